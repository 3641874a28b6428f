"""attention_scores against plain PyTorch, the published formula and flash-colreduce."""

import functools

import pytest
import torch

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


def all_queries(settings: harness.Settings, name: str) -> harness.Case:
    """All queries of each head by itself, as flash-colreduce has it."""
    shape = settings.shape(name)
    query, key, *_ = shapes.attention(shape, settings.device, settings.dtype)
    ours = functools.partial(sma_fast.attention_scores, query, key, head_reduce="none")
    wanted = harness.reference(ours)
    every = torch.arange(shape.queries, device=settings.device).expand(shape.batch, -1)
    stage = roofline.scores(query, key, every, None, None)

    def check(answer, is_ours):
        checks.scores(answer.float(), wanted, checks.tolerance(is_ours, settings.dtype))

    return harness.Case(
        op="attention_scores",
        part="all queries",
        shape=shape,
        ours=ours,
        peers={
            "eager": functools.partial(peers.summed_attention, query, key),
            "flash-colreduce": peers.flash_colreduce(query, key),
        },
        check=check,
        stages=[stage._replace(bytes=stage.bytes + query.nbytes)],  # here they are not few
    )


@pytest.mark.parametrize("shape", shapes.ATTENTION)
def bench_attention_scores(measure, settings, shape):
    measure(set_up(settings, shape))


@pytest.mark.parametrize("shape", shapes.COLREDUCE)
def bench_attention_scores_of_all_queries(measure, settings, shape):
    settings.only_on_gpu()
    measure(all_queries(settings, shape))
