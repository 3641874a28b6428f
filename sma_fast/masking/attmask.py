"""AttMask's policy: the patches are masked that the class token attends to most."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sma_fast import _check, ops
from sma_fast.masking.random import number_for


@dataclass(frozen=True)
class AttMaskMasking:
    """Masks the patches of highest class-token attention, averaged over heads.

    "hint" draws round(hint_share k) of the round(hint_share N) highest patches to stay visible, k
    being the number masked, and masks as many of the next ones: the published code masks fewer,
    which would make its task easier than that of the other policies.

    Args:
        kind: "high" or "hint".
        mask_ratio: share of the patches to mask, in [0, 1]. Default: that of the model's config.
        hint_share: in [0, 1]; the published 0.1.
        layer: whose attention; the published last one.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: What to Hide from Your Students: Attention-Guided Masked Image Modeling (arXiv
    2203.12719), section 3. There the attention is an averaged teacher's: give that one as `model`.
    """

    kind: str = "high"
    mask_ratio: float | None = None
    hint_share: float = 0.1
    layer: int = -1

    def __post_init__(self) -> None:
        _check.choice("kind", self.kind, ("high", "hint"))
        if self.mask_ratio is not None:
            _check.ratio("mask_ratio", self.mask_ratio)
        _check.ratio("hint_share", self.hint_share)

    def __call__(
        self,
        model: Any,
        pixels: Tensor,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> ops.TokenSelection:
        """Returns which patches are masked, by one unmasked forward without gradient.

        Args:
            model: MAEForPretraining.
            pixels: (B, channels, height, width).
            progress: the share of training that is done, in [0, 1]; not used.
            generator: for the hints. Default: torch's global one.

        Returns:
            TokenSelection.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        _check.generator(generator)
        scores = model.attention_of_class_token(pixels, self.layer).mean(dim=1)  # (B, N)
        return self.select(scores, number_for(model, self.mask_ratio), generator)

    def select(
        self, scores: Tensor, num_masked: int, generator: torch.Generator | None = None
    ) -> ops.TokenSelection:
        """Returns which patches are masked, by their attention.

        Args:
            scores: (B, N).
            num_masked: k.
            generator: for the hints. Default: torch's global one.

        Returns:
            TokenSelection.

        Raises:
            ValueError: naming `hint_share`, where hints and masked patches are more than N.
        """
        if self.kind == "hint":
            count = scores.shape[1]
            hints = round(self.hint_share * num_masked)
            if hints + num_masked > count:
                raise ValueError(
                    f"hint_share: got {self.hint_share}, {hints} hints beside {num_masked} masked "
                    f"of {count} patches, allowed is at most all of them"
                )
            shown = ops.select_tokens(
                scores, num_masked=hints, pool_ratio=self.hint_share, generator=generator
            )
            scores = scores.masked_fill(shown.mask, float("-inf"))
        return ops.select_tokens(scores, num_masked=num_masked)
