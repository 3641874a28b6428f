"""Checkpoints that are damaged, foreign or half-written, and disks that are full."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
from runs import PHYSICS, TINY, Run, assert_same_weights

from sma_fast import cli
from sma_fast.training import checkpoints


def command(place: Path, out: Path, *more: object) -> list[str]:
    start = ["pretrain", place / "table.csv", "--cache", place / "cache", "--out", out]
    start += ["--input", "a", "b", "c", "d", "--validation-share", "0.2", *PHYSICS]
    return [str(a) for a in (*start, "--steps", "9", "--save-steps", "3", *more)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a table and runs "whole" and "other", of another width."""
    folder = tmp_path_factory.mktemp("checkpoints")
    runs.write_table(folder / "table.csv")
    wider = [name.replace("16", "32") for name in TINY]
    for name, more in (("whole", ()), ("other", wider)):
        assert Run(command(folder, folder / name, *more), folder).end().code == 0
    return folder


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    """Returns a copy of "whole"."""
    return Path(shutil.copytree(place / "whole", tmp_path / "out"))


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    assert cli.main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sma-fast: error: ")
    return line


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {truncate: "were written", empty: "has 0 bytes", flip: "holds other bytes than"}
FILES = ("model.safetensors", "optimizer.pt", "trainer_state.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(
    file: str, damage: Callable, place: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(out / "checkpoint-9" / file)
    line = refused(command(place, out, "--resume"), capsys)
    assert f"{out / 'checkpoint-9' / file}: " in line and DAMAGE[damage] in line
    assert "take an earlier checkpoint" in line


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_model(
    damage: Callable, place: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(out / "model.safetensors")
    line = refused(["evaluate", str(out), str(place / "table.csv")], capsys)
    assert f"{out / 'model.safetensors'}: " in line and DAMAGE[damage] in line
    finetune = ["finetune", "missing.csv", "--from", str(out), "--label", "y"]
    finetune += ["--task", "regression", "--out", str(out / "new"), "--preset", "physics"]
    assert f"{out / 'model.safetensors'}: " in refused(finetune, capsys)  # before data are read


def test_foreign_checkpoint(place: Path, out: Path, capsys: pytest.CaptureFixture) -> None:
    """Whole, and of another model: nobody's checksum says so."""
    shutil.rmtree(out / "checkpoint-9")
    shutil.copytree(place / "other" / "checkpoint-6", out / "checkpoint-6", dirs_exist_ok=True)
    line = refused(command(place, out, "--resume"), capsys)
    assert f"{out / 'checkpoint-6' / 'model.safetensors'}: is of another model" in line
    assert "size mismatch" in line and len(line) < 600


def test_no_checkpoint_at_all(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine").mkdir()
    for folder in ("nowhere", "mine"):
        line = refused(["evaluate", str(tmp_path / folder), str(place / "table.csv")], capsys)
        assert f"{tmp_path / folder / 'data.json'}: is missing" in line
    shutil.copy(place / "whole" / "data.json", tmp_path / "mine")
    line = refused(["evaluate", str(tmp_path / "mine"), str(place / "table.csv")], capsys)
    assert "has no complete.json" in line


def test_pretrained_model_of_another_kind(
    place: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    more = ["--from", out, "--label", "y", "--task", "regression", "--out", out / "new"]
    start = ["finetune", "missing.csv", *more, "--preset", "language"]
    line = refused([str(a) for a in start], capsys)
    assert "preset: got 'language', allowed is the one that" in line


def test_unfinished_checkpoint_is_passed_over(place: Path, out: Path, tmp_path: Path) -> None:
    (out / "checkpoint-9" / "complete.json").unlink()
    (out / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    ended = Run(command(place, out, "--resume"), tmp_path).end()
    assert f"going on from {out / 'checkpoint-6'}" in ended.err
    assert_same_weights(out, place / "whole")


def test_other_options_are_refused_and_named(
    place: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    line = refused(command(place, out, "--resume", "--seed", "3", "--mask", "random"), capsys)
    assert "options.mask was 'guided', options.seed was 0" in line
    line = refused(command(place, out, "--resume", "--test-share", "0.3"), capsys)
    assert "data.test_share was None" in line
    line = refused(command(place, out, "--seed", "3"), capsys)
    assert f"{out}: holds checkpoints of an earlier run: add --resume" in line
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert "add --resume" in refused(command(place, out), capsys)
    assert "holds a finished model and no checkpoint" in refused(
        command(place, out, "--resume"), capsys
    )


def test_other_data_are_refused(
    place: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One digit of one row, between the kill and --resume."""
    mine = shutil.copy(place / "table.csv", tmp_path / "table.csv")
    lines = mine.read_text().splitlines()
    arguments = [str(mine) if a == str(place / "table.csv") else a for a in command(place, out)]
    ran = out / "run.json"
    ran.write_text(ran.read_text().replace(str(place / "table.csv"), str(mine)))
    (out / "checkpoint-9" / "complete.json").unlink()
    number = lines[7].split(",")[0]
    lines[7] = lines[7].replace(number, f"{float(number) + 0.0001:.4f}", 1)
    mine.write_text("\n".join(lines) + "\n")
    line = refused([*arguments, "--resume"], capsys)
    assert f"{out / 'checkpoint-6'}: the data are not those that the run began with" in line
    assert "bring those back" in line


@pytest.mark.parametrize(
    "size, file", [(1000, "run.json"), (12_000, "checkpoint-3"), (30_000, "optimizer.pt")]
)
def test_full_disk(size: int, file: str, place: Path, tmp_path: Path) -> None:
    """A file takes `size` bytes and no more, as on a disk that is full."""
    out = tmp_path / "out"
    line = Run(command(place, out), tmp_path, largest_file=size).end().refusal
    assert f"sma-fast: error: {out}" in line and f"{file}: cannot be written (" in line
    assert "make room on that disk" in line
    assert not checkpoints.complete_ones(out)
    ended = Run(command(place, out, "--resume"), tmp_path).end()
    assert "starting from the beginning" in ended.err
    assert ended.code == 0
    assert_same_weights(out, place / "whole")


def test_no_pickle_is_unpacked() -> None:
    root = Path(cli.__file__).parent
    loads = [file for file in root.rglob("*.py") if "torch.load(" in file.read_text()]
    assert all("weights_only=True" in file.read_text() for file in loads)


def test_old_ones_are_removed_but_the_best(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 3:
            checkpoints.mark_complete(tmp_path / f"checkpoint-{step}")
    checkpoints.remove_old(tmp_path, best_step=6, limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-6"]
