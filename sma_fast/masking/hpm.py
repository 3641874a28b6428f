"""Hard patches mining: the patches are masked whose reconstruction is predicted to be worst."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sma_fast import _check, ops
from sma_fast.masking.random import number_for


class HPMMasking(nn.Module):
    """Masks a growing share by predicted loss, the rest at random; learns the prediction.

    In a step: ``selection = policy(model, pixels, progress)``, ``out = model(pixels, selection)``,
    ``(out.loss + policy.loss(out)).backward()``, with the policy's parameters in the optimizer.

    The published predictor is a second decoder, fed with mask tokens in training and with the whole
    picture for the mask. This one is an MLP on a patch's embedding of the whole picture in both,
    which costs no forward beside the mask's own. Its gradient stops there.

    Args:
        width: C of the model.
        mask_ratio: share of the patches to mask, in [0, 1]. Default: that of the model's config.
        initial_share: of the masked patches that the prediction chooses, at progress 0.
        final_share: the same at progress 1, with a straight line between; the published 0.5.
        layer: of the embeddings; the published last one.
        hidden_width: of the MLP. Default: C.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Hard Patches Mining for Masked Image Modeling (arXiv 2304.05919), section 3. There an
    averaged teacher predicts: give that one, with an averaged policy, for the mask.
    """

    def __init__(
        self,
        width: int,
        mask_ratio: float | None = None,
        initial_share: float = 0.0,
        final_share: float = 0.5,
        layer: int = -1,
        hidden_width: int | None = None,
    ) -> None:
        super().__init__()
        _check.positive_count("width", width)
        if hidden_width is not None:
            _check.positive_count("hidden_width", hidden_width)
        if mask_ratio is not None:
            _check.ratio("mask_ratio", mask_ratio)
        _check.ratio("initial_share", initial_share)
        _check.ratio("final_share", final_share)
        self.mask_ratio, self.layer = mask_ratio, layer
        self.initial_share, self.final_share = initial_share, final_share
        hidden_width = width if hidden_width is None else hidden_width
        self.predictor = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, 1, bias=False),  # a bias changes no order
        )
        self._embeddings: Tensor | None = None  # (B, N, C), of the last call

    def share(self, progress: float) -> float:
        """Returns the share of the masked patches that the prediction chooses.

        Args:
            progress: the share of training that is done, in [0, 1].
        """
        _check.ratio("progress", progress)
        return self.initial_share + (self.final_share - self.initial_share) * progress

    def forward(
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
            progress: the share of training that is done, in [0, 1].
            generator: for the random ones. Default: torch's global one.

        Returns:
            TokenSelection.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        random_fraction = 1 - self.share(progress)
        with torch.no_grad():
            self._embeddings = model.embeddings(pixels, self.layer)  # (B, N, C)
            return ops.select_tokens(
                self.predictor(self._embeddings).squeeze(2),  # (B, N)
                num_masked=number_for(model, self.mask_ratio),
                random_fraction=random_fraction,
                generator=generator,
            )

    def loss(self, output: Any) -> Tensor:
        """Returns the predictor's loss, of the pictures that the last call masked.

        Args:
            output: MAEOutput for that mask.

        Returns:
            Scalar float32.

        Raises:
            ValueError: naming `output`, where it belongs to no call.
        """
        embeddings, self._embeddings = self._embeddings, None
        if embeddings is None or embeddings.shape[:2] != output.mask.shape:
            given = "none" if embeddings is None else f"one of {tuple(embeddings.shape[:2])}"
            raise ValueError(
                f"output: is of {tuple(output.mask.shape)} patches after a mask for {given}, "
                "allowed is what the model made of the last mask"
            )
        ids = output.ids_masked  # (B, K)
        predicted = self.predictor(ops.gather_tokens(embeddings, ids)).squeeze(2)
        return ranking_loss(predicted, ops.gather_tokens(output.patch_loss, ids), ids >= 0)


def ranking_loss(predicted: Tensor, patch_loss: Tensor, real: Tensor) -> Tensor:
    """Returns how badly `predicted` orders the patches of each picture by their loss.

    Over all pairs of patches with different losses, the mean of
    -log sigmoid(predicted of the worse - predicted of the better).

    Args:
        predicted: (B, K), of the masked patches.
        patch_loss: (B, K), of the same; no gradient reaches it.
        real: (B, K) bool, False where a row has no patch.

    Returns:
        Scalar float32; 0 where there is no such pair.

    Source: Hard Patches Mining for Masked Image Modeling (arXiv 2304.05919), section 3.
    """
    predicted, patch_loss = predicted.float(), patch_loss.detach().float()
    worse = patch_loss[:, :, None] > patch_loss[:, None, :]  # (B, K, K); each pair once
    worse = worse & real[:, :, None] & real[:, None, :]
    each = F.softplus(predicted[:, None, :] - predicted[:, :, None])
    return torch.where(worse, each, 0.0).sum() / worse.sum().clamp(min=1)
