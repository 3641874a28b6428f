"""pretrain, finetune and evaluate as a user runs them: killed, resumed, in several processes."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch
from runs import PHYSICS, PROTEIN, TINY, Run, assert_same_weights, difference

from sma_fast import _draws, cli
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

CUT = {  # arguments of runs whose steps are cut into batches in several ways
    "annealed table": lambda place, out, *more: pretrain(
        *(place, out, *steps(14, 7), "--set", "hidden_dropout_prob=0", *TINY[1:]),
        *("--set-mask", "schedule_length_ratio=1.0", *more),
    ),
    "ragged proteins": lambda place, out, *more: protein(
        "pretrain", place, out, *steps(14, 7), *more
    ),
    "ragged, random": lambda place, out, *more: protein(
        *("pretrain", place, out, *steps(14, 7), "--mask", "random", *more)
    ),
    "labels": lambda place, out, *more: finetune(
        *(place, out, *steps(14, 7), "--set", "hidden_dropout_prob=0", *TINY[1:], *more)
    ),
}


def torchrun(processes: int, arguments: list[object]) -> runs.Ended:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(random.SystemRandom().randint(20000, 40000))]
    command += ["-m", "sma_fast.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200
    )
    return runs.Ended(ended.returncode, ended.stdout, ended.stderr)


def assert_same_training(one: Path, other: Path) -> None:
    """Losses, validation included, and weights agree to rounding."""
    first, second = (json.loads((path / "results.json").read_text()) for path in (one, other))
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert_close(first["validation"], second["validation"])
    assert difference(one, other) < 1e-3


@pytest.mark.parametrize("case", CUT)
def test_two_processes_are_one_with_the_doubled_batch(
    case: str, place: Path, tmp_path: Path
) -> None:
    assert cli.main([str(argument) for argument in CUT[case](place, tmp_path / "one")]) == 0
    two = CUT[case](place, tmp_path / "two")
    # as users start them; and in forks, which have imported everything already
    ended = torchrun(2, two) if case == "ragged proteins" else pair(two, tmp_path)
    assert ended.code == 0, ended.err
    assert_same_training(tmp_path / "one", tmp_path / "two")


def pair(
    arguments: list[object], tmp_path: Path, dies: tuple[str, int] | None = None
) -> runs.Ended:
    """Returns how the first of two processes ended that were started as torchrun does."""
    port = str(random.SystemRandom().randint(20000, 40000))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = []
    for rank in ("0", "1"):
        environment = common | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        both.append(Run(arguments, tmp_path, dies, environment))
    ended = [run.end() for run in both]
    assert ended[1].code == ended[0].code, ended[1].err
    assert ended[1].out == ""  # the first one speaks for all
    return ended[0]


def test_two_processes_are_two_accumulated_batches(place: Path, tmp_path: Path) -> None:
    """With masks and dropout drawn, as every batch of a step has its own seed."""
    more = *steps(16, 8), "--set", "hidden_dropout_prob=0.2", *TINY[1:]
    more = *more, "--set-mask", "schedule_length_ratio=1.0"
    one = Run(pretrain(place, tmp_path / "one", *more, "--accumulate", "2"), tmp_path).end().results
    two = pair(pretrain(place, tmp_path / "two", *more), tmp_path).results
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["steps"] == one["steps"] == 16
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-3
    other = Run(pretrain(place, tmp_path / "other", *more, "--seed", "1"), tmp_path).end().results
    assert abs(other["loss"] - one["loss"]) > 1e-3


@pytest.mark.parametrize("case", CUT)
def test_accumulated_batches_are_the_large_one(case: str, place: Path, tmp_path: Path) -> None:
    for name, accumulate in (("large", "1"), ("small", "4")):
        run = CUT[case](place, tmp_path / name, "--accumulate", accumulate)
        assert Run(run, tmp_path).end().code == 0
    assert_same_training(tmp_path / "large", tmp_path / "small")


def assert_close(one: list[dict], other: list[dict]) -> None:
    assert [entry["step"] for entry in one] == [entry["step"] for entry in other]
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_two_killed_processes(place: Path, tmp_path: Path) -> None:
    more = *steps(12), "--test-share", "0.1"
    whole = pair(finetune(place, tmp_path / "whole", *more), tmp_path).results
    broken = [*finetune(place, tmp_path / "broken", *more), "--resume"]
    killed = pair(broken, tmp_path, dies=("torch.nn.utils.clip_grad_norm_", 8))
    assert killed.code == -9
    result = pair(broken, tmp_path)
    assert "going on from" in result.err
    assert result.results["test"] == whole["test"]
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [["--bf16"], ["--gradient-checkpointing"], ["--tensorboard", "--workers", "1"]],
    ids=lambda more: more[0],
)
def test_options(more: list[str], place: Path, pretrained: Path, tmp_path: Path) -> None:
    ended = Run(pretrain(place, tmp_path / "out", *steps(12), *more), tmp_path).end()
    plain = json.loads((pretrained / "results.json").read_text())
    found = ended.results["loss"]
    assert found == pytest.approx(plain["loss"], rel=0.05 if more == ["--bf16"] else 1e-5)
    assert (found == plain["loss"]) == (more != ["--bf16"])
    assert "Warning" not in ended.err
    assert bool(list(tmp_path.rglob("events.out.tfevents.*"))) == ("--tensorboard" in more)


def test_compiled(place: Path, pretrained: Path, tmp_path: Path) -> None:
    """Up to inductor, which takes minutes: the same losses, the same names of weights."""
    more = *steps(12), "--set-mask", "select_initial_ratio=null", "--accumulate", "2"
    results = []
    for name, flags in (("plain", ()), ("fast", ("--compile",))):
        environment = {"COMPILE_BACKEND": "eager"} if flags else {}
        arguments = pretrain(place, tmp_path / name, *more, *flags)
        results.append(Run(arguments, tmp_path, environment=environment).end().results)
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
    assert difference(tmp_path / "fast", tmp_path / "plain") < 1e-2


def test_compiled_ragged_annealed_and_validated(place: Path, tmp_path: Path) -> None:
    """All that changes in a run, and no step is left to eager for it."""
    more = *steps(12), "--set-mask", "select_initial_ratio=1.0", "schedule_length_ratio=1.0"
    arguments = protein("pretrain", place, tmp_path / "out", *more, "--compile")
    ended = Run(arguments, tmp_path, environment={"COMPILE_BACKEND": "eager"}).end()
    assert ended.code == 0 and "recompile_limit" not in ended.err, ended.err


def test_annealing_is_compiled_once_a_stage() -> None:
    from torch._dynamo.testing import CompileCounter

    from sma_fast.models import SMAConfig, SMAForPretraining
    from sma_fast.training.callbacks import STAGES, stage

    masking = SMAMasking(select_initial_ratio=1.0, schedule_length_ratio=0.5, num_per_query=1)
    config = SMAConfig(
        input_type="continuous",
        encoder_type="self_attention",
        **dict.fromkeys(("embedded_channels", "latent_channels", "decoder_channels"), 8),
        **dict.fromkeys(("num_self_attention_heads", "num_cross_attention_heads"), 2),
        **{"num_self_attends_per_block": 1, "decoder_heads": 1, "max_position_embeddings": 24},
        masking=masking,
    )
    model = SMAForPretraining(config)
    progress = [stage(step / 50, masking) for step in range(50)]
    assert (
        sorted(set(progress)) == [0.0, 0.125, 0.25, 0.375, 1.0] and len(set(progress)) == 1 + STAGES
    )
    assert progress == sorted(progress)
    assert all(value <= step / 50 or step >= 25 for step, value in enumerate(progress))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step, value in enumerate(progress):
        model.progress = value
        with _draws.by_row(torch.arange(2) + step):
            compiled(torch.randn(2, 24, 1)).loss.backward()
    assert counter.frame_count <= 1 + STAGES
    never = SMAMasking()
    assert {stage(step / 50, never) for step in range(50)} == {1.0}
    torch._dynamo.reset()


def test_progress_bar_shows_loss_and_speed(place: Path, pretrained: Path) -> None:
    shown = [file.read_text() for file in place.glob("*.err")]
    assert any("loss=" in text and "tokens/s=" in text for text in shown)


def test_limit_train(place: Path, pretrained: Path, tmp_path: Path) -> None:
    more = *steps(3), "--limit-train", "16"
    ended = Run(pretrain(place, tmp_path / "out", *more), tmp_path).end()
    assert ended.results["steps"] == 3
    encoded = json.loads((tmp_path / "out" / "data.json").read_text())
    whole = json.loads((pretrained / "data.json").read_text())
    assert encoded["inputs"]["mean"] != whole["inputs"]["mean"]  # of 16 rows
    refused = (
        Run(pretrain(place, tmp_path / "more", "--limit-train", "1000"), tmp_path).end().refusal
    )
    assert "limit_train: got 1000, allowed is at most 90" in refused


# ---- results -------------------------------------------------------------------------------------


def test_the_best_by_validation_and_never_by_test(place: Path, tmp_path: Path) -> None:
    folders = []
    for name, test in (("one", "test.csv"), ("other", "table.csv")):
        more = "--test", place / test, "--validation", place / "table.csv"
        more = *more, *steps(30), "--learning-rate", "0.05", "--scheduler", "constant"
        arguments = finetune(place, tmp_path / name, *more)
        arguments = [a for a in arguments if a not in ("--test-share", "--validation-share", "0.2")]
        result = Run(arguments, tmp_path).end().results
        best = min(result["validation"], key=lambda entry: entry["loss"])
        assert result["best_step"] == best["step"]
        assert_same_weights(tmp_path / name, tmp_path / name / f"checkpoint-{best['step']}")
        folders.append(tmp_path / name)
    assert_same_weights(*folders)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_evaluate_gives_what_finetune_reported(
    task: str, place: Path, pretrained: Path, tmp_path: Path
) -> None:
    """On 37 rows: an incomplete last batch counts."""
    out = tmp_path / "out"
    arguments = [
        *finetune(place, out, *steps(12)),
        "--test",
        place / "test.csv",
        *("--test-share", "0", "--validation-share", "0"),
    ]
    arguments += ["--from", pretrained, "--task", task, "--validation", place / "table.csv"]
    result = Run(arguments, tmp_path).end().results
    for size in ("16", "64"):
        evaluate = ["evaluate", out, place / "test.csv", "--cache", place / "cache"]
        again = Run([*evaluate, "--batch-size", size], tmp_path).end().results
        assert again == pytest.approx(result["test"], rel=1e-5)
    lines = (place / "test.csv").read_text().splitlines()
    hit = round(result["test"]["accuracy"] * (len(lines) - 1), 6) if task == "classification" else 0
    assert hit == int(hit)  # a share of all 37
