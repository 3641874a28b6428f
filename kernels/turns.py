"""Scratch memory of a fixed size: what does not fit is done in turns, in one order.

A sample's turns are the same whatever the batch: so are the bits of its sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import options, setting

SCRATCH = 1 << 20  # bytes that an op takes beside its inputs and outputs, at most
_GRID = 65535  # programs along an axis of a grid that is not its first


class Turn(NamedTuple):
    """The first of what one turn looks at, and how many."""

    sample: int
    samples: int
    head: int
    heads: int
    row: int
    rows: int


def turns(batch: int, heads: int, rows: int, room: int, samples: int | None = None) -> list[Turn]:
    """Returns turns of at most `room` rows in all, and of at most `samples` samples.

    Several samples go together only with all heads, several heads only with all rows.
    """
    rows_each = max(min(rows, room), 1)
    heads_each = max(min(heads, room // rows_each), 1)
    samples_each = room // (rows_each * heads_each) if heads_each == heads else 1
    samples_each = max(min(samples_each, batch, samples or batch, _GRID), 1)
    return [
        Turn(
            *(sample, min(samples_each, batch - sample)),
            *(head, min(heads_each, heads - head)),
            *(row, min(rows_each, rows - row)),
        )
        for sample in range(0, batch, samples_each)
        for head in range(0, heads, heads_each)
        for row in range(0, rows, rows_each)
    ]


def samples_apart(
    device: torch.device, heads: int, programs: int, sample_bytes: int, room: int
) -> int:
    """Returns how many samples at a time have their heads summed apart; 0: in one program each.

    Args:
        programs: that would start otherwise.
        sample_bytes: of the sums of a sample's heads.
        room: bytes for them.
    """
    fills = setting("sum_heads", device)["programs"]
    return 0 if heads == 1 or 2 * programs > fills else room // sample_bytes


@triton.jit(do_not_specialize=["number", "adds"])
def sum_heads_kernel(parts, out, number, tokens, adds, factor, BLOCK: tl.constexpr):
    """Adds up the (B, H, N) sums of heads, in their order, to what is in out (B, N) for `adds`."""
    sample = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    total = tl.load(out + sample * tokens + token, mask=inside & (adds + token * 0 != 0), other=0.0)
    total = total.to(parts.dtype.element_ty)
    for head in range(0, number):
        part = parts + (sample * number + head) * tokens
        total += tl.load(part + token, mask=inside, other=0.0)
    tl.store(out + sample * tokens + token, (total * factor).to(tl.float32), mask=inside)


def sum_heads(parts: Tensor, out: Tensor, adds: bool, factor: float) -> None:
    """Writes `factor` times the sum of (B, H, N) over H, and of (B, N) `out` for `adds`, to it."""
    batch, number, tokens = parts.shape
    chosen = setting("sum_heads", out.device)
    sum_heads_kernel[(batch, triton.cdiv(tokens, chosen["block"]))](
        *(parts, out, number, tokens, int(adds), factor),
        BLOCK=chosen["block"],
        **options(chosen["num_warps"]),
    )
