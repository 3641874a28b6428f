"""Policies for pictures: one call, one number of masked patches, each what its paper says."""

import copy
import math

import pytest
import torch

from sma_fast import _draws, ops
from sma_fast.masking import (
    POLICIES,
    AttMaskMasking,
    HPMMasking,
    RandomMasking,
    picture_policy,
)
from sma_fast.masking.hpm import ranking_loss
from sma_fast.models import MAEConfig, MAEForPretraining

N = 16
NAMES = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight")  # of HPM's predictor


def build(**changes) -> MAEForPretraining:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
    heads = {"num_attention_heads": 3, "decoder_num_attention_heads": 2}
    return MAEForPretraining(MAEConfig(**(sizes | decoder | heads | changes)))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=rng(1))


@pytest.mark.parametrize("name", POLICIES)
def test_one_training_loop_takes_them_all(name: str) -> None:
    model, pixels = build(mask_ratio=0.7), pictures()
    policy = picture_policy(name, model.config)
    learns = isinstance(policy, torch.nn.Module)
    parameters = [*model.parameters(), *(policy.parameters() if learns else ())]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for progress in (0.0, 0.5, 1.0):
        selection = policy(model, pixels, progress, rng())
        assert isinstance(selection, ops.TokenSelection)
        assert selection.num_masked.tolist() == [N - int(N * 0.3)] * 4  # as the model's own mask
        assert selection.ids_visible.shape == (4, int(N * 0.3))
        assert not selection.mask.requires_grad
        again = policy(model, pixels, progress, rng())
        assert all(map(torch.equal, selection, again))
        out = model(pixels, selection)
        assert torch.equal(out.mask, selection.mask)
        optimizer.zero_grad()
        (out.loss + (policy.loss(out) if learns else 0.0)).backward()
        optimizer.step()
        assert all(p.grad.isfinite().all() for p in parameters)
        assert all(p.grad.any() for p in parameters)
    assert picture_policy(name, model.config, mask_ratio=0.5)(model, pixels).mask.sum() == 4 * 8
    assert picture_policy(name, model.config)(model, pixels[:0]).mask.shape == (0, N)


def test_random_is_the_models_own_mask() -> None:
    model, pixels = build(), pictures()
    assert torch.equal(
        RandomMasking()(model, pixels, generator=rng()).mask,
        model(pixels, generator=rng()).mask,
    )
    many = RandomMasking(0.25)(model, torch.empty(4000, 3, 16, 16), generator=rng()).mask.float()
    deviation = math.sqrt(0.25 * 0.75 / 4000)
    assert (many.mean(dim=0) - 0.25).abs().max() < 5 * deviation


@pytest.mark.parametrize("name", ["random", "attmask-hint", "hpm"])
def test_draws_of_a_row_are_its_own(name: str) -> None:
    model, pixels, seeds = build(), pictures(), torch.arange(4)
    policy = picture_policy(name, model.config)
    with _draws.by_row(seeds):
        whole = policy(model, pixels, 0.5).mask
    with _draws.by_row(seeds[2:]):
        assert torch.equal(policy(model, pixels[2:], 0.5).mask, whole[2:])


# AttMask


def test_attmask_high_masks_what_the_class_token_attends_to() -> None:
    model, pixels = build(), pictures()
    for layer in (0, -1):
        scores = model.attention_of_class_token(pixels, layer).mean(1)
        mask = AttMaskMasking(layer=layer)(model, pixels).mask
        for row, hidden in zip(scores, mask, strict=True):
            assert hidden.sum() == 12 and row[hidden].min() >= row[~hidden].max()


def test_attmask_hint_shows_a_few_of_the_highest() -> None:
    scores = torch.rand(2000, 100, generator=rng(1))
    rank = scores.argsort(1, descending=True).argsort(1)
    high = AttMaskMasking().select(scores, 60).mask
    mask = AttMaskMasking("hint", hint_share=0.1).select(scores, 60, rng()).mask
    assert (mask.sum(1) == 60).all()
    assert torch.equal(high, rank < 60)
    assert ((mask & ~high).sum(1) == 6).all() and (mask <= (rank < 66)).all()
    shown = ~mask & (rank < 10)  # 6 of the highest 10
    assert (shown.sum(1) == 6).all() and mask[(rank >= 10) & (rank < 66)].all()
    share = torch.stack([shown[rank == place].float().mean() for place in range(10)])
    assert (share - 0.6).abs().max() < 5 * math.sqrt(0.24 / 2000)
    assert torch.equal(AttMaskMasking("hint", hint_share=0.0).select(scores, 60).mask, high)


# HPM


