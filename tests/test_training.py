"""pretrain, finetune and evaluate as a user runs them: killed, resumed, in several processes."""

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import runs
from runs import PHYSICS, PROTEIN, TINY, Run, assert_same_weights, difference
from sma_fast.masking.sma import SMAMasking

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a table, proteins, and a cache of them."""
    folder = tmp_path_factory.mktemp("training")
    runs.write_table(folder / "table.csv")
    runs.write_table(folder / "test.csv", 37, seed=1)
    runs.write_proteins(folder / "protein.csv")
    return folder


def pretrain(place: Path, out: Path, *more: object) -> list[object]:
    """Returns arguments that pretrain on the table."""
    return [
        *("pretrain", place / "table.csv", "--cache", place / "cache", "--out", out),
        *("--input", "a", "b", "c", "d", "--validation-share", "0.2", *PHYSICS, *more),
    ]


def finetune(place: Path, out: Path, *more: object) -> list[object]:
    """Returns arguments that fine-tune on the table, with a test part."""
    return [
        *("finetune", place / "table.csv", "--cache", place / "cache", "--out", out),
        *("--validation-share", "0.2", "--test-share", "0.2"),
        *("--label", "y", "--task", "classification", *PHYSICS, *more),
    ]


def protein(command: str, place: Path, out: Path, *more: object) -> list[object]:
    """Returns arguments that train on proteins of many lengths."""
    return [
        *(command, place / "protein.csv", "--cache", place / "cache", "--out", out),
        *("--validation-share", "0.2", *PROTEIN, *more),
    ]


def steps(number: int, saving: int = 3) -> tuple[str, ...]:
    return "--steps", str(number), "--save-steps", str(saving)


@pytest.fixture(scope="module")
def pretrained(place: Path) -> Path:
    """Returns the folder of a run that nobody broke."""
    out = place / "pretrained"
    assert Run(pretrain(place, out, *steps(12)), place).end().code == 0
    return out


# ---- killed ------------------------------------------------------------------------------------

CASES = {
    "guided, annealed, dropout": lambda place, out: pretrain(
        *(place, out, "--epochs", "5", "--save-steps", "3", "--set", "hidden_dropout_prob=0.1"),
        *TINY[1:],
        *("--set-mask", "schedule_length_ratio=1.0"),
    ),
    "ragged, accumulated": lambda place, out: protein(
        *("pretrain", place, out, *steps(20), "--accumulate", "2", "--mask", "random")
    ),
    "fine-tuning, patience": lambda place, out: finetune(
        *(place, out, *steps(200), "--patience", "3", "--learning-rate", "0.1")
    ),
}
DEATHS = [
    ("sma_fast.training.checkpoints.write_whole", 2),  # nothing but run.json is there
    ("torch.save", 4),  # half an optimiser.pt in the second checkpoint
    ("safetensors.torch.save_file", 2),
    ("sma_fast.training.checkpoints.mark_complete", 3),
    ("shutil.rmtree", 1),  # an old checkpoint is marked for removal, and still there
    ("torch.nn.utils.clip_grad_norm_", 5),  # inside a step
    ("sma_fast.training.run.SMATrainer.evaluate", 2),
]


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_comes_to_the_same_bits(case: str, place: Path, tmp_path: Path) -> None:
    whole = Run(CASES[case](place, tmp_path / "whole"), tmp_path).end().results
    broken = CASES[case](place, tmp_path / "broken")
    draw, killed = random.Random(case), 0
    for death in DEATHS:
        ended = Run([*broken, "--resume"], tmp_path, dies=death).end()
        assert ended.code in (0, -9), (death, ended.err)
        killed += ended.code == -9
    assert killed >= 5
    for _ in range(3):
        run = Run([*broken, "--resume"], tmp_path)
        time.sleep(draw.uniform(0.1, 1.0))
        run.kill()
    result = Run([*broken, "--resume"], tmp_path).end().results
    for number in range(2):
        for name in ("loss", "validation", "best_step", "steps", "test"):
            assert result.get(name) == whole.get(name), name
        assert_same_weights(tmp_path / "whole", tmp_path / "broken")
        if number == 0:  # killed between the last checkpoint and the end
            for name in ("model.safetensors", "results.json", "complete.json"):
                (tmp_path / "broken" / name).unlink()
            result = Run([*broken, "--resume"], tmp_path).end().results


def test_killed_before_its_first_checkpoint(place: Path, pretrained: Path, tmp_path: Path) -> None:
    """Killed by its id, as anyone would, and started again from a shell."""
    command = [sys.executable, "-m", "sma_fast.cli"]
    command += map(str, pretrain(place, tmp_path / "out", *steps(12)))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT)
    while not (tmp_path / "out" / "run.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    process.stderr.close()
    assert not list((tmp_path / "out").glob("checkpoint-*/complete.json"))
    ended = Run([*command[3:], "--resume"], tmp_path).end()
    assert (
        f"{tmp_path / 'out'}: holds no finished checkpoint: starting from the beginning"
        in ended.err
    )
    assert ended.results["loss"] == json.loads((pretrained / "results.json").read_text())["loss"]
    assert_same_weights(tmp_path / "out", pretrained)


# ---- several processes, and batches --------------------------------------------------------------

ALL_DRAWN = ("--set-mask", "num_queries=4", "head_reduce=mean", "select_initial_ratio=null")


def torchrun(processes: int, arguments: list[object]) -> runs.Ended:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(random.SystemRandom().randint(20000, 40000))]
    command += ["-m", "sma_fast.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200
    )
    return runs.Ended(ended.returncode, ended.stdout, ended.stderr)


def test_two_processes_are_one_with_the_doubled_batch(place: Path, tmp_path: Path) -> None:
    """To rounding: all draws but masks' are the same, and here every token is drawn."""
    arguments = *steps(14, 7), *ALL_DRAWN, "--learning-rate", "0.003"
    one = Run(pretrain(place, tmp_path / "one", *arguments), tmp_path).end().results
    two = torchrun(2, pretrain(place, tmp_path / "two", *arguments)).results
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for a, b in zip(one["validation"], two["validation"], strict=True):
        assert a["step"] == b["step"]
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-3
