"""attention_scores in Triton: column sums of softmax(q k') of the selected rows, map never stored.

Where a head's keys fit in one block they are read once: the logits of 16 rows at a time stay in
registers. Longer ones are read twice: for each row's largest logit and sum, then for the columns.
Heads and rows are added up in one order: the same bits every time.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aggregate_attention import splits, sum_splits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOG2E = 1.4426950408889634
_ONE_BLOCK = 128 * 1024  # bytes of a head's keys that are read once
_ONE_BLOCK_TOKENS = 2048
_TOKENS, _ROWS = 64, 32  # of a block, for longer keys
# the interpreter multiplies the bits of bfloat16 as if they were numbers
_WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rows_of_block(
    query, query_index, head_index, sample, head, first, heads_stride, row_stride, sample_stride,
    queries, selected, width,
    INDEXED: tl.constexpr, BY_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Returns selected queries (BLOCK_ROWS, BLOCK_WIDTH), and which of them count for this head."""
    at = first + tl.arange(0, BLOCK_ROWS)
    use = at < selected
    place = at.to(tl.int64)
    if BY_HEAD:
        use &= tl.load(head_index + sample * selected + at, mask=use, other=-1) == head
    if INDEXED:
        place = tl.load(query_index + sample * selected + at, mask=use, other=-1)
        use &= (place >= 0) & (place < queries)
    column = tl.arange(0, BLOCK_WIDTH)
    row = sample * sample_stride + head * heads_stride + place * row_stride
    q = tl.load(
        query + row[:, None] + column[None, :],
        mask=use[:, None] & (column < width)[None, :],
        other=0.0,
    )
    return q, use


