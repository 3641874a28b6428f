"""lightly's random token mask, before and after `patch`."""

import inspect

import pytest
import torch
from peers import peer_file

from sma_fast import compat


@pytest.fixture
def lightly_utils():
    return peer_file("lightly", "lightly/models/utils.py")


@pytest.mark.parametrize("mask_class_token", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.6, 0.75, 1.0])
@pytest.mark.parametrize("size", [(2, 0), (2, 1), (0, 9), (3, 197)])
def test_lightly_random_token_mask(lightly_utils, size, mask_ratio, mask_class_token):
    results = []
    for function in (lightly_utils.random_token_mask, compat.lightly_random_token_mask):
        torch.manual_seed(7)
        results.append(function(size, mask_ratio, mask_class_token, device="cpu"))
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs.sort(dim=1).values)


def test_lightly_defaults_and_patch(lightly_utils):
    theirs = lightly_utils.random_token_mask
    assert (
        inspect.signature(theirs).parameters.keys()
        == inspect.signature(compat.lightly_random_token_mask).parameters.keys()
    )
    names = [f"{lightly_utils.__name__}.random_token_mask"]
    torch.manual_seed(0)
    before = theirs(size=(4, 50))
    assert compat.patch(lightly_utils) == names == compat.patch(lightly_utils)
    assert lightly_utils.random_token_mask is compat.lightly_random_token_mask
    torch.manual_seed(0)
    after = lightly_utils.random_token_mask(size=(4, 50))
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b.sort(dim=1).values)
    # what lightly does with them: the same tokens, each in the same place again
    tokens = torch.randn(4, 50, 3)
    for keep, mask in (before, after):
        rebuilt = lightly_utils.set_at_index(tokens, mask, lightly_utils.get_at_index(tokens, mask))
        assert torch.equal(rebuilt, tokens)
        assert torch.equal(torch.cat([keep, mask], 1).sort().values, torch.arange(50).expand(4, -1))
    compat.unpatch(lightly_utils)
    assert lightly_utils.random_token_mask is theirs
