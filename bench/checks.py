"""Is an answer right? Each check raises AssertionError; nothing wrong is ever timed.

The truth is `sma_fast`'s reference on the same inputs. Scores are compared by tolerance, and masks
made from computed scores outside the band of near ties; everything that follows from a mask is
compared exactly.
"""

import torch
from torch import Tensor

from sma_fast import TokenSelection

# Share of a row's largest score that a score may be off: sma_fast computes in float32 whatever the
# inputs, plain PyTorch rounds its logits to the type of the inputs.
OURS = 2e-4
PEERS = {torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tolerance(is_ours: bool, dtype: torch.dtype) -> float:
    return OURS if is_ours else PEERS[dtype]


def scores(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = (got - wanted).abs().amax(1)
    bound = tolerance * wanted.abs().amax(1)
    assert (error <= bound).all(), f"scores are off by up to {float((error / bound).max()):.1f} x"


def mask(got: Tensor, wanted: Tensor, by: Tensor, padding: Tensor | None, tolerance: float) -> None:
    """`by`: the reference's scores. A tolerance of 0 allows ties to fall either way."""
    assert torch.equal(got.sum(1), wanted.sum(1)), "wrong number of masked tokens"
    assert padding is None or not (got & padding).any(), "padding is masked"
    least = by.masked_fill(~wanted, float("inf")).amin(1, keepdim=True)  # of the masked scores
    band = tolerance * by.abs().amax(1, keepdim=True)
    assert ((by - least).abs() <= band)[got != wanted].all(), "wrong tokens are masked"


def ids_visible(got: Tensor, mask: Tensor, padding: Tensor | None) -> None:
    visible = ~mask if padding is None else ~(mask | padding)
    assert torch.equal(got, _ids(visible, got.shape[1])), "ids_visible does not follow the mask"


def selection(got: TokenSelection, padding: Tensor | None) -> None:
    """Every field of a TokenSelection follows from its mask."""
    visible = ~got.mask if padding is None else ~(got.mask | padding)
    ids_visible(got.ids_visible, got.mask, padding)
    width = got.ids_visible.shape[1]
    assert torch.equal(got.ids_masked, _ids(got.mask, got.ids_masked.shape[1])), "ids_masked"
    place = torch.where(visible, visible.cumsum(1) - 1, -1)
    place = torch.where(got.mask, width + got.mask.cumsum(1) - 1, place)
    assert torch.equal(got.ids_restore, place), "ids_restore does not follow the mask"
    assert torch.equal(got.num_visible.long(), visible.sum(1)), "num_visible"
    assert torch.equal(got.num_masked.long(), got.mask.sum(1)), "num_masked"


def same_selection(got: TokenSelection, wanted: TokenSelection) -> None:
    """Bit for bit, as the contract asks where scores are given."""
    for name, one, other in zip(got._fields, got, wanted, strict=True):
        assert torch.equal(one, other), f"{name} is not the reference's"


def rows(got: Tensor, source: Tensor, ids: Tensor, *, zeros: bool) -> None:
    """Row j of `got` is row ids[j] of `source`; `zeros`: and zeros where the id is -1."""
    row, place = (ids >= 0).nonzero(as_tuple=True)
    assert torch.equal(got[row, place], source[row, ids[row, place]]), "wrong rows"
    assert not zeros or not got[ids < 0].any(), "rows without an id are not zeros"


def drawn(got: Tensor, number: int, candidates: int, padding: Tensor | None) -> None:
    assert got.shape[1] == number
    assert (got[:, 1:] > got[:, :-1]).all(), "queries repeat or are out of order"
    assert ((got >= 0) & (got < candidates)).all(), "queries out of range"
    assert padding is None or not padding.gather(1, got).any(), "padding was drawn"


def _ids(member: Tensor, width: int) -> Tensor:
    """Returns the indices of the members of each row, ascending, -1 behind. (B, width)"""
    token = torch.arange(member.shape[1], device=member.device)
    ids = torch.where(member, token, member.shape[1]).sort(1).values
    ids = torch.nn.functional.pad(ids, (0, max(width - ids.shape[1], 0)), value=member.shape[1])
    return torch.where(ids == member.shape[1], -1, ids)[:, :width]
