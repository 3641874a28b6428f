"""Case tables, tolerances and memory guards, used by the tests and the benchmarks.

Imports torch and sma_fast only. `CASES[op]` lists named inputs of an op; `call` runs the public
function on them; `guarded` lays them out as views into sentinel-filled buffers; the ``assert_``
functions compare what an implementation returned with what it should have.

Letters in the shape comments: B batch, N tokens, V visible, K masked, H heads, M queries,
R selected queries, D head width, C token width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import sma_fast

OPS = (
    "attention_scores",
    "aggregate_attention",
    "select_tokens",
    "draw_queries",
    "gather_tokens",
    "restore_tokens",
    "self_guided_masking",
    "random_masking",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE_DTYPES = DTYPES[:3]  # what every implementation takes; float64 is the reference's
LAYOUTS = ("packed", "strided", "transposed", "expanded")
PADDINGS = ("none", "left", "right", "scattered", "one full row", "every row full")


@dataclass(frozen=True)
class Case:
    """Named inputs of one op: `build` returns the keyword arguments of the public function.

    A "seed" among them stands for a generator seeded so; "tokens" of self_guided_masking is a list.
    """

    name: str
    builder: Callable[..., dict]
    options: dict = field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float32) -> dict:
        return self.builder(dtype, **self.options)

    def __str__(self) -> str:
        return self.name


def call(op: str, inputs: dict) -> Any:
    """Returns what the public function `op` gives for the inputs of a case."""
    inputs = dict(inputs)
    if "seed" in inputs:
        inputs["generator"] = torch.Generator(device_of(inputs)).manual_seed(inputs.pop("seed"))
    function = getattr(sma_fast, op)
    if op == "self_guided_masking":
        query, key, tokens = (inputs.pop(name) for name in ("query", "key", "tokens"))
        return function(query, key, *tokens, **inputs)
    return function(**inputs)


def device_of(inputs: dict) -> torch.device:
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    return tensors[0].device if tensors else torch.device(inputs.get("device", "cpu"))


def to_device(inputs: dict, device: str) -> dict:
    moved = pytree.tree_map_only(Tensor, lambda x: x.to(device), inputs)
    return moved | {"device": device} if "num_candidates" in inputs else moved


# Builders: each returns the keyword arguments of one public function.


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
        return torch.rand(batch, tokens, generator=_rng(3)) < 0.4
    if pattern == "one full row":
        return torch.arange(batch)[:, None].expand(-1, tokens) == batch // 2
    assert pattern == "every row full", pattern
    return torch.ones(batch, tokens, dtype=torch.bool)


SCORES = ("normal", "equal", "ties", "special", "last bits", "denormals", "huge")


def make_scores(kind: str, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Returns values that are hard to order, or plain normal ones."""
    rng, shape, info = _rng(seed), tuple(shape), torch.finfo(dtype)
    if kind == "normal":
        return torch.randn(shape, generator=rng).to(dtype)
    if kind == "equal":
        return torch.full(shape, 0.25, dtype=dtype)
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=rng).to(dtype)
    if kind == "special":
        nan = torch.tensor(math.nan)
        palette = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, info.tiny])
        palette = torch.cat([palette, torch.stack([nan, nan.copysign(torch.tensor(-1.0))])])
        return palette.to(dtype)[torch.randint(len(palette), shape, generator=rng)]
    steps = torch.randint(-60, 61, shape, generator=rng).to(dtype)
    if kind == "last bits":  # all leading bits shared
        return 1.0 + steps.abs() * info.eps
    if kind == "denormals":
        return steps * (info.smallest_normal * info.eps)
    assert kind == "huge", kind
    return steps.sign() * (info.max * (1 - steps.abs() * info.eps))


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(batch: int, tokens: int) -> Tensor:
    # eighths, so that there are ties
    return torch.randint(8, (batch, tokens), generator=_rng(5)).float() / 8


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
        order = torch.rand(rows, queries, generator=_rng(1)).argsort(dim=1)[:, :selected]
        if ragged:
            own = torch.arange(rows)[:, None] % (selected + 1)
            order = torch.where(torch.arange(selected) < own, order, -1)
        inputs["query_index"] = order[0] if shared else order
    if by_head:
        head = torch.randint(heads, (batch, width), generator=_rng(2))
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
    rng = _rng(0)
    query_batch = batch if query_batch is None else query_batch
    query = torch.randn(query_batch, heads, queries, width, generator=rng)
    key = torch.randn(batch, kv_heads or heads, tokens, width, generator=rng)
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
        index = torch.randint(-1, max(tokens, 1), (batch, visible), generator=_rng(1))
        index = index if tokens else index.fill_(-1)
    elif ids == "ascending":
        index = torch.rand(batch, tokens, generator=_rng(1)).argsort(dim=1)[:, :visible]
        index = index.sort(dim=1).values
    else:
        assert ids == "nothing", ids
        index = torch.full((batch, visible), -1)
    if dtype.is_floating_point:
        return {"tokens": make_scores(values, shape, dtype), "ids": index}
    return {"tokens": torch.randint(0, 100, shape, generator=_rng(0)).to(dtype), "ids": index}


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
        scores = torch.rand(batch, tokens, generator=_rng(1))
        with sma_fast.use_backend("reference"):
            index = sma_fast.select_tokens(
                scores, num_masked=masked, key_padding_mask=padding_mask(padding, batch, tokens)
            ).ids_restore
    elif ids == "any":  # repeated, in any order, some -1
        index = torch.randint(-1, max(tokens, 1), (batch, tokens), generator=_rng(1))
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
        (torch.randn((batch, tokens, *shape), generator=_rng(6)) * 4).to(kind)
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


