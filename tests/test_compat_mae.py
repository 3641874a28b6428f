"""MAE's random masking, and which of the models that look like it `patch` takes."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from sma_fast import compat


def mae_formula(x, mask_ratio):
    """facebookresearch/mae's masking: shuffle the tokens by noise and cut the shuffled row."""
    order = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)
    place = order.argsort(dim=1)  # of each token in the shuffled row
    keep = int(x.shape[1] * (1 - mask_ratio))
    kept = x.take_along_dim(order[:, :keep, None], dim=1)
    return kept, (place >= keep).float(), place


class TinyMAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.mask_token = nn.Parameter(torch.randn(16))
        self.decoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def random_masking(self, x, mask_ratio):
        return mae_formula(x, mask_ratio)

    def forward(self, x, mask_ratio=0.75):
        visible, mask, ids_restore = self.random_masking(x, mask_ratio)
        visible = self.encoder(visible)
        fill = self.mask_token.expand(x.shape[0], x.shape[1] - visible.shape[1], -1)
        full = torch.cat([visible, fill], 1).take_along_dim(ids_restore[:, :, None], 1)
        error = (self.decoder(full) - x).square().mean(-1)
        return (error * mask).sum() / mask.sum(), mask


@pytest.mark.parametrize("mask_ratio", [0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("tokens", [1, 16, 63])
def test_mae_random_masking(tokens, mask_ratio):
    x = torch.randn(3, tokens, 5)
    torch.manual_seed(1)
    visible, mask, ids_restore = mae_formula(x, mask_ratio)
    torch.manual_seed(1)
    ours = compat.mae_random_masking(x, mask_ratio)
    assert [t.dtype for t in ours] == [visible.dtype, mask.dtype, ids_restore.dtype]
    assert [t.shape for t in ours] == [visible.shape, mask.shape, ids_restore.shape]
    assert torch.equal(ours[1], mask)
    fill = x.new_zeros(3, tokens - visible.shape[1], 5)
    for kept, ids in ((visible, ids_restore), (ours[0], ours[2])):
        restored = torch.cat([kept, fill], 1).take_along_dim(ids[:, :, None], 1)
        assert torch.equal(restored, x * (1 - mask[:, :, None]))


def test_patched_mae_computes_the_same():
    torch.manual_seed(0)
    model, x = nn.Sequential(TinyMAE()), torch.randn(4, 20, 16)

    def step(model):
        model.zero_grad()
        torch.manual_seed(3)
        loss, mask = model(x)
        loss.backward()
        return loss.detach(), mask, [p.grad.clone() for p in model.parameters()]

    before = step(model)
    rng = torch.get_rng_state()
    assert compat.patch(model) == ["0.random_masking"]
    assert torch.equal(torch.get_rng_state(), rng)
    assert model[0].random_masking is compat.mae_random_masking
    after = step(model)
    assert torch.equal(after[1], before[1])
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step(pickle.loads(pickle.dumps(model))), after)
    torch.testing.assert_close(step(copy.deepcopy(model)), after)
    assert compat.patch(model) == ["0.random_masking"]
    compat.unpatch(model)
    assert "random_masking" not in vars(model[0])
    torch.testing.assert_close(step(model), before, rtol=0, atol=0)


class OtherOrder(nn.Module):
    def random_masking(self, x, mask_ratio):
        visible, mask, ids_restore = mae_formula(x, mask_ratio)
        return ids_restore, visible, mask


class FourResults(nn.Module):
    def random_masking(self, x, mask_ratio):
        return *mae_formula(x, mask_ratio), None


class KeepsTheMasked(nn.Module):
    def random_masking(self, x, mask_ratio):
        visible, mask, ids_restore = mae_formula(x, mask_ratio)
        return visible, 1 - mask, ids_restore


class ReturnsTheOrder(nn.Module):
    def random_masking(self, x, mask_ratio):
        visible, mask, ids_restore = mae_formula(x, mask_ratio)
        return visible, mask, ids_restore.argsort(dim=1)


class KeepsTheFirst(nn.Module):
    def random_masking(self, x, mask_ratio):
        keep = int(x.shape[1] * (1 - mask_ratio))
        place = torch.arange(x.shape[1]).expand(x.shape[:2])
        return x[:, :keep], (place >= keep).float(), place


class HasADefault(nn.Module):
    def random_masking(self, x, mask_ratio=0.75):
        return mae_formula(x, mask_ratio)


class Fails(nn.Module):
    def random_masking(self, x, mask_ratio):
        return self.not_there(x)


class OtherArguments(nn.Module):
    def random_masking(self, pixel_values, noise=None):
        return mae_formula(pixel_values, 0.5)


@pytest.mark.parametrize(
    "kind",
    [
        OtherOrder,
        FourResults,
        KeepsTheMasked,
        ReturnsTheOrder,
        KeepsTheFirst,
        HasADefault,
        Fails,
        OtherArguments,
        nn.ReLU,
    ],
)
def test_patch_leaves_other_masking_alone(kind):
    model = nn.Sequential(kind(), nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="got Sequential.*random_masking.*ViTMAE.*PatchDropout.*lightly"
    ):
        compat.patch(model)
    assert "random_masking" not in vars(model[0])
    assert compat.patch(nn.Sequential(model, TinyMAE())) == ["1.random_masking"]


@pytest.mark.parametrize("model", [None, "model", TinyMAE])
def test_patch_takes_models_only(model):
    with pytest.raises(TypeError, match="model: got"):
        compat.patch(model)


def test_patch_names_an_empty_python_module():
    with pytest.raises(ValueError, match="model: got json"):
        compat.patch(json)
