"""SelfMAEMasking: when masks are informed, what they hide, and scores that outlast a step."""

import math

import pytest
import torch

import sma_fast
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
    """Of an object of 4 patches where 12 are masked: 2 of the 14 most like it stay visible."""
    policy = SelfMAEMasking(start=0.0, final_hints=0.5)
    x = pictures(1).repeat(700, 1, 1, 1)
    mask = policy(model, x, 1.0, torch.Generator().manual_seed(0)).mask
    assert mask.sum(1).tolist() == [12] * 700
    rank = policy.scores(model, x[:1]).argsort(dim=1, descending=True, stable=True)[0]
    shown = (~mask[:, rank]).float().mean(0)  # by rank
    torch.testing.assert_close(shown[:14], torch.full((14,), 1 / 7), rtol=0, atol=0.04)
    assert bool((shown[14:] == 1).all())
    assert set(rank[:4].tolist()) == {0, 1, 4, 5}  # the object


def test_hints_of_the_rest_leave_what_is_ranked_hidden(model) -> None:
    policy = SelfMAEMasking(start=0.0, final_hints=0.5, mask_ratio=0.5, hints_by="rest")
    x = pictures(1).repeat(300, 1, 1, 1)
    mask = policy(model, x, 1.0, torch.Generator().manual_seed(0)).mask
    rank = policy.scores(model, x[:1]).argsort(dim=1, descending=True, stable=True)[0]
    assert mask.sum(1).tolist() == [8] * 300 and bool(mask[:, rank[:4]].all())
    assert 0.2 < float(mask[:, rank[4:]].float().mean(0).min()) < 0.5


def test_equal_patches_give_a_random_mask(model) -> None:
    policy = SelfMAEMasking(start=0.0, final_hints=0.0)
    equal = torch.zeros(30, 3, 16, 16)
    blind = type(model)(model.config).eval()
    blind.encoder.positions.zero_()
    mask = policy(blind, equal, 1.0, torch.Generator().manual_seed(0)).mask
    assert len({tuple(row) for row in mask.tolist()}) > 20


def test_how_many_masks_are_random(model) -> None:
    policy = SelfMAEMasking(start=0.5, initial_hints=0.1)
    assert math.isnan(policy.share_at_random())
    policy(model, pictures(6), 0.4)
    assert policy.share_at_random() == 1.0
    policy(model, pictures(6), 0.6)
    assert policy.share_at_random() == 0.0
    model.encoder.positions.zero_()
    some = pictures(6)
    some[:2] = 0  # nothing to cut
    policy(model, some, 1.0)
    policy(model, pictures(2), 1.0)
    assert policy.share_at_random() == 2 / 8
    assert math.isnan(policy.share_at_random())


def test_no_gradient_and_no_draws_beside_its_own(model) -> None:
    before = torch.get_rng_state()
    SelfMAEMasking(start=0.0)(model, pictures(), 0.7, torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


class Counted(SelfMAEMasking):
    """Counts the pictures whose scores are made."""

    def __post_init__(self):
        super().__post_init__()
        self.made = []

    def scores(self, model, pixels):
        self.made.append(len(pixels))
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
    assert policy.made == [4, 2, 4, 2]
    assert torch.equal(masks[1], masks[2])
    again = Counted(start=0.0, final_hints=0.0, table=policy.table, pictures=9, refresh=2)
    assert torch.equal(again(model, x, index=index, epoch=3).mask, masks[3])
    assert again.made == []  # read from the file


def test_scores_of_a_later_epoch_are_another_run_s(model, tmp_path) -> None:
    given = {"start": 0.0, "table": tmp_path / "scores", "pictures": 9, "refresh": 3}
    x, index = pictures(), torch.arange(6)
    Counted(**given)(model, x, index=index, epoch=300)
    policy = Counted(**given)
    policy(model, x, index=index, epoch=0)
    assert policy.made == [6]


@pytest.mark.parametrize("refresh", [0, 1])
def test_scores_that_are_not_kept(model, tmp_path, refresh) -> None:
    given = {"start": 0.0, "final_hints": 0.0, "mask_ratio": 0.25}
    kept = Counted(**given, table=tmp_path / "scores", pictures=6, refresh=refresh)
    x, index = pictures(), torch.arange(6)
    for epoch in (0, 1):
        mask = kept(model, x, index=index, epoch=epoch).mask
        assert torch.equal(mask, SelfMAEMasking(**given)(model, x).mask)
    assert kept.made == [6, 6]


def test_no_forward_where_the_mask_is_random_anyway(model) -> None:
    policy = Counted(start=0.0)  # of 4 visible patches all are hints while their share is over 7/8
    generator = torch.Generator().manual_seed(0)
    mask = policy(model, pictures(40), 0.2, generator).mask
    assert policy.hints(0.2) < 1 and policy.made == []
    assert mask.sum(1).tolist() == [12] * 40 and len(set(map(tuple, mask.tolist()))) > 20
    policy(model, pictures(), 0.5, generator)
    assert policy.made == [6]


def test_cuts_that_did_not_converge_give_random_masks(model) -> None:
    given = {"start": 0.0, "final_hints": 0.0, "mask_ratio": 0.25}
    x = pictures(1).repeat(40, 1, 1, 1)
    early = SelfMAEMasking(**given, iterations=1, tol=1e-6)
    assert not bool(early.scores(model, x).any())
    masks = early(model, x, generator=torch.Generator().manual_seed(0)).mask
    assert len(set(map(tuple, masks.tolist()))) > 20
    masks = SelfMAEMasking(**given)(model, x).mask
    assert len(set(map(tuple, masks.tolist()))) == 1


class Seen(torch.nn.Module):
    """Answers with given embeddings, normalised or not."""

    def __init__(self, plain: torch.Tensor, normal: torch.Tensor) -> None:
        super().__init__()
        self.config, self.plain, self.normal = MAEConfig(**TINY), plain, normal

    def embeddings(self, pixels, layer=-1, norm=True):
        return self.normal if norm else self.plain


def test_norm_of_the_embeddings(model) -> None:
    x = pictures()
    plain, normal = model.embeddings(x, norm=False).detach(), model.embeddings(x).detach()
    for norm, chosen in ((True, normal), (False, plain)):
        scores = SelfMAEMasking(norm=norm).scores(Seen(plain, normal), x)
        expected = sma_fast.informed_scores(chosen, sma_fast.bipartition(chosen))
        assert torch.equal(scores, expected) and bool(scores.any())


def test_thresholds() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16, 16)
    x[:, :3] += 3
    cut = sma_fast.bipartition(x, tol=1.0)
    middles = {"mean": cut.vector.mean(1), "median": cut.vector.sort(1).values[:, 7]}
    found = {
        name: SelfMAEMasking(threshold=name, tol=1.0).scores(Seen(x, x), x) for name in middles
    }
    for name, middle in middles.items():
        labels = cut.vector > middle[:, None]
        assert name == "mean" or labels.sum(1).tolist() == [8] * 8
        assert torch.equal(found[name], sma_fast.informed_scores(x, cut._replace(labels=labels)))
    zero = SelfMAEMasking(tol=1.0).scores(Seen(x, x), x)
    assert torch.equal(zero, sma_fast.informed_scores(x, cut))
    assert not torch.equal(found["median"], zero)


