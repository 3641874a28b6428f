"""select_tokens in Triton: one program a row; a long row is read a chunk at a time.

Few long rows have several programs each: select_few.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import select_few
from .launching import in_registers, longest
from .selection import (
    fill_ids,
    float_bits,
    how_many,
    ordered,
    rows_of,
    store_choice,
    top,
    top_of_long,
    valid_of_long,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_RATIO, BY_COUNT, BY_ROW = 0, 1, 2  # what says how many tokens a row masks
NONE, FRACTION, POOL = 0, 1, 2  # kinds of random share


@triton.jit(do_not_specialize=["ratio", "second", "number"])
def select_tokens_kernel(
    scores,  # (B, N)
    padding,  # (B, N) bytes, for PADDED
    noise,  # (B, N), for RANDOM
    row_numbers,  # (B,), for COUNT 2
    first,  # (B, N) bytes, tokens that go before all others, for FIRST
    mask,  # (B, N) bytes
    ids_visible,  # (B, V)
    ids_masked,  # (B, K)
    ids_restore,  # (B, N)
    num_visible,  # (B,)
    num_masked,  # (B,)
    tokens,  # N
    width_visible,  # V
    width_masked,  # K
    scores_stride,
    padding_stride,
    noise_stride,
    number,  # for COUNT 1
    ratio,  # float64 bits, for COUNT 0
    second,  # float64 bits: 1 - random_fraction, or pool_ratio
    COUNT: tl.constexpr,
    RANDOM: tl.constexpr,
    PADDED: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,  # at least N
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    valid = token < tokens
    if PADDED:
        valid &= tl.load(padding + row * padding_stride + token, mask=valid, other=1) == 0
    key = ordered(tl.load(scores + row * scores_stride + token, mask=valid, other=0), False)
    if FIRST:
        goes_first = tl.load(first + row * tokens + token, mask=valid, other=0) != 0
        key = tl.where(goes_first, ordered(tl.full([BLOCK], float("inf"), tl.float32), False), key)
    valid_number = tl.sum(valid.to(tl.int32))
    count, by_score = how_many(
        row, valid_number, ratio, number, row_numbers, width_masked, second, COUNT, RANDOM
    )
    chosen = top(key, valid, by_score)
    if RANDOM != 0:
        key = ordered(tl.load(noise + row * noise_stride + token, mask=valid, other=0), True)
        if RANDOM == 1:
            chosen |= top(key, valid & (chosen == 0), count - by_score)
        else:
            chosen = top(key, chosen, count)
    seen = valid & (chosen == 0)
    store_choice(
        chosen, seen, token, 0, 0, ids_visible, ids_masked, ids_restore,
        row, tokens, tokens, width_visible, width_masked,
    )  # fmt: skip
    tl.store(mask + row * tokens + token, chosen.to(tl.uint8), mask=token < tokens)
    visible_number = valid_number - count
    fill_ids(ids_visible + row * width_visible, visible_number, width_visible, BLOCK)
    fill_ids(ids_masked + row * width_masked, count, width_masked, BLOCK)
    tl.store(num_visible + row, visible_number)
    tl.store(num_masked + row, count)


@triton.jit(do_not_specialize=["ratio", "second", "number"])
def select_long_kernel(
    scores, padding, noise, row_numbers, first, mask, ids_visible, ids_masked, ids_restore,
    num_visible, num_masked, tokens, width_visible, width_masked, scores_stride, padding_stride,
    noise_stride, number, ratio, second,
    COUNT: tl.constexpr, RANDOM: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As select_tokens_kernel, for rows of any length, BLOCK at a time; `first` is `mask`."""
    row = tl.program_id(0).to(tl.int64)
    valid_number = valid_of_long(padding, row * padding_stride, tokens, PADDED, BLOCK)
    count, by_score = how_many(
        row, valid_number, ratio, number, row_numbers, width_masked, second, COUNT, RANDOM
    )
    top_of_long(
        scores, row * scores_stride, padding, row * padding_stride, mask, row * tokens, tokens,
        by_score, PADDED, 0, FIRST, False, BLOCK,
    )  # fmt: skip
    if RANDOM == 1:
        tl.debug_barrier()
        top_of_long(
            noise, row * noise_stride, padding, row * padding_stride, mask, row * tokens, tokens,
            count - by_score, PADDED, 1, False, True, BLOCK,
        )  # fmt: skip
    if RANDOM == 2:
        tl.debug_barrier()
        top_of_long(
            noise, row * noise_stride, padding, row * padding_stride, mask, row * tokens, tokens,
            count, PADDED, 2, False, True, BLOCK,
        )  # fmt: skip
    tl.debug_barrier()
    visible_before = tl.zeros([], tl.int32)
    masked_before = tl.zeros([], tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < tokens
        chosen = tl.load(mask + row * tokens + token, mask=inside, other=0) != 0
        seen = inside & (chosen == 0)
        if PADDED:
            seen &= tl.load(padding + row * padding_stride + token, mask=inside, other=1) == 0
        visible_before, masked_before = store_choice(
            chosen, seen, token, visible_before, masked_before, ids_visible, ids_masked,
            ids_restore, row, tokens, tokens, width_visible, width_masked,
        )  # fmt: skip
    fill_ids(ids_visible + row * width_visible, visible_before, width_visible, BLOCK)
    fill_ids(ids_masked + row * width_masked, masked_before, width_masked, BLOCK)
    tl.store(num_visible + row, visible_before)
    tl.store(num_masked + row, masked_before)


def launch(
    scores: Tensor,  # (B, N)
    key_padding_mask: Tensor | None,
    noise: Tensor | None,
    mask_ratio: float | None,
    num_masked: int | None,
    num_masked_rows: Tensor | None,
    max_masked: int | None,
    random_fraction: float,
    pool_ratio: float | None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the fields of TokenSelection.

    `first`, (B, N) bytes, says which tokens go before all others; the mask is returned in it.
    """
    batch, tokens = scores.shape
    if num_masked_rows is not None:
        width_visible, width_masked = tokens, tokens if max_masked is None else max_masked
    else:
        width_masked = num_masked if mask_ratio is None else round(mask_ratio * tokens)
        width_visible = tokens - width_masked

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=scores.device)

    mask = empty(batch, tokens, dtype=torch.bool) if first is None else first.view(torch.bool)
    ids_visible = empty(batch, width_visible, dtype=torch.int64)
    ids_masked = empty(batch, width_masked, dtype=torch.int64)
    ids_restore = empty(batch, tokens, dtype=torch.int64)
    num_visible, num_chosen = (empty(batch, dtype=torch.int32) for _ in range(2))
    result = mask, ids_visible, ids_masked, ids_restore, num_visible, num_chosen
    if batch == 0:
        return result
    in_row = tokens <= longest("select_tokens", scores.device)
    kernel = select_tokens_kernel if in_row else select_long_kernel
    share, second = NONE, None
    if pool_ratio is not None:
        share, second = POOL, pool_ratio
    elif random_fraction > 0:
        share, second = FRACTION, 1.0 - random_fraction
    by = BY_ROW if num_masked_rows is not None else BY_COUNT if mask_ratio is None else BY_RATIO
    scores, scores_stride = rows_of(scores, scores)
    padding, padding_stride = rows_of(key_padding_mask, mask.view(torch.uint8))
    noise, noise_stride = rows_of(noise, scores)
    common = {  # of all kernels
        "padding": padding,
        "row_numbers": num_visible if num_masked_rows is None else num_masked_rows.contiguous(),
        "mask": mask.view(torch.uint8),
        "tokens": tokens,
        "width_masked": width_masked,
        "padding_stride": padding_stride,
        "number": num_masked or 0,
        "ratio": float_bits(mask_ratio),
        "second": float_bits(second),
        "COUNT": by,
        "RANDOM": share,
        "PADDED": key_padding_mask is not None,
        "FIRST": first is not None,
    }
    outputs = {
        "ids_visible": ids_visible,
        "ids_masked": ids_masked,
        "ids_restore": ids_restore,
        "num_visible": num_visible,
        "num_masked": num_chosen,
    }
    with torch.cuda.device_of(scores):
        if not in_row and select_few.takes(scores, tokens):
            orders = ((scores, scores_stride), (noise, noise_stride))
            orders = orders[:1] if share == NONE else orders
            select_few.launch(orders, common, outputs)
            return result
        kernel[(batch,)](
            scores=scores,
            scores_stride=scores_stride,
            noise=noise,
            noise_stride=noise_stride,
            first=common["mask"],
            width_visible=width_visible,
            **common,
            **outputs,
            **in_registers("select_tokens", scores.device, tokens),
        )
    return result
