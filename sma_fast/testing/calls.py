"""The ops by name, the types they take, and how a case becomes a call."""

from collections.abc import Callable
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
    "bipartition",
    "informed_scores",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE_DTYPES = DTYPES[:3]  # what every implementation of every op takes


@dataclass(frozen=True)
class Case:
    """Named inputs of one op: `build` returns the keyword arguments of the public function.

    A "seed" among them stands for a generator seeded so; "tokens" of self_guided_masking is a list,
    and "labels" of informed_scores are those of its bipartition.
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
    if op == "informed_scores":
        labels = inputs.pop("labels")
        inputs["bipartition"] = sma_fast.Bipartition(None, labels, None, None, None)
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
