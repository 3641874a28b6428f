"""draw_queries against one topk of noise and a loop of randperm."""

import functools

import pytest
import torch

import sma_fast
from bench import checks, harness, peers, roofline, shapes


def set_up(settings: harness.Settings, name: str) -> harness.Case:
    shape = settings.shape(name)
    padding = None if shape.latents else shapes.padding(shape, settings.device)
    arguments = (shape.batch, shape.queries, shape.selected, padding, settings.device)
    ours = functools.partial(
        sma_fast.draw_queries,
        shape.selected,
        batch=shape.batch,
        num_candidates=shape.queries,
        padding_mask=padding,
        device=settings.device,
    )

    def seeded():
        return ours(generator=torch.Generator(settings.device).manual_seed(6))

    wanted = harness.reference(seeded)

    def check(answer, is_ours):
        checks.drawn(answer, shape.selected, shape.queries, padding)
        if is_ours:
            assert torch.equal(seeded(), wanted), "not the reference's draw from the same seed"

    return harness.Case(
        op="draw_queries",
        part="forward",
        shape=shape,
        ours=ours,
        peers={
            "eager": functools.partial(peers.best_draw, *arguments),
            "compiled": harness.compiled(settings, peers.best_draw, *arguments),
            "published": functools.partial(peers.published_draw, *arguments),
        },
        check=check,
        stages=[roofline.draw(shape.queries, wanted)],
    )


@pytest.mark.parametrize("shape", shapes.ATTENTION)
def bench_draw_queries(measure, settings, shape):
    measure(set_up(settings, shape))
