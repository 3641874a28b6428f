"""pretrain --model mae: every mask, resumed and accumulated runs, bad pictures, refusals."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import Run, assert_same_weights, weights
from test_cli import refused
from test_training import pair

from sma_fast import _draws, cli
from sma_fast.masking import SelfMAEMasking
from sma_fast.masking.random import RandomMasking
from sma_fast.masking.score_table import ScoreTable
from sma_fast.models import MAEConfig, MAEForPretraining
from sma_fast.training.data import ByIndex
from sma_fast.training.mae import MAETraining, augmented
from sma_fast.training.mae_presets import AUGMENTATIONS, MAE_PRESETS, MASKS, mae_policy
from sma_fast.training.options import TrainOptions

SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
TINY = ["--batch-size", "8", "--set", *(f"{name}={value}" for name, value in SIZES.items())]


def png(number: int, side: int = 8) -> bytes:
    draw = np.random.default_rng(number)
    pixels = draw.integers(0, 100, (side, side, 3))
    pixels[2:5, 2:6] += 120  # an object
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "png")
    return stream.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with pictures in a folder and in a zip file, and a cache of them."""
    folder = tmp_path_factory.mktemp("mae")
    (folder / "pictures").mkdir()
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for number in range(20):
            (folder / "pictures" / f"{number:02}.png").write_bytes(png(number))
            archive.writestr(f"{number:02}.png", png(number))
    return folder


@pytest.fixture
def pictures(place: Path, tmp_path: Path) -> Path:
    """Returns a copy of the folder, to spoil."""
    return Path(shutil.copytree(place / "pictures", tmp_path / "pictures"))


def pretrain(place: Path, out: Path, mask: str, *more: object) -> list[object]:
    """Returns arguments that pretrain on 16 pictures, and validate on 4."""
    return [
        *("pretrain", place / "pictures", "--cache", place / "cache", "--out", out),
        *("--model", "mae", "--mask", mask, "--validation-share", "0.2", *TINY, *more),
    ]


def call(arguments: list[object]) -> int:
    return cli.main([str(argument) for argument in arguments])


