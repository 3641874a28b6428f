"""What bench.tune measures: for each entry of kernels.settings its candidates and its shapes."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench import shapes
from bench.shapes import FULL_BATCH, SHAPES, Shape

HALF, FLOAT = torch.bfloat16, torch.float32


class Case(NamedTuple):
    """One call of an op's launch, and the size that its class goes by."""

    op: str
    shape: Shape
    dtype: torch.dtype
    arguments: Callable[[Shape, str, torch.dtype], tuple]
    size: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape.name} B {self.shape.batch} {dtype}"


class Entry(NamedTuple):
    candidates: dict[str, tuple[int, ...]]  # tried one name after the other
    cases: tuple[Case, ...]  # of every class


def _shape(name: str, batch: int | None = None) -> Shape:
    shape = SHAPES[name]
    if shape.fixed_batch:
        return shape
    return dataclasses.replace(shape, batch=batch or FULL_BATCH[name])


def _sized(name: str, batch: int, **sizes: int) -> Shape:
    """Returns a named shape with some sizes changed, for classes that no named one has."""
    said = ", ".join(f"{size} {x}" for size, x in sizes.items())
    return dataclasses.replace(SHAPES[name], name=f"{name}, {said}", batch=batch, **sizes)


def _attention(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    query, key, index, head_index, padding = shapes.attention(shape, device, dtype)
    return query, key, index, head_index, padding, shape.head_dim**-0.5, "mean"


def _all_queries(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    query, key, *_ = shapes.attention(shape, device, dtype)
    return query, key, None, None, None, shape.head_dim**-0.5, "none"


def _map(logits: bool) -> Callable[[Shape, str, torch.dtype], tuple]:
    def arguments(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
        _, _, index, head_index, _ = shapes.attention(shape, device, dtype)
        size = (shape.batch, shape.heads, shape.queries, shape.tokens)
        map_ = torch.rand(size, device=device, dtype=dtype)
        return map_, index, head_index, "mean", logits

    return arguments


def _select(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    padding = shapes.padding(shape, device)
    return shapes.scores(shape, device), padding, None, shape.ratio, None, None, None, 0.0, None


def _draw(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    noise = torch.rand((shape.batch, shape.queries), device=device)
    return noise, shape.selected, None, None


def _ids(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Returns ids of the visible tokens (B, V), ascending, and ids_restore (B, N)."""
    order = shapes.scores(shape, device).argsort(1)
    visible = order[:, : shape.num_visible].sort(1).values
    masked = order[:, shape.num_visible :].sort(1).values
    return visible, torch.cat([visible, masked], 1).argsort(1)


def _gather(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    return shapes.tokens(shape, device, dtype), _ids(shape, device)[0]


def _gather_back(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    tokens, ids = _gather(shape, device, dtype)
    return tokens[:, : shape.num_visible].contiguous(), ids, shape.tokens


def _restore(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    tokens = shapes.tokens(shape, device, dtype)
    visible = tokens[:, : shape.num_visible].contiguous()
    return visible, _ids(shape, device)[1], tokens[0, 0].clone()


def _restore_back(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    ids = _ids(shape, device)[1]
    return shapes.tokens(shape, device, dtype), ids, shape.num_visible, None


def _random(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    return shapes.tokens(shape, device, dtype), shapes.scores(shape, device), shape.ratio


def _guided(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    query, key, index, head_index, padding = shapes.attention(shape, device, dtype)
    tokens = [shapes.tokens(shape, device, dtype)]
    scale = shape.head_dim**-0.5
    choice = (padding, None, shape.ratio, scale, "mean", True, 0.0, None)
    return query, key, tokens, index, head_index, *choice


def _informed(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    embeddings = shapes.embeddings(shape, device, dtype)
    return embeddings, shapes.scores(shape, device) > 0, None, "object"


def _cut(shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    return shapes.embeddings(shape, device, dtype), None, "ncut", 64, 1e-4


def _by_tokens(op: str, arguments: Callable, *shapes: str | Shape) -> tuple[Case, ...]:
    every = (_shape(shape) if isinstance(shape, str) else shape for shape in shapes)
    return tuple(Case(op, shape, FLOAT, arguments, shape.tokens) for shape in every)


def _of_bytes(op: str, arguments: Callable) -> tuple[Case, ...]:
    return (
        *(Case(op, _shape(name), HALF, arguments, 2) for name in ("vit", "protein")),
        *(Case(op, _shape(name), FLOAT, arguments, 4) for name in ("vit", "molecule")),
    )


def _of_heads(*widths: int) -> tuple[Case, ...]:
    return tuple(
        Case("attention_scores", _sized("image", 1, head_dim=x), dtype, _attention, dtype.itemsize)
        for dtype in (HALF, FLOAT)
        for x in widths
    )


_WARPS = {"num_warps": (1, 2, 4, 8, 16)}
_BLOCKS = {"block": (1024, 2048, 4096), "num_warps": (4, 8, 16)}
_COPY = {"elements": (1024, 2048, 4096, 8192), "width": (512, 1024, 2048), "num_warps": (4, 8)}
_LONG_KEYS = {"tokens": (32, 64, 128), "rows": (16, 32, 64), "num_warps": (4, 8)}
_FEATURES = {"kept": (16, 32, 64, 128), "width": (16, 32, 64)}
_TWICE = (
    *(Case("attention_scores", _shape(x), HALF, _attention, 1) for x in ("image", "long")),
    Case("attention_scores", _shape("colreduce-4096"), torch.float16, _all_queries, 1),
    Case("attention_scores", _shape("image"), FLOAT, _attention, 2),
    Case("attention_scores", _sized("image", 1, head_dim=256), HALF, _attention, 8),
)

ENTRIES = {
    "attention_scores": Entry(
        {"rows": (16, 32), "num_warps": (4, 8, 16), "num_stages": (1, 2, 3)},
        (
            Case("attention_scores", _shape("molecule"), HALF, _attention, 512),
            Case("attention_scores", _shape("colreduce-512"), torch.float16, _all_queries, 512),
            Case("attention_scores", _shape("protein"), HALF, _attention, 1024),
        ),
    ),
    "attention_scores.row_statistics": Entry({**_LONG_KEYS, "num_stages": (1, 2, 3, 4)}, _TWICE),
    "attention_scores.column_sums": Entry({**_LONG_KEYS, "num_stages": (1, 2, 3, 4)}, _TWICE),
    "attention_scores.splits": Entry(
        {"tokens": (2048, 4096, 8192, 16384), "splits": (4, 8, 16, 32)},
        (
            Case("attention_scores", _shape("long"), HALF, _attention),
            Case("attention_scores", _shape("image", 1), HALF, _attention),
        ),
    ),
    "attention_scores.features": Entry(_FEATURES, _of_heads(64, 128, 256)),
    "attention_scores.unaligned": Entry(_FEATURES, _of_heads(20, 36, 68)),
    "aggregate_attention": Entry(
        {"block": (256, 512, 1024, 2048), "num_warps": (2, 4, 8)},
        (
            Case("aggregate_attention", _shape("protein", 256), HALF, _map(False)),
            Case("aggregate_attention", _shape("image", 4), HALF, _map(False)),
        ),
    ),
    "aggregate_attention.logits": Entry(
        _WARPS,
        (
            Case("aggregate_attention", _shape("protein", 256), HALF, _map(True), 1024),
            *(
                Case(
                    *("aggregate_attention", _sized("protein", 64, tokens=tokens), HALF),
                    *(_map(True), tokens),
                )
                for tokens in (2048, 4096)
            ),
        ),
    ),
    "aggregate_attention.long": Entry(
        {"block": (512, 1024, 2048, 4096), "num_warps": (4, 8)},
        (Case("aggregate_attention", _shape("image", 4), HALF, _map(True)),),
    ),
    "sum_heads": Entry(
        {"programs": (132, 264, 528), "block": (256, 512, 1024), "num_warps": (2, 4, 8)},
        (
            Case("attention_scores", _shape("protein", 8), HALF, _attention),
            Case("attention_scores", _shape("protein", 64), HALF, _attention),
            Case("attention_scores", _shape("molecule", 8), HALF, _attention),
        ),
    ),
    "select_tokens": Entry(
        _WARPS,
        _by_tokens(
            *("select_tokens", _select, "physics", "vit", "molecule", "protein"),
            *(_sized("protein", 4096, tokens=2048), "4096x4096"),
        ),
    ),
    "select_tokens.long": Entry(
        _BLOCKS, (Case("select_tokens", _shape("image", 256), FLOAT, _select),)
    ),
    "select_tokens.few": Entry(
        {"programs": (132, 264, 528), **_BLOCKS},
        (
            Case("select_tokens", _shape("long"), FLOAT, _select),
            Case("select_tokens", _shape("64x262144"), FLOAT, _select),
            Case("select_tokens", _shape("image", 4), FLOAT, _select),
        ),
    ),
    "draw_queries": Entry(
        _WARPS,
        (
            Case("draw_queries", _shape("protein"), FLOAT, _draw, 256),
            Case("draw_queries", _shape("molecule"), FLOAT, _draw, 512),
            *(
                Case("draw_queries", _sized("molecule", 1024, queries=x), FLOAT, _draw, x)
                for x in (1024, 2048, 4096)
            ),
        ),
    ),
    "draw_queries.long": Entry(
        _BLOCKS,
        (
            Case(
                *("draw_queries", _sized("image", FULL_BATCH["image"], queries=36864), FLOAT),
                _draw,
            ),
        ),
    ),
    "random_masking": Entry(
        _WARPS,
        _by_tokens(
            *("random_masking", _random, "vit", "physics"),
            *(_sized("vit", 2**19 // tokens, tokens=tokens) for tokens in (512, 1024, 2048, 4096)),
        ),
    ),
    "random_masking.long": Entry(_BLOCKS, _by_tokens("random_masking", _random, "image")),
    "random_masking.rows": Entry(_COPY, _of_bytes("random_masking", _random)),
    "gather_tokens": Entry(_COPY, _of_bytes("gather_tokens", _gather)),
    "restore_tokens": Entry(_COPY, _of_bytes("restore_tokens", _restore)),
    "gather_tokens_backward": Entry(
        {"elements": (512, 1024, 2048, 4096, 8192), "num_warps": (2, 4, 8)},
        (
            Case("gather_tokens_backward", _shape("image"), HALF, _gather_back, 64),
            Case("gather_tokens_backward", _shape("vit"), HALF, _gather_back, 768),
        ),
    ),
    "gather_tokens_backward.notes": Entry(
        {"block": (64, 256, 1024), "num_warps": (1, 2, 4)},
        (Case("gather_tokens_backward", _shape("vit"), HALF, _gather_back),),
    ),
    "gather_tokens_backward.several": Entry(
        {"flags": (4, 16, 64)}, (Case("gather_tokens_backward", _shape("vit"), HALF, _gather_back),)
    ),
    "restore_tokens_backward": Entry(
        {"elements": (2048, 4096, 8192), "width": (128, 256), "rows": (64, 128, 256)},
        _of_bytes("restore_tokens_backward", _restore_back),
    ),
    "self_guided_masking": Entry(
        {"block": (256, 512, 1024), "num_warps": (2, 4, 8)},
        (Case("self_guided_masking", _shape("molecule", 64), HALF, _guided),),
    ),
    "bipartition": Entry(
        {"bytes": (32, 64, 128), "num_warps": (4, 8, 16)},
        tuple(
            Case("bipartition", _sized("patches", 2**16 // x, tokens=x), dtype, _cut, x)
            for x in (128, 196, 2048)
            for dtype in (HALF, FLOAT)
        ),
    ),
    "informed_scores": Entry(
        {"elements": (4096, 8192, 16384), "num_warps": (4, 8)},
        tuple(Case("informed_scores", _shape("patches"), x, _informed) for x in (HALF, FLOAT)),
    ),
}
