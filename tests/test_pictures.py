"""`python -m bench.pictures` on pictures made up here: runs, their table, figures, and going on."""

import argparse
import contextlib
import dataclasses
import io
import json
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from runs import forks

from bench import pictures, pictures_plots, pictures_probe, runs
from sma_fast.masking.selfmae import SelfMAEMasking
from sma_fast.models import MAEConfig, MAEForPretraining
from sma_fast.training import run as training_run
from sma_fast.training.mae_presets import mae_policy

MASKS = ("random", "selfmae")
TRIED = ("--epochs", "2", "--pictures", "40", "--seeds", "1", "--jobs", "1", "--masks", *MASKS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder as ../shared/data is, with pictures of two classes."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "vision").mkdir()
    draw = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "vision" / "cifar10_jpeg_12k.zip", "w") as archive:
        for part, number in (("train", 50), ("test", 10)):
            for label, colour in enumerate(("blue", "red")):
                for index in range(number):
                    pixels = draw.integers(0, 150, (32, 32, 3), dtype=np.uint8)
                    pixels[8:24, 8:24, 2 - 2 * label] += 100  # an object
                    stream = io.BytesIO()
                    Image.fromarray(pixels).save(stream, "jpeg")
                    archive.writestr(f"{part}/{colour}/{index:04}.jpg", stream.getvalue())
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Has this process, and those of the runs, convert files in a folder of their own."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder))
        yield


