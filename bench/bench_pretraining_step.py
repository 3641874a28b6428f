"""A whole pretraining step, forward and backward, beside the published model's and random masks.

"changed parts" is the step of a model without the layers after the first, which this project leaves
as they are; "whole" has four of them, and "untouched layers" is these four alone.

On vit-b16 "informed mask" is what self-guided MAE's mask takes, beside MAE's step with a random
one. It comes from embeddings that are there: the unmasked forward that makes them is left out, but
for the "informed step", which is the step with it and such a mask.
"""

import functools

import pytest
import torch

from bench import harness, pictures_step, steps
from bench.shapes import Shape


def _shape(name: str) -> Shape:
    step = steps.build(name, quick=True)
    return Shape(
        name,
        batch=steps.BATCH[name],
        tokens=step.inputs.shape[1],
        width=steps.WIDTH,
        ratio=step.model.config.masking.mask_ratio,
    )


@pytest.mark.parametrize("name", steps.BATCH)
@pytest.mark.parametrize("part", ["whole", "changed parts"])
def bench_pretraining_step(measure, settings, name, part):
    if settings.device != "cpu" or settings.dtype != torch.float32:
        pytest.skip("a step is compared on the CPU in float32")
    build = functools.partial(
        steps.build, name, depth=steps.DEPTH if part == "whole" else 0, quick=settings.quick
    )
    step = build()
    steps.check_same_loss(step)
    peers = {"published": steps.published(build())}
    if part == "whole":
        peers["random mask"] = steps.ours(build(mask="random"))
    measure(
        harness.Case("pretraining_step", part, _shape(name), steps.ours(step), peers, _check_finite)
    )


def bench_pretraining_step_of_pictures(measure, settings):
    shape = settings.shape("vit-b16")
    step = pictures_step.build(shape, settings.device, settings.dtype, settings.quick)
    peers = {
        "whole step": pictures_step.random(step),
        "informed step": pictures_step.informed(step),
    }
    ours = pictures_step.mask(step)
    measure(harness.Case("pretraining_step", "informed mask", shape, ours, peers, _check_finite))


@pytest.mark.parametrize("name", steps.BATCH)
def bench_pretraining_step_untouched_layers(measure, settings, name):
    if settings.device != "cpu" or settings.dtype != torch.float32:
        pytest.skip("a step is compared on the CPU in float32")
    layers = steps.untouched(steps.build(name, quick=settings.quick))
    case = harness.Case(
        "pretraining_step", "untouched layers", _shape(name), layers, {}, _check_finite
    )
    measure(case)


@pytest.mark.parametrize("name", steps.BATCH)
def bench_pretraining_step_peak_memory(benchmark, settings, name):
    if settings.device != "cpu" or settings.dtype != torch.float32:
        pytest.skip("a step is compared on the CPU in float32")
    ours = benchmark.pedantic(steps.peak_bytes, ("ours", name, settings.quick))
    published = steps.peak_bytes("published", name, settings.quick)
    benchmark.extra_info.update(
        op="pretraining_step",
        part="peak memory",
        shape=name,
        batch=steps.BATCH[name],
        device="cpu",
        dtype="float32",
        backend="model",
        peak_bytes=ours,
        peers={"published": {"peak_bytes": published}},
        skipped={},
    )


def _check_finite(loss: torch.Tensor, is_ours: bool) -> None:
    assert loss.isfinite()
