"""The demo: the package's main job on scikit-learn's 1,797 digits, 8x8 real pictures.

Masks a batch with every backend, pretrains the same small model with guided and with random masks,
and asks a linear probe what the frozen features know.
"""

import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import sma_fast
from sma_fast.masking.sma import SMAMasking
from sma_fast.models import SMAConfig, SMAForPretraining
from sma_fast.training import demo_backends, demo_plots
from sma_fast.training.demo_pretrain import Curve, pretrain
from sma_fast.training.probe import Probe, linear_probe

MASKS = ("guided", "random")
FEATURES = ("raw pixels", "untrained", "random", "guided")
STEPS = 800
BATCH = 64
BATCH_MASKED = 1024  # pictures that every backend masks
# Chosen once, by validation accuracy of both masks with seed 100, without a look at the test set.
LEARNING_RATE = 3e-3
MASKING = {"mask_ratio": 0.5, "num_per_query": 16}
SIZES = {
    "input_type": "continuous",
    "input_channels": 1,
    "max_position_embeddings": 64,
    "embedded_channels": 32,
    "num_latents": 8,
    "latent_channels": 64,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
    "self_attention_widening_factor": 2,
    "cross_attention_widening_factor": 2,
    "decoder_heads": 4,
    "decoder_widening_factor": 2,
    "initializer_range": 0.1,
    "pe_initializer_range": 0.1,
}
TEST_SEED = 0  # of the one split that sets the test pictures aside
SHOWN = 8  # pictures in masks.png
# A second thread saves this small model a quarter of a step on an idle machine, and on a busy one
# the two wait for each other for seconds.
THREADS = 1


@dataclass(frozen=True)
class Digits:
    """The pictures, split for one seed; the test pictures are the same for all seeds.

    Attributes:
        pixels: (1797, 64) float, 0 to 16.
        labels: (1797,), 0 to 9.
        train, validation, test: indices.
    """

    pixels: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def mean_and_std(self) -> tuple[float, float]:
        return self.pixels[self.train].mean(), self.pixels[self.train].std()

    def inputs(self) -> torch.Tensor:
        """Returns (1797, 64, 1) float32, standardised by the train pictures."""
        mean, std = self.mean_and_std
        return torch.tensor((self.pixels - mean) / std, dtype=torch.float32).unsqueeze(2)


@dataclass(frozen=True)
class SeedRun:
    """What one seed gave: trained models and loss by mask, probes by features, training time."""

    models: dict[str, SMAForPretraining]
    curves: dict[str, Curve]
    probes: dict[str, Probe]
    seconds: float


def load(seed: int) -> Digits:
    """Returns the digits: 30 % test, and by `seed` three quarters of the rest train."""
    pixels, labels = load_digits(return_X_y=True)
    everything = np.arange(len(labels))
    rest, test = train_test_split(
        everything, test_size=0.3, stratify=labels, random_state=TEST_SEED
    )
    train, validation = train_test_split(
        rest, test_size=0.25, stratify=labels[rest], random_state=seed
    )
    return Digits(pixels, labels, train, validation, test)


def build(mask: str, seed: int) -> SMAForPretraining:
    """Returns the untrained model of `seed`, the same weights for either mask."""
    torch.manual_seed(seed)
    return SMAForPretraining(SMAConfig(**SIZES, masking=SMAMasking(**MASKING, mask=mask))).eval()


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def features(model: SMAForPretraining, inputs: torch.Tensor) -> np.ndarray:
    """Returns (pictures, M C): all latents after the last layer, with nothing masked."""
    return model.encoder(inputs).last_hidden_state.flatten(1).numpy()


