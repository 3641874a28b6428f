"""restore_tokens against a concatenation and a gather, forward and backward."""

import functools

import pytest
import torch

import sma_fast
from bench import checks, harness, peers, roofline, shapes

FUNCTIONS = {"mae": peers.mae_restore, "eager": peers.best_restore}


def forward(settings: harness.Settings, name: str) -> harness.Case:
    shape, *arguments = inputs(settings, name)
    visible, ids_restore, fill = arguments
    ours = functools.partial(sma_fast.restore_tokens, *arguments)
    source = torch.cat([visible, fill.expand(shape.batch, shape.num_masked, -1)], 1)

    def check(answer, is_ours):
        checks.rows(answer, source, ids_restore, zeros=is_ours)

    calls = {name: functools.partial(f, *arguments) for name, f in FUNCTIONS.items()}
    calls["compiled"] = harness.compiled(settings, peers.mae_restore, *arguments)
    stages = [roofline.restore(visible, ids_restore)]
    return harness.Case("restore_tokens", "forward", shape, ours, calls, check, stages)


def backward(settings: harness.Settings, name: str) -> harness.Case:
    shape, *arguments = inputs(settings, name)
    visible, ids_restore, fill = arguments
    visible.requires_grad_()
    fill.requires_grad_()
    grad = torch.randn_like(shapes.tokens(shape, settings.device, settings.dtype))
    grad.masked_fill_((ids_restore < 0)[:, :, None], 0.0)

    def call_of(function):
        return harness.backward(function, arguments, (visible, fill), grad)

    ours = call_of(sma_fast.restore_tokens)
    wanted = harness.reference(ours)

    def check(answer, is_ours):
        assert torch.equal(answer[0], wanted[0]), "wrong gradient of visible"
        filled, total = answer[1].double(), wanted[1].double()
        # a sum of each type, rounded to it once
        bound = max(checks.tolerance(is_ours, settings.dtype), torch.finfo(settings.dtype).eps)
        bound = bound * total.abs().max()
        assert (filled - total).abs().max() <= bound, "wrong gradient of fill"

    calls = {name: call_of(function) for name, function in FUNCTIONS.items()}
    stages = [roofline.restore_backward(visible, ids_restore)]
    return harness.Case("restore_tokens", "backward", shape, ours, calls, check, stages)


def inputs(settings: harness.Settings, name: str):
    shape = settings.shape(name)
    selection = sma_fast.select_tokens(
        shapes.scores(shape, settings.device),
        mask_ratio=shape.ratio,
        key_padding_mask=shapes.padding(shape, settings.device),
    )
    tokens = shapes.tokens(shape, settings.device, settings.dtype)
    fill = tokens[0, 0].clone()
    return shape, tokens[:, : shape.num_visible].contiguous(), selection.ids_restore, fill


@pytest.mark.parametrize("shape", shapes.ALL)
def bench_restore_tokens(measure, settings, shape):
    measure(forward(settings, shape))


@pytest.mark.parametrize("shape", ("vit", "protein"))
def bench_restore_tokens_backward(measure, settings, shape):
    measure(backward(settings, shape))