# ---- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_trains(
    mask: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = ("--set-mask", "start=0") if mask == "selfmae" else ()
    out = tmp_path / "out"
    assert call(pretrain(place, out, mask, "--steps", "2", *more)) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((out / "results.json").read_text())
    assert results["steps"] == 2 and np.isfinite(results["loss"])
    assert len(results["validation"]) == 2
    assert ("random_masks" in results) == (mask == "selfmae")
    model = MAEForPretraining.from_pretrained(out)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert (out / "policy.safetensors").exists() == (mask == "hpm")
    evaluated = ["evaluate", out, place / "pictures", "--cache", place / "cache"]
    capsys.readouterr()
    assert call(evaluated) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"loss"}
    shown = ["show", out, place / "pictures", "--cache", place / "cache", "--row", 3, 1]
    assert call([*shown, "--out", tmp_path / "masks.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", loss ")[0] for line in lines[:2]] == [
        f"row {i} ({place.name}/pictures/{i - 1:02}.png): 16 tokens, 12 masked" for i in (3, 1)
    ]
    width, height = Image.open(tmp_path / "masks.png").size
    assert width > 300 and height > 400


def test_show_needs_to_know_the_masks(place: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert call(pretrain(place, out, "random", "--steps", "2")) == 0
    alone = shutil.copytree(out / "checkpoint-2", tmp_path / "alone")
    capsys.readouterr()
    shown = ["show", alone, place / "pictures", "--cache", place / "cache"]
    assert call([*shown, "--out", tmp_path / "masks.png"]) == 1
    assert "no run.json says which masks it was trained with" in capsys.readouterr().err


def test_the_command_end_to_end(place: Path, tmp_path: Path) -> None:
    """A zip, every default that the preset gives, in a process as a user starts it."""
    arguments = pretrain(place, tmp_path / "out", "selfmae", "--steps", "4", "--augment", "crop")
    arguments[1] = place / "pictures.zip"
    ended = Run(arguments, place).end()
    assert ended.results["steps"] == 4 and "pretraining, selfmae masks" in ended.err
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "data.json", "run.json", "results.json"} <= files
    assert 0 <= ended.results["random_masks"] <= 1
    again = Run([*arguments, "--resume"], place).end()
    assert again.results == ended.results


RESUMED = {
    "random": ("random",),
    "hpm": ("hpm", "--augment", "crop"),
    "selfmae": ("selfmae", "--set-mask", "start=0.2"),
    "a table": ("selfmae", "--set-mask", "start=0.2", "table=scores.bin", "refresh=2"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_killed_and_resumed(case: str, place: Path, tmp_path: Path) -> None:
    given = (*RESUMED[case], "--steps", "12", "--save-steps", "4")
    whole = Run(pretrain(place, tmp_path / "whole", *given), place)
    killed = Run(
        pretrain(place, tmp_path / "killed", *given),
        place,
        dies=("sma_fast.training.mae.MAETraining.forward", 12),  # validations count
    )
    assert whole.end().code == 0
    assert killed.end().code < 0
    assert not (tmp_path / "killed" / "results.json").exists()
    ended = Run(pretrain(place, tmp_path / "killed", *given, "--resume"), place).end()
    assert ended.code == 0 and "going on from" in ended.err, ended.err
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    if case == "hpm":
        policies = [tmp_path / name / "policy.safetensors" for name in ("whole", "killed")]
        assert policies[0].read_bytes() == policies[1].read_bytes()


@pytest.mark.parametrize("mask", ["random", "hpm", "selfmae", "attmask-hint"])
def test_accumulated(mask: str, place: Path, tmp_path: Path) -> None:
    more = ("--set-mask", "start=0") if mask == "selfmae" else ()
    for name, number in (("one", 1), ("two", 2)):
        given = ("--steps", "3", "--accumulate", number, *more)
        assert call(pretrain(place, tmp_path / name, mask, *given)) == 0
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("case", ["hpm", "a table"])
def test_two_processes(case: str, place: Path, tmp_path: Path) -> None:
    """As one with the doubled batch; the last batch of 5 pictures is filled up for validation."""
    given = (*RESUMED[case], "--steps", "6", "--save-steps", "3", "--validation-share", "0.25")
    assert Run(pretrain(place, tmp_path / "one", *given), place).end().code == 0
    ended = pair(pretrain(place, tmp_path / "two", *given), tmp_path)
    assert ended.code == 0, ended.err
    assert_close(tmp_path / "one", tmp_path / "two")
    both = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two")]
    losses = [[entry["loss"] for entry in results["validation"]] for results in both]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_compiled(place: Path, tmp_path: Path) -> None:
    given = (*RESUMED["selfmae"], "--steps", "6")
    compiled = pretrain(place, tmp_path / "two", *given, "--compile")
    assert Run(pretrain(place, tmp_path / "one", *given), place).end().code == 0
    ended = Run(compiled, place, environment={"COMPILE_BACKEND": "eager"}).end()
    assert ended.code == 0 and "recompile_limit" not in ended.err, ended.err
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("mask", ["hpm", "selfmae"])
def test_bf16_and_gradient_checkpointing(mask: str, place: Path, tmp_path: Path) -> None:
    given = ("--steps", "3", "--bf16", "--gradient-checkpointing")
    ended = Run(pretrain(place, tmp_path / "out", mask, *given), place).end()
    assert np.isfinite(ended.results["loss"])


def assert_close(a: Path, b: Path) -> None:
    """Weights agree to rounding.

    Biases of queries, keys and values are left out: those of keys change no attention, so that
    their gradient is rounding only, which Adam makes as large as any other.
    """
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name in one:
        if not name.endswith("qkv.bias"):
            size = max(np.abs(one[name]).max(), 1e-2)
            assert np.abs(one[name] - other[name]).max() < 1e-3 * size, name


# ---- the model in training ----------------------------------------------------------------------


def made(mask: str = "random", **arguments: object) -> MAETraining:
    torch.manual_seed(0)
    config = MAEConfig(**SIZES)
    return MAETraining(MAEForPretraining(config), mae_policy(mask, config, arguments))


def test_pixels_lie_as_the_encoding_gives_them() -> None:
    picture = torch.randn(2, 3, 8, 8)
    rows = picture.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, channels)
    assert torch.equal(made().pixels(rows), picture)


def test_evaluation_is_under_random_masks() -> None:
    inputs, losses = torch.randn(4, 64, 3), []
    for mask in MASKS:
        training = made(mask).eval()
        with _draws.by_row(torch.arange(4)):
            losses.append(training(inputs).loss)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_fillers_do_not_count() -> None:
    training, inputs = made().eval(), torch.randn(4, 64, 3)
    mask = torch.ones(4, 64, dtype=torch.long)
    mask[2:] = 0
    with _draws.by_row(torch.arange(4)):
        some = training(inputs, mask).loss
    with _draws.by_row(torch.arange(2)):
        first = training(inputs[:2]).loss
    assert torch.allclose(some, first, rtol=1e-5)
    assert training.num_targets(inputs, mask) * 2 == training.num_targets(inputs) == 4 * 12


def test_what_a_policy_learns_leaves_the_loss_alone() -> None:
    inputs, training = torch.randn(4, 64, 3), made("hpm")
    with _draws.by_row(torch.arange(4)):
        output = training(inputs)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in training.policy.predictor.parameters())
    assert torch.allclose(output.loss, output.patch_loss[output.mask].mean(), rtol=1e-5)


@pytest.mark.parametrize("how", AUGMENTATIONS)
def test_augmented_pictures_are_their_views(how: str) -> None:
    # channels that hold the place of each pixel say which part of the picture one sees
    place = (torch.arange(32) + 0.5) / 32
    picture = torch.stack(torch.meshgrid(place, place, indexing="xy")).repeat(64, 1, 1, 1)
    with _draws.by_row(torch.arange(64)):
        changed, view = augmented(picture, how)
    left, top, right, bottom, flipped = view[:, :, None].unbind(1)
    across = torch.where(flipped > 0.5, 1 - place, place)
    assert (changed[:, 0, 5] - (left + across * (right - left))).abs().max() < 1 / 64
    assert (changed[:, 1, :, 5] - (top + place * (bottom - top))).abs().max() < 1 / 64
    assert view[:, :4].min() >= 0 and view[:, :4].max() <= 1 + 1e-6
    if how == "none":
        assert torch.equal(changed, picture)
    else:
        assert 16 < flipped.sum() < 48
    with _draws.by_row(torch.arange(32, 64)):  # whatever the rows beside them
        half, _ = augmented(picture[32:], how)
    assert torch.equal(half, changed[32:])


def test_schedules(tmp_path: Path) -> None:
    assert set(MAE_PRESETS) == {"mae-32", "mae-tiny", "mae-base", "mae-large"}
    given = {"out": tmp_path, "kind": "mae", "preset": "mae-base", "mask": "random"}
    schedule = TrainOptions(**given, batch_size=256).schedule(finetuning=False)
    assert schedule.learning_rate == pytest.approx(1.5e-4)
    assert (schedule.warmup_share, schedule.adam_beta2, schedule.weight_decay) == (0.05, 0.95, 0.05)
    fixed = TrainOptions(**given, batch_size=256, learning_rate=1e-3, warmup_steps=7)
    schedule = fixed.schedule(finetuning=False)
    assert (schedule.learning_rate, schedule.warmup_share, schedule.warmup_steps) == (1e-3, None, 7)
    config = TrainOptions(**given, masking={"mask_ratio": 0.5}).config()
    assert config.mask_ratio == 0.5 and config.norm_pix_loss
    assert isinstance(mae_policy("random", config, {"mask_ratio": 0.5}), RandomMasking)


# ---- bad input ----------------------------------------------------------------------------------


def test_a_damaged_picture(
    place: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("03.png", "11.png"):
        (pictures / name).write_bytes((pictures / name).read_bytes()[:-40])
    arguments = pretrain(place, tmp_path / "out", "random", "--steps", "2")
    arguments[1] = pictures
    line = refused(arguments, capsys)
    assert ".png: got no whole picture" in line and "--skip-damaged" in line
    assert str(pictures) in line
    assert call([*arguments, "--skip-damaged"]) == 0
    printed = capsys.readouterr()
    assert "2 damaged pictures left out" in printed.err
    assert "03.png" in printed.err and "11.png" in printed.err
    assert json.loads(printed.out)["damaged_left_out"] == 2
    parts = json.loads((tmp_path / "out" / "data.json").read_text())
    assert parts["train"]["rows"] + parts["valid"]["rows"] == 18
    evaluated = ["evaluate", tmp_path / "out", pictures, "--cache", place / "cache"]
    assert "got no whole picture" in refused(evaluated, capsys)
    assert call([*evaluated, "--skip-damaged"]) == 0
    assert json.loads(capsys.readouterr().out)["damaged_left_out"] == 2
    drawn = ["show", tmp_path / "out", pictures, "--cache", place / "cache", "--row", "4"]
    drawn += ["--out", tmp_path / "masks.png", "--skip-damaged"]
    assert call(drawn) == 0
    assert "row 4 (" in (line := capsys.readouterr().out) and "04.png" in line


def test_a_part_with_damaged_pictures_only(
    place: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """They are left out before the rest is cut into parts."""
    valid = ByIndex({"valid": 0.2, "train": None}).indices(20)["valid"]
    for number in valid:
        (pictures / f"{number:02}.png").write_bytes(b"no picture")
    arguments = pretrain(place, tmp_path / "out", "random", "--steps", "1", "--skip-damaged")
    arguments[1] = pictures
    assert call(arguments) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["damaged_left_out"] == 4
    assert "got no whole picture (no format that is known)" in printed.err
    parts = json.loads((tmp_path / "out" / "data.json").read_text())
    assert (parts["train"]["rows"], parts["valid"]["rows"]) == (13, 3)


def test_a_damaged_picture_in_a_zip_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "pictures.zip"
    data = bytearray((place / "pictures.zip").read_bytes())
    data[data.index(png(7)) + 60] ^= 1
    file.write_bytes(data)
    arguments = pretrain(place, tmp_path / "out", "random", "--steps", "1")
    arguments[1] = file
    assert f"{file}/07.png: got no whole picture (no bytes, or damaged" in refused(
        arguments, capsys
    )
    assert call([*arguments, "--skip-damaged"]) == 0
    assert json.loads(capsys.readouterr().out)["damaged_left_out"] == 1
    evaluated = ["evaluate", tmp_path / "out", file, "--cache", place / "cache", "--skip-damaged"]
    assert call(evaluated) == 0
    assert json.loads(capsys.readouterr().out)["damaged_left_out"] == 1


def test_nothing_but_damaged_pictures(
    place: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for path in pictures.iterdir():
        path.write_bytes(b"no picture")
    arguments = pretrain(place, tmp_path / "out", "random", "--skip-damaged")
    arguments[1] = pictures
    assert call(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"skip_damaged: no picture of {pictures} is whole" in line


def test_pictures_of_mixed_sizes(
    place: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (pictures / "07.png").write_bytes(png(7, 10))
    arguments = pretrain(place, tmp_path / "out", "random", "--steps", "1")
    arguments += ["--validation-share", "0"]
    arguments[1] = pictures
    line = refused(arguments, capsys)
    assert "07.png: got a picture of 10 x 10 pixels, allowed is 8 x 8; give resize" in line
    shutil.rmtree(tmp_path / "out")
    assert call([*arguments, "--resize", "bilinear"]) == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "out")
    line = refused([*arguments, "--resize", "bilinear", "--size", "10", "10"], capsys)
    assert "size: got (10, 10), allowed is (8, 8), that of the model" in line


OPTIONS = {
    "--mask guided": (1, "mask: got 'guided', allowed is selfmae, random, attmask, attmask-hint"),
    "--mask some": (2, "argument --mask: invalid choice: 'some'"),
    "--model vae": (2, "argument --model: invalid choice: 'vae'"),
    "--model sma --mask hpm": (1, "guided, random with --model sma; --model mae has others"),
    "--model sma --augment flip": (1, "augment: got 'flip', allowed is flip, crop, none, with"),
    "--preset protein": (1, "preset: got 'protein', allowed is mae-32, mae-tiny, mae-base"),
    "--scale small": (1, "scale: got 'small', allowed is full with --model mae"),
    "--set width=3": (1, "got 'width', allowed is image_size, patch_size"),
    "--set hidden_size=15": (1, "hidden_size: got 15, allowed is a multiple of 4"),
    "--set hidden_size=many": (1, "hidden_size: got "),
    "--set-mask ratio=3": (1, "options of mask 'selfmae': got 'ratio', allowed is mask_ratio, st"),
    "--set-mask start=3": (1, "start: got 3, allowed is"),
    "--set-mask layer=9": (1, "layer: got 9, allowed is an int in [-6, 5]"),
    "--set-mask layer=last": (1, "layer: got 'last', allowed is an int"),
    "--set-mask iterations=0": (1, "iterations: got 0, allowed is an int of at least 1"),
    "--set-mask iterations=many": (1, "iterations: got 'many', allowed is an int of at least 1"),
    "--set-mask tol=0": (1, "tol: got 0, allowed is a finite number above 0"),
    "--set-mask tol=x": (1, "tol: got 'x', allowed is a number"),
    "--set-mask norm=1": (1, "norm: got int, allowed is True or False"),
    "--set-mask table=5": (1, "table: got 5, allowed is a bare file name in the run's folder"),
    "--set-mask table=/tmp/scores.bin": (1, "table: got '/tmp/scores.bin', allowed is a bare"),
    "--set-mask table=../scores.bin": (1, "table: got '../scores.bin', allowed is a bare file"),
    "--set-mask table=a\\b": (1, "table: got 'a\\\\b', allowed is a bare file name"),
    "--set-mask table=..": (1, "table: got '..', allowed is a bare file name"),
    "--set-mask table=": (1, "table: got '', allowed is a bare file name"),
    "--set-mask table=config.json": (1, "table: got 'config.json', the run's own, allowed is"),
    "--set-mask table=Model.safetensors": (1, "table: got 'Model.safetensors', the run's own"),
    "--set-mask table=checkpoint-2": (1, "table: got 'checkpoint-2', the run's own, allowed is"),
    "--set-mask pictures=9": (1, "pictures: got 9 in masking, allowed is as many as the train"),
    "--set-mask mask_ratio=1": (1, "mask_ratio: got 1, allowed is"),
    "--set mask_ratio=0.5 --set-mask mask_ratio=0.6": (1, "mask_ratio: got 0.5 of the model and"),
    "--mask hpm --set-mask start=1": (1, "options of mask 'hpm': got 'start', allowed is"),
    "--mask attmask --set-mask kind=hint": (1, "kind: got 'hint' in masking, allowed is --mask"),
    "--fsdp full_shard": (1, "fsdp: got 'full_shard', allowed is none with --model mae"),
    "--alphabet ABC": (1, "alphabet: got 'ABC', allowed is for sequences only"),
}


@pytest.mark.parametrize("given", OPTIONS)
def test_options_are_refused_before_data_are_read(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, message = OPTIONS[given]
    start = ["pretrain", tmp_path / "missing", "--out", tmp_path / "out"]
    model = [] if "--model" in given else ["--model", "mae"]
    assert message in refused([*start, *model, *given.split()], capsys, code)
    assert not (tmp_path / "out").exists()


def test_only_tables_of_scores_are_deleted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("years of work")
    given = ("--steps", "2", "--set-mask", "start=0", "table=precious.txt")
    arguments = pretrain(place, out, "selfmae", *given)
    arguments[1] = tmp_path / "missing"  # nothing of it is read
    line = refused(arguments, capsys)
    assert f"table: got {out / 'precious.txt'}, which is there and no table of scores" in line
    assert (out / "precious.txt").read_text() == "years of work"
    arguments = pretrain(place, out, "selfmae", *given[:-1], "table=scores.bin")
    for _ in range(2):  # what an earlier run left, too
        assert call(arguments) == 0
        for folder in (out, out / "checkpoint-2"):
            ScoreTable(folder / "scores.bin", 16, 16)
        shutil.rmtree(out / "checkpoint-1")
        shutil.rmtree(out / "checkpoint-2")
        (out / "complete.json").unlink()


def test_a_table_replaces_nothing_else_in_a_checkpoint(tmp_path: Path) -> None:
    config = MAEConfig(**SIZES)
    policy = SelfMAEMasking(table=tmp_path / "model.safetensors", pictures=3)
    training = MAETraining(MAEForPretraining(config), policy)
    training.prepare_table(None)
    (tmp_path / "saved").mkdir()
    with pytest.raises(ValueError, match=r"table: got .*model.safetensors, which is there and no"):
        training.save_pretrained(tmp_path / "saved")
    MAEForPretraining.from_pretrained(tmp_path / "saved")


def test_tables_keep_scores_of_whole_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = SelfMAEMasking(start=0.0, table=tmp_path / "scores", pictures=4)
    training = MAETraining(MAEForPretraining(MAEConfig(**SIZES)), policy, "crop")
    inputs = torch.randn(4, 64, 3)
    inputs[:, :16] += 5
    training(inputs, index=torch.arange(4))
    kept, fresh = ScoreTable(policy.table, 4, 16).read(torch.arange(4), 0, 0)
    assert bool(fresh.all())
    expected = policy.scores(training.model, training.pixels(inputs))
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-3)


def test_damaged_rows_of_other_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = runs.write_table(tmp_path / "t.csv")
    start = ["pretrain", file, "--out", tmp_path / "out", "--preset", "physics", "--skip-damaged"]
    assert "skip_damaged: got True, allowed is for pictures only" in refused(start, capsys)


def test_other_commands_say_what_they_take(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, source = tmp_path / "out", (place / "pictures", "--cache", place / "cache")
    assert call(pretrain(place, out, "random", "--steps", "1")) == 0
    capsys.readouterr()
    labelled = ("--label", "y", "--task", "regression", "--out", tmp_path / "fine")
    message = f"{out}: holds a masked autoencoder of pictures"
    assert message in refused(["finetune", *source, "--from", out, *labelled], capsys)
    (out / "data.json").unlink()
    assert "data.json: is missing" in refused(["evaluate", out, *source], capsys)
    MAEForPretraining.from_pretrained(out).save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    line = refused(["evaluate", tmp_path / "saved", *source], capsys)
    assert "data.json: is missing: name a folder that sma-fast wrote" in line
