"""Memory guards: inputs laid out so that reading or writing beside them shows."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sma_fast.testing.comparisons import bits

LAYOUTS = ("packed", "aligned", "strided", "transposed", "expanded")


def guarded(inputs: dict, layout: str) -> tuple[dict, Callable[[], None]]:
    """Returns the inputs as views into sentinel-filled buffers, and a check that nothing changed.

    The sentinels are NaN for floats and large numbers for integers, so that reading one shows too.
    Layouts: "packed" (contiguous, at an odd offset), "aligned" (contiguous, where 16 bytes can be
    read at once), "strided" (every second element of every dimension), "transposed" (dimensions
    stored in reverse), "expanded" (the first row for all, at stride 0).
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
        first = 16 if layout == "aligned" else 17
        buffer = torch.full((x.numel() + 34,), sentinel, **new)
        view = buffer[first : first + x.numel()].view(x.shape)
    view.copy_(x.detach())
    return view, buffer
