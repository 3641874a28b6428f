"""Builds sma_fast._C from csrc/ with ninja; everything else stands in pyproject.toml.

Environment: CXX (compiler), SMA_FAST_NATIVE=0 (no native module), SMA_FAST_CUDA=0|1 (without, with;
default: with where nvcc is), CUDA_HOME, SMA_FAST_CUDA_ARCHS (such as "80;90a;103").
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
X86_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c",
}


def find_compiler():
    wish = os.environ.get("CXX")
    if wish and not shutil.which(wish.split()[0]):
        raise SystemExit(f"CXX={wish!r}: not found. Name a C++ compiler, or unset CXX")
    return wish or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def find_nvcc():
    wish = os.environ.get("SMA_FAST_CUDA", "")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if nvcc is None and home:
        raise SystemExit(f"CUDA_HOME={home!r}: no bin/nvcc there. Correct it, or unset CUDA_HOME")
    if nvcc is None and wish == "1":
        raise SystemExit("SMA_FAST_CUDA=1, but there is no nvcc: set CUDA_HOME or PATH")
    return nvcc


def cuda_archs(nvcc):
    """80, 90a and the newest that this nvcc has, unless SMA_FAST_CUDA_ARCHS says otherwise."""
    wish = os.environ.get("SMA_FAST_CUDA_ARCHS")
    if wish:
        archs = [arch.strip() for arch in wish.replace(",", ";").split(";")]
        for arch in archs:
            number = arch.removesuffix("a").removesuffix("f")
            if not number.isdecimal() or int(number) < 80:
                raise SystemExit(
                    f"SMA_FAST_CUDA_ARCHS={wish!r}: {arch!r} is not one of compute capability 8.0 "
                    "or more, as the kernels need. Name such as '80;90a', or unset it"
                )
        return archs
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = sorted({int(code.removeprefix("sm_").rstrip("af")) for code in listed.stdout.split()})
    return ["80"] + ["90a"] * (90 in known) + [str(known[-1])]


def ninja_path():
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        return shutil.which("ninja") or "ninja"


class NinjaBuild(build_ext):
    def run(self):
        module = Path(self.get_ext_fullpath("sma_fast._C")).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        compiler = find_compiler()
        if os.environ.get("SMA_FAST_NATIVE") == "0":
            reason = "switched off by SMA_FAST_NATIVE=0 when sma_fast was installed"
        elif compiler is None and os.environ.get("SMA_FAST_CUDA") == "1":
            raise SystemExit("SMA_FAST_CUDA=1, but there is no C++ compiler: set CXX or PATH")
        elif compiler is None:
            reason = "no C++ compiler was found when sma_fast was installed"
        else:
            reason = ""
            self.build(module, compiler, find_nvcc())
        if reason:
            print(f"sma_fast: native module not built: {reason}", file=sys.stderr)
            module.unlink(missing_ok=True)  # of an earlier build
            self.extensions = []
        (module.parent / "_build.json").write_text(json.dumps({"not_built": reason}) + "\n")

    def build(self, module, compiler, nvcc):
        import pybind11

        # an editable installation is given a new folder each time, and would compile all again
        folder = ROOT / "build" / "editable" if self.editable_mode else self.build_temp
        temp = Path(folder).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        openmp = "" if sys.platform == "darwin" else "-fopenmp"
        x86 = platform.machine() in ("x86_64", "AMD64")
        defines = "-DSMA_HAVE_X86" if x86 else ""
        archs = cuda_archs(nvcc) if nvcc else []
        if archs:
            defines += f' -DSMA_CUDA_ARCHS=\\"{",".join(archs)}\\"'
        gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
        # PTX of the oldest, and of the first with clusters of blocks: the driver compiles the best
        # one for a GPU that is not named
        bare = [arch.rstrip("af") for arch in archs]
        for ptx in sorted({*bare[:1], *({"90"} & set(bare))}):
            gencode += f" -gencode arch=compute_{ptx},code=compute_{ptx}"
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        python = " ".join(f'-I"{path}"' for path in includes)
        # nvcc wants a program, without what wraps it ("ccache g++") or follows it ("g++ -m64")
        host = [word for word in compiler.split() if not word.startswith("-")][-1]
        if nvcc:
            link = f"'{nvcc}' -ccbin '{host}' -shared -cudart static {gencode}"
            link += " -Xcompiler -fopenmp $in -o $out"
        elif sys.platform == "darwin":
            link = f"{compiler} -bundle -undefined dynamic_lookup $in -o $out"
        else:
            link = f"{compiler} -shared {openmp} $in -o $out"
        lines = [
            f"cxx = {compiler} -std=c++17 -O3 -fPIC -fvisibility=hidden {openmp}",
            "rule cxx",
            f"  command = $cxx -ffp-contract=fast {defines} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule cuda",
            f"  command = '{nvcc}' -ccbin '{host}' -std=c++17 -O3 -Xcompiler -fPIC {gencode} "
            "--threads 0 -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {link}",
        ]
        objects = []
        for source in sources(x86, bool(nvcc)):
            rule = "cuda" if source.suffix == ".cu" else "cxx"
            target = temp / (source.stem + (".cu.o" if rule == "cuda" else ".o"))
            objects.append(target)
            lines.append(f"build {escape(target)}: {rule} {escape(source)}")
            flags = python if source.stem == "module" else X86_FLAGS.get(source.stem, "")
            if rule == "cxx" and flags:
                lines.append(f"  flags = {flags}")
        linked = temp / module.name
        lines.append(f"build {escape(linked)}: link {' '.join(map(escape, objects))}")
        (temp / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [ninja_path(), "-C", str(temp)] + (["-v"] if self.verbose > 1 else [])
        if subprocess.run(command).returncode:
            raise SystemExit(
                "sma_fast: building the native module failed (see above). SMA_FAST_CUDA=0 builds "
                "without CUDA, SMA_FAST_NATIVE=0 installs without the native module"
            )
        # whatever another folder's build has put there; not into a file that a process has open
        module.unlink(missing_ok=True)
        shutil.copy2(linked, module)


def sources(x86, cuda):
    found = [CSRC / "module.cpp", CSRC / "cpu" / "cache.cpp", CSRC / "cpu" / "baseline.cpp"]
    if x86:
        found += [CSRC / "cpu" / f"{name}.cpp" for name in X86_FLAGS]
    if cuda:
        found += sorted((CSRC / "cuda").glob("*.cu"))
    return found


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    license="MIT",  # in pyproject.toml, setuptools before and after 77 want it differently
    ext_modules=[Extension("sma_fast._C", sources=["csrc/module.cpp"], language="c++")],
    cmdclass={"build_ext": NinjaBuild},
)
