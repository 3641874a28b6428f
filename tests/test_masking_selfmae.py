"""SelfMAEMasking: when masks are informed, what they hide, and scores that outlast a step."""

import pytest
import torch

from sma_fast.masking.score_table import ScoreTable
from sma_fast.masking.selfmae import SelfMAEMasking
from sma_fast.models.vit import MAEForPretraining
from sma_fast.models.vit_config import MAEConfig

TINY = {
    "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture
def model() -> MAEForPretraining:
    torch.manual_seed(0)
    return MAEForPretraining(MAEConfig(**TINY)).eval()


def pictures(number: int = 6) -> torch.Tensor:
    """Returns pictures whose left upper quarter, 4 of 16 patches, differs from the rest."""
    generator = torch.Generator().manual_seed(1)
    x = 0.1 * torch.randn(number, 3, 16, 16, generator=generator) - 1
    x[:, :, :8, :8] += 3
    return x


def test_random_before_the_start(model) -> None:
    policy = SelfMAEMasking(start=0.5)
    generator = torch.Generator().manual_seed(3)
    early = policy(model, pictures(40), 0.49, generator)
    assert early.num_masked.tolist() == [12] * 40
    share = early.mask.float().mean(0)  # each patch in about three quarters of the pictures
    assert float(share.min()) > 0.4 and float(share.max()) < 1


def test_the_object_is_hidden_at_the_end(model) -> None:
    policy = SelfMAEMasking(start=0.0, final_hints=0.0, mask_ratio=0.25)
    mask = policy(model, pictures(), 1.0).mask.reshape(-1, 4, 4)
    assert bool(mask[:, :2, :2].all())
    assert int(mask.sum()) == 4 * len(mask)


def test_hints_fall_from_the_start_on() -> None:
    policy = SelfMAEMasking(start=0.2, initial_hints=0.9, final_hints=0.1)
    assert policy.hints(0.1) == 1.0
    assert policy.hints(0.2) == pytest.approx(0.9)
    assert policy.hints(0.6) == pytest.approx(0.1 + 0.8 * 0.75)
    assert policy.hints(1.0) == pytest.approx(0.1)
    assert SelfMAEMasking(start=1.0).hints(1.0) == 1.0


def test_hints_leave_some_of_the_object(model) -> None:
    policy = SelfMAEMasking(start=0.0, initial_hints=0.5, mask_ratio=0.25)
    generator = torch.Generator().manual_seed(0)
    mask = policy(model, pictures(), 0.0, generator).mask.reshape(-1, 4, 4)
    hidden = mask[:, :2, :2].flatten(1).sum(1)  # of 4: two by rank, and what the hints fall on
    assert int(hidden.min()) >= 2 and float(hidden.float().mean()) < 3


def test_equal_patches_give_a_random_mask(model) -> None:
    policy = SelfMAEMasking(start=0.0, final_hints=0.0)
    equal = torch.zeros(30, 3, 16, 16)
    blind = type(model)(model.config).eval()
    blind.encoder.positions.zero_()
    mask = policy(blind, equal, 1.0, torch.Generator().manual_seed(0)).mask
    assert len({tuple(row) for row in mask.tolist()}) > 20


def test_no_gradient_and_no_draws_beside_its_own(model) -> None:
    before = torch.get_rng_state()
    SelfMAEMasking(start=0.0)(model, pictures(), 0.7, torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


class Counted(SelfMAEMasking):
    """Counts the pictures whose scores are made."""

    def scores(self, model, pixels):
        self._tables.setdefault("made", []).append(len(pixels))
        return super().scores(model, pixels)


def test_scores_are_kept_for_some_epochs(model, tmp_path) -> None:
    policy = Counted(
        start=0.0, final_hints=0.0, table=tmp_path / "t" / "scores", pictures=9, refresh=2
    )
    x, index = pictures(), torch.tensor([8, 1, 2, 3, 4, 5])
    masks = [
        policy(model, x[:number], index=index[:number], epoch=epoch).mask
        for number, epoch in ((4, 0), (6, 1), (6, 2), (6, 3))
    ]
    # four in epoch 0; two new ones in 1; the four again in 2; the two again in 3
    assert policy._tables["made"] == [4, 2, 4, 2]
    assert torch.equal(masks[1], masks[2])
    again = Counted(start=0.0, final_hints=0.0, table=policy.table, pictures=9, refresh=2)
    assert torch.equal(again(model, x, index=index, epoch=3).mask, masks[3])
    assert "made" not in again._tables  # read from the file


def table(tmp_path, scores: torch.Tensor, view: list[float] | None = None) -> ScoreTable:
    found = ScoreTable(tmp_path / "scores", len(scores), scores.shape[1])
    view = None if view is None else torch.tensor([view]).expand(len(scores), 5)
    found.write(torch.arange(len(scores)), 0, scores, view)
    return found


SQUARE = torch.arange(16.0).reshape(1, 4, 4)


def seen(found: ScoreTable, *view: float) -> torch.Tensor:
    scores, fresh = found.read(torch.tensor([0]), 0, torch.tensor([view]))
    assert bool(fresh.all())
    return scores.reshape(4, 4)


def test_the_table_follows_flips(tmp_path) -> None:
    found = table(tmp_path, SQUARE.flatten(1))
    assert torch.equal(seen(found, 0, 0, 1, 1, 0), SQUARE[0])
    torch.testing.assert_close(seen(found, 0, 0, 1, 1, 1), SQUARE[0].flip(1))


def test_the_table_follows_flips_of_what_was_flipped(tmp_path) -> None:
    found = table(tmp_path, SQUARE.flatten(1), [0, 0, 1, 1, 1])
    torch.testing.assert_close(seen(found, 0, 0, 1, 1, 1), SQUARE[0])
    torch.testing.assert_close(seen(found, 0, 0, 1, 1, 0), SQUARE[0].flip(1))


def test_the_table_follows_crops(tmp_path) -> None:
    """The right lower quarter: its patches lie at half steps between the whole's."""
    found = table(tmp_path, SQUARE.flatten(1))
    quarter = seen(found, 0.5, 0.5, 1, 1, 0)
    rows = torch.tensor([1.75, 2.25, 2.75, 3.0])  # of the whole; the last is clamped to its edge
    torch.testing.assert_close(quarter, rows[:, None] * 4 + rows[None, :])
    torch.testing.assert_close(seen(found, 0.5, 0.5, 1, 1, 1), quarter.flip(1))


def test_a_crop_s_scores_are_found_in_the_whole(tmp_path) -> None:
    found = table(tmp_path, SQUARE.flatten(1), [0.5, 0.5, 1, 1, 0])
    torch.testing.assert_close(seen(found, 0.5, 0.5, 1, 1, 0), SQUARE[0])
    whole = seen(found, 0, 0, 1, 1, 0)
    assert torch.equal(whole[:2, :2], torch.zeros(2, 2))  # outside: the nearest edge
    assert float(whole[3, 3]) == pytest.approx(2.5 * 4 + 2.5)


def test_rows_never_written_are_not_fresh(tmp_path) -> None:
    found = ScoreTable(tmp_path / "scores", 3, 16)
    scores, fresh = found.read(torch.tensor([0, 2]), -100)
    assert not bool(fresh.any()) and not bool(scores.any())


BAD = {
    "start": ("start", ValueError, {"start": 1.5}),
    "hints": ("final_hints", ValueError, {"final_hints": -0.1}),
    "cluster": ("cluster", ValueError, {"cluster": "all"}),
    "method": ("method", ValueError, {"method": "kmeans"}),
    "ratio": ("mask_ratio", TypeError, {"mask_ratio": "much"}),
    "refresh": ("refresh", TypeError, {"refresh": 1.5}),
    "pictures": ("pictures", ValueError, {"table": "scores"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name) -> None:
    argument, error, changed = BAD[name]
    with pytest.raises(error, match=rf"^{argument}: .*allowed is"):
        SelfMAEMasking(**changed)


def test_bad_calls(model, tmp_path) -> None:
    policy = SelfMAEMasking(start=0.0, table=tmp_path / "scores", pictures=2)
    with pytest.raises(ValueError, match="^index, epoch: got None"):
        policy(model, pictures(1))
    with pytest.raises(ValueError, match="^index: holds 2 to 2, allowed is 0 to 1"):
        policy(model, pictures(1), index=torch.tensor([2]), epoch=0)
    with pytest.raises(ValueError, match="^table: got .*allowed is one of 3 pictures"):
        ScoreTable(tmp_path / "scores", 3, 16)
    with pytest.raises(ValueError, match="^progress: got 2"):
        policy(model, pictures(1), 2)
