"""restore_tokens_backward in Triton: the rows go back as those of gather_tokens do.

The gradient of one fill for all tokens is a sum over few parts of the rows, then over the parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gather_tokens_backward, turns
from .launching import setting

DTYPES = gather_tokens_backward.DTYPES


@triton.jit
def sum_filled_kernel(
    grad,  # (B, N, C)
    ids_restore,  # (B, N), contiguous
    parts,  # (P, C)
    rows,  # B * N
    tokens,  # N
    width_visible,  # V
    width,  # C
    rows_of_part,
    batch_stride,
    row_stride,
    SUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_width = column < width
    total = tl.zeros([BLOCK_WIDTH], SUM)
    for first in range(0, rows_of_part, BLOCK_ROWS):
        at = first + tl.arange(0, BLOCK_ROWS)
        row = part * rows_of_part + at
        place = tl.load(ids_restore + row, mask=(at < rows_of_part) & (row < rows), other=-1)
        filled = (place >= width_visible) & (place < width_visible + tokens)
        start = row // tokens * batch_stride + row % tokens * row_stride
        values = tl.load(
            grad + start[:, None] + column[None, :],
            mask=filled[:, None] & in_width[None, :],
            other=0,
        )
        total += tl.sum(values.to(SUM), 0)
    tl.store(parts + part * width + column, total, mask=in_width)


@triton.jit
def sum_parts_kernel(
    parts, out, number, width,
    SUM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_width = column < width
    total = tl.zeros([BLOCK_WIDTH], SUM)
    for first in range(0, number, BLOCK_ROWS):
        part = first + tl.arange(0, BLOCK_ROWS)
        mask = (part < number)[:, None] & in_width[None, :]
        total += tl.sum(
            tl.load(parts + part[:, None] * width + column[None, :], mask=mask, other=0), 0
        )
    tl.store(out + column, total.to(out.dtype.element_ty), mask=in_width)


def launch(
    grad: Tensor,  # (B, N, C)
    ids_restore: Tensor,  # (B, N)
    num_visible: int,
    num_fill: int | None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients (B, V, C) of visible rows, and (C,) or (B, K, C) of the fill."""
    to_visible = gather_tokens_backward.launch(grad, ids_restore, num_visible)
    if num_fill is not None:
        return to_visible, gather_tokens_backward.launch(grad, ids_restore, num_fill, num_visible)
    batch, tokens, width = grad.shape
    to_fill = torch.zeros(width, dtype=grad.dtype, device=grad.device)
    rows = batch * tokens
    if rows == 0 or width == 0:
        return to_visible, to_fill
    if grad.stride(2) != 1:
        grad = grad.contiguous()
    ids_restore = ids_restore.contiguous()
    most = max(turns.SCRATCH // 8, 1)
    for first in range(0, width, most):  # one turn, but for rows of more than 128 Ki numbers
        columns = slice(first, first + most)
        _sum_filled(grad[:, :, columns], ids_restore, num_visible, to_fill[columns])
    return to_visible, to_fill


def _sum_filled(grad: Tensor, ids_restore: Tensor, num_visible: int, to_fill: Tensor) -> None:
    """Writes (C,) sums of the filled rows of (B, N, C)."""
    batch, tokens, width = grad.shape
    kind = torch.float64 if grad.dtype == torch.float64 else torch.float32
    chosen = setting("restore_tokens_backward", grad.device)
    most = max(turns.SCRATCH // (width * kind.itemsize), 1)
    rows_of_part = max(triton.cdiv(batch * tokens, most), chosen["rows"])
    number = triton.cdiv(batch * tokens, rows_of_part)
    parts = torch.empty((number, width), dtype=kind, device=grad.device)
    block_width = min(triton.next_power_of_2(width), chosen["width"])
    columns = triton.cdiv(width, block_width)
    common = {
        "SUM": tl.float64 if kind == torch.float64 else tl.float32,
        "BLOCK_ROWS": chosen["elements"] // block_width,
        "BLOCK_WIDTH": block_width,
        "num_warps": chosen["num_warps"],
    }
    with torch.cuda.device_of(grad):
        sum_filled_kernel[(number, columns)](
            *(grad, ids_restore, parts, batch * tokens, tokens, num_visible, width),
            *(rows_of_part, grad.stride(0), grad.stride(1)),
            **common,
        )
        sum_parts_kernel[(columns,)](parts, to_fill, number, width, **common)
