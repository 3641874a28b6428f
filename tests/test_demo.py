import contextlib
import io
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from matplotlib import image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

import sma_fast
from sma_fast import _dispatch, cli
from sma_fast.training import demo, demo_backends
from sma_fast.training.demo_pretrain import pretrain
from sma_fast.training.probe import STRENGTHS, linear_probe

STEPS, SEEDS = 6, 2
CPU_READY = [
    backend
    for backend, state in sma_fast.backends()["self_guided_masking"]["cpu"].items()
    if state in ("answers", "ready")
]


class DemoRun(NamedTuple):
    code: int
    out: Path
    printed: str
    progress: str
    results: dict


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    printed, progress = io.StringIO(), io.StringIO()
    arguments = ["demo", "--out", str(out), "--seeds", str(SEEDS), "--steps", str(STEPS)]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(progress):
        code = cli.main(arguments)
    results = json.loads((out / "results.json").read_text())
    return DemoRun(code, out, printed.getvalue(), progress.getvalue(), results)


def test_demo_writes_three_files_and_nothing_else(demo_run: DemoRun) -> None:
    assert demo_run.code == 0
    assert sorted(path.name for path in demo_run.out.iterdir()) == [
        "curves.png",
        "masks.png",
        "results.json",
    ]
    for name in ("curves.png", "masks.png"):
        height, width, _ = image.imread(demo_run.out / name).shape
        assert height >= 500 and width >= 900
        assert name in demo_run.printed


def test_demo_times_every_backend(demo_run: DemoRun) -> None:
    times = demo_run.results["backends"]["times"]
    whole = [row for row in times if (row["op"], row["device"]) == ("self_guided_masking", "cpu")]
    assert [row["backend"] for row in whole] == [demo_backends.PLAIN, *CPU_READY]
    assert {row["op"] for row in times} == set(demo_backends.OPS)
    for row in times:
        assert 0 < row["seconds"] < 60
        interpreted = (row["backend"], row["device"]) == ("triton", "cpu")
        pictures = demo_backends.INTERPRETED if interpreted else demo.BATCH_MASKED
        assert row["samples"] == pytest.approx(pictures / row["seconds"])
    others = set(_dispatch.BACKENDS) - set(CPU_READY)
    assert {f"{backend} on cpu" for backend in others} <= set(
        demo_run.results["backends"]["not_here"]
    )


def test_demo_trains_and_shows_the_loss(demo_run: DemoRun) -> None:
    assert demo_run.results["seeds"] == SEEDS and demo_run.results["steps"] == STEPS
    for mask in demo.MASKS:
        curves = demo_run.results["loss"][mask]
        assert len(curves) == SEEDS
        for curve in curves:
            assert curve["step"] == list(range(1, STEPS + 1))
            assert all(0 < loss < 3 for loss in curve["loss"])
            assert curve["loss"][-1] < curve["loss"][0]
        assert f"seed 1, {mask} masks: 100%" in demo_run.progress
    assert "loss=" in demo_run.progress and "train_runtime" not in demo_run.progress
    assert "arning" not in demo_run.progress + demo_run.printed


def test_demo_summarises_what_it_measured(demo_run: DemoRun) -> None:
    probe = demo_run.results["probe"]
    assert list(probe) == list(demo.FEATURES)
    for name, entry in probe.items():
        tests = [run["test"] for run in entry["runs"]]
        assert len(tests) == SEEDS and all(0.5 < accuracy <= 1 for accuracy in tests)
        assert entry["test_mean"] == pytest.approx(statistics.mean(tests))
        assert entry["test_std"] == pytest.approx(statistics.stdev(tests))
        assert f"{name:<14} {entry['test_mean'] * 100:>7.2f}" in demo_run.printed
    assert probe["guided"]["runs"] != probe["random"]["runs"]
    gap = 100 * (probe["guided"]["test_mean"] - probe["random"]["test_mean"])
    assert f"Guided minus random, seed by seed: {gap:+.2f}" in demo_run.printed