def called(*arguments: object) -> tuple[int, list[str]]:
    """Returns the exit code, and the rows of the table."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pictures.main([str(argument) for argument in arguments])
    return code, [line for line in printed.getvalue().splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list, list[str]]:
    """Returns the command's arguments and its table, of runs in a process of their own."""
    arguments = ["--data", data, *TRIED, "--out", tmp_path_factory.mktemp("out")]
    code, rows = called(*arguments)
    assert code == 0
    return arguments, rows


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Has the runs be done in this process, which is quicker, and returns those that were."""
    found = []

    def here(run, jobs, processes) -> None:
        for job in jobs:
            found.append(job)
            run(job)

    monkeypatch.setattr(runs, "in_processes", here)
    return found


def probes(out: Path, mask: str) -> dict:
    return json.loads((out / f"{mask}-0" / "probes.json").read_text())


def test_the_table(done: tuple) -> None:
    arguments, rows = done
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert len({len(row) for row in cells}) == 1
    assert [row[0] for row in cells[2:]] == ["(no training)", *MASKS]
    assert [row[1] for row in cells[2:]] == ["0", "2", "2"]
    for row in cells[2:]:
        runs = probes(arguments[-1], row[0] if row[0] in MASKS else "random")
        entry = runs["probes"][-1 if row[0] in MASKS else 0]
        assert row[2:4] == [f"{entry['linear']:.3f}", f"{entry['knn']:.3f}"]
        assert row[4] == ("" if row[0] not in MASKS else f"{runs['loss']:.3f}")
    before, after = (probes(arguments[-1], mask)["probes"] for mask in MASKS)
    assert before[0] == after[0] and before[0]["epoch"] == 0  # one seed, so one model
    assert [entry["step"] for entry in before] == [0, 1, 2]
    assert all(0 <= entry[name] <= 1 for entry in before for name in ("linear", "knn"))


def test_figures(done: tuple) -> None:
    for name in ("curves.png", "masks.png"):
        with Image.open(done[0][-1] / name) as figure:
            assert min(figure.size) > 300
            low, high = figure.convert("L").getextrema()
            assert low < 100 and high == 255


def test_runs_that_are_done_are_not_repeated(done: tuple, jobs: list) -> None:
    arguments, rows = done
    out = arguments[-1]
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(written) == 2 * (1 + 2)  # the model of each run, and its checkpoints
    assert called(*arguments) == (0, rows) and jobs == []

    (out / "selfmae-0" / "probes.json").unlink()
    assert called(*arguments) == (0, rows) and jobs == [("selfmae", 0)]

    probed = probes(out, "random")
    (out / "random-0" / "probes.json").write_text("{}")
    assert called(*arguments, "--reprobe") == (0, rows) and jobs[1:] == [(m, 0) for m in MASKS]
    assert probes(out, "random") == probed
    assert written == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_other_options_in_the_same_folder(done: tuple, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        called(*done[0], "--epochs", "3")
    shown = capsys.readouterr().err
    assert "--out: " in shown and "'epochs': 2" in shown


def test_untrained_models_are_those_that_the_runs_began_with(done: tuple) -> None:
    folder = done[0][-1] / "random-0"
    same, other = (pictures_probe.untrained(folder, seed).state_dict() for seed in (0, 1))
    begun = MAEForPretraining.from_pretrained(str(folder / "checkpoint-1")).state_dict()
    far = {name: float((x - same[name]).abs().max()) for name, x in begun.items()}
    assert max(far.values()) < 5e-4  # one step of AdamW: twice its learning rate
    changed = [name for name, x in other.items() if x.dim() == 2 and (x != same[name]).any()]
    assert len(changed) >= 10


def test_full_resizes_and_each_seed_has_its_own_untrained_model(
    data: Path, tmp_path: Path, jobs: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {**pictures.SCALES["small"].model, "image_size": 64, "patch_size": 16}
    small = pictures.SCALES["full"]._replace(preset="mae-32", model=sizes)
    monkeypatch.setitem(pictures.SCALES, "full", small)
    monkeypatch.setattr(pictures_probe, "_AT_A_TIME", 7)
    seeds, untrained = [], pictures_probe.untrained
    monkeypatch.setattr(
        pictures_probe, "untrained", lambda *given: seeds.append(given[1]) or untrained(*given)
    )
    arguments = ("--data", data, *TRIED[:-2], "selfmae", "--scale", "full", "--seeds", "2")
    code, rows = called(*arguments, "--out", tmp_path)
    assert code == 0 and jobs == [("selfmae", 0), ("selfmae", 1)] and len(rows) == 4
    assert seeds == [0, 1] and " ± " in rows[-1]
    inputs = json.loads((tmp_path / "selfmae-0" / "data.json").read_text())["inputs"]
    assert inputs["size"] == [64, 64] and inputs["resize"] == "bilinear"
    assert (tmp_path / "masks.png").stat().st_size > 10_000


def test_how_many_masks_follow_the_rank() -> None:
    torch.manual_seed(0)
    model = MAEForPretraining(MAEConfig.preset("mae-32", **pictures.SCALES["small"].model)).eval()
    pixels = torch.randn(40, 3, 32, 32)
    pixels[:, :, 8:20, 8:20] += 4  # something to cut
    shares = pictures_probe.shares_by_rank(model, pixels, points=5)
    assert shares[0] == pytest.approx(0.75, abs=0.03)  # 48 of 64 at random
    assert shares[-1] == pytest.approx(48 / 50, abs=0.02)  # 2 hints among the 50 highest
    assert shares[0] < shares[3] < shares[-1]


def test_the_variants_are_selfmae_with_other_arguments(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(training_run, "pretrain", lambda train, _: asked.append(train))
    options = argparse.Namespace(
        out=tmp_path, zip=data / "x.zip", chosen=pictures.SCALES["small"], pictures=None
    )
    pictures._pretrain("selfmae-kept", 0, options)
    pictures._pretrain("selfmae-informed", 0, options)
    train, informed = asked
    assert informed.mask == "selfmae" and informed.masking == {"initial_hints": 0.1}
    policy = mae_policy(train.mask, train.config(), train.masking, train.out)
    assert isinstance(policy, SelfMAEMasking) and policy.refresh == 5
    assert Path(policy.table) == tmp_path / "selfmae-kept-0" / "scores.bin"


def test_the_scales_are_those_of_their_presets() -> None:
    for scale in pictures.SCALES.values():
        MAEForPretraining(MAEConfig.preset(scale.preset, **scale.model))
        steps = scale.epochs * (pictures.TRAINED // scale.batch_size)
        assert steps // scale.epochs >= 10 and steps % scale.checkpoints == 0


def test_the_figure_draws_what_training_does_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    policy = SelfMAEMasking.__call__

    def call(self, model, pixels, progress, generator):
        asked.append((self, progress))
        return policy(self, model, pixels, progress, generator)

    monkeypatch.setattr(SelfMAEMasking, "__call__", call)
    model = MAEForPretraining(MAEConfig.preset("mae-32", **pictures.SCALES["small"].model))
    pixels = torch.rand(2, 3, 32, 32)
    pictures_plots.masks(
        tmp_path / "masks.png", model.eval(), pixels, lambda x: x.permute(0, 2, 3, 1).numpy()
    )
    ((drawn, progress),) = asked
    assert dataclasses.asdict(drawn) == dataclasses.asdict(SelfMAEMasking()) and progress == 0.5


def test_a_failed_run_is_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("bench.runs.multiprocessing", forks(tmp_path / "cache"))
    arguments = ["--data", data, "--out", tmp_path, "--seeds", "1", "--masks", "unknown"]
    code, rows = called(*arguments, "--jobs", "1")
    assert code == 1 and rows == []
    shown = capsys.readouterr().err
    assert "mask: got 'unknown'" in shown and "failed: [('unknown', 0)]" in shown


@pytest.mark.parametrize(
    "given, message",
    [
        (["--data", "nowhere"], "--data: nowhere"),
        (["--pictures", "2", "--save"], "--save: allowed"),
        (["--epochs", "2", "--save"], "--save: allowed"),
    ],
)
def test_bad_options(given: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        pictures.main(given)
    assert message in capsys.readouterr().err
