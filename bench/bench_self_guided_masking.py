"""self_guided_masking against plain PyTorch and the published formula."""

import dataclasses
import functools

import pytest

import sma_fast
from bench import checks, harness, peers, roofline, shapes
from sma_fast.testing import assert_consistent


def set_up(settings: harness.Settings, name: str, *, drawn: bool = False) -> harness.Case:
    """`drawn`: ours draws its queries in the call; otherwise it is given those of the peers."""
    shape = settings.shape(name)
    inputs = shapes.attention(shape, settings.device, settings.dtype)
    tokens = shapes.tokens(shape, settings.device, settings.dtype)
    arguments = (inputs.query, inputs.key, tokens, *inputs[2:], shape.ratio)
    given = functools.partial(
        sma_fast.self_guided_masking,
        inputs.query,
        inputs.key,
        tokens,
        mask_ratio=shape.ratio,
        head_index=inputs.head_index,
        key_padding_mask=inputs.padding,
    )
    ours = functools.partial(given, query_index=inputs.query_index)
    wanted = harness.reference(ours)
    if drawn:
        ours = functools.partial(given, num_queries=shape.selected)

    def check(answer, is_ours):
        right = wanted
        if is_ours:
            if drawn:
                right = harness.reference(functools.partial(given, query_index=answer.query_index))
            mask, ids = answer.selection.mask, answer.selection.ids_visible
            assert_consistent(answer.selection, inputs.padding)
            answer = peers.Masked(answer.scores, mask, ids, answer.visible[0])
        tolerance = checks.tolerance(is_ours, settings.dtype)
        checks.scores(answer.scores, right.scores, tolerance)
        checks.mask(answer.mask, right.selection.mask, right.scores, inputs.padding, tolerance)
        checks.ids_visible(answer.ids_visible, answer.mask, inputs.padding)
        checks.rows(answer.visible, tokens, answer.ids_visible, zeros=is_ours)

    # The floor is that of the issue: scores and gather. Choosing works on what lies in the cache.
    stages = [roofline.scores(*inputs), roofline.gather(tokens, wanted.selection.ids_visible)]
    return harness.Case(
        op="self_guided_masking",
        part="forward",
        shape=shape,
        ours=ours,
        peers={
            "eager": functools.partial(peers.best_masking, *arguments),
            "compiled": harness.compiled(settings, peers.best_masking, *arguments),
            "published": harness.published_fits(shape, settings)
            or functools.partial(peers.published_masking, *arguments),
        },
        check=check,
        stages=stages,
    )


@pytest.mark.parametrize("shape", shapes.ATTENTION)
def bench_self_guided_masking(measure, settings, shape):
    measure(set_up(settings, shape))


@pytest.mark.parametrize("shape", ("protein", "molecule"))
def bench_self_guided_masking_drawn(measure, settings, shape):
    """As training calls it; the peer's queries are drawn already."""
    case = set_up(settings, shape, drawn=True)
    eager = {"eager": case.peers["eager"]}
    measure(dataclasses.replace(case, part="forward, drawn", peers=eager))