def test_decays() -> None:
    hints = {name: SelfMAEMasking(start=0.0, decay=name).hints for name in ("linear", "cosine")}
    for decay in hints.values():
        assert decay(0.0) == pytest.approx(1.0) and decay(1.0) == pytest.approx(0.1)
    assert hints["linear"](0.25) == pytest.approx(0.1 + 0.9 * 0.75)
    assert hints["cosine"](0.25) == pytest.approx(0.1 + 0.9 * (1 + 0.5**0.5) / 2)


def test_hints_by_score_are_the_highest(model) -> None:
    given = {"start": 0.0, "initial_hints": 0.5, "mask_ratio": 0.5, "hints_by": "score"}
    policy = SelfMAEMasking(**given)
    x = pictures()
    rank = policy.scores(model, x).argsort(dim=1, descending=True, stable=True).argsort(1)
    mask = policy(model, x, 0.0).mask  # half of the 8 visible ones are hints
    assert torch.equal(mask, (rank >= 4) & (rank < 12))
    assert torch.equal(SelfMAEMasking(**given, final_hints=0.0)(model, x).mask, rank < 8)


@pytest.mark.parametrize("hints_by", ("random", "score", "rest"))
def test_random_until_the_start_whatever_the_hints(model, hints_by) -> None:
    x = pictures(1).repeat(60, 1, 1, 1)
    for start, progress in ((0.5, 0.4), (1.0, 1.0)):
        policy = Counted(start=start, hints_by=hints_by)
        mask = policy(model, x, progress, torch.Generator().manual_seed(0)).mask
        assert policy.made == [] and len(set(map(tuple, mask.tolist()))) > 40


def test_a_table_keeps_the_ranks_of_close_scores(tmp_path) -> None:
    scores = 0.9 + 1e-6 * torch.rand(5, 196, generator=torch.Generator().manual_seed(0))
    found = ScoreTable(tmp_path / "scores", 5, 196)
    found.write(torch.arange(5), 0, scores)
    assert torch.equal(found.read(torch.arange(5), 0, 0)[0], scores)


def test_crops_are_scored_whole(model, tmp_path) -> None:
    """The object lies outside of the first crop, and inside of the second."""
    given = {"start": 0.0, "final_hints": 0.0, "mask_ratio": 0.25}
    policy = Counted(**given, table=tmp_path / "scores", pictures=6)
    x, index = pictures(), torch.arange(6)
    corner = torch.tensor([[0.5, 0.5, 1.0, 1.0, 0.0]]).expand(6, 5)
    crop = torch.nn.functional.interpolate(x[:, :, 8:, 8:], scale_factor=2)
    policy(model, crop, index=index, epoch=0, view=corner, whole=x)
    flipped = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]]).expand(6, 5)
    mask = policy(model, x.flip(3), index=index, epoch=0, view=flipped, whole=x).mask
    assert policy.made == [6]
    assert bool(mask.reshape(-1, 4, 4)[:, :2, 2:].all())


