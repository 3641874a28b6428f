"""aggregate_attention in Triton: one program adds up a sample's rows, in one order, read once.

Where heads are split among programs, or rows are too long for one, a few more small launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .selection import warps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW = 8192  # the longest row of logits whose softmax is taken in registers
_PROGRAMS = 264  # that fill a large GPU
_SCRATCH = 1 << 20  # bytes, for sums of parts of the heads


@triton.jit
def statistics_kernel(
    attention, query_index, stats, heads, queries, selected, tokens,
    batch_stride, head_stride, row_stride, INDEXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the largest logit and 1 / the sum of exponentials of a row to stats (B, H, R, 2)."""
    at = tl.program_id(0).to(tl.int64)  # (b * H + h) * R + r
    place = at % selected
    sample = at // (selected * heads)
    if INDEXED:
        place = tl.load(query_index + sample * selected + place)
    row = sample * batch_stride + at // selected % heads * head_stride + place * row_stride
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = (token < tokens) & (place + token * 0 >= 0) & (place + token * 0 < queries)
        x = tl.load(attention + row + token, mask=mask, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
    most = tl.max(largest, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = (token < tokens) & (place + token * 0 >= 0) & (place + token * 0 < queries)
        x = tl.load(attention + row + token, mask=mask, other=float("-inf")).to(tl.float32)
        total += tl.where(mask, tl.exp(x - most), 0.0)
    tl.store(stats + at * 2, most)
    tl.store(stats + at * 2 + 1, 1.0 / tl.sum(total, 0))


@triton.jit
def aggregate_attention_kernel(
    attention,  # (B, H, M, N), rows dense
    query_index,  # (B, R), for INDEXED
    head_index,  # (B, R), for BY_HEAD
    stats,  # (B, H, R, 2), for LOGITS 2
    out,  # (B, S, N)
    heads,  # H
    queries,  # M
    selected,  # R
    tokens,  # N
    batch_stride,
    head_stride,
    row_stride,
    heads_of_split,  # H / S, rounded up
    factor,
    INDEXED: tl.constexpr,
    BY_HEAD: tl.constexpr,
    LOGITS: tl.constexpr,  # 0: no, 1: a block is a whole row, 2: by stats
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    token = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    first = split * heads_of_split
    last = tl.minimum(first + heads_of_split, heads)
    total = tl.zeros([BLOCK], tl.float64)  # there may be thousands of terms
    for at in range(first * selected, last * selected):
        place = (at % selected).to(tl.int64)
        head = at // selected
        of_head = head
        if BY_HEAD:
            of_head = tl.load(head_index + sample * selected + place)
        if INDEXED:
            place = tl.load(query_index + sample * selected + place)
        place = tl.where(of_head == head, place, -1)
        use = inside & (place + token * 0 >= 0) & (place + token * 0 < queries)
        row = sample * batch_stride + head * head_stride + place * row_stride
        x = tl.load(attention + row + token, mask=use, other=0.0).to(tl.float32)
        if LOGITS == 1:
            x = tl.where(inside, x, float("-inf"))
            e = tl.exp(x - tl.max(x, 0))
            x = tl.where(inside, e / tl.sum(e, 0), 0.0)
        if LOGITS == 2:
            stat = stats + ((sample * heads + head) * selected + at % selected) * 2
            x = tl.exp(x - tl.load(stat)) * tl.load(stat + 1)
        total += tl.where(use, x, 0.0).to(tl.float64)
    to = (sample * tl.num_programs(1) + split) * tokens
    tl.store(out + to + token, (total * factor).to(tl.float32), mask=inside)


@triton.jit
def sum_splits_kernel(parts, out, number, tokens, factor, BLOCK: tl.constexpr):
    """Adds up the (B, S, N) sums of parts of the heads, in their order."""
    sample = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, number):
        part = parts + (sample * number + split) * tokens
        total += tl.load(part + token, mask=inside, other=0.0)
    tl.store(out + sample * tokens + token, total * factor, mask=inside)


def splits(batch: int, heads: int, tokens: int) -> int:
    """Returns into how many parts the heads of a sample go: one where samples are enough."""
    most = _SCRATCH // max(4 * batch * tokens, 1)
    return max(1, min(heads, _PROGRAMS // max(batch, 1), most))


def sum_splits(parts: Tensor, factor: float) -> Tensor:
    """Returns (B, N), `factor` times the sum of (B, S, N) over S."""
    batch, number, tokens = parts.shape
    out = torch.empty((batch, tokens), dtype=torch.float32, device=parts.device)
    sum_splits_kernel[(batch, triton.cdiv(tokens, 1024))](
        parts, out, number, tokens, factor, BLOCK=1024
    )
    return out


def launch(
    attention: Tensor,  # (B, H, M, N)
    query_index: Tensor | None,  # (B, R)
    head_index: Tensor | None,  # (B, R)
    head_reduce: str,
    logits: bool,
) -> Tensor:
    """Returns (B, N), or (B, H, N) for head_reduce "none": sums over the selected rows."""
    batch, heads, queries, tokens = attention.shape
    selected = queries if query_index is None else query_index.shape[1]
    apart = head_reduce == "none"
    shape = (batch, heads, tokens) if apart else (batch, tokens)
    if 0 in (batch, heads, selected, tokens, queries):
        return torch.zeros(shape, dtype=torch.float32, device=attention.device)
    if attention.stride(3) != 1 and tokens > 1:
        attention = attention.contiguous()
    strides = attention.stride()[:3]
    number = heads if apart else splits(batch, heads, tokens)
    factor = 1.0 / heads if head_reduce == "mean" and head_index is None else 1.0
    in_row = logits and tokens <= ROW
    block = triton.next_power_of_2(tokens) if in_row else min(triton.next_power_of_2(tokens), 1024)
    block = max(block, 16)
    nothing = attention
    index = nothing if query_index is None else query_index.contiguous()
    by_head = nothing if head_index is None else head_index.contiguous()
    with torch.cuda.device_of(attention):
        stats = nothing
        if logits and not in_row:
            stats = torch.empty(
                (batch, heads, selected, 2), dtype=torch.float32, device=attention.device
            )
            statistics_kernel[(batch * heads * selected,)](
                *(attention, index, stats, heads, queries, selected, tokens, *strides),
                INDEXED=query_index is not None,
                BLOCK=1024,
            )
        parts = torch.empty((batch, number, tokens), dtype=torch.float32, device=attention.device)
        aggregate_attention_kernel[(batch, number, triton.cdiv(tokens, block))](
            *(attention, index, by_head, stats, parts, heads, queries, selected, tokens),
            *(*strides, triton.cdiv(heads, number), factor if number == 1 or apart else 1.0),
            INDEXED=query_index is not None,
            BY_HEAD=head_index is not None,
            LOGITS=0 if not logits else 1 if in_row else 2,
            BLOCK=block,
            num_warps=max(warps(block), 4),
        )
        if apart or number == 1:
            return parts.view(shape)
        return sum_splits(parts, factor)