def test_hpm_share_grows_and_is_of_the_highest_predictions() -> None:
    model, pixels = build(mask_ratio=0.5), pictures(400)
    policy = HPMMasking(24, initial_share=0.0, final_share=0.5)
    with torch.no_grad():
        predicted = policy.predictor(model.embeddings(pixels)).squeeze(2)
    rank = predicted.argsort(1, descending=True).argsort(1)
    for progress, top in ((0.0, 0), (0.5, 2), (1.0, 4)):
        mask = policy(model, pixels, progress, rng()).mask
        assert mask[rank < top].all()
        rest = mask[rank >= top].float().mean()  # drawn uniformly
        assert rest == (8 - top) / (N - top)
        share = torch.stack([mask[rank == place].float().mean() for place in range(top, N)])
        assert (share - rest).abs().max() < 5 * math.sqrt(0.25 / 400)
    assert policy.share(0.25) == 0.125


def test_ranking_loss() -> None:
    predicted = torch.tensor([[1.0, 3.0, 2.0, 9.0], [0.0, 5.0, 0.0, 0.0]], requires_grad=True)
    loss = torch.tensor([[1.0, 2.0, 4.0, 9.0], [7.0, 7.0, 0.0, 0.0]])
    real = torch.tensor([[True, True, True, False], [True, True, False, False]])
    # worse - better: 3-1, 2-1, 2-3; the second row's two are equally hard
    expected = sum(math.log1p(math.exp(-x)) for x in (2.0, 1.0, -1.0)) / 3
    actual = ranking_loss(predicted, loss, real)
    assert actual.item() == pytest.approx(expected)
    actual.backward()
    assert predicted.grad[0, :3].all() and not predicted.grad[0, 3] and not predicted.grad[1].any()
    assert ranking_loss(predicted, torch.ones(2, 4), real) == 0


def test_hpm_copies_and_saves_between_mask_and_loss() -> None:
    model, pixels = build(), pictures()
    policy = HPMMasking(24)
    out = model(pixels, policy(model, pixels))
    teacher = copy.deepcopy(policy)
    assert policy.state_dict().keys() == {f"predictor.{name}" for name in NAMES}
    assert policy.loss(out) == teacher.loss(out)
    with pytest.raises(ValueError, match="output: "):
        policy.loss(out)


def test_hpm_learns_which_patches_are_hard() -> None:
    model, pixels = build(mask_ratio=0.5), pictures(64)
    hard = torch.rand(64, 4, 4, generator=rng(2)) < 0.5  # noisy patches among plain ones
    hard = hard.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    pixels = torch.where(hard, pixels, 0.1 * pixels)
    torch.manual_seed(0)
    policy = HPMMasking(24)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        selection = policy(model, pixels, 0.0, rng(step))
        loss = policy.loss(model(pixels, selection))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None for p in model.parameters())  # nothing of it reaches the model
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5 > 0.35 > losses[-1]
    sure = HPMMasking(24, initial_share=1.0, final_share=1.0)
    sure.load_state_dict(policy.state_dict())
    mask = sure(model, pixels).mask
    is_hard = hard[:, 0, ::4, ::4].flatten(1)
    assert mask[is_hard].float().mean() > 0.85 > 0.25 > mask[~is_hard].float().mean()


# Wrong arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomMasking(1.5), "mask_ratio: got 1.5, allowed is"),
        (lambda: AttMaskMasking("low"), "kind: got 'low', allowed is 'high', 'hint'"),
        (lambda: AttMaskMasking(hint_share=-0.1), "hint_share: got -0.1"),
        (lambda: AttMaskMasking(mask_ratio=2.0), "mask_ratio: got 2.0"),
        (lambda: HPMMasking(8, mask_ratio="x"), "mask_ratio: got 'x'"),
        (lambda: HPMMasking(8, final_share=2.0), "final_share: got 2.0"),
        (lambda: HPMMasking(0), "width: got 0, allowed is an int of at least 1"),
        (lambda: HPMMasking(8, hidden_width=-3), "hidden_width: got -3, allowed is an int of at"),
        (lambda: HPMMasking(8, hidden_width=0), "hidden_width: got 0, allowed is an int of at"),
        (lambda: HPMMasking(8).share(1.5), "progress: got 1.5"),
        (lambda: picture_policy("block", MAEConfig()), "name: got 'block', allowed is 'selfmae'"),
        (
            lambda: AttMaskMasking("hint", 0.95)(build(), pictures()),
            "hint_share: got 0.1, 2 hints beside 16 masked of 16 patches",
        ),
        (
            lambda: HPMMasking(24).loss(build()(pictures())),
            r"output: is of \(4, 16\) patches after a mask for none",
        ),
        (lambda: AttMaskMasking()(build(), pictures(), generator=1), "generator: got int"),
        (lambda: HPMMasking(24, layer=2)(build(), pictures()), "layer: got 2"),
    ],
)
def test_policies_refuse(make, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()