def table(tmp_path, scores: torch.Tensor, view: list[float] | None = None) -> ScoreTable:
    found = ScoreTable(tmp_path / "scores", len(scores), scores.shape[1])
    view = None if view is None else torch.tensor([view]).expand(len(scores), 5)
    found.write(torch.arange(len(scores)), 0, scores, view)
    return found


SQUARE = torch.arange(16.0).reshape(1, 4, 4)


def seen(found: ScoreTable, *view: float) -> torch.Tensor:
    scores, fresh = found.read(torch.tensor([0]), 0, 0, torch.tensor([view]))
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
    scores, fresh = found.read(torch.tensor([0, 2]), -100, 100)
    assert not bool(fresh.any()) and not bool(scores.any())


def test_only_tables_are_opened(tmp_path) -> None:
    file = tmp_path / "precious.txt"
    for data in (b"", b"years of work", bytes(3 * (4 * 16 + 24) + 64)):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="^table: got .*precious.txt, .*allowed is a new file"):
            ScoreTable(file, 3, 16)
        assert file.read_bytes() == data
    with pytest.raises(ValueError, match="^table: got .*no table of scores"):
        ScoreTable(tmp_path, 3, 16)


def test_a_table_of_other_pictures(tmp_path) -> None:
    ScoreTable(tmp_path / "scores", 3, 16)
    for number, patches in ((4, 16), (3, 25)):
        with pytest.raises(ValueError, match="^table: got .*of 3 pictures of 16 patches"):
            ScoreTable(tmp_path / "scores", number, patches)
    (tmp_path / "scores").write_bytes((tmp_path / "scores").read_bytes()[:-1])
    with pytest.raises(ValueError, match="^table: got .*327 bytes, allowed is .*328 bytes"):
        ScoreTable(tmp_path / "scores", 3, 16)


BAD = {
    "start": ("start", ValueError, {"start": 1.5}),
    "hints": ("final_hints", ValueError, {"final_hints": -0.1}),
    "cluster": ("cluster", ValueError, {"cluster": "all"}),
    "method": ("method", ValueError, {"method": "kmeans"}),
    "threshold": ("threshold", ValueError, {"threshold": "otsu"}),
    "hints by": ("hints_by", ValueError, {"hints_by": "rank"}),
    "decay": ("decay", ValueError, {"decay": "step"}),
    "norm": ("norm", TypeError, {"norm": "yes"}),
    "ratio": ("mask_ratio", TypeError, {"mask_ratio": "much"}),
    "refresh": ("refresh", TypeError, {"refresh": 1.5}),
    "no iterations": ("iterations", ValueError, {"iterations": 0}),
    "many iterations": ("iterations", TypeError, {"iterations": "many"}),
    "no tol": ("tol", ValueError, {"tol": 0}),
    "tol": ("tol", TypeError, {"tol": "x"}),
    "nan tol": ("tol", ValueError, {"tol": float("nan")}),
    "endless tol": ("tol", ValueError, {"tol": float("inf")}),
    "layer": ("layer", ValueError, {"layer": "last"}),
    "half a layer": ("layer", ValueError, {"layer": 0.5}),
    "pictures": ("pictures", ValueError, {"table": "scores"}),
    "fewer pictures": ("pictures", ValueError, {"table": "scores", "pictures": -3}),
    "table": ("table", TypeError, {"table": 5, "pictures": 3}),
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
    with pytest.raises(ValueError, match="^progress: got 2"):
        policy(model, pictures(1), 2, index=torch.tensor([0]), epoch=0)


CALLS = {
    "few": ("index", ValueError, {"index": torch.arange(3)}),
    "square": ("index", ValueError, {"index": torch.zeros(4, 1, dtype=torch.long)}),
    "list": ("index", TypeError, {"index": [0, 1, 2, 3]}),
    "floats": ("index", TypeError, {"index": torch.zeros(4)}),
    "epoch": ("epoch", TypeError, {"epoch": "1"}),
    "half an epoch": ("epoch", TypeError, {"epoch": 0.5}),
    "before": ("epoch", ValueError, {"epoch": -1}),
    "narrow view": ("view", ValueError, {"view": torch.zeros(4, 4)}),
    "few views": ("view", ValueError, {"view": torch.zeros(3, 5)}),
    "views": ("view", TypeError, {"view": [(0, 0, 1, 1, 0)] * 4}),
    "whole": ("whole", ValueError, {"whole": torch.zeros(3, 3, 16, 16)}),
    "no pictures": ("whole", TypeError, {"whole": 1}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_bad_places(model, tmp_path, name, progress) -> None:
    """Whether a table is needed already or not."""
    argument, error, changed = CALLS[name]
    policy = SelfMAEMasking(table=tmp_path / "scores", pictures=4)
    with pytest.raises(error, match=rf"^{argument}: .*allowed is"):
        policy(model, pictures(4), progress, **({"index": torch.arange(4), "epoch": 0} | changed))
