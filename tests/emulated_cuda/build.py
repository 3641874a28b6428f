"""Compiles the native module with its CUDA kernels for the emulator in this folder.

`load()` gives the module, whose ops for device 0 take addresses in the memory of the CPU.
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
BUILD = ROOT / "build" / "emulated"
COMPILER = os.environ.get("CXX", "g++").split()
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", f"-I{HERE}"]
# "address": AddressSanitizer. Python must then start with the compiler's libasan.so and
# libstdc++.so, in this order, in LD_PRELOAD, and with ASAN_OPTIONS=detect_leaks=0:log_path=FILE
SANITIZE = os.environ.get("SMA_EMULATED_SANITIZE")
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-g"]
COMPILERS_AT_ONCE = 2


def build() -> Path:
    """Compiles what changed since, and returns where the module is."""
    import pybind11

    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    host = ["-O1", '-DSMA_CUDA_ARCHS="emulated"', *python]  # the CPU's own ops are not called
    sources = {CSRC / "module.cpp": host}
    sources |= {CSRC / "cpu" / f"{name}.cpp": host for name in ("cache", "baseline")}
    sources |= {path: ["-O2"] for path in sorted((CSRC / "cuda").glob("*.cu"))}
    return shared_library("_C", sources, list(CSRC.rglob("*.h")))


@functools.cache
def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sma_fast_emulated._C", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shared_library(name: str, sources: dict[Path, list[str]], headers: list[Path]) -> Path:
    """Returns build/emulated/<hash>/<name>.so of these sources, their flags, and the emulator.

    An object is compiled again where its source or any header changed.
    """
    sources = sources | {path: ["-O3"] for path in sorted(HERE.glob("*.cpp"))}
    version = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True).stdout
    common = repr((COMPILER, FLAGS, version)).encode()
    for path in sorted([*headers, *HERE.glob("*.h")]):
        common += str(path).encode() + path.read_bytes()
    objects = [
        BUILD / "objects" / f"{digest(common, path.read_bytes(), path, flags)}.o"
        for path, flags in sources.items()
    ]
    library = BUILD / digest(*objects) / f"{name}.so"
    if library.exists():
        return library
    commands = [
        ([*COMPILER, *FLAGS, *flags, "-x", "c++", "-c", str(path)], target)
        for (path, flags), target in zip(sources.items(), objects, strict=True)
        if not target.exists()
    ]
    with ThreadPoolExecutor(COMPILERS_AT_ONCE) as pool:
        list(pool.map(lambda both: make(*both), commands))
    make([*COMPILER, *FLAGS, "-shared", *map(str, objects)], library)
    return library


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def make(command: list[str], target: Path) -> None:
    """Runs a compiler; `target` appears complete, also where another process makes the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [*command, "-o", str(made)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
        made.replace(target)
