"""aggregate_attention in Triton: one program adds up a sample's rows, read once.

Where heads have programs of their own, or rows of logits are too long for one, a few more launches.
Rows are added up, then heads, then turns, in one order: the same bits whatever the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import turns
from .launching import longest, options, power_of_2, setting
from .selection import rows_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OF_TURNS = [
    *("index_stride", "first_sample", "first_head", "first_row", "turn_heads", "rows"),
    *("heads_apart", "out_stride", "adds"),
]


@triton.jit
def place_of(token, stride, APART: tl.constexpr):
    """Returns where tokens lie in a row, whose numbers lie side by side if not APART."""
    if APART:
        token = token.to(tl.int64) * stride
    return token


@triton.jit(do_not_specialize=_OF_TURNS)
def statistics_kernel(
    attention, query_index, stats, queries, tokens, batch_stride, head_stride, row_stride,
    token_stride, index_stride, first_sample, first_head, first_row, turn_heads, rows,
    INDEXED: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the largest logit and 1 / the sum of exponentials of each row of a turn to stats.

    stats is (samples, heads, rows, 2) of the turn, in the order of the programs.
    """
    at = tl.program_id(0).to(tl.int64)
    place = first_row + at % rows
    sample = first_sample + at // (rows * turn_heads)
    if INDEXED:
        place = tl.load(query_index + sample * index_stride + place)
    head = first_head + at // rows % turn_heads
    row = sample * batch_stride + head * head_stride + place * row_stride
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = (token < tokens) & (place + token * 0 >= 0) & (place + token * 0 < queries)
        at_token = attention + row + place_of(token, token_stride, APART)
        x = tl.load(at_token, mask=mask, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
    most = tl.max(largest, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = (token < tokens) & (place + token * 0 >= 0) & (place + token * 0 < queries)
        at_token = attention + row + place_of(token, token_stride, APART)
        x = tl.load(at_token, mask=mask, other=float("-inf")).to(tl.float32)
        total += tl.where(mask, tl.exp(x - most), 0.0)
    tl.store(stats + at * 2, most)
    tl.store(stats + at * 2 + 1, 1.0 / tl.sum(total, 0))


@triton.jit(do_not_specialize=_OF_TURNS)
def aggregate_attention_kernel(
    attention,  # (B, H, M, N)
    query_index,  # (B, R), for INDEXED
    head_index,  # (B, R), for BY_HEAD
    stats,  # (samples, heads, rows, 2) of the turn, for LOGITS 2
    out,  # of the turn's first sample's first sums
    queries,  # M
    selected,  # R
    tokens,  # N
    batch_stride,
    head_stride,
    row_stride,
    token_stride,
    index_stride,
    first_sample,
    first_head,
    first_row,
    turn_heads,
    rows,
    heads_apart,  # whether each head has a program and sums of its own
    out_stride,  # of samples
    adds,  # to what is there
    factor,
    INDEXED: tl.constexpr,
    BY_HEAD: tl.constexpr,
    APART: tl.constexpr,  # whether the numbers of a row do not lie side by side
    LOGITS: tl.constexpr,  # 0: no, 1: a block is a whole row, 2: by stats
    BLOCK: tl.constexpr,
):
    at_sample = tl.program_id(2).to(tl.int64)
    sample = at_sample + first_sample
    first = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    to = out + at_sample * out_stride + first.to(tl.int64) * tokens + token
    total = tl.load(to, mask=inside & (adds + token * 0 != 0), other=0.0).to(tl.float64)
    for turn_head in range(first, tl.where(heads_apart != 0, first + 1, turn_heads)):
        head = first_head + turn_head + sample * 0  # 64 bits, as all that a stride multiplies
        of_head = tl.zeros([BLOCK], tl.float64)  # there may be thousands of terms
        for row in range(0, rows):
            place = first_row + row + sample * 0
            of_row = head
            if BY_HEAD:
                of_row = tl.load(head_index + sample * selected + place)
            if INDEXED:
                place = tl.load(query_index + sample * index_stride + place)
            place = tl.where(of_row == head, place, -1)
            use = inside & (place + token * 0 >= 0) & (place + token * 0 < queries)
            start = sample * batch_stride + head * head_stride + place * row_stride
            at_token = attention + start + place_of(token, token_stride, APART)
            x = tl.load(at_token, mask=use, other=0.0).to(tl.float32)
            if LOGITS == 1:
                x = tl.where(inside, x, float("-inf"))
                e = tl.exp(x - tl.max(x, 0))
                x = tl.where(inside, e / tl.sum(e, 0), 0.0)
            if LOGITS == 2:
                stat = stats + ((at_sample * turn_heads + turn_head) * rows + row) * 2
                x = tl.exp(x - tl.load(stat)) * tl.load(stat + 1)
            of_head += tl.where(use, x, 0.0).to(tl.float64)
        total += of_head
    tl.store(to, (total * factor).to(out.dtype.element_ty), mask=inside)


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
    factor = 1.0 / heads if head_reduce == "mean" and head_index is None else 1.0
    device = attention.device
    in_row = logits and tokens <= longest("aggregate_attention.logits", device)
    if in_row:
        block = power_of_2(tokens)
        chosen = setting("aggregate_attention.logits", device, block)
    else:
        chosen = setting("aggregate_attention.long" if logits else "aggregate_attention", device)
        block = min(power_of_2(tokens), chosen["block"])
    blocks = triton.cdiv(tokens, block)
    scores = torch.empty(shape, dtype=torch.float32, device=device)
    index, index_stride = rows_of(query_index, attention)
    batch_stride, head_stride, row_stride, token_stride = attention.stride()
    common = {
        "attention": attention,
        "query_index": index,
        "queries": queries,
        "tokens": tokens,
        "batch_stride": batch_stride,
        "head_stride": head_stride,
        "row_stride": row_stride,
        "token_stride": token_stride,
        "index_stride": index_stride,
        "INDEXED": query_index is not None,
        "APART": token_stride != 1 and tokens > 1,
        **options(chosen["num_warps"], all_registers=True),
    }
    by_head = attention if head_index is None else head_index.contiguous()
    in_turns = logits and not in_row
    held = turns.SCRATCH // (2 if in_turns else 1)  # for statistics, and for sums of heads
    samples = turns.samples_apart(scores, heads, batch * blocks, torch.float64.itemsize, held)
    room = held // 8 if in_turns else batch * heads * selected
    every = turns.turns(batch, heads, selected, room, samples or None)
    largest = every[0]
    stats = scores
    if in_turns:
        stats = scores.new_empty(largest.samples * largest.heads * largest.rows * 2)
    sums = turns.Sums(scores, every, samples > 0, factor, torch.float64)
    with torch.cuda.device_of(attention):
        for turn in every:
            of_turn = {
                "stats": stats,
                "first_sample": turn.sample,
                "first_head": turn.head,
                "first_row": turn.row,
                "turn_heads": turn.heads,
                "rows": turn.rows,
            }
            if in_turns:
                statistics_kernel[(turn.samples * turn.heads * turn.rows,)](
                    **common, **of_turn, BLOCK=chosen["block"]
                )
            aggregate_attention_kernel[(blocks, sums.programs(turn), turn.samples)](
                **common,
                **of_turn,
                **sums.place(turn),
                adds=sums.adds(turn),
                head_index=by_head,
                selected=selected,
                BY_HEAD=head_index is not None,
                LOGITS=0 if not logits else 1 if in_row else 2,
                BLOCK=block,
            )
            sums.add_up(turn)
    return scores
