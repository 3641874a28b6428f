"""attention_scores in Triton: column sums of softmax(q k') of the selected rows, map never stored.

Where one program can hold a head's keys they are read once: the logits of a few rows at a time stay
in registers. Longer ones are read for the largest logits and the sums of up to 64 rows at a time,
by programs that take a part of the keys each, then for the columns (features of wide heads are not
kept, but read again for every few rows); where these statistics are more than the scratch memory
holds, rows take turns. Rows are added up, then heads, then turns, in one order: the same bits every
time, whatever the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import turns
from .launching import longest, options, power_of_2, setting
from .logits import keys_of_block, logits_of, rows_of_block
from .selection import rows_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOG2E = 1.4426950408889634
_DIVISOR = 8  # of features: in half types 16 bytes, which come at once

# what changes from turn to turn is not worth another kernel
_OF_TURNS = [
    *("index_stride", "first_sample", "first_head", "first_row", "heads_apart", "rows"),
    *("out_stride", "adds"),
]


@triton.jit(do_not_specialize=_OF_TURNS)
def attention_scores_kernel(
    query,  # (B, H, M, D)
    key,  # (B, H_kv, N, D)
    query_index,  # (B, R), for INDEXED
    head_index,  # (B, R), for BY_HEAD
    padding,  # (B, N) bytes, for PADDED
    out,  # of the first sample's first sums
    heads,  # H
    group,  # H / H_kv
    queries,  # M
    selected,  # R
    tokens,  # N
    width,  # D
    scale,
    query_batch_stride,
    query_head_stride,
    query_stride,
    query_feature_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    key_feature_stride,
    padding_stride,
    index_stride,
    first_sample,
    heads_apart,  # whether each head has a program and sums of its own
    out_stride,  # of samples
    factor,
    INDEXED: tl.constexpr,
    BY_HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # at least N
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    KEPT: tl.constexpr,  # whether BLOCK_WIDTH is at least D
    DIVISOR: tl.constexpr,  # of D and the strides of queries and keys; 0: features lie apart
):
    sample = tl.program_id(0).to(tl.int64) + first_sample
    first = tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    for at_head in range(first, tl.where(heads_apart != 0, first + 1, heads)):
        head = at_head + sample * 0  # 64 bits, as all that a stride multiplies
        k, keys, valid = keys_of_block(
            key, padding, sample, head // group, 0, tokens, width, key_batch_stride,
            key_head_stride, key_stride, key_feature_stride, padding_stride, PADDED, BLOCK,
            BLOCK_WIDTH, DIVISOR,
        )  # fmt: skip
        of_head = tl.zeros([BLOCK], tl.float32)
        for row in range(0, selected, BLOCK_ROWS):
            q, vectors, use = rows_of_block(
                query, query_index, head_index, sample, head, row, query_batch_stride,
                query_head_stride, query_stride, query_feature_stride, index_stride, queries,
                selected, selected, width,
                INDEXED, BY_HEAD, BLOCK_ROWS, BLOCK_WIDTH, DIVISOR,
            )  # fmt: skip
            s = logits_of(
                k, keys, valid, q, vectors, use, width, key_feature_stride, query_feature_stride,
                scale, BLOCK_WIDTH, KEPT, DIVISOR,
            )  # fmt: skip
            most = tl.max(s, 0)
            p = tl.exp2(s - tl.where(most == float("-inf"), 0.0, most)[None, :])
            amount = tl.sum(p, 0)
            weight = tl.where(use, 1.0 / amount, 0.0)
            of_head += tl.sum(tl.where(use[None, :], p * weight[None, :], 0.0), 1)
        total += tl.where(valid, of_head, 0.0)  # a NaN among the keys stays out of padding
    token = tl.arange(0, BLOCK)
    to = out + tl.program_id(0).to(tl.int64) * out_stride + first.to(tl.int64) * tokens + token
    tl.store(to, total * factor, mask=token < tokens)


@triton.jit(do_not_specialize=[*_OF_TURNS, "split_tokens"])
def row_statistics_kernel(
    query, key, query_index, head_index, padding, stats, heads, group, queries, selected, tokens,
    width, scale, query_batch_stride, query_head_stride, query_stride, query_feature_stride,
    key_batch_stride, key_head_stride, key_stride, key_feature_stride, padding_stride, index_stride,
    first_sample, first_head, first_row, rows, split_tokens,
    INDEXED: tl.constexpr, BY_HEAD: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    KEPT: tl.constexpr, DIVISOR: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Writes the largest logit of each row of a turn, and its sum, of each part of the keys.

    stats is (samples, heads, SPLITS, rows, 2) of the turn; program_id is block of rows and part,
    head, sample. A part has `split_tokens` keys.
    """
    sample = tl.program_id(2).to(tl.int64) + first_sample
    head = tl.program_id(1).to(tl.int64) + first_head
    split = tl.program_id(0) % SPLITS
    block = tl.program_id(0) // SPLITS * BLOCK_ROWS
    q, vectors, use = rows_of_block(
        query, query_index, head_index, sample, head, first_row + block, query_batch_stride,
        query_head_stride, query_stride, query_feature_stride, index_stride, queries, selected,
        first_row + rows, width,
        INDEXED, BY_HEAD, BLOCK_ROWS, BLOCK_WIDTH, DIVISOR,
    )  # fmt: skip
    most = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    amount = tl.zeros([BLOCK_ROWS], tl.float32)
    begin = split * split_tokens
    for start in range(begin, tl.minimum(begin + split_tokens, tokens), BLOCK):
        k, keys, valid = keys_of_block(
            key, padding, sample, head // group, start, tokens, width, key_batch_stride,
            key_head_stride, key_stride, key_feature_stride, padding_stride, PADDED, BLOCK,
            BLOCK_WIDTH, DIVISOR,
        )  # fmt: skip
        s = logits_of(
            k, keys, valid, q, vectors, use, width, key_feature_stride, query_feature_stride, scale,
            BLOCK_WIDTH, KEPT, DIVISOR,
        )  # fmt: skip
        now = tl.maximum(most, tl.max(s, 0), propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(now == float("-inf"), 0.0, now)
        amount = amount * tl.exp2(most - base) + tl.sum(tl.exp2(s - base[None, :]), 0)
        most = now
    at = block + tl.arange(0, BLOCK_ROWS)
    list_ = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * SPLITS + split
    to = stats + (list_ * rows + at) * 2
    tl.store(to, most, mask=at < rows)
    tl.store(to + 1, amount, mask=at < rows)


@triton.jit
def statistics_of_rows(
    stats, list_, row, rows, use, BLOCK_ROWS: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Returns what rows' exponents are counted from, and 1 / their sums, 0 where not used."""
    split = tl.arange(0, SPLITS)
    at = row + tl.arange(0, BLOCK_ROWS)
    stat = stats + ((list_ * SPLITS + split[:, None]) * rows + at[None, :]) * 2
    mosts = tl.load(stat, mask=(at < rows)[None, :], other=0.0)
    amounts = tl.load(stat + 1, mask=(at < rows)[None, :], other=0.0)
    most = tl.max(mosts, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    amount = tl.sum(amounts * tl.exp2(mosts - most[None, :]), 0)
    return most, tl.where(use, 1.0 / amount, 0.0)


@triton.jit(do_not_specialize=[*_OF_TURNS, "turn_heads"])
def column_sums_kernel(
    query, key, query_index, head_index, padding, stats, out, heads, group, queries, selected,
    tokens, width, scale, query_batch_stride, query_head_stride, query_stride, query_feature_stride,
    key_batch_stride, key_head_stride, key_stride, key_feature_stride, padding_stride, index_stride,
    first_sample, first_head, first_row, rows, turn_heads, heads_apart, out_stride, adds, factor,
    INDEXED: tl.constexpr, BY_HEAD: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    KEPT: tl.constexpr, DIVISOR: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """As attention_scores_kernel, of one turn and a block of its tokens; for `adds`, to `out`.

    program_id is block of tokens, head (0 where they are not apart), sample.
    """
    sample = tl.program_id(2).to(tl.int64) + first_sample
    first = tl.program_id(1)
    start = tl.program_id(0) * BLOCK
    token = start + tl.arange(0, BLOCK)
    to = out + tl.program_id(2).to(tl.int64) * out_stride + first.to(tl.int64) * tokens + token
    total = tl.load(to, mask=(token < tokens) & (adds + token * 0 != 0), other=0.0)
    for turn_head in range(first, tl.where(heads_apart != 0, first + 1, turn_heads)):
        head = first_head + turn_head + sample * 0  # 64 bits, as all that a stride multiplies
        k, keys, valid = keys_of_block(
            key, padding, sample, head // group, start, tokens, width, key_batch_stride,
            key_head_stride, key_stride, key_feature_stride, padding_stride, PADDED, BLOCK,
            BLOCK_WIDTH, DIVISOR,
        )  # fmt: skip
        of_head = tl.zeros([BLOCK], tl.float32)
        for row in range(0, rows, BLOCK_ROWS):
            q, vectors, use = rows_of_block(
                query, query_index, head_index, sample, head, first_row + row, query_batch_stride,
                query_head_stride, query_stride, query_feature_stride, index_stride, queries,
                selected, first_row + rows, width,
                INDEXED, BY_HEAD, BLOCK_ROWS, BLOCK_WIDTH, DIVISOR,
            )  # fmt: skip
            list_ = tl.program_id(2) * turn_heads + turn_head
            most, weight = statistics_of_rows(stats, list_, row, rows, use, BLOCK_ROWS, SPLITS)
            s = logits_of(
                k, keys, valid, q, vectors, use, width, key_feature_stride, query_feature_stride,
                scale, BLOCK_WIDTH, KEPT, DIVISOR,
            )  # fmt: skip
            p = tl.exp2(s - most[None, :])
            of_head += tl.sum(tl.where(use[None, :], p * weight[None, :], 0.0), 1)
        total += tl.where(valid, of_head, 0.0)  # a NaN among the keys stays out of padding
    tl.store(to, total * factor, mask=token < tokens)


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
    query = query.expand(batch, -1, -1, -1)
    if 0 in (batch, heads, queries, selected, tokens):
        return torch.zeros(shape, dtype=torch.float32, device=key.device)
    padding = key if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
    index, index_stride = rows_of(query_index, key)
    by_head = key if head_index is None else head_index.contiguous()
    factor = 1.0 / heads if head_reduce == "mean" and head_index is None else 1.0
    divisor = _divisor(query, key)
    loaded = "attention_scores.features" if divisor > 1 else "attention_scores.unaligned"
    features = setting(loaded, key.device, key.element_size())
    kept = power_of_2(width) <= features["kept"]
    block_width = power_of_2(width) if kept else features["width"]
    common = {
        "query": query,
        "key": key,
        "query_index": index,
        "head_index": by_head,
        "padding": padding,
        "heads": heads,
        "group": heads // kv_heads,
        "queries": queries,
        "selected": selected,
        "tokens": tokens,
        "width": width,
        "scale": scale * _LOG2E,
        **_strides("query", query),
        **_strides("key", key),
        "padding_stride": tokens,
        "index_stride": index_stride,
        "INDEXED": query_index is not None,
        "BY_HEAD": head_index is not None,
        "PADDED": key_padding_mask is not None,
        "BLOCK_WIDTH": block_width,
        "KEPT": kept,
        "DIVISOR": divisor,
    }
    scores = torch.empty(shape, dtype=torch.float32, device=key.device)
    chosen = setting("attention_scores", key.device, tokens)
    block = power_of_2(tokens)
    # the tensor cores take a float32 as two numbers, and compute with each: as many registers as
    # 16 bytes would take
    size = 16 if key.dtype == torch.float32 else key.element_size()
    loads = 1 if divisor > 1 else 8  # of which a register has the address
    fits = kept and loads * block * block_width * size <= chosen["most_bytes"]
    with torch.cuda.device_of(key):
        if block <= longest("attention_scores", key.device) and fits:
            _at_once(scores, factor, common, block, chosen)
        else:
            _in_turns(scores, factor, common)
    return scores


def _strides(name: str, x: Tensor) -> dict[str, int]:
    # of (B, H, tokens, D), as the kernels name them
    ends = ("batch_stride", "head_stride", "stride", "feature_stride")
    return {f"{name}_{end}": step for end, step in zip(ends, x.stride(), strict=True)}


def _divisor(query: Tensor, key: Tensor) -> int:
    # _DIVISOR where a head's features can come 16 bytes at a time; 0 where they lie apart; else 1
    if key.shape[3] > 1 and (query.stride(3), key.stride(3)) != (1, 1):
        return 0
    steps = [key.shape[3]]
    for x in (query, key):
        steps += [step for size, step in zip(x.shape[:3], x.stride(), strict=False) if size > 1]
    return 1 if any(step % _DIVISOR for step in steps) else _DIVISOR


def _at_once(scores: Tensor, factor: float, common: dict, block: int, chosen: dict) -> None:
    """Writes the sums of keys that are read once."""
    batch, heads, selected = scores.shape[0], common["heads"], common["selected"]
    samples = turns.samples_apart(scores, heads, batch, scores.itemsize, turns.SCRATCH)
    each = min(samples or batch, batch)
    every = [
        turns.Turn(sample, min(each, batch - sample), 0, heads, 0, selected)
        for sample in range(0, batch, each)
    ]
    sums = turns.Sums(scores, every, samples > 0, factor, scores.dtype)
    for turn in every:
        attention_scores_kernel[(turn.samples, sums.programs(turn))](
            **common,
            **sums.place(turn),
            first_sample=turn.sample,
            BLOCK=block,
            BLOCK_ROWS=chosen["rows"],
            num_stages=chosen["num_stages"],
            **options(chosen["num_warps"], all_registers=True),
        )
        sums.add_up(turn)


def _in_turns(scores: Tensor, factor: float, common: dict) -> None:
    """Writes the sums of longer keys, by the statistics of rows."""
    batch, tokens = scores.shape[0], scores.shape[-1]
    heads, selected = common["heads"], common["selected"]
    of_features = triton.cdiv(common["width"], common["BLOCK_WIDTH"])  # blocks
    of_rows = setting("attention_scores.row_statistics", scores.device, of_features)
    of_columns = setting("attention_scores.column_sums", scores.device, of_features)
    blocks = triton.cdiv(tokens, of_columns["tokens"])
    of_splits = setting("attention_scores.splits", scores.device)
    splits = 2 ** (max(tokens // of_splits["tokens"], 1).bit_length() - 1)
    splits = min(splits, of_splits["splits"])
    split_tokens = triton.cdiv(triton.cdiv(tokens, of_rows["tokens"]), splits) * of_rows["tokens"]
    held = turns.SCRATCH // 2  # for the statistics, and for sums of heads
    samples = turns.samples_apart(scores, heads, batch * blocks, scores.itemsize, held)
    every = turns.turns(batch, heads, selected, held // (8 * splits), samples or None)
    largest = every[0]
    stats = scores.new_empty((largest.samples * largest.heads * splits * largest.rows, 2))
    sums = turns.Sums(scores, every, samples > 0, factor, scores.dtype)
    for turn in every:
        of_turn = {
            "stats": stats,
            "first_sample": turn.sample,
            "first_head": turn.head,
            "first_row": turn.row,
            "rows": turn.rows,
            "SPLITS": splits,
        }
        of_statistics = _blocks(of_rows, selected)
        number = triton.cdiv(turn.rows, of_statistics["BLOCK_ROWS"])
        row_statistics_kernel[(number * splits, turn.heads, turn.samples)](
            **common, **of_turn, split_tokens=split_tokens, **of_statistics
        )
        column_sums_kernel[(blocks, sums.programs(turn), turn.samples)](
            **common,
            **of_turn,
            **sums.place(turn),
            turn_heads=turn.heads,
            adds=sums.adds(turn),
            **_blocks(of_columns, selected),
        )
        sums.add_up(turn)


def _blocks(chosen: dict[str, int], selected: int) -> dict[str, int]:
    names = {"tokens": "BLOCK", "rows": "BLOCK_ROWS"}
    blocks = {names.get(name, name): x for name, x in chosen.items() if name != "up_to"}
    blocks["BLOCK_ROWS"] = min(blocks["BLOCK_ROWS"], power_of_2(selected))
    return blocks | options(chosen["num_warps"], all_registers=True)
