"""restore_tokens in Triton: one program puts back a block of rows, a block of columns at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import copied
from .words import as_words


@triton.jit(do_not_specialize=["rows", "tokens", "width_visible", "width_masked"])
def restore_tokens_kernel(
    visible,  # (B, V, C)
    ids_restore,  # (B, N) int64, contiguous
    fill,  # (B, K, C), strides 0 where it is one row for all
    out,  # (B, N, C), contiguous
    rows,  # B * N
    tokens,  # N
    width_visible,  # V
    width_masked,  # K, or N for one row
    width,  # C
    visible_batch_stride,
    visible_stride,
    fill_batch_stride,
    fill_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    live = row < rows
    in_width = column < width
    place = tl.load(ids_restore + row, mask=live, other=-1)
    sample = row // tokens
    seen = (place >= 0) & (place < width_visible)
    filled = (place >= width_visible) & (place < width_visible + width_masked)
    start = sample * visible_batch_stride + place * visible_stride
    values = tl.load(
        visible + start[:, None] + column[None, :], mask=seen[:, None] & in_width[None, :], other=0
    )
    start = sample * fill_batch_stride + (place - width_visible) * fill_stride
    values |= tl.load(  # words, of which one of the two is 0
        fill + start[:, None] + column[None, :], mask=filled[:, None] & in_width[None, :], other=0
    )
    tl.store(
        out + row[:, None] * width + column[None, :],
        values,
        mask=live[:, None] & in_width[None, :],
    )


def launch(
    visible: Tensor,  # (B, V, C)
    ids_restore: Tensor,  # (B, N)
    fill: Tensor,  # (C,) or (B, K, C)
) -> Tensor:
    """Returns (B, N, C): visible rows in their places, `fill` elsewhere, zeros for padding."""
    batch, tokens = ids_restore.shape
    out = torch.empty((batch, tokens, visible.shape[2]), dtype=visible.dtype, device=visible.device)
    if out.numel() == 0:
        return out
    one_row = fill.dim() == 1
    seen, given, words = as_words(visible, fill[None, None] if one_row else fill, out)
    width = words.shape[2]
    chosen = copied("restore_tokens", visible.device, width, words.itemsize)
    rows = batch * tokens
    grid = (triton.cdiv(rows, chosen["BLOCK_ROWS"]), triton.cdiv(width, chosen["BLOCK_WIDTH"]))
    with torch.cuda.device_of(visible):
        restore_tokens_kernel[grid](
            *(seen, ids_restore.contiguous(), given, words),
            *(rows, tokens, visible.shape[1], tokens if one_row else fill.shape[1], width),
            *(seen.stride(0), seen.stride(1)),
            *((0, 0) if one_row else (given.stride(0), given.stride(1))),
            **chosen,
        )
    return out
