"""Is an answer right? Each check raises AssertionError; nothing wrong is ever timed.

The truth is `sma_fast`'s reference on the same inputs. Scores are compared by tolerance, and masks
made from computed scores outside the band of near ties; everything that follows from a mask is
compared exactly. Whole selections are compared by `sma_fast.testing`.
"""

import torch
from torch import Tensor

from sma_fast.testing import SCORE_TOLERANCE, assert_mask_up_to_near_ties, score_bound

# sma_fast computes in float32 whatever the inputs, plain PyTorch rounds its logits to their type.
PEERS = {torch.float32: SCORE_TOLERANCE, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tolerance(is_ours: bool, dtype: torch.dtype) -> float:
    return SCORE_TOLERANCE if is_ours else PEERS[dtype]


def scores(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    error, bound = (got - wanted).abs(), score_bound(wanted, tolerance)
    assert (error <= bound).all(), f"scores are off by up to {float((error / bound).max()):.1f} x"


def mask(got: Tensor, wanted: Tensor, by: Tensor, padding: Tensor | None, tolerance: float) -> None:
    """`by`: the reference's scores. A tolerance of 0 allows ties to fall either way."""
    assert padding is None or not (got & padding).any(), "padding is masked"
    assert_mask_up_to_near_ties(got, wanted, by, score_bound(by, tolerance))


def ids_visible(got: Tensor, mask: Tensor, padding: Tensor | None) -> None:
    visible = ~mask if padding is None else ~(mask | padding)
    assert torch.equal(got, _ids(visible, got.shape[1])), "ids_visible does not follow the mask"


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
