"""Inputs of the ops: each ``..._inputs`` returns the keyword arguments of one public function.

Letters in the shape comments: B batch, N tokens, V visible, K masked, H heads, M queries,
R selected queries, D head width, C token width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import sma_fast

PADDINGS = ("none", "left", "right", "scattered", "one full row", "every row full")


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padding_mask(pattern: str, batch: int, tokens: int) -> Tensor:
    """Returns (B, N) bool, True = padding; the row's share of padding differs from row to row."""
    position = torch.arange(tokens).expand(batch, -1)
    length = (torch.arange(batch) * 5 + tokens // 3) % (tokens + 1)  # of the padding
    if pattern == "none":
        return torch.zeros(batch, tokens, dtype=torch.bool)
    if pattern == "left":
        return position < length[:, None]
    if pattern == "right":
        return position >= tokens - length[:, None]
    if pattern == "scattered":
        return torch.rand(batch, tokens, generator=rng(3)) < 0.4
    if pattern == "one full row":
        return torch.arange(batch)[:, None].expand(-1, tokens) == batch // 2
    assert pattern == "every row full", pattern
    return torch.ones(batch, tokens, dtype=torch.bool)


SCORES = ("normal", "equal", "ties", "special", "last bits", "denormals", "huge")


def make_scores(kind: str, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Returns values that are hard to order, or plain normal ones."""
    generator, shape, info = rng(seed), tuple(shape), torch.finfo(dtype)
    if kind == "normal":
        return torch.randn(shape, generator=generator).to(dtype)
    if kind == "equal":
        return torch.full(shape, 0.25, dtype=dtype)
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)
    if kind == "special":
        nan = torch.tensor(math.nan)
        palette = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, info.tiny])
        palette = torch.cat([palette, torch.stack([nan, nan.copysign(torch.tensor(-1.0))])])
        return palette.to(dtype)[torch.randint(len(palette), shape, generator=generator)]
    steps = torch.randint(-60, 61, shape, generator=generator).to(dtype)
    if kind == "last bits":  # all leading bits shared
        return 1.0 + steps.abs() * info.eps
    if kind == "denormals":
        return steps * (info.smallest_normal * info.eps)
    assert kind == "huge", kind
    return steps.sign() * (info.max * (1 - steps.abs() * info.eps))


def _noise(batch: int, tokens: int) -> Tensor:
    # eighths, so that there are ties
    return torch.randint(8, (batch, tokens), generator=rng(5)).float() / 8


def _index_inputs(
    batch: int,
    heads: int,
    queries: int,
    selected: int | None,
    ragged: bool,
    shared: bool,
    by_head: bool,
) -> dict:
    # query_index: (B, R), or (R,) when shared, with -1 behind a row's own number when ragged
    inputs = {}
    width = queries
    if selected is not None:
        width = selected
        rows = 1 if shared else batch
        order = torch.rand(rows, queries, generator=rng(1)).argsort(dim=1)[:, :selected]
        if ragged:
            own = torch.arange(rows)[:, None] % (selected + 1)
            order = torch.where(torch.arange(selected) < own, order, -1)
        inputs["query_index"] = order[0] if shared else order
    if by_head:
        head = torch.randint(heads, (batch, width), generator=rng(2))
        if ragged:
            head = torch.where(inputs["query_index"].expand(batch, -1) < 0, -1, head)
        inputs["head_index"] = head
    return inputs


def attention_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    query_batch: int | None = None,
    heads: int = 2,
    kv_heads: int | None = None,
    queries: int = 5,
    tokens: int = 12,
    width: int = 8,
    selected: int | None = None,
    ragged: bool = False,
    shared: bool = False,
    by_head: bool = False,
    padding: str | None = None,
    values: str = "normal",
    **options: Any,
) -> dict:
    generator = rng(0)
    query_batch = batch if query_batch is None else query_batch
    query = torch.randn(query_batch, heads, queries, width, generator=generator)
    key = torch.randn(batch, kv_heads or heads, tokens, width, generator=generator)
    inputs = {"query": query, "key": key}
    inputs |= _index_inputs(batch, heads, queries, selected, ragged, shared, by_head)
    if padding is not None:
        inputs["key_padding_mask"] = padding_mask(padding, batch, tokens)
    if values == "equal":
        query.fill_(0.5), key.fill_(0.5)
    elif values == "sharp":  # nearly all attention on one key
        query *= 20
    elif values == "NaN query":
        query[:, :, :1] = math.nan
    elif values == "NaN key":
        key[:1, :1, -1:] = math.nan
    elif values == "inf key":
        key[:1, :, :1, :1] = math.inf
    elif values == "-inf keys":  # logits, all of the first sample's
        query[..., :1] = 1.0
        key[:1, ..., :1] = -math.inf
    elif values == "NaN padding":
        key.masked_fill_(inputs["key_padding_mask"][:, None, :, None], math.nan)
    else:
        assert values == "normal", values
    return inputs | {"query": query.to(dtype), "key": key.to(dtype)} | options


def aggregate_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    heads: int = 2,
    queries: int = 5,
    tokens: int = 12,
    selected: int | None = None,
    ragged: bool = False,
    shared: bool = False,
    by_head: bool = False,
    values: str = "normal",
    **options: Any,
) -> dict:
    attention = make_scores(values, (batch, heads, queries, tokens), dtype)
    if not options.get("logits") and values == "normal":
        attention = attention.float().softmax(dim=3).to(dtype)
    index = _index_inputs(batch, heads, queries, selected, ragged, shared, by_head)
    return {"attention": attention} | index | options


def cut_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 3,
    tokens: int = 12,
    width: int = 8,
    values: str = "clustered",
    padding: str | None = None,
    **options: Any,
) -> dict:
    """Embeddings for bipartition; "clustered": a third of the patches of another direction."""
    generator = rng(0)
    x = torch.randn(batch, tokens, width, generator=generator)
    if values == "clustered":
        centres = torch.randn(batch, 2, width, generator=generator)
        member = torch.rand(batch, tokens, generator=generator) < 0.3
        x = 0.3 * x + torch.where(member[:, :, None], centres[:, :1], centres[:, 1:])
    elif values == "equal":
        x = x[:, :1].expand(-1, tokens, -1).contiguous()
    elif values == "zero":
        x = torch.zeros_like(x)
    elif values == "a zero row":
        x[:, :1] = 0.0
    elif values == "huge":
        x *= 1e4
    elif values == "tiny":
        x *= 1e-4
    elif values == "alike":  # but for a hundredth
        x = 0.01 * x + torch.randn(batch, 1, width, generator=generator)
    else:
        assert values == "normal", values
    inputs = {"embeddings": x.to(dtype)}
    if padding is not None:
        inputs["key_padding_mask"] = padding_mask(padding, batch, tokens)
    return inputs | options


def informed_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 3,
    tokens: int = 12,
    labels: str = "random",
    **options: Any,
) -> dict:
    """Embeddings as `cut_inputs` makes them, and labels: "random", "none", "all" or "first"."""
    cut = {x: options.pop(x) for x in ("width", "values", "padding") if x in options}
    inputs = cut_inputs(dtype, batch=batch, tokens=tokens, **cut)
    chosen = torch.rand(batch, tokens, generator=rng(1)) < 0.3
    if labels == "none" or labels == "all":
        chosen = torch.full_like(chosen, labels == "all")
    elif labels == "first":
        chosen = (torch.arange(tokens) == 0).expand(batch, -1).contiguous()
    else:
        assert labels == "random", labels
    return inputs | {"labels": chosen} | options


def select_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 3,
    tokens: int = 12,
    scores: str = "normal",
    padding: str | None = None,
    rows: Sequence[int] | None = None,
    **options: Any,
) -> dict:
    inputs = {"scores": make_scores(scores, (batch, tokens), dtype)}
    if padding is not None:
        inputs["key_padding_mask"] = padding_mask(padding, batch, tokens)
    if rows is not None:
        inputs["num_masked"] = torch.tensor(rows, dtype=torch.int64)
    if options.get("random_fraction") or options.get("pool_ratio") is not None:
        inputs["noise"] = _noise(batch, tokens)
    return inputs | options


def draw_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 3,
    candidates: int = 12,
    padding: str | None = None,
    rows: Sequence[int] | None = None,
    **options: Any,
) -> dict:
    # draws have no dtype of their own
    inputs: dict[str, Any] = {"seed": 0}
    if rows is not None:
        inputs["num_queries"] = torch.tensor(rows, dtype=torch.int64)
    if padding is not None:
        inputs["padding_mask"] = padding_mask(padding, batch, candidates)
        return inputs | options
    return inputs | {"batch": batch, "num_candidates": candidates} | options


def gather_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 3,
    tokens: int = 12,
    visible: int = 7,
    trailing: Sequence[int] = (5,),
    ids: str = "any",
    values: str = "normal",
) -> dict:
    shape = (batch, tokens, *trailing)
    if ids == "any":  # repeated, in any order, some -1
        index = torch.randint(-1, max(tokens, 1), (batch, visible), generator=rng(1))
        index = index if tokens else index.fill_(-1)
    elif ids == "ascending":
        index = torch.rand(batch, tokens, generator=rng(1)).argsort(dim=1)[:, :visible]
        index = index.sort(dim=1).values
    else:
        assert ids == "nothing", ids
        index = torch.full((batch, visible), -1)
    if dtype.is_floating_point:
        return {"tokens": make_scores(values, shape, dtype), "ids": index}
    return {"tokens": torch.randint(0, 100, shape, generator=rng(0)).to(dtype), "ids": index}


def restore_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 3,
    tokens: int = 12,
    masked: int = 5,
    width: int = 5,
    fill: str = "token",
    ids: str = "selection",
    padding: str = "none",
    values: str = "normal",
) -> dict:
    visible = tokens - masked
    if ids == "selection":
        scores = torch.rand(batch, tokens, generator=rng(1))
        with sma_fast.use_backend("reference"):
            index = sma_fast.select_tokens(
                scores, num_masked=masked, key_padding_mask=padding_mask(padding, batch, tokens)
            ).ids_restore
    elif ids == "any":  # repeated, in any order, some -1
        index = torch.randint(-1, max(tokens, 1), (batch, tokens), generator=rng(1))
    else:
        assert ids == "nothing", ids
        index = torch.full((batch, tokens), -1)
    shape = (width,) if fill == "token" else (batch, masked, width)
    return {
        "visible": make_scores(values, (batch, visible, width), dtype),
        "ids_restore": index,
        "fill": make_scores(values, shape, dtype, seed=9),
    }


MANY_TOKENS = (
    (torch.bfloat16, (3,)),
    (torch.int64, ()),
    (torch.bool, (2, 2)),
    (torch.float64, (1,)),
    (torch.float16, (0,)),
)


def guided_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    mask_ratio: float = 0.4,
    num_queries: int | None = None,
    query_rows: Sequence[int] | None = None,
    query_padding: str | None = None,
    trailing: Sequence[int] = (5,),
    many: bool = False,
    random_fraction: float = 0.0,
    pool_ratio: float | None = None,
    mask_queries: bool = False,
    **options: Any,
) -> dict:
    inputs = attention_inputs(dtype, **options) | {"seed": 4}
    batch, _, tokens, _ = inputs["key"].shape
    queries = inputs["query"].shape[2]
    kinds = [(dtype, trailing), *(MANY_TOKENS if many else ())]
    inputs["tokens"] = [
        (torch.randn((batch, tokens, *shape), generator=rng(6)) * 4).to(kind)
        for kind, shape in kinds
    ]
    if "query_index" not in inputs:
        inputs["num_queries"] = num_queries if query_rows is None else torch.tensor(query_rows)
    if query_padding is not None:
        inputs["query_padding_mask"] = padding_mask(query_padding, batch, queries)
    return inputs | {
        "mask_ratio": mask_ratio,
        "mask_queries": mask_queries,
        "random_fraction": random_fraction,
        "pool_ratio": pool_ratio,
    }


def random_inputs(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 3,
    tokens: int = 12,
    trailing: Sequence[int] = (5,),
    mask_ratio: float = 0.4,
    noise: str = "eighths",
) -> dict:
    inputs = gather_inputs(dtype, batch=batch, tokens=tokens, trailing=trailing)
    inputs = {"tokens": inputs["tokens"], "mask_ratio": mask_ratio}
    if noise == "drawn":
        return inputs | {"seed": 7}
    if noise == "eighths":
        return inputs | {"noise": _noise(batch, tokens)}
    return inputs | {"noise": make_scores(noise, (batch, tokens), torch.float32)}
