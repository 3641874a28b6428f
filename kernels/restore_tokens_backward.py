"""restore_tokens_backward in Triton: the rows go back as those of gather_tokens do.

The gradient of one fill for all tokens is a sum over few parts of the rows, then over the parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gather_tokens_backward, turns
from .launching import options, setting

DTYPES = gather_tokens_backward.DTYPES


@triton.jit
def sum_filled_kernel(
    grad,  # (B, N, C)
    ids_restore,  # (B, N), contiguous
    parts,  # (P, C)
    batch,  # B
    tokens,  # N
    width_visible,  # V
    width,  # C
    samples_of_part,
    slices,  # of a sample, of which a part has one
    rows_of_slice,
    batch_stride,
    row_stride,
    SUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_width = column < width
    first_sample = part // slices * samples_of_part
    samples = min(samples_of_part, batch - first_sample)
    first_row = part % slices * rows_of_slice
    last_row = min(first_row + rows_of_slice, tokens)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], SUM)
    for number in range(0, samples):
        sample = first_sample.to(tl.int64) + number
        ids = ids_restore + sample * tokens
        rows = grad + sample * batch_stride
        row = first_row + tl.arange(0, BLOCK_ROWS)
        place = tl.load(ids + row, mask=row < last_row, other=-1)
        for _ in range(first_row, last_row, BLOCK_ROWS):
            filled = (place >= width_visible) & (place < width_visible + tokens)
            from_row = rows + row.to(tl.int64) * row_stride
            values = tl.load(
                from_row[:, None] + column[None, :],
                mask=filled[:, None] & in_width[None, :],
                other=0,
            )
            row += BLOCK_ROWS
            place = tl.load(ids + row, mask=row < last_row, other=-1)  # while the rows are awaited
            total += values.to(SUM)
    tl.store(parts + part.to(tl.int64) * width + column, tl.sum(total, 0), mask=in_width)


@triton.jit
def sum_parts_kernel(
    parts, out, number, width,
    SUM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_width = column < width
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], SUM)
    for first in range(0, number, BLOCK_ROWS):
        part = first + tl.arange(0, BLOCK_ROWS)
        mask = (part < number)[:, None] & in_width[None, :]
        total += tl.load(parts + part[:, None] * width + column[None, :], mask=mask, other=0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=in_width)


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
    chosen = setting("restore_tokens_backward", grad.device, grad.element_size())
    most = max(turns.SCRATCH // (width * kind.itemsize), 1)
    # a part has a few samples, or a slice of one
    samples_of_part = triton.cdiv(batch, most)
    slices = min(max(most // batch, 1), triton.cdiv(tokens, chosen["rows"]))
    rows_of_slice = triton.cdiv(tokens, slices)
    number = triton.cdiv(batch, samples_of_part) * slices
    parts = torch.empty((number, width), dtype=kind, device=grad.device)

    def block(width_at_most: int) -> dict[str, int]:
        block_width = min(triton.next_power_of_2(width), width_at_most)
        return {
            "SUM": tl.float64 if kind == torch.float64 else tl.float32,
            "BLOCK_ROWS": chosen["elements"] // block_width,
            "BLOCK_WIDTH": block_width,
            **options(chosen["num_warps"], all_registers=True),
        }

    of_rows, of_parts = block(chosen["width"]), block(chosen["parts_width"])
    with torch.cuda.device_of(grad):
        sum_filled_kernel[(number, triton.cdiv(width, of_rows["BLOCK_WIDTH"]))](
            *(grad, ids_restore, parts, batch, tokens, num_visible, width),
            *(samples_of_part, slices, rows_of_slice, grad.stride(0), grad.stride(1)),
            **of_rows,
        )
        sum_parts_kernel[(triton.cdiv(width, of_parts["BLOCK_WIDTH"]),)](
            parts, to_fill, number, width, **of_parts
        )
