"""Installs sma_fast for the GPUs that are here, into the Python that is here: `make gpu` begins so.

Nothing is downloaded. What is missing is said at once, before anything is built.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from bench.cubins import find_nvcc

ROOT = Path(__file__).parents[1]
MODULES = {  # and their names for pip
    "pip": "pip",
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "setuptools": "setuptools>=64",
    "pybind11": "pybind11",
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "hypothesis": "hypothesis",
}
SYSTEMS_OWN = """
This Python belongs to the system, which does not let pip install into it (PEP 668). One that sees
its packages takes a second:

    {python} -m venv --system-site-packages --without-pip .venv-gpu
    make gpu PYTHON=.venv-gpu/bin/python
"""


def missing() -> list[str]:
    """Returns what has to be installed first."""
    found = [name for module, name in MODULES.items() if not importlib.util.find_spec(module)]
    if "setuptools>=64" not in found:
        version = _numbers(importlib.metadata.version("setuptools"))
        if version < (64,):
            found.append("setuptools>=64")
        elif version < (70, 1) and not importlib.util.find_spec("wheel"):
            found.append("wheel")  # later ones bring it along
    if not (importlib.util.find_spec("ninja") or shutil.which("ninja")):
        found.append("ninja")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def architectures(nvcc: str) -> str | None:
    """Returns SMA_FAST_CUDA_ARCHS for the GPUs of this machine; None for those setup.py takes.

    None where nvidia-smi does not say which they are, or nvcc does not know one of them.
    """
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return None
    numbers = sorted(set(re.findall(r"^\s*(\d+)\.(\d)\s*$", said, re.M)))
    found = ["".join(number).replace("90", "90a") for number in numbers]
    codes = [nvcc, "--list-gpu-code"]
    known = subprocess.run(codes, capture_output=True, text=True).stdout.split()
    if all(f"sm_{arch.rstrip('a')}" in known for arch in found):
        return ";".join(found) or None
    return None


def main() -> int:
    nvcc = find_nvcc()
    lacks = missing()
    if lacks:
        print(f"make gpu: install first: {' '.join(lacks)}", file=sys.stderr)
    if nvcc is None:
        print("make gpu: no nvcc: set CUDA_HOME or PATH", file=sys.stderr)
    if lacks or nvcc is None:
        return 1
    if not importlib.util.find_spec("expecttest"):
        print("make gpu: no expecttest: the tests of torch's opcheck are skipped", file=sys.stderr)
    environment = os.environ | {"SMA_FAST_CUDA": "1"}
    archs = os.environ.get("SMA_FAST_CUDA_ARCHS") or architectures(nvcc)
    if archs:
        environment["SMA_FAST_CUDA_ARCHS"] = archs
    print(f"building for {archs or 'the usual architectures'} with {nvcc}", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    code = subprocess.run(pip, cwd=ROOT, env=environment).returncode
    mark = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if code and sys.prefix == sys.base_prefix and mark.exists():
        print(SYSTEMS_OWN.format(python=sys.executable), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
