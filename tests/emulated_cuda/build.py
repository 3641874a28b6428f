"""Compiles the native module with its CUDA kernels for the emulator in this folder.

`load()` gives the module, whose cuda_* functions take addresses in the memory of the CPU.
"""

import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "g++").split()
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", f"-I{HERE}", "-Wall"]
FLAGS += ["-Wno-unknown-pragmas", "-Werror=return-type"]
COMPILERS_AT_ONCE = 2


def build() -> Path:
    """Compiles what changed since, and returns where the module is."""
    import pybind11

    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    host = ["-O1", '-DSMA_CUDA_ARCHS="emulated"', *python]  # only the cuda_* functions are used
    sources = {CSRC / "module.cpp": host}
    sources |= {CSRC / "cpu" / f"{name}.cpp": host for name in ("cache", "baseline")}
    sources |= {path: ["-O2"] for path in sorted((CSRC / "cuda").glob("*.cu"))}
    headers = [path for path in CSRC.rglob("*.h")]
    return shared_library("_C", sources, headers)


@functools.cache
def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sma_fast_emulated._C", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shared_library(name: str, sources: dict[Path, list[str]], headers: list[Path]) -> Path:
    """Returns build/emulated/<hash>/<name>.so of these sources, their flags, and the emulator."""
    sources = sources | {path: ["-O2"] for path in sorted(HERE.glob("*.cpp"))}
    version = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((COMPILER, FLAGS, version)).encode())
    for path in sorted([*sources, *headers, *HERE.glob("*.h")]):
        digest.update(repr((str(path), sources.get(path))).encode() + path.read_bytes())
    library = ROOT / "build" / "emulated" / digest.hexdigest()[:16] / f"{name}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    # another process may build the same: each in a folder of its own, the last rename stays
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = [Path(folder) / f"{i}-{path.name}.o" for i, path in enumerate(sources)]
        commands = [
            [*COMPILER, *FLAGS, *flags, "-x", "c++", "-c", str(path), "-o", str(target)]
            for (path, flags), target in zip(sources.items(), objects, strict=True)
        ]
        with ThreadPoolExecutor(COMPILERS_AT_ONCE) as pool:
            list(pool.map(run, commands))
        linked = Path(folder) / library.name
        run([*COMPILER, "-shared", "-fopenmp", *map(str, objects), "-o", str(linked)])
        linked.replace(library)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
