"""random_masking against MAE's two argsorts and gather."""

import functools

import pytest
import torch

import sma_fast
from bench import checks, harness, peers, roofline, shapes


def set_up(settings: harness.Settings, name: str) -> harness.Case:
    shape = settings.shape(name)
    tokens = shapes.tokens(shape, settings.device, settings.dtype)
    ours = functools.partial(sma_fast.random_masking, tokens, shape.ratio)
    arguments = (tokens, shape.ratio)
    noise = shapes.scores(shape, settings.device)
    wanted = harness.reference(functools.partial(ours, noise=noise))
    keep = wanted[0].shape[1]
    ids_visible = wanted[2].argsort(1)[:, :keep]

    def check(answer, is_ours):
        # timed calls draw their own noise; the same noise must give the same mask
        if is_ours:
            given = ours(noise=noise)
            assert all(map(torch.equal, given, wanted)), "not the reference's answer"
        else:
            given = peers.mae_random_masking(*arguments, noise=noise)
            checks.mask(given[1].bool(), wanted[1].bool(), noise, None, tolerance=0.0)
        visible, mask, ids_restore = answer
        assert (mask.sum(1) == shape.tokens - keep).all(), "wrong number of masked tokens"
        assert torch.equal(mask.bool(), ids_restore >= keep), "ids_restore does not follow the mask"
        order = ids_restore.argsort(1)
        checks.rows(visible, tokens, order[:, :keep], zeros=False)

    return harness.Case(
        op="random_masking",
        part="forward",
        shape=shape,
        ours=ours,
        peers={
            "mae": functools.partial(peers.mae_random_masking, *arguments),
            "compiled": harness.compiled(settings, peers.mae_random_masking, *arguments),
        },
        check=check,
        stages=[roofline.gather(tokens, ids_visible)],
    )


@pytest.mark.parametrize("shape", shapes.FIXED_LENGTH)
def bench_random_masking(measure, settings, shape):
    measure(set_up(settings, shape))
