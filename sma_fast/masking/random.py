"""MAE's policy: patches are masked at random, whatever the picture."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sma_fast import _check, _draws, ops


@dataclass(frozen=True)
class RandomMasking:
    """Masks N - int(N (1 - mask_ratio)) patches of each picture, drawn uniformly.

    Args:
        mask_ratio: share of the patches to mask, in [0, 1]. Default: that of the model's config.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), section 3.
    """

    mask_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.mask_ratio is not None:
            _check.ratio("mask_ratio", self.mask_ratio)

    def __call__(
        self,
        model: Any,
        pixels: Tensor,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> ops.TokenSelection:
        """Returns which patches are masked.

        Args:
            model: MAEForPretraining, for its sizes only.
            pixels: (B, channels, height, width), for its batch and device only.
            progress: the share of training that is done, in [0, 1]; not used.
            generator: for the draws. Default: torch's global one.

        Returns:
            TokenSelection.
        """
        _check.generator(generator)
        shape = pixels.shape[0], model.config.num_patches
        noise = _draws.rand(shape, generator, pixels.device)
        return ops.select_tokens(noise, num_masked=number_for(model, self.mask_ratio))


def count_masked(tokens: int, mask_ratio: float) -> int:
    """Returns how many tokens MAE masks: all but int(N (1 - mask_ratio)).

    Args:
        tokens: N.
        mask_ratio: in [0, 1].
    """
    return tokens - int(tokens * (1 - mask_ratio))


def number_for(model: Any, mask_ratio: float | None) -> int:
    """Returns how many patches a policy masks in each picture, the same for all policies.

    Args:
        model: MAEForPretraining.
        mask_ratio: in [0, 1]. Default: that of the model's config.
    """
    config = model.config
    return count_masked(config.num_patches, config.mask_ratio if mask_ratio is None else mask_ratio)