@triton.jit
def keys_of_block(
    key, padding, sample, head, start, tokens, width, sample_stride, head_stride, token_stride,
    padding_stride, PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Returns keys (BLOCK, BLOCK_WIDTH), and which of them are valid."""
    token = start + tl.arange(0, BLOCK)
    valid = token < tokens
    if PADDED:
        valid &= tl.load(padding + sample * padding_stride + token, mask=valid, other=1) == 0
    column = tl.arange(0, BLOCK_WIDTH)
    place = sample * sample_stride + head * head_stride + token.to(tl.int64) * token_stride
    k = tl.load(
        key + place[:, None] + column[None, :],
        mask=valid[:, None] & (column < width)[None, :],
        other=0.0,
    )
    return k, valid


@triton.jit
def logits_of(k, q, valid, scale):
    """Returns (tokens, rows) logits in powers of two, -inf for padding."""
    if _WIDEN:
        k, q = k.to(tl.float32), q.to(tl.float32)
    s = tl.dot(k, tl.trans(q), input_precision="tf32x3") * scale  # of float32: to its precision
    return tl.where(valid[:, None], s, float("-inf"))


@triton.jit
def attention_scores_kernel(
    query,  # (B or 1, H, M, D)
    key,  # (B, H_kv, N, D)
    query_index,  # (B, R), for INDEXED
    head_index,  # (B, R), for BY_HEAD
    padding,  # (B, N) bytes, for PADDED
    out,  # (B, S, N)
    heads,  # H
    group,  # H / H_kv
    queries,  # M
    selected,  # R
    tokens,  # N
    width,  # D
    scale,
    factor,
    heads_of_split,  # H / S, rounded up
    query_batch_stride,
    query_head_stride,
    query_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    padding_stride,
    INDEXED: tl.constexpr,
    BY_HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # at least N
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,  # at least D
):
    sample = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * heads_of_split
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(first, tl.minimum(first + heads_of_split, heads)):
        k, valid = keys_of_block(
            key, padding, sample, head // group, 0, tokens, width, key_batch_stride,
            key_head_stride, key_stride, padding_stride, PADDED, BLOCK, BLOCK_WIDTH,
        )  # fmt: skip
        for row in range(0, selected, BLOCK_ROWS):
            q, use = rows_of_block(
                query, query_index, head_index, sample, head, row, query_head_stride, query_stride,
                query_batch_stride, queries, selected, width,
                INDEXED, BY_HEAD, BLOCK_ROWS, BLOCK_WIDTH,
            )  # fmt: skip
            s = logits_of(k, q, valid, scale)
            most = tl.max(s, 0)
            p = tl.exp2(s - tl.where(most == float("-inf"), 0.0, most)[None, :])
            amount = tl.sum(p, 0)
            weight = tl.where(use & (amount != 0.0), 1.0 / amount, 0.0)
            columns = tl.sum(tl.where(use[None, :], p * weight[None, :], 0.0), 1)
            total += tl.where(valid, columns, 0.0)  # a NaN among the keys stays out of padding
    token = tl.arange(0, BLOCK)
    to = (sample * tl.num_programs(1) + split) * tokens
    tl.store(out + to + token, total * factor, mask=token < tokens)


@triton.jit
def row_statistics_kernel(
    query, key, query_index, head_index, padding, stats, heads, group, queries, selected, tokens,
    width, scale, query_batch_stride, query_head_stride, query_stride, key_batch_stride,
    key_head_stride, key_stride, padding_stride,
    INDEXED: tl.constexpr, BY_HEAD: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes each row's largest logit and 1 / its sum, 0 where it does not count: (B, H, R, 2)."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    row = tl.program_id(1) * BLOCK_ROWS
    q, use = rows_of_block(
        query, query_index, head_index, sample, head, row, query_head_stride, query_stride,
        query_batch_stride, queries, selected, width, INDEXED, BY_HEAD, BLOCK_ROWS, BLOCK_WIDTH,
    )  # fmt: skip
    most = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    amount = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, tokens, BLOCK):
        k, valid = keys_of_block(
            key, padding, sample, head // group, start, tokens, width, key_batch_stride,
            key_head_stride, key_stride, padding_stride, PADDED, BLOCK, BLOCK_WIDTH,
        )  # fmt: skip
        s = logits_of(k, q, valid, scale)
        now = tl.maximum(most, tl.max(s, 0), propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(now == float("-inf"), 0.0, now)
        amount = amount * tl.exp2(most - base) + tl.sum(tl.exp2(s - base[None, :]), 0)
        most = now
    at = row + tl.arange(0, BLOCK_ROWS)
    to = stats + ((sample * heads + head) * selected + at) * 2
    tl.store(to, tl.where(most == float("-inf"), 0.0, most), mask=at < selected)
    weight = tl.where(use & (amount != 0.0), 1.0 / amount, 0.0)
    tl.store(to + 1, weight, mask=at < selected)


@triton.jit
def column_sums_kernel(
    query, key, query_index, head_index, padding, stats, out, heads, group, queries, selected,
    tokens, width, scale, factor, heads_of_split, query_batch_stride, query_head_stride,
    query_stride, key_batch_stride, key_head_stride, key_stride, padding_stride,
    INDEXED: tl.constexpr, BY_HEAD: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """As attention_scores_kernel for a block of the tokens, with the rows' statistics at hand."""
    sample = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = tl.program_id(2) * BLOCK
    first = split * heads_of_split
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(first, tl.minimum(first + heads_of_split, heads)):
        k, valid = keys_of_block(
            key, padding, sample, head // group, start, tokens, width, key_batch_stride,
            key_head_stride, key_stride, padding_stride, PADDED, BLOCK, BLOCK_WIDTH,
        )  # fmt: skip
        for row in range(0, selected, BLOCK_ROWS):
            q, use = rows_of_block(
                query, query_index, head_index, sample, head, row, query_head_stride, query_stride,
                query_batch_stride, queries, selected, width,
                INDEXED, BY_HEAD, BLOCK_ROWS, BLOCK_WIDTH,
            )  # fmt: skip
            at = row + tl.arange(0, BLOCK_ROWS)
            stat = stats + ((sample * heads + head) * selected + at) * 2
            most = tl.load(stat, mask=at < selected, other=0.0)
            weight = tl.load(stat + 1, mask=at < selected, other=0.0)
            p = tl.exp2(logits_of(k, q, valid, scale) - most[None, :])
            columns = tl.sum(tl.where(use[None, :], p * weight[None, :], 0.0), 1)
            total += tl.where(valid, columns, 0.0)  # a NaN among the keys stays out of padding
    token = start + tl.arange(0, BLOCK)
    to = (sample * tl.num_programs(1) + split) * tokens
    tl.store(out + to + token, total * factor, mask=token < tokens)


def launch(
    query: Tensor,  # (B or 1, H, M, D)
    key: Tensor,  # (B, H_kv, N, D)
    query_index: Tensor | None,  # (B, R)
    head_index: Tensor | None,  # (B, R)
    key_padding_mask: Tensor | None,  # (B, N)
    scale: float,
    head_reduce: str,
) -> Tensor:
    """Returns (B, N) scores, or (B, H, N) for head_reduce "none"."""
    batch, kv_heads, tokens, width = key.shape
    heads, queries = query.shape[1:3]
    selected = queries if query_index is None else query_index.shape[1]
    apart = head_reduce == "none"
    shape = (batch, heads, tokens) if apart else (batch, tokens)
    if 0 in (batch, heads, queries, selected, tokens, width):
        return torch.zeros(shape, dtype=torch.float32, device=key.device)
    query = query if query.stride(3) == 1 else query.contiguous()
    key = key if key.stride(3) == 1 else key.contiguous()
    padding = key if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
    index = key if query_index is None else query_index.contiguous()
    by_head = key if head_index is None else head_index.contiguous()
    number = heads if apart else splits(batch, heads, tokens)
    factor = 1.0 / heads if head_reduce == "mean" and head_index is None else 1.0
    own_factor = factor if number == 1 or apart else 1.0
    block = max(triton.next_power_of_2(tokens), 16)
    block_width = max(triton.next_power_of_2(width), 16)
    of_query = (0 if query.shape[0] == 1 else query.stride(0), query.stride(1), query.stride(2))
    strides = (*of_query, *key.stride()[:3], tokens)
    sizes = (heads, heads // kv_heads, queries, selected, tokens, width, scale * _LOG2E)
    kinds = {
        "INDEXED": query_index is not None,
        "BY_HEAD": head_index is not None,
        "PADDED": key_padding_mask is not None,
        "BLOCK_WIDTH": block_width,
    }
    parts = torch.empty((batch, number, tokens), dtype=torch.float32, device=key.device)
    heads_of_split = triton.cdiv(heads, number)
    inputs = (query, key, index, by_head, padding)
    with torch.cuda.device_of(key):
        if block <= _ONE_BLOCK_TOKENS and block * block_width * key.element_size() <= _ONE_BLOCK:
            attention_scores_kernel[(batch, number)](
                *(*inputs, parts, *sizes, own_factor, heads_of_split, *strides),
                **kinds,
                BLOCK=block,
                BLOCK_ROWS=16,
                num_warps=min(max(block // 128, 4), 16),
            )
        else:
            stats = torch.empty((batch, heads, selected, 2), dtype=torch.float32, device=key.device)
            row_statistics_kernel[(batch * heads, triton.cdiv(selected, _ROWS))](
                *(*inputs, stats, *sizes, *strides),
                **kinds,
                BLOCK=_TOKENS,
                BLOCK_ROWS=_ROWS,
                num_warps=8,
            )
            column_sums_kernel[(batch, number, triton.cdiv(tokens, _TOKENS))](
                *(*inputs, stats, parts, *sizes, own_factor, heads_of_split, *strides),
                **kinds,
                BLOCK=_TOKENS,
                BLOCK_ROWS=_ROWS,
                num_warps=8,
            )
        if apart or number == 1:
            return parts.view(shape)
        return sum_splits(parts, factor)
