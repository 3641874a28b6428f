"""The named shapes that every op is timed on, and builders of their inputs.

Inputs are seeded, so each run and each variant sees the same values; ragged lengths are spread
evenly over their range and shuffled, with padding on the right.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Shape:
    """One workload. Letters as in the contract; a shape without attention has no heads."""

    name: str
    batch: int  # B
    tokens: int  # N
    width: int  # C
    ratio: float
    heads: int = 0  # H
    queries: int = 0  # M
    selected: int = 0  # R
    head_dim: int = 0  # D
    latents: bool = False  # the queries are given once, with batch 1
    shortest: int | None = None  # ragged: lengths from `shortest` to `tokens`
    random_mix: bool = False  # one random head for each selected query
    fixed_batch: bool = False  # its batch belongs to its name

    @property
    def num_masked(self) -> int:
        """K, the width of ids_masked."""
        return round(self.ratio * self.tokens)

    @property
    def num_visible(self) -> int:
        """V, the width of ids_visible."""
        return self.tokens - self.num_masked


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "protein", batch=64, heads=8, queries=256, tokens=1024, head_dim=32, width=512,
            selected=38, ratio=0.15, latents=True, shortest=256,
        ),
        # The issue leaves the lengths open: 64 is the least that gives each row its 51 queries.
        Shape(
            "molecule", batch=32, heads=12, queries=512, tokens=512, head_dim=64, width=768,
            selected=51, ratio=0.30, shortest=64, random_mix=True,
        ),
        Shape(
            "physics", batch=256, heads=8, queries=28, tokens=28, head_dim=16, width=128,
            selected=2, ratio=0.20,
        ),
        Shape(
            "image", batch=4, heads=8, queries=512, tokens=36864, head_dim=64, width=64,
            selected=32, ratio=0.5, latents=True,
        ),
        Shape("vit", batch=256, tokens=196, width=768, ratio=0.75),
        Shape(
            "long", batch=1, heads=8, queries=512, tokens=262144, head_dim=64, width=256,
            selected=64, ratio=0.15, latents=True,
        ),
        # Patches of ViT-B/16, as bipartition gets them; the batch is that of its target.
        Shape("patches", batch=256, tokens=196, width=768, ratio=0.75),
        # A step of ViT-B/16 on pictures of 224 px.
        Shape("vit-b16", batch=8, tokens=196, width=768, ratio=0.75),
        # Small enough that only a call's fixed cost is left.
        Shape(
            "2x16", batch=2, heads=2, queries=16, tokens=16, head_dim=8, width=8,
            selected=2, ratio=0.25, fixed_batch=True,
        ),
        # A GPU's: rows to select from, and those of flash-colreduce's README (all queries).
        Shape("4096x4096", batch=4096, tokens=4096, width=1, ratio=0.15, fixed_batch=True),
        Shape("64x262144", batch=64, tokens=262144, width=1, ratio=0.15, fixed_batch=True),
        Shape(
            "colreduce-512", batch=8, heads=16, queries=512, tokens=512, head_dim=64, width=1,
            selected=512, ratio=0.15, fixed_batch=True,
        ),
        Shape(
            "colreduce-4096", batch=1, heads=32, queries=128, tokens=4096, head_dim=128, width=1,
            selected=128, ratio=0.15, fixed_batch=True,
        ),
    )
}  # fmt: skip

ATTENTION = ("protein", "molecule", "physics", "image", "long")
ALL = (*ATTENTION, "vit")
SELECT_ON_GPU = ("4096x4096", "64x262144")
COLREDUCE = ("colreduce-512", "colreduce-4096")
# `--batch full`: what fills a large GPU
FULL_BATCH = {
    "protein": 1024,
    "molecule": 1024,
    "physics": 65536,
    "image": 64,
    "vit": 4096,
    "long": 32,
    "patches": 256,
    "vit-b16": 256,
}
FIXED_LENGTH = tuple(name for name in ALL if SHAPES[name].shortest is None)


def scaled_down(shape: Shape) -> Shape:
    """Returns `shape` at a size that runs in milliseconds: for checks of function, not of speed."""
    tokens = min(shape.tokens, 64)
    return dataclasses.replace(
        shape,
        batch=min(shape.batch, 3),
        tokens=tokens,
        width=min(shape.width, 8),
        heads=min(shape.heads, 3),
        queries=min(shape.queries, tokens),
        selected=min(shape.selected, 4),
        head_dim=min(shape.head_dim, 8),
        shortest=shape.shortest and 16,
    )


class Attention(NamedTuple):
    """What the scores are made from."""

    query: Tensor  # (B or 1, H, M, D)
    key: Tensor  # (B, H, N, D)
    query_index: Tensor  # (B, R)
    head_index: Tensor | None  # (B, R) where the shape mixes heads at random
    padding: Tensor | None  # (B, N), True = padding


def attention(shape: Shape, device: str, dtype: torch.dtype) -> Attention:
    """Returns normal queries and keys, and queries drawn among those that are not padding."""
    draw = torch.Generator(device).manual_seed(1)
    batch = 1 if shape.latents else shape.batch
    query = torch.randn(
        (batch, shape.heads, shape.queries, shape.head_dim),
        device=device, dtype=dtype, generator=draw,
    )  # fmt: skip
    key = torch.randn(
        (shape.batch, shape.heads, shape.tokens, shape.head_dim),
        device=device, dtype=dtype, generator=draw,
    )  # fmt: skip
    pad = padding(shape, device)
    noise = torch.rand((shape.batch, shape.queries), device=device, generator=draw)
    if pad is not None and not shape.latents:
        noise = noise.masked_fill(pad, 2.0)
    query_index = noise.topk(shape.selected, largest=False).indices.sort().values
    head_index = None
    if shape.random_mix:
        head_index = torch.randint(shape.heads, query_index.shape, device=device, generator=draw)
    return Attention(query, key, query_index, head_index, pad)


def tokens(shape: Shape, device: str, dtype: torch.dtype) -> Tensor:
    """Returns the embeddings whose visible rows are gathered, (B, N, C)."""
    draw = torch.Generator(device).manual_seed(2)
    size = (shape.batch, shape.tokens, shape.width)
    return torch.randn(size, device=device, dtype=dtype, generator=draw)


def embeddings(shape: Shape, device: str, dtype: torch.dtype) -> Tensor:
    """Returns embeddings of falling weight along random directions, (B, N, C).

    On the CPU their cut takes 7 to 14 products; on real pictures those of a trained model 3 to 9.
    """
    draw = torch.Generator(device).manual_seed(5)
    rank = min(64, shape.width)
    size = (shape.batch, shape.tokens, rank)
    along = torch.randn(size, device=device, generator=draw)
    directions = torch.randn((shape.batch, rank, shape.width), device=device, generator=draw)
    weight = 0.92 ** torch.arange(rank, device=device)
    return ((along * weight) @ directions / rank**0.5).to(dtype)


def scores(shape: Shape, device: str) -> Tensor:
    """Returns uniform float32 scores, (B, N)."""
    draw = torch.Generator(device).manual_seed(3)
    return torch.rand((shape.batch, shape.tokens), device=device, generator=draw)


def padding(shape: Shape, device: str) -> Tensor | None:
    """Returns the (B, N) mask of a ragged shape, True = padding, or None."""
    if shape.shortest is None:
        return None
    lengths = torch.linspace(shape.shortest, shape.tokens, shape.batch).round()
    order = torch.randperm(shape.batch, generator=torch.Generator().manual_seed(4))
    return (torch.arange(shape.tokens) >= lengths[order][:, None]).to(device)