# The tables.


def _cases(builder: Callable[..., dict], table: dict[str, dict]) -> tuple[Case, ...]:
    return tuple(Case(name, builder, options) for name, options in table.items())


_INDEX = {  # what attention_scores and aggregate_attention share
    "all queries": {},
    "empty batch": {"batch": 0, "selected": 2},
    "no tokens": {"tokens": 0, "selected": 2},
    "no queries": {"queries": 0},
    "none selected": {"selected": 0},
    "one token": {"tokens": 1},
    "63 tokens": {"tokens": 63, "selected": 3},
    "1000 tokens": {"batch": 1, "tokens": 1000, "selected": 3},
    "15 selected": {"queries": 20, "selected": 15},
    "16 selected": {"queries": 20, "selected": 16},
    "17 selected": {"queries": 20, "selected": 17},
    "38 of 40 selected": {"queries": 40, "selected": 38, "tokens": 33},
    "-1 behind": {"batch": 5, "selected": 3, "ragged": True},
    "one index for all rows": {"selected": 3, "shared": True},
    "only -1": {"batch": 1, "selected": 4, "ragged": True, "shared": True},
    "sum of heads": {"selected": 3, "head_reduce": "sum"},
    "heads apart": {"selected": 3, "head_reduce": "none"},
    "heads apart, one head": {"heads": 1, "head_reduce": "none"},
    "head of each query": {"selected": 3, "by_head": True},
    "head of each of all queries": {"by_head": True, "head_reduce": "sum"},
    "head of each query, -1 behind": {"batch": 5, "selected": 4, "ragged": True, "by_head": True},
    "7 heads": {"heads": 7, "batch": 1},
}
_ATTENTION = {
    "latents given once": {"query_batch": 1, "batch": 3},
    "latents given once, own index": {"query_batch": 1, "batch": 4, "selected": 2, "ragged": True},
    "latents given once, batch 0": {"query_batch": 1, "batch": 0},
    "grouped keys": {"heads": 6, "kv_heads": 2, "selected": 3},
    "grouped keys, one": {"heads": 4, "kv_heads": 1, "by_head": True, "selected": 3},
    "width 1": {"width": 1},
    "width 3": {"width": 3},
    "width 33": {"width": 33, "selected": 4},
    "width 64": {"width": 64, "tokens": 65},
    "width 128": {"width": 128, "batch": 1, "selected": 2},
    "padding left": {"batch": 5, "padding": "left"},
    "padding right": {"batch": 5, "padding": "right", "selected": 3},
    "padding scattered": {"batch": 5, "tokens": 63, "padding": "scattered"},
    "padding, 1000 tokens": {"batch": 2, "tokens": 1000, "padding": "scattered", "selected": 17},
    "one row of padding": {"batch": 3, "padding": "one full row"},
    "one row of padding, heads apart": {"padding": "one full row", "head_reduce": "none"},
    "all padding": {"padding": "every row full", "selected": 2},
    "no padding in the mask": {"padding": "none"},
    "padding, no tokens": {"tokens": 0, "padding": "left"},
    "scale": {"scale": 0.75},
    "scale 0": {"scale": 0.0},
    "negative scale": {"scale": -0.5},
    "all equal": {"values": "equal"},
    "sharp": {"values": "sharp"},
    "NaN query": {"values": "NaN query", "head_reduce": "none"},
    "NaN query not selected": {"values": "NaN query", "batch": 4, "selected": 2, "ragged": True},
    "NaN key": {"values": "NaN key", "selected": 3},
    "NaN key beside padding": {"values": "NaN key", "padding": "left", "batch": 3},
    "inf key": {"values": "inf key", "selected": 3},
    "NaN padding": {"values": "NaN padding", "padding": "scattered", "batch": 4},
    "NaN padding, full row": {"values": "NaN padding", "padding": "one full row", "batch": 3},
    "float latents by head": {"query_batch": 1, "by_head": True, "padding": "left", "batch": 3},
}
_AGGREGATE = {
    "logits": {"logits": True},
    "logits, selected": {"logits": True, "selected": 3, "tokens": 63},
    "logits, heads apart": {"logits": True, "head_reduce": "none", "tokens": 65},
    "logits by head": {"logits": True, "by_head": True, "selected": 3},
    "logits, one token": {"logits": True, "tokens": 1},
    "logits, no tokens": {"logits": True, "tokens": 0},
    "logits, 1000 tokens": {"logits": True, "tokens": 1000, "batch": 1, "selected": 4},
    "special": {"values": "special", "tokens": 40},
    "special, selected": {"values": "special", "selected": 2, "head_reduce": "none"},
    "special logits": {"values": "special", "logits": True, "tokens": 4, "batch": 4},
    "equal logits": {"values": "equal", "logits": True},
}
_SELECT = {
    "ratio": {"mask_ratio": 0.4},
    "ratio 0": {"mask_ratio": 0.0},
    "ratio 1": {"mask_ratio": 1.0},
    "ratio, an int": {"mask_ratio": 1},
    "half to even, 5": {"mask_ratio": 0.5, "tokens": 5},
    "half to even, 7": {"mask_ratio": 0.5, "tokens": 7},
    "empty batch": {"mask_ratio": 0.4, "batch": 0},
    "no tokens": {"mask_ratio": 0.4, "tokens": 0},
    "no tokens, number": {"num_masked": 0, "tokens": 0},
    "no tokens, padding": {"mask_ratio": 0.4, "tokens": 0, "padding": "left"},
    "K = 0": {"num_masked": 0},
    "K = 1": {"num_masked": 1},
    "K = N": {"num_masked": 12},
    "one token": {"num_masked": 1, "tokens": 1},
    "one token, none": {"mask_ratio": 0.5, "tokens": 1},
    "63 tokens": {"num_masked": 20, "tokens": 63},
    "64 tokens": {"num_masked": 21, "tokens": 64},
    "65 tokens": {"num_masked": 64, "tokens": 65},
    "1000 tokens": {"mask_ratio": 0.15, "tokens": 1000},
    "all equal": {"mask_ratio": 0.4, "scores": "equal"},
    "all equal, 1000": {"mask_ratio": 0.75, "scores": "equal", "tokens": 1000},
    "ties": {"mask_ratio": 0.4, "scores": "ties", "tokens": 100},
    "special": {"mask_ratio": 0.3, "scores": "special", "tokens": 40},
    "special, most": {"mask_ratio": 0.9, "scores": "special", "tokens": 200},
    "last bits": {"mask_ratio": 0.37, "scores": "last bits", "tokens": 1000},
    "denormals": {"mask_ratio": 0.37, "scores": "denormals", "tokens": 1000},
    "huge": {"mask_ratio": 0.37, "scores": "huge", "tokens": 1000},
    "long": {"mask_ratio": 0.15, "batch": 1, "tokens": 40_000},
    "long, last bits": {"mask_ratio": 0.37, "scores": "last bits", "batch": 1, "tokens": 20_001},
    "long, padding": {"mask_ratio": 0.5, "padding": "scattered", "batch": 2, "tokens": 9_999},
    "padding left": {"mask_ratio": 0.4, "padding": "left", "batch": 7},
    "padding right": {"mask_ratio": 0.5, "padding": "right", "batch": 7},
    "padding scattered": {"mask_ratio": 0.4, "padding": "scattered", "tokens": 63},
    "padding, special": {"mask_ratio": 0.6, "padding": "scattered", "scores": "special"},
    "one row of padding": {"mask_ratio": 0.4, "padding": "one full row"},
    "all padding": {"num_masked": 5, "padding": "every row full"},
    "number above a row's tokens": {"num_masked": 11, "padding": "left", "batch": 7},
    "rows": {"rows": [0, 12, 5]},
    "rows beyond N": {"rows": [99, 0, 13]},
    "rows, width": {"rows": [0, 12, 5], "max_masked": 6},
    "rows, width 0": {"rows": [0, 12, 5], "max_masked": 0},
    "rows, padding": {"rows": [3, 12, 5], "padding": "right"},
    "random share": {"mask_ratio": 0.5, "random_fraction": 0.4},
    "random share, all": {"mask_ratio": 0.5, "random_fraction": 1.0, "tokens": 63},
    "random share, half to even": {"num_masked": 5, "random_fraction": 0.5},
    "random share, padding": {"mask_ratio": 0.5, "random_fraction": 0.5, "padding": "scattered"},
    "random share, special": {"mask_ratio": 0.5, "random_fraction": 0.3, "scores": "special"},
    "random share, rows": {"rows": [0, 12, 5], "random_fraction": 0.5, "max_masked": 9},
    "random share, 1000": {"mask_ratio": 0.3, "random_fraction": 0.5, "tokens": 1000},
    "random share, K = N": {"num_masked": 12, "random_fraction": 0.5},
    "pool": {"mask_ratio": 0.25, "pool_ratio": 0.5},
    "pool of all": {"mask_ratio": 0.25, "pool_ratio": 1.0, "tokens": 63},
    "pool of just enough": {"mask_ratio": 0.25, "pool_ratio": 0.25},
    "pool smaller than K": {"num_masked": 8, "pool_ratio": 0.25},
    "pool, padding": {"mask_ratio": 0.25, "pool_ratio": 0.5, "padding": "left", "batch": 7},
    "pool, special": {"mask_ratio": 0.25, "pool_ratio": 0.6, "scores": "special", "tokens": 50},
    "pool, 1000": {"mask_ratio": 0.15, "pool_ratio": 0.4, "tokens": 1000, "scores": "ties"},
    "pool, rows": {"rows": [0, 12, 5], "pool_ratio": 0.5},
}
_DRAW = {
    "some": {"num_queries": 4},
    "none asked, one drawn": {"num_queries": 0},
    "all": {"num_queries": 12},
    "one of one": {"num_queries": 1, "candidates": 1},
    "no candidates": {"num_queries": 0, "candidates": 0},
    "empty batch": {"num_queries": 4, "batch": 0},
    "63 candidates": {"num_queries": 20, "candidates": 63},
    "1000 candidates": {"num_queries": 38, "candidates": 1000, "batch": 8},
    "long": {"num_queries": 64, "candidates": 20_001, "batch": 1},
    "padding left": {"num_queries": 6, "padding": "left", "batch": 7},
    "padding right": {"num_queries": 6, "padding": "right", "batch": 7},
    "padding scattered": {"num_queries": 6, "padding": "scattered"},
    "one row of padding": {"num_queries": 6, "padding": "one full row"},
    "all padding": {"num_queries": 6, "padding": "every row full"},
    "rows": {"rows": [0, 12, 5]},
    "rows beyond M": {"rows": [99, 1, 13]},
    "rows, padding": {"rows": [5, 3, 12], "padding": "right"},
    "rows, a row of padding": {"rows": [5, 3, 12], "padding": "one full row"},
}
_GATHER = {
    "any ids": {},
    "ascending ids": {"ids": "ascending"},
    "only -1": {"ids": "nothing"},
    "empty batch": {"batch": 0},
    "no tokens": {"tokens": 0},
    "nothing visible": {"visible": 0},
    "all visible": {"ids": "ascending", "visible": 12},
    "one token": {"tokens": 1, "visible": 1},
    "more ids than tokens": {"tokens": 3, "visible": 40},
    "63 tokens": {"tokens": 63, "visible": 20, "trailing": (64,)},
    "1000 tokens": {"tokens": 1000, "visible": 250, "trailing": (33,), "ids": "ascending"},
    "long": {"batch": 1, "tokens": 9_000, "visible": 5_000, "trailing": (3,)},
    "no width": {"trailing": ()},
    "width 0": {"trailing": (0,)},
    "width 1": {"trailing": (1,)},
    "width 768": {"trailing": (768,)},
    "two more dims": {"trailing": (3, 4)},
    "three more dims": {"trailing": (2, 1, 3)},
    "special": {"values": "special"},
    "denormals": {"values": "denormals"},
}
_RESTORE = {
    "mask token": {},
    "mask rows": {"fill": "rows"},
    "any ids": {"ids": "any"},
    "any ids, rows": {"ids": "any", "fill": "rows"},
    "only -1": {"ids": "nothing"},
    "only -1, rows": {"ids": "nothing", "fill": "rows"},
    "padding": {"padding": "scattered"},
    "padding, rows": {"padding": "scattered", "fill": "rows"},
    "a row of padding": {"padding": "one full row"},
    "all padding": {"padding": "every row full", "fill": "rows"},
    "empty batch": {"batch": 0},
    "empty batch, rows": {"batch": 0, "fill": "rows"},
    "no tokens": {"tokens": 0, "masked": 0},
    "no tokens, rows": {"tokens": 0, "masked": 0, "fill": "rows"},
    "K = 0": {"masked": 0},
    "K = 0, rows": {"masked": 0, "fill": "rows"},
    "K = 1, rows": {"masked": 1, "fill": "rows"},
    "K = N": {"masked": 12},
    "K = N, rows": {"masked": 12, "fill": "rows"},
    "one token": {"tokens": 1, "masked": 1},
    "63 tokens": {"tokens": 63, "masked": 40, "width": 64},
    "1000 tokens": {"tokens": 1000, "masked": 750, "width": 33},
    "1000 tokens, rows": {"tokens": 1000, "masked": 750, "width": 16, "fill": "rows"},
    "width 0": {"width": 0},
    "width 1, rows": {"width": 1, "fill": "rows"},
    "width 768": {"width": 768},
    "special": {"values": "special"},
    "special, rows": {"values": "special", "fill": "rows"},
}
_GUIDED = {
    "index given": {"selected": 3},
    "index for all rows": {"selected": 3, "shared": True},
    "index, -1 behind": {"selected": 4, "ragged": True, "batch": 5},
    "drawn": {"num_queries": 3},
    "drawn, rows": {"query_rows": [1, 5]},
    "drawn, rows and padding": {"query_rows": [0, 3, 5], "batch": 3, "query_padding": "left"},
    "drawn, a row of padding": {"num_queries": 3, "batch": 3, "query_padding": "one full row"},
    "empty batch": {"batch": 0, "num_queries": 3},
    "no tokens": {"tokens": 0, "num_queries": 3},
    "no queries": {"queries": 0, "num_queries": 0},
    "ratio 0": {"mask_ratio": 0.0, "num_queries": 2},
    "ratio 1": {"mask_ratio": 1.0, "num_queries": 2},
    "one token": {"tokens": 1, "num_queries": 2},
    "63 tokens": {"tokens": 63, "num_queries": 2},
    "1000 tokens": {"tokens": 1000, "num_queries": 5, "mask_ratio": 0.15, "heads": 3},
    "long": {"tokens": 20_001, "batch": 1, "num_queries": 3, "width": 4, "trailing": (2,)},
    "17 queries": {"queries": 40, "num_queries": 17, "tokens": 65, "width": 33},
    "no token tensors' width": {"trailing": (), "num_queries": 2},
    "many token tensors": {"many": True, "num_queries": 2, "padding": "scattered"},
    "wide tokens": {"trailing": (3, 40), "num_queries": 2},
    "all equal": {"values": "equal", "num_queries": 2},
    "sharp": {"values": "sharp", "num_queries": 1, "tokens": 100},
    "sum of heads": {"head_reduce": "sum", "num_queries": 2},
    "random heads": {"head_reduce": "random", "num_queries": 3, "heads": 4},
    "head of each query": {"by_head": True, "selected": 3, "heads": 4},
    "latents given once": {"query_batch": 1, "batch": 3, "num_queries": 3},
    "grouped keys": {"heads": 6, "kv_heads": 2, "num_queries": 3},
    "padding left": {"padding": "left", "batch": 5, "num_queries": 3},
    "padding right": {"padding": "right", "batch": 5, "num_queries": 3, "mask_ratio": 0.5},
    "padding scattered": {"padding": "scattered", "tokens": 100, "num_queries": 3},
    "one row of padding": {"padding": "one full row", "batch": 3, "num_queries": 3},
    "all padding": {"padding": "every row full", "num_queries": 3},
    "NaN padding": {"padding": "scattered", "values": "NaN padding", "num_queries": 3},
    "NaN key": {"values": "NaN key", "num_queries": 3},
    "masked queries": {"queries": 12, "num_queries": 3, "mask_queries": True},
    "more queries than masked": {"queries": 12, "num_queries": 9, "mask_queries": True},
    "masked queries, padding": {
        "queries": 12,
        "num_queries": 3,
        "mask_queries": True,
        "padding": "left",
        "batch": 5,
    },
    "masked queries, -1 behind": {
        "queries": 12,
        "selected": 4,
        "ragged": True,
        "mask_queries": True,
        "batch": 5,
    },
    "masked queries, random heads": {
        "queries": 63,
        "tokens": 63,
        "num_queries": 7,
        "mask_queries": True,
        "head_reduce": "random",
        "padding": "scattered",
        "random_fraction": 0.5,
    },
    "random share": {"num_queries": 3, "random_fraction": 0.5},
    "random share, padding": {"num_queries": 3, "random_fraction": 0.5, "padding": "right"},
    "pool": {"num_queries": 3, "pool_ratio": 0.7, "tokens": 63},
    "scale": {"num_queries": 3, "scale": 0.3},
}
_RANDOM = {
    "given noise": {},
    "drawn noise": {"noise": "drawn"},
    "equal noise": {"noise": "equal"},
    "special noise": {"noise": "special", "tokens": 40},
    "ratio 0": {"mask_ratio": 0.0},
    "ratio 1": {"mask_ratio": 1.0},
    "rounds down": {"mask_ratio": 0.9, "tokens": 10},
    "empty batch": {"batch": 0},
    "no tokens": {"tokens": 0},
    "one token": {"tokens": 1},
    "63 tokens": {"tokens": 63, "mask_ratio": 0.75},
    "1000 tokens": {"tokens": 1000, "mask_ratio": 0.75, "trailing": (33,)},
    "long": {"batch": 1, "tokens": 20_001, "trailing": (2,), "noise": "drawn"},
    "last bits": {"tokens": 1000, "noise": "last bits"},
    "denormals": {"tokens": 1000, "noise": "denormals"},
    "no width": {"trailing": ()},
    "width 0": {"trailing": (0,)},
    "two more dims": {"trailing": (3, 4)},
}
CASES: dict[str, tuple[Case, ...]] = {
    "attention_scores": _cases(attention_inputs, _INDEX | _ATTENTION),
    "aggregate_attention": _cases(aggregate_inputs, _INDEX | _AGGREGATE),
    "select_tokens": _cases(select_inputs, _SELECT),
    "draw_queries": _cases(draw_inputs, _DRAW),
    "gather_tokens": _cases(gather_inputs, _GATHER),
    "restore_tokens": _cases(restore_inputs, _RESTORE),
    "self_guided_masking": _cases(guided_inputs, _GUIDED),
    "random_masking": _cases(random_inputs, _RANDOM),
}


