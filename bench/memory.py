"""Memory: what the allocator does during a run, and the peak of one call.

`python -m bench.memory VARIANT SHAPE DEVICE DTYPE QUICK` prints the peak in bytes: of a process of
its own, because a process that has run benchmarks already holds more than any call needs.
"""

import ctypes
import functools
import gc
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

import sma_fast
from bench import peers, shapes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h


def keep_freed_memory() -> None:
    """Tells glibc to serve large blocks from its heap and to keep what is freed."""
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1)):
        raise RuntimeError("glibc did not take the settings; run without --keep-memory")


def release_freed_memory() -> None:
    """Gives freed memory back to the system, so that one shape's heap does not burden the next."""
    ctypes.CDLL(None).malloc_trim(0)


def free_bytes(device: str) -> int:
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached
    return _kib("/proc/meminfo", "MemAvailable") * 1024


def peak_bytes(variant: str, name: str, device: str, dtype: torch.dtype, quick: bool) -> int:
    """Returns the most that one self_guided_masking held beyond its inputs and outputs.

    Args:
        variant: "ours" or "eager", plain PyTorch of the best algebra.
        name: of the shape.
        quick: scaled down.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    return printed_by("bench.memory", variant, name, device, dtype_name, str(int(quick)))


def printed_by(module: str, *arguments: str) -> int:
    """Returns the number that `python -m module arguments` prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"python -m {module} {' '.join(arguments)}: {done.stderr}")
    return int(done.stdout)


def _call(variant: str, shape: shapes.Shape, device: str, dtype: torch.dtype) -> functools.partial:
    inputs = shapes.attention(shape, device, dtype)
    tokens = shapes.tokens(shape, device, dtype)
    if variant == "eager":
        return functools.partial(
            peers.best_masking, inputs.query, inputs.key, tokens, *inputs[2:], shape.ratio
        )
    return functools.partial(
        sma_fast.self_guided_masking,
        inputs.query,
        inputs.key,
        tokens,
        mask_ratio=shape.ratio,
        query_index=inputs.query_index,
        head_index=inputs.head_index,
        key_padding_mask=inputs.padding,
    )


def peak_of(call: Callable[[], Any], device: str) -> int:
    """Returns the most bytes that a call held beyond what was there and what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        outputs = call()  # held, so that what is allocated then is inputs and outputs
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _kib("/proc/self/status", "VmRSS")
    outputs = call()
    return (_kib("/proc/self/status", "VmHWM") - before) * 1024 - _storage_bytes(outputs)


def _storage_bytes(outputs: tuple) -> int:
    # each storage once; inputs that are handed through count for nothing beside these
    leaves, _ = torch.utils._pytree.tree_flatten(outputs)
    storages = (x.untyped_storage() for x in leaves if isinstance(x, torch.Tensor))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _kib(file: str, field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+) kB", pathlib.Path(file).read_text(), re.M)[1])


def _main(variant: str, name: str, device: str, dtype: str, quick: str) -> None:
    shape = shapes.SHAPES[name]
    small = shapes.scaled_down(shape)
    dtype = getattr(torch, dtype)
    _call(variant, small, device, dtype)()  # starts the threads and loads what is loaded late
    call = _call(variant, small if quick == "1" else shape, device, dtype)
    print(peak_of(call, device))


if __name__ == "__main__":
    _main(*sys.argv[1:])
