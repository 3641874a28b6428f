"""A pretraining step of MAE's ViT-B/16, and the informed mask that it could have had."""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.shapes import Shape
from sma_fast.masking.random import RandomMasking
from sma_fast.masking.selfmae import SelfMAEMasking
from sma_fast.models import MAEConfig, MAEForPretraining


class Embedded(NamedTuple):
    """What a policy asks of a model, answered by embeddings that are there: no extra forward."""

    config: MAEConfig
    known: Tensor  # (B, N, C)

    def embeddings(self, pixels: Tensor, layer: int, norm: bool = True) -> Tensor:
        return self.known


class Step(NamedTuple):
    """A model, its pictures, and the embeddings of an unmasked forward of them."""

    model: MAEForPretraining
    pixels: Tensor
    embedded: Embedded
    context: Callable[[], contextlib.AbstractContextManager]


def build(shape: Shape, device: str, dtype: torch.dtype, quick: bool = False) -> Step:
    """Returns a step of seeded weights and pictures; other types than float32 under autocast.

    Args:
        shape: whose batch is taken.
        quick: the smallest model instead.
    """
    torch.manual_seed(0)
    model = MAEForPretraining(MAEConfig.preset("mae-32" if quick else "mae-base")).to(device)
    size = model.config.image_size
    pixels = torch.rand((shape.batch, 3, size, size), device=device)

    def context() -> contextlib.AbstractContextManager:
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    with torch.no_grad(), context():
        known = model.embeddings(pixels)
    return Step(model, pixels, Embedded(model.config, known), context)


def mask(step: Step) -> Callable[[], Tensor]:
    """Returns what cuts the known embeddings and masks, as the policy does at the end."""
    return functools.partial(_mask, step)


def random(step: Step) -> Callable[[], Tensor]:
    """Returns the step with MAE's random mask."""
    return functools.partial(_run, RandomMasking(), step)


def informed(step: Step) -> Callable[[], Tensor]:
    """Returns the step with an informed mask, of an unmasked forward of its own."""
    return functools.partial(_run, SelfMAEMasking(), step)


def _mask(step: Step) -> Tensor:
    with step.context():
        return SelfMAEMasking()(step.embedded, step.pixels).num_masked.float().mean()


def _run(policy: Callable, step: Step) -> Tensor:
    step.model.zero_grad()
    with step.context():
        mask = policy(step.model, step.pixels)
        loss = step.model(step.pixels, mask=mask).loss
    loss.backward()
    return loss.detach()
