"""gather_tokens against torch.gather and index_select, forward and backward."""

import functools

import pytest
import torch

import sma_fast
from bench import checks, harness, peers, roofline, shapes

FUNCTIONS = {"torch.gather": peers.torch_gather, "eager": peers.best_gather}


def forward(settings: harness.Settings, name: str) -> harness.Case:
    shape, tokens, ids = inputs(settings, name)
    ours = functools.partial(sma_fast.gather_tokens, tokens, ids)

    def check(answer, is_ours):
        checks.rows(answer, tokens, ids, zeros=is_ours)

    calls = {name: functools.partial(f, tokens, ids) for name, f in FUNCTIONS.items()}
    calls["compiled"] = harness.compiled(settings, peers.best_gather, tokens, ids)
    stages = [roofline.gather(tokens, ids)]
    return harness.Case("gather_tokens", "forward", shape, ours, calls, check, stages)


def backward(settings: harness.Settings, name: str) -> harness.Case:
    shape, tokens, ids = inputs(settings, name)
    tokens.requires_grad_()
    grad = torch.randn_like(tokens[:, : ids.shape[1]]).masked_fill_((ids < 0)[:, :, None], 0.0)

    def call_of(function):
        return harness.backward(function, (tokens, ids), (tokens,), grad)

    ours = call_of(sma_fast.gather_tokens)
    (wanted,) = harness.reference(ours)

    def check(answer, is_ours):
        assert torch.equal(answer[0], wanted), "wrong gradient"

    calls = {name: call_of(function) for name, function in FUNCTIONS.items()}
    stages = [roofline.gather_backward(tokens, ids)]
    return harness.Case("gather_tokens", "backward", shape, ours, calls, check, stages)


def inputs(settings: harness.Settings, name: str):
    shape = settings.shape(name)
    selection = sma_fast.select_tokens(
        shapes.scores(shape, settings.device),
        mask_ratio=shape.ratio,
        key_padding_mask=shapes.padding(shape, settings.device),
    )
    tokens = shapes.tokens(shape, settings.device, settings.dtype)
    return shape, tokens, selection.ids_visible


@pytest.mark.parametrize("shape", shapes.ALL)
def bench_gather_tokens(measure, settings, shape):
    measure(forward(settings, shape))


@pytest.mark.parametrize("shape", ("vit", "protein"))
def bench_gather_tokens_backward(measure, settings, shape):
    measure(backward(settings, shape))
