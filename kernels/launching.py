"""Which of kernels.settings a launch takes, by the op, its size and the GPU's architecture."""

import contextlib
import functools
from collections.abc import Iterator

import torch
import triton

from . import settings

_pretended: str | None = None


@functools.cache
def _architecture(index: int) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


@contextlib.contextmanager
def on_architecture(name: str) -> Iterator[None]:
    """Takes the settings of an architecture, such as "sm_90", wherever the tensors are."""
    global _pretended
    before, _pretended = _pretended, name
    try:
        yield
    finally:
        _pretended = before


def classes(entry: str, device: torch.device) -> tuple[dict[str, int | None], ...]:
    """Returns an entry of the table: what was measured on this architecture, or the default."""
    name = _pretended
    if name is None and device.type == "cuda" and settings.MEASURED:
        index = torch.cuda.current_device() if device.index is None else device.index
        name = _architecture(index)
    return settings.MEASURED.get(name, {}).get(entry) or settings.DEFAULT[entry]


def setting(entry: str, device: torch.device, size: int = 0) -> dict[str, int | None]:
    """Returns the class of `entry` that `size` belongs to."""
    every = classes(entry, device)
    return next((each for each in every if (each["up_to"] or size) >= size), every[-1])


def longest(entry: str, device: torch.device) -> int:
    """Returns the largest size that `entry` is for."""
    return classes(entry, device)[-1]["up_to"]


def power_of_2(size: int) -> int:
    """Returns the block for `size`, at least 16."""
    return max(triton.next_power_of_2(size), 16)


def options(
    num_warps: int, *, all_registers: bool = False, fused: bool = True
) -> dict[str, int | bool]:
    """Returns what a kernel is compiled with.

    Args:
        num_warps: of a program.
        all_registers: whether its threads may take all that there are; else the compiler leaves
            some to more programs, and spills sooner.
        fused: whether a product goes unrounded into a sum; left open, Triton's versions differ.
    """
    chosen = {"num_warps": num_warps, "enable_fp_fusion": fused}
    if all_registers:
        chosen["maxnreg"] = min(255, 65536 // (32 * num_warps))
    return chosen


def in_registers(op: str, device: torch.device, tokens: int) -> dict[str, int | bool]:
    """Returns BLOCK and options for rows of `tokens`: whole ones, or parts of what is longer.

    Products are rounded, as numbers of tokens are counted from them.
    """
    in_row = tokens <= longest(op, device)
    chosen = setting(op if in_row else f"{op}.long", device, tokens)
    block = power_of_2(tokens) if in_row else chosen["block"]
    return {"BLOCK": block, **options(chosen["num_warps"], fused=False)}


def copied(entry: str, device: torch.device, width: int, size: int) -> dict[str, int]:
    """Returns how many rows, and columns of them, one program copies, and its warps."""
    chosen = setting(entry, device, size)
    block_width = min(triton.next_power_of_2(width), chosen["width"])
    return {
        "BLOCK_ROWS": max(1, chosen["elements"] // block_width),
        "BLOCK_WIDTH": block_width,
        **options(chosen["num_warps"], all_registers=True),
    }
