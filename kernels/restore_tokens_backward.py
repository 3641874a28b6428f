"""restore_tokens_backward in Triton: the rows go back as those of gather_tokens do.

The gradient of one fill for all tokens is a sum over few parts of the rows, then over the parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gather_tokens_backward

DTYPES = gather_tokens_backward.DTYPES
_SCRATCH = 1 << 20  # bytes, for the parts' sums


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
    kind = torch.float64 if grad.dtype == torch.float64 else torch.float32
    most = max(_SCRATCH // (width * kind.itemsize), 1)
    rows_of_part = max(triton.cdiv(rows, most), 64)
    number = triton.cdiv(rows, rows_of_part)
    parts = torch.empty((number, width), dtype=kind, device=grad.device)
    block_width = min(triton.next_power_of_2(width), 256)
    block_rows = 4096 // block_width
    columns = triton.cdiv(width, block_width)
    common = {"SUM": tl.float64 if kind == torch.float64 else tl.float32}
    common |= {"BLOCK_ROWS": block_rows, "BLOCK_WIDTH": block_width}
    with torch.cuda.device_of(grad):
        sum_filled_kernel[(number, columns)](
            *(grad, ids_restore.contiguous(), parts),
            *(rows, tokens, num_visible, width, rows_of_part, grad.stride(0), grad.stride(1)),
            **common,
        )
        sum_parts_kernel[(columns,)](parts, to_fill, number, width, **common)
    return to_visible, to_fill
