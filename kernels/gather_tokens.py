"""gather_tokens in Triton: one program copies a block of rows, a block of columns at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import copied


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


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_words(*tensors: Tensor) -> list[Tensor]:
    """Returns (B, N, ...) as integers (B, N, C), rows dense: a copy does not care what they mean.

    Elements that do not come 16 bytes at a time are taken together where all these rows allow it:
    C is the number of integers, and smaller then than that of elements.
    """
    words = [_rows(x) for x in tensors]
    size = words[0].itemsize
    steps = [step for x in words for step in (x.shape[2], x.stride(0), x.stride(1))]
    begins = [x.data_ptr() | size * x.storage_offset() for x in words]
    bytes_ = [size * step for step in steps] + begins
    dense = all(x.shape[2] == 1 or x.stride(2) == 1 for x in words)  # not where there are no rows
    if dense and any(step % 16 for step in steps):
        wider = next(w for w in (8, 4, 2, 1) if w == size or not any(x % w for x in bytes_))
        words = [x.view(_WORDS[wider]) for x in words]
    return words


def _rows(x: Tensor) -> Tensor:
    if x.dtype.itemsize == 16:  # complex128
        x = torch.view_as_real(x)
    x = x.view(_WORDS[x.dtype.itemsize])
    x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    return x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()


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