def test_raw_pixel_probe_is_what_scikit_learn_says(demo_run: DemoRun) -> None:
    digits = demo.load(1)
    run = demo_run.results["probe"]["raw pixels"]["runs"][1]
    scaler = StandardScaler().fit(digits.pixels[digits.train])
    model = LogisticRegression(C=run["strength"], max_iter=2000)
    model.fit(scaler.transform(digits.pixels[digits.train]), digits.labels[digits.train])
    accuracy = model.score(scaler.transform(digits.pixels[digits.test]), digits.labels[digits.test])
    assert run["test"] == pytest.approx(accuracy)


def test_one_seed_has_no_deviation() -> None:
    runs = [demo.Probe(test=0.5, validation=0.5, strength=1.0)]
    assert demo._summary(runs)["test_std"] is None
    assert demo._probe_table({"guided": demo._summary(runs)}).splitlines()[1].split() == [
        "guided",
        "50.00",
        "-",
        "50.00",
    ]


# The comparison is fair


def test_test_pictures_are_the_same_for_all_seeds_and_in_no_other_part() -> None:
    first, second = demo.load(0), demo.load(1)
    assert np.array_equal(first.test, second.test)
    assert not np.array_equal(first.train, second.train)
    for digits in (first, second):
        parts = np.concatenate([digits.train, digits.validation, digits.test])
        assert sorted(parts) == list(range(1797))
        inputs = digits.inputs()
        assert inputs.shape == (1797, 64, 1)
        assert inputs[digits.train].mean().abs() < 1e-5
        assert inputs[digits.train].std() == pytest.approx(1, abs=1e-3)


def test_both_masks_start_from_the_same_weights() -> None:
    guided, control = demo.build("guided", 3), demo.build("random", 3)
    other = demo.build("guided", 4)
    assert guided.config.masking.mask == "guided" and control.config.masking.mask == "random"
    assert guided.config.masking.mask_ratio == control.config.masking.mask_ratio
    for name, weight in guided.state_dict().items():
        assert torch.equal(weight, control.state_dict()[name])
    assert not torch.equal(guided.encoder.latents, other.encoder.latents)


class Recorder(nn.Module):
    """Fits the mean of its inputs, keeps what it saw, and draws `draws` random numbers a step."""

    def __init__(self, draws: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1))
        self.draws = draws
        self.seen: list[list[float]] = []
        self.losses: list[float] = []
        self.drawn: list[float] = []

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor]:
        self.drawn.append(torch.rand(self.draws)[0].item())
        loss = (inputs - self.mean).square().mean()
        self.seen.append(inputs.flatten().tolist())
        self.losses.append(loss.item())
        return (loss,)


def train_recorder(draws: int, seed: int, capsys: pytest.CaptureFixture) -> Recorder:
    model = Recorder(draws)
    samples = torch.arange(20.0).view(20, 1)
    model.curve = pretrain(
        model, samples, steps=8, batch_size=6, learning_rate=0.1, seed=seed, title="recorder"
    )
    capsys.readouterr()
    return model


def test_order_of_samples_depends_on_the_seed_alone(capsys: pytest.CaptureFixture) -> None:
    few, many, again, other = (
        train_recorder(draws, seed, capsys) for draws, seed in ((1, 0), (1000, 0), (1, 0), (1, 1))
    )
    assert [len(batch) for batch in few.seen] == [6] * 8  # of which an epoch has three
    assert few.seen == many.seen
    assert few.seen != other.seen
    assert few.drawn == again.drawn and few.drawn != other.drawn
    epoch = [sample for batch in few.seen[:3] for sample in batch]
    assert len(set(epoch)) == 18 and few.seen[3:6] != few.seen[:3]


def test_curve_holds_the_losses(capsys: pytest.CaptureFixture) -> None:
    model = train_recorder(1, 0, capsys)
    assert model.curve.step == list(range(1, 9))
    assert model.curve.loss == pytest.approx(model.losses, rel=1e-3)
    assert model.mean.item() > 0.2 and not model.training


