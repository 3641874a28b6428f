"""attention_scores against plain PyTorch and the published formula."""

import functools

import pytest

import sma_fast
from bench import checks, harness, peers, roofline, shapes


def set_up(settings: harness.Settings, name: str) -> harness.Case:
    shape = settings.shape(name)
    inputs = shapes.attention(shape, settings.device, settings.dtype)
    ours = functools.partial(
        sma_fast.attention_scores,
        inputs.query,
        inputs.key,
        query_index=inputs.query_index,
        head_index=inputs.head_index,
        key_padding_mask=inputs.padding,
    )
    wanted = harness.reference(ours)

    def check(answer, is_ours):
        checks.scores(answer, wanted, checks.tolerance(is_ours, settings.dtype))

    return harness.Case(
        op="attention_scores",
        part="forward",
        shape=shape,
        ours=ours,
        peers={
            "eager": functools.partial(peers.best_scores, *inputs),
            "compiled": harness.compiled(settings, peers.best_scores, *inputs),
            "published": harness.published_fits(shape, settings)
            or functools.partial(peers.published_scores, *inputs),
        },
        check=check,
        stages=[roofline.scores(*inputs)],
    )


@pytest.mark.parametrize("shape", shapes.ATTENTION)
def bench_attention_scores(measure, settings, shape):
    measure(set_up(settings, shape))
