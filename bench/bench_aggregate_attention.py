"""aggregate_attention against plain PyTorch and the published formula, on a map that exists."""

import functools
import math

import pytest
import torch

import sma_fast
from bench import checks, harness, memory, peers, roofline, shapes


def set_up(settings: harness.Settings, name: str) -> harness.Case:
    shape = settings.shape(name)
    _, _, query_index, head_index, _ = shapes.attention(shape, settings.device, settings.dtype)
    draw = torch.Generator(settings.device).manual_seed(5)
    size = (shape.batch, shape.heads, shape.queries, shape.tokens)
    needed = 1.5 * math.prod(size) * settings.dtype.itemsize  # the map, and rows taken from it
    if needed > memory.free_bytes(settings.device):
        pytest.skip(f"needs {needed / 2**30:.0f} GiB")
    attention = torch.empty(size, device=settings.device, dtype=settings.dtype)
    attention.uniform_(generator=draw)
    arguments = (attention, query_index, head_index)
    ours = functools.partial(
        sma_fast.aggregate_attention, attention, query_index=query_index, head_index=head_index
    )
    wanted = harness.reference(ours)

    def check(answer, is_ours):
        checks.scores(answer, wanted, checks.tolerance(is_ours, settings.dtype))

    return harness.Case(
        op="aggregate_attention",
        part="forward",
        shape=shape,
        ours=ours,
        peers={
            "eager": functools.partial(peers.best_aggregate, *arguments),
            "compiled": harness.compiled(settings, peers.best_aggregate, *arguments),
            "published": functools.partial(peers.published_aggregate, *arguments),
        },
        check=check,
        stages=[roofline.aggregate(*arguments)],
    )


@pytest.mark.parametrize("shape", shapes.ATTENTION)
def bench_aggregate_attention(measure, settings, shape):
    measure(set_up(settings, shape))
