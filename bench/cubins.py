"""What compiled kernels take: `cuobjdump -res-usage` of a cubin, for both compilers' reports."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """What one thread, and one block, of a compiled kernel takes."""

    registers: int
    shared_bytes: int  # static; Triton's: what the launch asks for
    stack_bytes: int
    local_bytes: int

    @property
    def spilled_bytes(self) -> int:
        """Registers that did not fit, and arrays in local memory."""
        return self.stack_bytes + self.local_bytes


class Row(NamedTuple):
    """One line of the report."""

    kernel: str
    architecture: str  # such as "sm_90a"
    usage: Usage


def find_nvcc() -> str | None:
    """Returns the nvcc that setup.py would take: that of CUDA_HOME, or of PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


@functools.cache
def cuobjdump() -> str:
    """Returns the tool's path: nvcc's own, or the one inside Triton's package.

    Raises:
        FileNotFoundError: where there is neither.
    """
    nvcc = find_nvcc()
    beside = nvcc and shutil.which("cuobjdump", path=str(Path(nvcc).resolve().parent))
    found = beside or shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if not found and triton:
        folder = Path(triton.origin).parent / "backends/nvidia/bin"
        found = shutil.which("cuobjdump", path=str(folder))
    if not found:
        raise FileNotFoundError("cuobjdump: not beside nvcc, not on PATH, not in Triton's package")
    return found


def usages(cubin: Path) -> dict[str, Usage]:
    """Returns what each function of a cubin takes, by its name in there."""
    return _usages(_dumped(cubin))


def usages_of_module(module: Path) -> dict[str, dict[str, Usage]]:
    """Returns the same of a shared library, for each architecture in it, such as "90a"."""
    found: dict[str, dict[str, Usage]] = {}
    _, *parts = re.split(r"^arch = sm_(\w+)$", _dumped(module), flags=re.M)
    for architecture, text in zip(parts[::2], parts[1::2], strict=True):
        found.setdefault(architecture, {}).update(_usages(text))
    return found


def _dumped(file: Path) -> str:
    command = [cuobjdump(), "-res-usage", str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _usages(text: str) -> dict[str, Usage]:
    found = {}
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text):
        of = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", line)}
        found[name] = Usage(of["REG"], of["SHARED"], of["STACK"], of["LOCAL"])
    return found
