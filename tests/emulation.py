"""CUDA kernels on a machine without a GPU: as backend "cuda" on CPU tensors, in the emulator."""

import functools
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sma_fast import _dispatch, _native


@functools.cache
def builder() -> ModuleType:
    path = Path(__file__).parent / "emulated_cuda" / "build.py"
    spec = importlib.util.spec_from_file_location("emulated_cuda_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_missing(op: str) -> str | None:
    """Returns why the emulator cannot run the CUDA kernel of `op`, or None where it can."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if not shutil.which(builder().COMPILER[0]) or not importlib.util.find_spec("pybind11"):
        return "needs g++ and pybind11"
    if not (builder().CSRC / "cuda" / f"{op}.cu").exists():
        return f"no CUDA kernel for {op} yet"
    return None


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the native functions call the emulated module, whatever the tensors' device."""
    monkeypatch.setattr(_native, "_module", builder().load)
    monkeypatch.setattr(_native, "_backend", lambda x: "cuda")
    monkeypatch.setattr(_native, "_where", lambda x: (0, 0))


def implementation(op: str) -> Callable:
    """Returns what calls the emulated kernel of `op`, once `use` was called."""
    return _dispatch._checked(op, _native._OPS[op])
