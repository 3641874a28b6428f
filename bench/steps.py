"""Pretraining steps to compare: this project's, and the published model's with the same weights.

`python -m bench.steps VARIANT NAME` prints the peak memory of one step in bytes: of a process of
its own.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import sma_fast
from bench import memory, published_step
from sma_fast.masking.sma import SMAMasking
from sma_fast.models import SMAConfig, SMAForPretraining

WIDTH = 128
# the published settings, narrower and less deep so that a step takes a second at most
_TOKENS = {
    "encoder_type": "self_attention",
    "embedded_channels": WIDTH,
    "latent_channels": WIDTH,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 8,
    "decoder_heads": 1,
}
_ONE_HEAD = {"num_per_query": 3, "head_reduce": "random", "mask_self": True}
_CONFIGS = {
    "physics": (
        {"input_type": "continuous", "max_position_embeddings": 28, **_TOKENS},
        {"mask_ratio": 0.20, **_ONE_HEAD},
    ),
    "molecule": (
        {"max_position_embeddings": 512, **_TOKENS},
        {"mask_ratio": 0.30, **_ONE_HEAD},
    ),
    "protein": (
        {"embedded_channels": WIDTH, "latent_channels": 2 * WIDTH, "num_latents": 256},
        {"mask_ratio": 0.15, "num_per_query": 4},
    ),
}
BATCH = {"physics": 256, "molecule": 8, "protein": 8}
_SHORTEST = {"physics": 28, "molecule": 64, "protein": 256}
DEPTH = 4


class Step(NamedTuple):
    """A model, its inputs, and the draws that the published step is given."""

    model: SMAForPretraining
    inputs: Tensor
    valid: Tensor | None
    draws: published_step.Draws


def build(name: str, mask: str = "guided", depth: int = DEPTH, quick: bool = False) -> Step:
    """Returns a step of seeded weights and inputs; lengths are spread evenly over their range.

    Args:
        name: "physics", "molecule" or "protein".
        mask: "guided" or "random".
        depth: layers after the first; with 0 only the parts are left that this project changes.
        quick: a batch of 4.
    """
    sizes, masking = _CONFIGS[name]
    config = SMAConfig(
        **sizes,
        num_self_attends_per_block=depth,
        masking=SMAMasking(**masking, mask=mask),
        initializer_range=0.1,
    )
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = SMAForPretraining(config)
    batch, length = 4 if quick else BATCH[name], config.max_position_embeddings
    if config.input_type == "continuous":
        inputs = torch.randn(batch, length, 1, generator=generator)
    else:
        inputs = torch.randint(6, 262, (batch, length), generator=generator)
    valid = None
    if _SHORTEST[name] < length:
        lengths = torch.linspace(_SHORTEST[name], length, batch).long()
        valid = (torch.arange(length) < lengths[:, None]).long()
    padding = None if valid is None else valid == 0
    if model.encoder.latents is None:
        index = config.masking.draw_tokens(inputs, padding, generator)
    else:
        index = sma_fast.draw_queries(
            config.masking.count_queries(length, config.num_latents),
            batch=batch,
            num_candidates=config.num_latents,
            generator=generator,
        )
    heads = None
    if config.masking.head_reduce == "random":
        heads = torch.randint(config.num_cross_attention_heads, index.shape, generator=generator)
    return Step(model, inputs, valid, published_step.Draws(index, heads))


def ours(step: Step) -> Callable[[], Tensor]:
    """Returns the forward and backward pass of this project's step."""

    def run() -> Tensor:
        step.model.zero_grad()
        loss = step.model(step.inputs, step.valid).loss
        loss.backward()
        return loss

    return run


def published(step: Step) -> Callable[[], Tensor]:
    """Returns the forward and backward pass of the published step."""

    def run() -> Tensor:
        step.model.zero_grad()
        loss, _ = published_loss(step)
        loss.backward()
        return loss

    return run


def published_loss(step: Step) -> tuple[Tensor, Tensor]:
    """Returns the loss and the mask of the published step."""
    valid = step.valid
    if valid is None:
        valid = torch.ones(step.inputs.shape[:2], dtype=torch.int64)
    x, attend, mask = published_step.first_layer(step.model, step.inputs, valid, step.draws)
    x = published_step.later_layers(step.model, x, attend)
    return published_step.decoder_loss(step.model, step.inputs, x, attend, mask), mask


def untouched(step: Step) -> Callable[[], Tensor]:
    """Returns the forward and backward pass of the layers that are the same in both steps."""
    valid = step.valid
    if valid is None:
        valid = torch.ones(step.inputs.shape[:2], dtype=torch.int64)
    with torch.no_grad():
        x, attend, _ = published_step.first_layer(step.model, step.inputs, valid, step.draws)
    x.requires_grad_()

    def run() -> Tensor:
        step.model.zero_grad()
        x.grad = None
        out = published_step.later_layers(step.model, x, attend).square().mean()
        out.backward()
        return out

    return run


def check_same_loss(step: Step) -> None:
    """Asserts that both give the same loss to 1e-5, with the published step's mask."""
    with torch.no_grad():
        theirs, mask = published_loss(step)
        mine = step.model(step.inputs, step.valid, mask=mask).loss
    assert abs(float(mine / theirs) - 1) < 1e-5, f"losses are {float(mine)} and {float(theirs)}"


def peak_bytes(variant: str, name: str, quick: bool) -> int:
    """Returns the most that one step of a process of its own held beyond the model and inputs."""
    return memory.printed_by("bench.steps", variant, name, str(int(quick)))


def _main(variant: str, name: str, quick: str) -> None:
    run = {"ours": ours, "published": published}[variant]
    warm = build(name, quick=True)
    run(warm)()  # starts the threads and loads what is loaded late
    call = run(build(name, quick=quick == "1"))
    print(memory.peak_of(call, "cpu"))


if __name__ == "__main__":
    _main(*sys.argv[1:])
