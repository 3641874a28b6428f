"""random_masking in Triton: a selection by noise alone, then the visible rows, each read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gather_tokens import as_words, blocks
from .selection import CHUNK, ROW, ordered, rows_of, top, top_of_long, warps


@triton.jit
def random_selection_kernel(
    noise,  # (B, N)
    mask,  # (B, N) float32
    ids_restore,  # (B, N)
    tokens,  # N
    visible,  # V
    noise_stride,
    BLOCK: tl.constexpr,  # at least N
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    inside = token < tokens
    key = ordered(tl.load(noise + row * noise_stride + token, mask=inside, other=0), True)
    seen = top(key, inside, visible)
    before = tl.cumsum(seen.to(tl.int32), 0)
    place = tl.where(seen, before - 1, visible + token - before)
    tl.store(mask + row * tokens + token, (seen == 0).to(tl.float32), mask=inside)
    tl.store(ids_restore + row * tokens + token, place.to(tl.int64), mask=inside)


@triton.jit
def random_long_kernel(
    noise, mask, ids_restore, tokens, visible, noise_stride, BLOCK: tl.constexpr
):
    """As random_selection_kernel, for rows of any length; ids_restore holds the choice at first."""
    row = tl.program_id(0).to(tl.int64)
    chosen_row = ids_restore + row * tokens
    top_of_long(
        noise,
        row * noise_stride,
        noise,
        0,
        chosen_row,
        0,
        tokens,
        visible,
        False,
        0,
        False,
        True,
        BLOCK,
    )
    tl.debug_barrier()
    seen_before = tl.zeros([], tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < tokens
        seen = tl.load(chosen_row + token, mask=inside, other=0) != 0
        before = seen_before + tl.cumsum(seen.to(tl.int32), 0)
        place = tl.where(seen, before - 1, visible + token - before)
        tl.store(mask + row * tokens + token, (seen == 0).to(tl.float32), mask=inside)
        tl.store(chosen_row + token, place.to(tl.int64), mask=inside)
        seen_before += tl.sum(seen.to(tl.int32))


@triton.jit
def visible_rows_kernel(
    tokens,  # (B, N, C)
    ids_restore,  # (B, N), contiguous
    out,  # (B, V, C), contiguous
    rows,  # B * N
    count,  # N
    visible,  # V
    width,  # C
    batch_stride,
    token_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    place = tl.load(ids_restore + row, mask=row < rows, other=-1)
    seen = (place >= 0) & (place < visible)
    sample = row // count
    start = sample * batch_stride + row % count * token_stride
    mask = seen[:, None] & (column < width)[None, :]
    values = tl.load(tokens + start[:, None] + column[None, :], mask=mask, other=0)
    to = (sample * visible + place) * width
    tl.store(out + to[:, None] + column[None, :], values, mask=mask)


def launch(
    tokens: Tensor,  # (B, N, ...)
    noise: Tensor,  # (B, N)
    mask_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (B, V, ...) visible tokens, (B, N) mask of 0 and 1, (B, N) ids_restore."""
    batch, count = tokens.shape[:2]
    visible = int(count * (1 - mask_ratio))

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=tokens.device)

    out = empty(batch, visible, *tokens.shape[2:], dtype=tokens.dtype)
    mask = empty(batch, count, dtype=torch.float32)
    ids_restore = empty(batch, count, dtype=torch.int64)
    if mask.numel() == 0:
        return out, mask, ids_restore
    noise, noise_stride = rows_of(noise, noise)
    in_row = count <= ROW
    block = max(triton.next_power_of_2(count), 16) if in_row else CHUNK
    kernel = random_selection_kernel if in_row else random_long_kernel
    with torch.cuda.device_of(tokens):
        kernel[(batch,)](
            *(noise, mask, ids_restore, count, visible, noise_stride),
            BLOCK=block,
            num_warps=warps(block),
        )
        if out.numel():
            flat, words = as_words(tokens), as_words(out)
            if flat.shape[2] > 1 and flat.stride(2) != 1:
                flat = flat.contiguous()
            width = flat.shape[2]
            block_rows, block_width = blocks(width)
            rows = batch * count
            grid = (triton.cdiv(rows, block_rows), triton.cdiv(width, block_width))
            visible_rows_kernel[grid](
                *(flat, ids_restore, words, rows, count, visible, width),
                *(flat.stride(0), flat.stride(1)),
                BLOCK_ROWS=block_rows,
                BLOCK_WIDTH=block_width,
            )
    return out, mask, ids_restore
