"""gather_tokens in Triton: one program copies a block of rows, a block of columns at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import copied
from .words import as_words


@triton.jit(do_not_specialize=["rows", "visible", "count"])  # nor compiled anew for each
def gather_tokens_kernel(
    tokens,  # (B, N, C), any strides between rows
    ids,  # (B, V) int64, contiguous
    out,  # (B, V, C), contiguous
    rows,  # B * V
    visible,  # V
    count,  # N
    width,  # C
    batch_stride,
    token_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    live = row < rows
    token = tl.load(ids + row, mask=live, other=-1)
    inside = (token >= 0) & (token < count)  # an id outside reads nothing and gives zeros
    start = (row // visible) * batch_stride + token * token_stride
    in_width = column < width
    values = tl.load(
        tokens + start[:, None] + column[None, :],
        mask=inside[:, None] & in_width[None, :],
        other=0,
    )
    tl.store(
        out + row[:, None] * width + column[None, :],
        values,
        mask=live[:, None] & in_width[None, :],
    )


def launch(tokens: Tensor, ids: Tensor) -> Tensor:
    """Returns (B, V, ...) tokens at (B, V) ids, zeros where the id is -1 or out of range."""
    batch, visible = ids.shape
    out = torch.empty((batch, visible) + tokens.shape[2:], dtype=tokens.dtype, device=tokens.device)
    if out.numel() == 0:
        return out
    flat, words = as_words(tokens, out)
    width = flat.shape[2]
    chosen = copied("gather_tokens", tokens.device, width, flat.itemsize)
    rows = batch * visible
    grid = (triton.cdiv(rows, chosen["BLOCK_ROWS"]), triton.cdiv(width, chosen["BLOCK_WIDTH"]))
    with torch.cuda.device_of(tokens):
        gather_tokens_kernel[grid](
            flat,
            ids.contiguous(),
            words,
            rows,
            visible,
            flat.shape[1],
            width,
            flat.stride(0),
            flat.stride(1),
            **chosen,
        )
    return out