def run(
    out: Path, *, seeds: int = 3, steps: int = STEPS, say: Callable[[str], object] = print
) -> dict:
    """Runs the demo and writes masks.png, curves.png and results.json into `out`.

    Args:
        out: an existing folder.
        seeds: pretraining runs of each mask, at least 1.
        steps: optimiser steps of a run, at least 1.
        say: takes each line of the report.

    Returns:
        What results.json holds.

    Raises:
        BackendMismatch: where an implementation disagrees with the oracle.
    """
    start = time.perf_counter()
    threads = torch.get_num_threads()
    say(f"sma_fast {sma_fast.__version__}, torch {torch.__version__}, {threads} threads")
    say("scikit-learn's digits: 1797 pictures of 8x8 pixels, each pixel a token")

    batch = _masking_batch()
    say(
        f"\n1. Masking {BATCH_MASKED} pictures: {batch.key.shape[1]} heads, "
        f"{batch.query_index.shape[1]} of {batch.query.shape[2]} queries, ratio "
        f"{batch.mask_ratio}. Each implementation is checked against the oracle, then timed."
    )
    rows, missing = demo_backends.compare_backends(batch)
    say(demo_backends.table(rows, "pictures"))
    say("All agree with the oracle. x: times as fast as plain PyTorch (selected rows only).")
    for backend, reason in missing.items():
        say(f"Not here: {backend}: {reason}.")
    seconds = {"masking": time.perf_counter() - start}

    say(
        f"\n2. Pretraining, {seeds} x {steps} steps of {BATCH} pictures with guided and with "
        "random masks, each pair from the same weights and in the same order."
    )
    with _threads(THREADS):
        runs = [_run_seed(seed, steps) for seed in range(seeds)]
    curves = {mask: [run.curves[mask] for run in runs] for mask in MASKS}
    probes = {name: [run.probes[name] for run in runs] for name in FEATURES}
    demo_plots.draw_curves(out / "curves.png", curves)
    _draw_masks(out / "masks.png", runs[0].models, load(0))
    seconds |= {
        "pretraining": sum(run.seconds for run in runs),
        "all": time.perf_counter() - start,
    }
    results = {
        "data": "scikit-learn digits: 1797 pictures of 8x8 pixels",
        "versions": {
            "sma_fast": sma_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.system()} {platform.machine()}, {threads} threads",
        "seeds": seeds,
        "steps": steps,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "model": SIZES,
        "masking": MASKING,
        "backends": {
            "pictures": BATCH_MASKED,
            "times": [asdict(row) for row in rows],
            "not_here": missing,
        },
        "loss": {mask: [asdict(curve) for curve in each] for mask, each in curves.items()},
        "probe": {name: _summary(each) for name, each in probes.items()},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    say(
        "\n3. Probe: logistic regression on frozen features, accuracy in % on "
        f"{len(load(0).test)} test pictures."
    )
    say(_probe_table(results["probe"]))
    say(_difference(probes))
    files = ", ".join(str(out / name) for name in ("masks.png", "curves.png", "results.json"))
    say(f"\n{seconds['all']:.0f} s. Written: {files}")
    return results


def _run_seed(seed: int, steps: int) -> SeedRun:
    digits = load(seed)
    inputs = digits.inputs()
    split = (digits.labels, digits.train, digits.validation, digits.test)
    models, curves, seconds = {}, {}, 0.0
    for mask in MASKS:
        models[mask] = build(mask, seed)
        start = time.perf_counter()
        curves[mask] = pretrain(
            models[mask],
            inputs[digits.train],
            steps=steps,
            batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            seed=seed,
            title=f"seed {seed}, {mask} masks",
        )
        seconds += time.perf_counter() - start
    read = {"raw pixels": digits.pixels, "untrained": features(build("guided", seed), inputs)}
    read |= {mask: features(model, inputs) for mask, model in models.items()}
    probes = {name: linear_probe(read[name], *split) for name in FEATURES}
    return SeedRun(models, curves, probes, seconds)


@torch.no_grad()
def _masking_batch() -> demo_backends.Batch:
    encoder = build("guided", 0).encoder
    embeddings = encoder.embedding(load(0).inputs()[:BATCH_MASKED])  # (B, N, E)
    first = encoder.first
    query = first.split(encoder.latent_queries())
    key = first.split(first.key(embeddings))
    masking = SMAMasking(**MASKING)
    queries = query.shape[2]
    index = sma_fast.draw_queries(
        masking.count_queries(key.shape[2], queries),
        batch=len(key),
        num_candidates=queries,
        generator=torch.Generator().manual_seed(0),
    )
    return demo_backends.Batch(query, key, embeddings, index, masking.mask_ratio)


@torch.no_grad()
def _draw_masks(path: Path, models: dict[str, SMAForPretraining], digits: Digits) -> None:
    # the first test picture of each of the first digits
    labels = digits.labels[digits.test]
    chosen = digits.test[[int(np.argmax(labels == digit)) for digit in range(SHOWN)]]
    inputs = digits.inputs()[chosen]
    pictures = digits.pixels[chosen].reshape(-1, 8, 8) / 16
    mean, std = digits.mean_and_std
    rows = [("picture", "ink", pictures)]
    for mask, model in models.items():
        out = model(inputs, generator=torch.Generator().manual_seed(0))
        if out.scores is not None:
            rows.append(("guided:\nscores", "score", out.scores.numpy().reshape(-1, 8, 8)))
        masks = out.mask.numpy().reshape(-1, 8, 8)
        rows.append((f"{mask}:\nmask", demo_plots.COLOURS[mask], (pictures, masks)))
        restored = inputs.scatter(1, out.ids_masked.unsqueeze(2), out.logits)
        restored = (restored.numpy() * std + mean).reshape(-1, 8, 8) / 16
        rows.append((f"{mask}:\nreconstruction", "ink", restored.clip(0, 1)))
    demo_plots.draw_masks(path, [f"test digit {digit}" for digit in range(SHOWN)], rows)


def _summary(runs: list[Probe]) -> dict:
    test = [run.test for run in runs]
    return {
        "test_mean": statistics.mean(test),
        "test_std": statistics.stdev(test) if len(test) > 1 else None,
        "runs": [asdict(run) for run in runs],
    }


def _probe_table(summary: dict[str, dict]) -> str:
    lines = [f"{'features':<14} {'mean':>7} {'std':>6}   each seed, %"]
    for name, entry in summary.items():
        std = "-" if entry["test_std"] is None else f"{entry['test_std'] * 100:.2f}"
        each = "  ".join(f"{run['test'] * 100:.2f}" for run in entry["runs"])
        lines.append(f"{name:<14} {entry['test_mean'] * 100:>7.2f} {std:>6}   {each}")
    return "\n".join(lines)


def _difference(probes: dict[str, list[Probe]]) -> str:
    pairs = zip(probes["guided"], probes["random"], strict=True)
    gaps = [100 * (guided.test - control.test) for guided, control in pairs]
    mean = statistics.mean(gaps)
    spread = f" ± {statistics.stdev(gaps):.2f}" if len(gaps) > 1 else ""
    return f"Guided minus random, seed by seed: {mean:+.2f}{spread} points."
