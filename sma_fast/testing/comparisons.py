"""What an implementation returned against what it should have: ``assert_...``.

Used by the tests, the benchmarks (bench/checks.py) and the demo (training/demo_backends.py).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import sma_fast

# Share of a row's largest score that a float32 score may be off, whatever the inputs' dtype: sums
# of a few softmax rows, in any order.
SCORE_TOLERANCE = 1e-5


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
    """Asserts two selections equal, but for masks as `assert_mask_up_to_near_ties` allows."""
    for name in ("num_visible", "num_masked"):
        assert_same(getattr(actual, name), getattr(expected, name))
    assert torch.equal(actual.ids_restore < 0, expected.ids_restore < 0), "padding differs"
    assert_mask_up_to_near_ties(actual.mask, expected.mask, scores, bound)


def score_bound(scores: Tensor, tolerance: float = SCORE_TOLERANCE) -> Tensor:
    """Returns (B, 1), how far the scores (B, N) of each row may be off."""
    return tolerance * scores.abs().amax(dim=1, keepdim=True)


def assert_scores_close(
    actual: Tensor, expected: Tensor, tolerance: float = SCORE_TOLERANCE
) -> None:
    """Asserts that float32 scores (B, N) are as near as `score_bound` says to the reference's."""
    assert actual.dtype == expected.dtype, f"{actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
    if expected.shape[1] == 0:
        return
    error = (actual - expected).abs()
    assert bool((error <= score_bound(expected, tolerance)).all()), (
        f"scores differ by up to {error.max():.2g}"
    )


def assert_mask_up_to_near_ties(
    actual: Tensor,  # (B, N) bool
    expected: Tensor,  # (B, N) bool
    scores: Tensor,  # (B, N), those that `expected` was selected by
    bound: float | Tensor,  # or (B, 1)
) -> None:
    """Asserts two masks equal but for tokens whose scores are within 2 `bound` of the edge.

    The edge of a row is the lowest score that `expected` masks: two scores that are each off by
    up to `bound` may change places when they are 2 `bound` apart. With a bound of 0 equal scores
    may fall either way.
    """
    assert torch.equal(actual.sum(dim=1), expected.sum(dim=1)), "another number of masked tokens"
    if scores.shape[1] == 0:
        return
    scores = scores.double().nan_to_num(nan=-1.0, posinf=math.inf, neginf=-math.inf)
    edge = scores.masked_fill(~expected, math.inf).amin(dim=1, keepdim=True)
    moved = actual != expected
    distance = (scores - edge).abs()
    assert not bool((moved & ~(distance <= 2 * bound)).any()), (
        f"{int(moved.sum())} tokens differ, up to {distance[moved].max():.3g} from the edge; "
        f"allowed is {float(torch.as_tensor(2 * bound).max()):.3g}"
    )


def chi_square(counts: torch.Tensor, draws: int) -> float:
    """Returns how far `counts` of places drawn without replacement are from uniform.

    The variance of a count is draws p (1 - p); with k places the sum has k - 1 degrees of freedom.
    """
    places = len(counts)
    p = counts.sum().item() / draws / places
    spread = (counts.double() - draws * p).square().sum() / (draws * p * (1 - p))
    return spread.item() * (places - 1) / places
