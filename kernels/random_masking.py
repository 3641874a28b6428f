"""random_masking in Triton: a selection by noise alone, then the visible rows, each read once.

No ids are kept between the two: a search of ids_restore finds which token stands at a place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import copied, in_registers, longest
from .selection import chosen_of_chunk, keys_of_chunk, ordered, rows_of, threshold_of_long, top
from .words import as_words


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
    """As random_selection_kernel, for rows of any length."""
    row = tl.program_id(0).to(tl.int64)
    at = row * noise_stride
    kth, left = threshold_of_long(
        noise, at, noise, 0, noise, 0, tokens, visible, False, 0, False, True, BLOCK
    )
    seen_before = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < tokens
        key, eligible = keys_of_chunk(
            noise, at, noise, 0, noise, 0, start, tokens, False, 0, False, True, BLOCK
        )
        seen, ties = chosen_of_chunk(key, eligible, kth, left, ties)
        before = seen_before + tl.cumsum(seen.to(tl.int32), 0)
        place = tl.where(seen, before - 1, visible + token - before)
        tl.store(mask + row * tokens + token, (seen == 0).to(tl.float32), mask=inside)
        tl.store(ids_restore + row * tokens + token, place.to(tl.int64), mask=inside)
        seen_before += tl.sum(seen.to(tl.int32))


@triton.jit(do_not_specialize=["steps"])
def visible_rows_kernel(
    tokens,  # (B, N, C)
    ids_restore,  # (B, N), contiguous
    out,  # (B, V, C), contiguous
    count,  # N
    visible,  # V
    width,  # C
    batch_stride,
    token_stride,
    blocks,  # of the visible rows of a sample
    steps,  # that a search among N - V + 1 tokens takes
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    place = program % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    live = place < visible
    # the token at a place is the first with more visible ones up to it
    token = place
    last = place + (count - visible)
    for _ in range(steps):
        middle = token + (last - token) // 2
        to = tl.load(ids_restore + sample * count + middle, mask=live, other=0).to(tl.int32)
        enough = tl.where(to < visible, to + 1, middle - (to - visible)) > place
        token = tl.where(enough, token, middle + 1)
        last = tl.where(enough, middle, last)
    start = sample * batch_stride + token.to(tl.int64) * token_stride
    mask = live[:, None] & (column < width)[None, :]
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
    in_row = count <= longest("random_masking", tokens.device)
    kernel = random_selection_kernel if in_row else random_long_kernel
    with torch.cuda.device_of(tokens):
        kernel[(batch,)](
            *(noise, mask, ids_restore, count, visible, noise_stride),
            **in_registers("random_masking", tokens.device, count),
        )
        if out.numel():
            flat, words = as_words(tokens, out)
            width = flat.shape[2]
            chosen = copied("random_masking.rows", tokens.device, width, words.itemsize)
            blocks = triton.cdiv(visible, chosen["BLOCK_ROWS"])
            grid = (batch * blocks, triton.cdiv(width, chosen["BLOCK_WIDTH"]))
            steps = (count - visible).bit_length()
            visible_rows_kernel[grid](
                *(flat, ids_restore, words, count, visible, width),
                *(flat.stride(0), flat.stride(1), blocks, steps),
                **chosen,
            )
    return out, mask, ids_restore
