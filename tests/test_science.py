"""`python -m bench.science` on molecules made up here: runs, their table, and going on."""

import gzip
import json
import random
from pathlib import Path

import pytest
from runs import forks

from bench import science


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder as ../shared/data is, with chains of C, N and O and how many are O."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "chem").mkdir()
    draw = random.Random(0)
    chains = ["".join(draw.choices("CNO", k=draw.randint(5, 20))) for _ in range(160)]
    with gzip.open(folder / "chem" / "chembl30_90k.smi.gz", "wt") as file:
        file.writelines(f"{chain} {number}\n" for number, chain in enumerate(chains))
    rows = ["smiles,label,scaffold_split"]
    for number, chain in enumerate(chains[:80]):
        part = ("train", "train", "train", "valid", "test")[number % 5]
        rows.append(f"{chain},{chain.count('O')},{part}")
    (folder / "chem" / "esol.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the runs, which are processes of their own, convert files in a folder of their own."""
    monkeypatch.setattr("bench.runs.multiprocessing", forks(tmp_path / "cache"))


def test_runs_are_done_once_and_summed_up(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["--data", data, "--out", tmp_path, "--only", "esol", "--jobs", "1"]
    command = [str(argument) for argument in (*command, "--steps", "2", "--seeds", "2")]
    assert science.main(command) == 0
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 4 + 6 + 2 + 1  # pretraining, fine-tuning, baselines, seconds
    row, header = (
        next(line for line in shown.out.splitlines() if line.startswith(start)).split(" | ")
        for start in ("| esol | rmse |", "| task |")
    )
    assert len(row) == len(header)
    expected = []
    for start in science.STARTS:
        folders = [tmp_path / "2-steps" / f"finetune-esol-{start}-{seed}" for seed in range(2)]
        tests = [json.loads((f / "results.json").read_text())["test"]["rmse"] for f in folders]
        assert tests[0] != tests[1]
        expected.append(f"{sum(tests) / 2:.3f} ± {abs(tests[0] - tests[1]) / 2**0.5:.3f}")
    assert row[2:5] == expected and len(set(expected)) == 3
    assert shown.out.startswith("molecule:\n")
    assert "| guided masks | 2 |" in shown.out and "| random masks | 2 |" in shown.out

    (tmp_path / "2-steps" / "finetune-esol-none-1" / "results.json").unlink()
    assert science.main(command) == 0
    again = capsys.readouterr()
    assert "1/1 finetune esol none 1" in again.err and again.err.count("\n") == 2
    assert again.out.splitlines()[4].split(" | ")[2:5] == expected


def test_a_failed_run_is_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["--data", data, "--out", tmp_path, "--only", "freesolv", "--jobs", "1"]
    command = [str(argument) for argument in (*command, "--steps", "2", "--seeds", "1")]
    assert science.main(command) == 1
    shown = capsys.readouterr()
    assert "freesolv.csv" in shown.err and "failed: [" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    "given, message",
    [(["--data", "nowhere"], "--data: nowhere"), (["--steps", "2", "--save"], "--save: allowed")],
)
def test_bad_options(given: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        science.main(given)
    assert message in capsys.readouterr().err
