"""draw_queries in Triton: the candidates of lowest noise, one program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import in_registers, longest
from .selection import (
    chosen_of_chunk,
    fill_ids,
    keys_of_chunk,
    ordered,
    rows_of,
    store_ids,
    threshold_of_long,
    top,
    valid_of_long,
)


@triton.jit
def how_many_drawn(row, valid, number, row_numbers, BY_ROW: tl.constexpr):
    """Returns how many of `valid` candidates are drawn, at least 1 where there is one."""
    count = number + valid * 0
    if BY_ROW:
        count = tl.minimum(tl.load(row_numbers + row).to(tl.int64), number).to(tl.int32)
    return tl.minimum(tl.maximum(count, 1), valid)


@triton.jit(do_not_specialize=["number"])
def draw_queries_kernel(
    noise,  # (B, M)
    padding,  # (B, M) bytes, for PADDED
    row_numbers,  # (B,), for BY_ROW
    ids,  # (B, R)
    candidates,  # M
    number,  # R
    noise_stride,
    padding_stride,
    BY_ROW: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # at least M
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    valid = token < candidates
    if PADDED:
        valid &= tl.load(padding + row * padding_stride + token, mask=valid, other=1) == 0
    key = ordered(tl.load(noise + row * noise_stride + token, mask=valid, other=0), True)
    count = how_many_drawn(row, tl.sum(valid.to(tl.int32)), number, row_numbers, BY_ROW)
    drawn = top(key, valid, count)
    store_ids(ids + row * number, drawn, token, 0, number)
    fill_ids(ids + row * number, count, number, BLOCK)


@triton.jit(do_not_specialize=["number"])
def draw_long_kernel(
    noise, padding, row_numbers, ids, candidates, number, noise_stride, padding_stride,
    BY_ROW: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As draw_queries_kernel, for any number of candidates."""
    row = tl.program_id(0).to(tl.int64)
    valid_number = valid_of_long(padding, row * padding_stride, candidates, PADDED, BLOCK)
    count = how_many_drawn(row, valid_number, number, row_numbers, BY_ROW)
    kth, left = threshold_of_long(
        noise, row * noise_stride, padding, row * padding_stride, noise, 0,
        candidates, count, PADDED, 0, False, True, BLOCK,
    )  # fmt: skip
    before = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    for start in range(0, candidates, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key, eligible = keys_of_chunk(
            noise, row * noise_stride, padding, row * padding_stride, noise, 0, start, candidates,
            PADDED, 0, False, True, BLOCK,
        )  # fmt: skip
        drawn, ties = chosen_of_chunk(key, eligible, kth, left, ties)
        store_ids(ids + row * number, drawn, token, before, number)
        before += tl.sum(drawn.to(tl.int32))
    fill_ids(ids + row * number, before, number, BLOCK)


def launch(
    noise: Tensor,  # (B, M)
    num_queries: int,
    num_queries_rows: Tensor | None,
    padding_mask: Tensor | None,
) -> Tensor:
    """Returns (B, R) drawn candidates, ascending, -1 behind a row's own number."""
    batch, candidates = noise.shape
    ids = torch.empty((batch, num_queries), dtype=torch.int64, device=noise.device)
    if ids.numel() == 0:
        return ids
    noise, noise_stride = rows_of(noise, noise)
    padding, padding_stride = rows_of(padding_mask, ids)
    row_numbers = ids if num_queries_rows is None else num_queries_rows.contiguous()
    in_row = candidates <= longest("draw_queries", noise.device)
    kernel = draw_queries_kernel if in_row else draw_long_kernel
    with torch.cuda.device_of(noise):
        kernel[(batch,)](
            *(noise, padding, row_numbers, ids),
            *(candidates, num_queries, noise_stride, padding_stride),
            BY_ROW=num_queries_rows is not None,
            PADDED=padding_mask is not None,
            **in_registers("draw_queries", noise.device, candidates),
        )
    return ids