def test_pretrain_refuses_a_batch_larger_than_the_data() -> None:
    with pytest.raises(ValueError, match="batch_size: got 6, allowed is at most 5 samples"):
        pretrain(Recorder(1), torch.ones(5, 1), steps=1, batch_size=6, learning_rate=0.1, seed=0)


def test_probe_chooses_its_strength_without_the_test_labels() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    features = np.eye(3)[labels] @ rng.normal(size=(3, 10)) + 1.5 * rng.normal(size=(300, 10))
    train, validation, test = np.arange(60), np.arange(60, 180), np.arange(180, 300)
    probe = linear_probe(features, labels, train, validation, test)
    assert probe.strength in STRENGTHS and probe.test > 0.5
    shuffled = labels.copy()
    shuffled[test] = (shuffled[test] + 1) % 3
    other = linear_probe(features, shuffled, train, validation, test)
    assert (other.strength, other.validation) == (probe.strength, probe.validation)
    assert other.test < probe.test
    # a perfect score is kept by the strongest penalty that reaches it
    assert linear_probe(np.eye(3)[labels], labels, train, validation, test).strength == 0.01


# A backend that disagrees


def wrong(op: str, *arguments):
    """What the oracle gives, with one thing off that a careless check would pass."""
    result = getattr(sma_fast.reference, op)(*arguments)
    if op == "attention_scores":
        result[3, 5] += 0.01
    elif op == "gather_tokens":
        result[-1, -1] = result[-1, 0]
    elif op == "select_tokens":
        mask, ids_visible, ids_masked, *rest = result
        ids_masked[0, :2] = ids_masked[0, :2].flip(0)
        result = (mask, ids_visible, ids_masked, *rest)
    elif op == "self_guided_masking":
        scores, *selection, visible = result
        selection[3][2, :2] = selection[3][2, :2].flip(0)
        result = (scores, *selection, visible)
    return result


@pytest.fixture
def faulty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the "triton" backend answer on the CPU, wrongly for one op."""
    find = _dispatch.implementation

    def find_faulty(backend: str, op: str, device_type: str):
        if (backend, op, device_type) == ("triton", request.param, "cpu"):
            return lambda *arguments: wrong(op, *arguments)
        return find(backend, op, device_type)

    monkeypatch.setattr(_dispatch, "implementation", find_faulty)
    _dispatch._choose.cache_clear()
    yield
    _dispatch._choose.cache_clear()


@pytest.mark.parametrize("faulty", demo_backends.OPS, indirect=True)
def test_a_backend_that_disagrees_ends_the_demo(
    faulty: None, tmp_path: Path, capsys: pytest.CaptureFixture, request: pytest.FixtureRequest
) -> None:
    op = request.node.callspec.params["faulty"]
    assert cli.main(["demo", "--out", str(tmp_path), "--steps", "1", "--seeds", "1"]) == 1
    error = capsys.readouterr().err
    assert f"{op} on cpu: triton disagrees with the oracle" in error
    assert not any(tmp_path.iterdir())


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--steps", "0"], "argument --steps: got '0', allowed is a whole number"),
        (["demo", "--steps", "many"], "argument --steps: got 'many'"),
        (["demo", "--seeds", "0"], "argument --seeds: got '0', allowed is a whole number"),
        (["demo", "--seeds", "-1"], "argument --seeds: got '-1'"),
        (["demo", "--seeds", "1.5"], "argument --seeds: got '1.5'"),
        (["demo", "--colour"], "unrecognized arguments: --colour"),
        (["undo"], "invalid choice: 'undo'"),
        ([], "arguments are required: COMMAND"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main(arguments)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit) as ending:
            cli.main(["demo", "--out", str(out)])
        assert ending.value.code == 2
        assert f"argument --out: cannot write to {out}: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_extras(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "not installed: sklearn" in error and "pip install sma_fast[train]" in error


def test_info(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert _dispatch.config_text() in printed
    for op, devices in sma_fast.backends().items():
        for device, states in devices.items():
            assert f"{op} on {device}" in printed
            assert all(state in printed for state in states.values())
