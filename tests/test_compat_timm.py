"""timm's patch dropout, before and after `patch`."""

import copy
import pickle
import sys

import pytest
import torch
from peers import peer_file
from torch import nn

from sma_fast import compat


@pytest.fixture
def timm_dropout(monkeypatch):
    module = peer_file("timm", "timm/layers/patch_dropout.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # for pickle
    return module


@pytest.mark.parametrize("prob", [0.0, 0.25, 0.5, 0.99])
@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (17, 1), (17, 0), (20, 3), (3, 3)])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_timm_patch_dropout_forward(timm_dropout, tokens, prefix, prob, ordered, training):
    x = torch.randn(3, tokens, 4, requires_grad=True)
    weight = torch.randn(3, tokens, 4)  # follows each token, in whatever order they come
    results = []
    for function in (timm_dropout.patch_dropout_forward, compat.timm_patch_dropout_forward):
        torch.manual_seed(2)
        kept, keep = function(x, prob, prefix, ordered, training)
        if keep is None:
            assert kept is x and not (training and prob)
            results.append(None)
            continue
        patches, order = kept[:, prefix:], keep.argsort(dim=1)
        ids = torch.cat([torch.arange(prefix).expand(3, -1), keep + prefix], 1)
        (grad,) = torch.autograd.grad((kept * weight.take_along_dim(ids[:, :, None], 1)).sum(), x)
        results.append(
            (
                kept[:, :prefix],
                patches.take_along_dim(order[:, :, None], 1),
                keep.sort(dim=1).values,
                grad,
            )
        )
        if function is compat.timm_patch_dropout_forward or ordered:
            assert torch.equal(keep, keep.sort(dim=1).values)
    if results[0] is None:
        assert results[1] is None
    else:
        for theirs, ours in zip(*results, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype is theirs.dtype


@pytest.mark.parametrize("name", ["PatchDropout", "PatchDropoutWithIndices"])
def test_patched_timm_model_computes_the_same(timm_dropout, name):
    torch.manual_seed(0)
    drop = getattr(timm_dropout, name)(0.5, num_prefix_tokens=1)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.ModuleDict({"patch_drop": drop, "block": block}), torch.randn(4, 33, 16)

    def step(model):
        torch.manual_seed(4)
        kept = model["patch_drop"](x)
        if name == "PatchDropoutWithIndices":
            kept, keep = kept
            assert keep is None or torch.equal(kept[:, 1], x[torch.arange(4), 1 + keep[:, 0]])
        out = model["block"](kept)
        return kept.shape, torch.cat([out[:, 0], out.mean(1)], 1)  # class token, pooled patches

    before = step(model)
    assert compat.patch(model) == ["patch_drop.forward"] == compat.patch(model)
    shape, after = step(model)
    assert shape == before[0] == (4, 17, 16)
    torch.testing.assert_close(after, before[1], rtol=1e-5, atol=1e-5)
    compiled = torch.compile(model["patch_drop"], backend="eager", fullgraph=True)
    compiled(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(step(other)[1], after)
        other["patch_drop"].prob = 0.25  # its own, not the original's
        assert step(other)[0] == (4, 25, 16)
        assert step(model)[0] == shape
        assert step(other.eval())[0] == (4, 33, 16)
    compat.unpatch(model)
    assert torch.equal(step(model)[1], before[1])


def test_patch_respects_what_others_patched(timm_dropout):
    model = nn.Sequential(timm_dropout.PatchDropout())
    hooked = model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="model"):
        compat.patch(model)
    compat.unpatch(model)
    assert model[0].forward is hooked


def test_one_class_for_both_with_a_flag(timm_dropout):
    class PatchDropout(timm_dropout.PatchDropout):  # as timm had it
        def __init__(self, return_indices):
            super().__init__()
            self.return_indices = return_indices

        def forward(self, x):
            raise AssertionError("not replaced")

    for flag in (False, True):
        module = PatchDropout(flag)
        compat.patch(module)
        result = module(torch.randn(2, 9, 3))
        assert isinstance(result, tuple) is flag
