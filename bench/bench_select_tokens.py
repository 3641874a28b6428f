"""select_tokens against topk with scatter and nonzero, plain PyTorch and the published loops."""

import functools

import pytest

import sma_fast
from bench import checks, harness, peers, roofline, shapes
from sma_fast.testing import assert_same_selection


def set_up(settings: harness.Settings, name: str) -> harness.Case:
    shape = settings.shape(name)
    scores = shapes.scores(shape, settings.device)
    padding = shapes.padding(shape, settings.device)
    arguments = (scores, shape.ratio, padding)
    ours = functools.partial(
        sma_fast.select_tokens, scores, mask_ratio=shape.ratio, key_padding_mask=padding
    )
    wanted = harness.reference(ours)

    def check(answer, is_ours):
        if is_ours:
            assert_same_selection(answer, wanted)
            return
        mask, ids_visible = answer
        checks.mask(mask, wanted.mask, scores, padding, tolerance=0.0)
        checks.ids_visible(ids_visible, mask, padding)

    return harness.Case(
        op="select_tokens",
        part="forward",
        shape=shape,
        ours=ours,
        peers={
            "topk+scatter+nonzero": functools.partial(peers.topk_scatter_nonzero, *arguments),
            "eager": functools.partial(peers.best_select, *arguments),
            "compiled": harness.compiled(settings, peers.best_select, *arguments),
            "published": functools.partial(peers.published_select, *arguments),
        },
        check=check,
        stages=[roofline.select(scores, shape.num_visible, shape.num_masked)],
    )


@pytest.mark.parametrize("shape", shapes.ALL)
def bench_select_tokens(measure, settings, shape):
    measure(set_up(settings, shape))


@pytest.mark.parametrize("shape", shapes.SELECT_ON_GPU)
def bench_select_tokens_of_many(measure, settings, shape):
    settings.only_on_gpu()
    measure(set_up(settings, shape))