# Plain formulas, written a second time and sample by sample, so that the oracle has one of its own.


def plain_attention_scores(
    query: Tensor,
    key: Tensor,
    query_index: Tensor | None = None,
    head_index: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    head_reduce: str = "mean",
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Returns attention scores computed in `dtype`, sample by sample over its valid keys only."""
    batch, heads = key.shape[0], query.shape[1]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    scores = torch.zeros(batch, heads, key.shape[2], dtype=dtype, device=key.device)
    for b in range(batch):
        valid = slice(None) if key_padding_mask is None else ~key_padding_mask[b]
        keys = key[b].to(dtype).repeat_interleave(heads // key.shape[1], dim=0)[:, valid]
        rows = query[min(b, query.shape[0] - 1)].to(dtype)  # (H, M, D)
        attention = (rows @ keys.transpose(1, 2) * scale).softmax(dim=2)
        scores[b][:, valid] = _sum_selected(attention, query_index, head_index, b)
    return _reduce_heads(scores, head_index, head_reduce)


def plain_aggregate_attention(
    attention: Tensor,
    query_index: Tensor | None = None,
    head_index: Tensor | None = None,
    head_reduce: str = "mean",
    logits: bool = False,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the sum over the selected rows of a map, computed in `dtype`, sample by sample."""
    attention = attention.to(dtype)
    if logits:
        attention = attention.softmax(dim=3)
    batch, heads, _, tokens = attention.shape
    scores = torch.zeros(batch, heads, tokens, dtype=dtype, device=attention.device)
    for b in range(batch):
        scores[b] = _sum_selected(attention[b], query_index, head_index, b)
    return _reduce_heads(scores, head_index, head_reduce)


def _sum_selected(
    attention: Tensor, query_index: Tensor | None, head_index: Tensor | None, b: int
) -> Tensor:
    # (H, M, N) of sample b -> (H, N); with head_index each query counts in its own head only
    if query_index is None:
        queries = list(range(attention.shape[1]))
    else:
        queries = (query_index if query_index.dim() == 1 else query_index[b]).tolist()
    if head_index is None:
        return attention[:, [m for m in queries if m >= 0]].sum(dim=1)
    total = torch.zeros_like(attention[:, 0] if attention.shape[1] else attention.sum(dim=1))
    for m, head in zip(queries, head_index[b].tolist(), strict=True):
        if m >= 0:
            total[head] += attention[head, m]
    return total


def _reduce_heads(scores: Tensor, head_index: Tensor | None, head_reduce: str) -> Tensor:
    if head_reduce == "none":
        return scores
    total = scores.sum(dim=1)
    return total if head_reduce == "sum" or head_index is not None else total / scores.shape[1]


# Comparisons.


def error_bound(exact: Tensor, plain: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Returns the largest error allowed: twice that of plain PyTorch, plus a few roundings.

    Both errors are against float64 (`exact`). Half-precision inputs are compared with a plain
    implementation that computes in float32, as the contract's scores are float32: one in half
    precision would let almost anything pass.
    """
    finite = exact.isfinite() & plain.isfinite()
    if not finite.any():
        return 0.0
    error = (plain.double() - exact)[finite].abs().max().item()
    rounding = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps)
    return 2 * error + rounding * exact[finite].abs().max().item()


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor) -> float:
    """Asserts that `actual` is as near to float64 as plain PyTorch, NaN and inf in the same places.

    Returns the error that was allowed.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert actual.is_contiguous(), f"strides {actual.stride()} of shape {tuple(actual.shape)}"
    bound = error_bound(exact, plain, actual.dtype)
    finite = exact.isfinite()
    torch.testing.assert_close(
        actual[~finite].double(), exact[~finite], rtol=0, atol=0, equal_nan=True
    )
    if finite.any():
        error = (actual[finite].double() - exact[finite]).abs().max().item()
        assert error <= bound, f"error {error:.3g}, allowed is {bound:.3g}"
    return bound


def bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8) if x.numel() else torch.empty(0)


def assert_same(actual: Any, expected: Any) -> None:
    """Asserts that two outputs are the same bits, in shape and dtype too, and contiguous."""
    actual, expected = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(actual) == len(expected)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        if y is None:
            assert x is None
            continue
        assert x.shape == y.shape, f"output {i}: {tuple(x.shape)}, not {tuple(y.shape)}"
        assert x.dtype == y.dtype, f"output {i}: {x.dtype}, not {y.dtype}"
        assert x.is_contiguous(), f"output {i}: strides {x.stride()} of shape {tuple(x.shape)}"
        if not torch.equal(bits(x), bits(y)):
            raise AssertionError(f"output {i}: got\n{x}\nnot\n{y}")


def assert_consistent(
    selection: sma_fast.TokenSelection, key_padding_mask: Tensor | None = None
) -> None:
    """Asserts that every field of a selection follows from its mask, row by row."""
    mask, ids_visible, ids_masked, ids_restore, num_visible, num_masked = (
        x.tolist() for x in selection
    )
    width_visible, width_masked = selection.ids_visible.shape[1], selection.ids_masked.shape[1]
    for b, row in enumerate(mask):
        padding = [False] * len(row) if key_padding_mask is None else key_padding_mask[b].tolist()
        hidden = [j for j, m in enumerate(row) if m]
        seen = [j for j, (m, p) in enumerate(zip(row, padding, strict=True)) if not (m or p)]
        assert not any(padding[j] for j in hidden), f"row {b}: masks padding"
        assert ids_visible[b] == seen + [-1] * (width_visible - len(seen))
        assert ids_masked[b] == hidden + [-1] * (width_masked - len(hidden))
        place = {j: i for i, j in enumerate(seen)}
        place |= {j: width_visible + i for i, j in enumerate(hidden)}
        assert ids_restore[b] == [place.get(j, -1) for j in range(len(row))]
        assert (num_visible[b], num_masked[b]) == (len(seen), len(hidden))


def assert_same_selection(
    actual: sma_fast.TokenSelection, expected: sma_fast.TokenSelection
) -> None:
    """Asserts two selections of the same scores equal, bit for bit."""
    for name, x, y in zip(expected._fields, actual, expected, strict=True):
        try:
            assert_same(x, y)
        except AssertionError as difference:
            raise AssertionError(f"{name}: {difference}") from None


def assert_selection_up_to_near_ties(
    actual: sma_fast.TokenSelection,
    expected: sma_fast.TokenSelection,
    scores: Tensor,  # (B, N), those that `expected` was selected by
    bound: float,
) -> None:
    """Asserts two selections equal but for tokens whose scores are within 2 `bound` of the edge.

    The edge of a row is the lowest score that `expected` masks: two scores that are each off by
    up to `bound` may change places when they are 2 `bound` apart.
    """
    for name in ("num_visible", "num_masked"):
        assert_same(getattr(actual, name), getattr(expected, name))
    assert torch.equal(actual.ids_restore < 0, expected.ids_restore < 0), "padding differs"
    if scores.shape[1] == 0:
        return
    scores = scores.double().nan_to_num(nan=-1.0, posinf=math.inf, neginf=-math.inf)
    edge = scores.masked_fill(~expected.mask, math.inf).amin(dim=1, keepdim=True)
    moved = actual.mask != expected.mask
    distance = (scores - edge).abs()[moved]
    assert bool((distance <= 2 * bound).all()), (
        f"{int(moved.sum())} tokens differ, up to {distance.max():.3g} from the edge; "
        f"allowed is {2 * bound:.3g}"
    )


def chi_square(counts: torch.Tensor, draws: int) -> float:
    """Returns how far `counts` of places drawn without replacement are from uniform.

    The variance of a count is draws p (1 - p); with k places the sum has k - 1 degrees of freedom.
    """
    places = len(counts)
    p = counts.sum().item() / draws / places
    spread = (counts.double() - draws * p).square().sum() / (draws * p * (1 - p))
    return spread.item() * (places - 1) / places


def assert_reproducible(function: Callable, *tensors: Tensor) -> None:
    """Asserts the same bits from every run, for 1, 2 and 4 threads, and sample by sample."""
    expected, threads = function(*tensors), torch.get_num_threads()
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            assert_same(function(*tensors), expected)
            samples = zip(*(x.split(1) for x in tensors), strict=True)
            parts = [pytree.tree_leaves(function(*sample)) for sample in samples]
            assert_same(
                [torch.cat(outputs) for outputs in zip(*parts, strict=True)],
                pytree.tree_leaves(expected),
            )
    finally:
        torch.set_num_threads(threads)


def gradients(function: Callable, leaves: Sequence[Tensor], layout: str = "packed") -> list[Tensor]:
    """Returns the gradients of `leaves`, and those of the outputs' weights through them.

    The second ones are zero unless the backward pass is differentiable too. `function` takes the
    leaves and returns a list of outputs; the weights are quarters, the same in every dtype.
    """
    rng = _rng(8)

    def weights(like: Tensor) -> Tensor:
        w = torch.randint(-8, 9, like.shape, generator=rng) / 4
        return w.to(like.dtype).to(like.device)

    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    laid_out, assert_unchanged = guarded({"weights": [weights(x) for x in outputs]}, layout)
    first = [w.requires_grad_() for w in laid_out["weights"]]
    to_leaves = torch.autograd.grad(outputs, leaves, first, create_graph=True)
    to_weights = torch.autograd.grad(to_leaves, first, [weights(x) for x in to_leaves])
    assert_unchanged()
    return [*to_leaves, *to_weights]


def assert_gradients(
    function: Callable,
    leaves: Sequence[Tensor],
    layout: str = "packed",
    oracle: Callable | None = None,  # the same function, in terms of another op
) -> None:
    """Asserts `gradients` of the backend in force as near to float64 as the oracle's."""
    actual = gradients(function, leaves, layout)
    with sma_fast.use_backend("reference"):
        exact = gradients(oracle or function, [x.double() for x in leaves], layout)
        plain = gradients(oracle or function, leaves, layout)
    for x, y, z in zip(actual, exact, plain, strict=True):
        assert_close(x.detach(), y.detach(), z.detach())


def assert_compiles_once(
    function: Callable,
    arguments: Sequence[tuple],  # more than one set, of different sizes
    compiler: str = "aot_eager",
) -> None:
    """Asserts that one graph without breaks answers all sizes, with eager's bits.

    Of the draws too; and of the gradients of arguments that require them.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = None
    for args in arguments:
        assert_same(_run_and_differentiate(compiled, args), _run_and_differentiate(function, args))
        graphs = counter.frame_count if graphs is None else graphs
    assert counter.frame_count == graphs > 0, "another size compiled again"


def _run_and_differentiate(function: Callable, args: tuple) -> list:
    torch.manual_seed(11)
    outputs = pytree.tree_leaves(function(*args))
    leaves = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor) and x.requires_grad]
    if leaves:
        loss = sum((x * x).sum() for x in outputs if isinstance(x, Tensor) and x.requires_grad)
        outputs += torch.autograd.grad(loss, leaves)
    return outputs


# Memory guards.


def guarded(inputs: dict, layout: str) -> tuple[dict, Callable[[], None]]:
    """Returns the inputs as views into sentinel-filled buffers, and a check that nothing changed.

    The sentinels are NaN for floats and large numbers for integers, so that reading one shows too.
    Layouts: "packed" (contiguous, at an odd offset), "strided" (every second element of every
    dimension), "transposed" (dimensions stored in reverse), "expanded" (the first row for all, at
    stride 0).
    """
    buffers = []

    def lay_out(x: Tensor) -> Tensor:
        view, buffer = _view_into_sentinels(x, layout)
        buffers.append((buffer, buffer.clone()))
        return view.requires_grad_() if x.requires_grad else view

    views = pytree.tree_map_only(Tensor, lay_out, inputs)

    def check() -> None:
        for buffer, before in buffers:
            assert torch.equal(bits(buffer), bits(before)), "wrote into an input or beside it"

    return views, check


def _view_into_sentinels(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    if layout == "expanded" and x.dim() > 0 and x.shape[0] > 1:
        view, buffer = _view_into_sentinels(x[:1], "packed")
        return view.expand(x.shape), buffer
    new = {"dtype": x.dtype, "device": x.device}
    sentinel: Any = math.nan if x.is_floating_point() or x.is_complex() else True
    if not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        sentinel = torch.iinfo(x.dtype).max - 3
    if layout == "strided":
        buffer = torch.full([2 * n + 3 for n in x.shape], sentinel, **new)
        view = buffer[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)]
    elif layout == "transposed":
        buffer = torch.full([n + 2 for n in reversed(x.shape)], sentinel, **new)
        view = buffer[tuple(slice(1, 1 + n) for n in reversed(x.shape))]
        view = view.permute(*reversed(range(x.dim())))
    else:
        buffer = torch.full((x.numel() + 34,), sentinel, **new)
        view = buffer[17 : 17 + x.numel()].view(x.shape)
    view.copy_(x.detach())
    return view, buffer
