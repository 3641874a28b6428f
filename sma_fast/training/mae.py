"""A masked autoencoder of pictures as the trainer sees it: model, policy, augmentation."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sma_fast import _check, _draws, ops
from sma_fast.masking.random import count_masked
from sma_fast.masking.score_table import ScoreTable, check_table, part_of
from sma_fast.models import MAEConfig, MAEForPretraining
from sma_fast.models.vit import MAEOutput
from sma_fast.training.mae_presets import AUGMENTATIONS

WEIGHTS, POLICY_WEIGHTS = "model.safetensors", "policy.safetensors"
_AREA, _ASPECT = (0.2, 1.0), (3 / 4, 4 / 3)  # of what is cut out, as in MAE


class MAETraining(nn.Module):
    """Masks by a policy in training, and in evaluation at random, so that losses compare.

    Args:
        model: whose weights `save_pretrained` writes, as the model's own does.
        policy: of `sma_fast.masking`; a learning one's weights are written beside the model's.
        augment: of pictures in training: "flip" mirrors every other one; "crop" is MAE's random
            resized crop of at least a fifth of the picture, mirrored too (bilinear, where MAE has
            bicubic); "none". MAE crops; the default does not, which suits pictures of 32 px.

    Attributes:
        progress: the share of training that is done, in [0, 1].
        epoch: which one it is, from 0.
    """

    def __init__(self, model: MAEForPretraining, policy: Any, augment: str = "flip") -> None:
        super().__init__()
        _check.choice("augment", augment, AUGMENTATIONS)
        self.model, self.policy, self.augment = model, policy, augment
        self.progress, self.epoch = 1.0, 0

    @property
    def config(self) -> MAEConfig:
        """The model's."""
        return self.model.config

    @property
    def pixels_per_token(self) -> int:
        """Of a patch."""
        return self.config.patch_size**2

    def forward(
        self, inputs: Tensor, attention_mask: Tensor | None = None, index: Tensor | None = None
    ) -> MAEOutput:
        """Returns what the model does; the gradient of the loss is that of a policy's loss, too.

        Args:
            inputs: (B, height * width, channels) float32, pixels row by row.
            attention_mask: (B, height * width), 0 in pictures that do not count. Default: all do.
            index: (B,) int64, which pictures of the data set these are; for a table of scores.
        """
        pixels = self.pixels(inputs)
        if not self.training:
            output = self.model(pixels)
            return output if attention_mask is None else _of_some(output, attention_mask.any(1))
        whole = pixels
        pixels, view = augmented(whole, self.augment)
        output = self.model(pixels, self._selection(pixels, index, view, whole))
        return output._replace(loss=self._with_own_loss(output))

    def pixels(self, inputs: Tensor) -> Tensor:
        """Returns (B, channels, height, width) of (B, height * width, channels)."""
        return inputs.unflatten(1, (self.config.image_size, -1)).permute(0, 3, 1, 2)

    @torch.compiler.disable  # progress changes at every step, and a policy may look at numbers
    def _selection(
        self, pixels: Tensor, index: Tensor | None, view: Tensor, whole: Tensor
    ) -> ops.TokenSelection:
        kept = {}
        if getattr(self.policy, "table", None) is not None:
            kept = {"index": index, "epoch": self.epoch, "view": view, "whole": whole}
        return self.policy(self.model, pixels, self.progress, **kept)

    @torch.compiler.disable
    def _with_own_loss(self, output: MAEOutput) -> Tensor:
        # the gradient of both, the value of the model's: it compares with that of other policies
        if not isinstance(self.policy, nn.Module):
            return output.loss
        own = self.policy.loss(output)
        return output.loss + (own - own.detach())

    def num_targets(
        self, inputs: Tensor, attention_mask: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Returns how many patches of a batch the loss is a mean over, scalar int64.

        Args:
            inputs, attention_mask, index: as in `forward`.
        """
        number = torch.tensor(len(inputs), device=inputs.device)
        if attention_mask is not None:
            number = attention_mask.any(1).sum()
        return number * count_masked(self.config.num_patches, self.config.mask_ratio)

    def to_log(self) -> dict[str, float]:
        """Returns what a log entry holds beside the loss: of selfmae, how many masks are random."""
        asked = getattr(self.policy, "share_at_random", None)
        return {} if asked is None else {"random_masks": asked()}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None):
        """Computes activations again in the backward pass, from now on."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def parts(self) -> Mapping[str, nn.Module]:
        """Returns what is saved, by the name of its file."""
        learns = isinstance(self.policy, nn.Module)
        return {WEIGHTS: self.model} | ({POLICY_WEIGHTS: self.policy} if learns else {})

    def save_pretrained(self, folder: Path) -> None:
        """Writes the model as its own `save_pretrained`, and beside it what the policy knows."""
        self.model.save_pretrained(folder)
        if isinstance(self.policy, nn.Module):
            safetensors.torch.save_model(self.policy, str(folder / POLICY_WEIGHTS))
        table = getattr(self.policy, "table", None)
        if table is not None and Path(table).parent != folder:
            check_table(folder / Path(table).name)
            shutil.copyfile(table, folder / Path(table).name)

    def prepare_table(self, start: Path | None) -> None:
        """Brings a policy's table of scores to where it was in a checkpoint; by one process.

        Args:
            start: the checkpoint, None for the start.

        Raises:
            ValueError: where another file has the table's name.
        """
        table = getattr(self.policy, "table", None)
        if table is None or int(os.environ.get("RANK", 0)) > 0:
            return  # the run has one folder, also over several nodes
        table = Path(table)
        check_table(table)
        table.unlink(missing_ok=True)
        if start is not None:
            shutil.copyfile(start / table.name, part_of(table))
            part_of(table).replace(table)
        ScoreTable(table, self.policy.pictures, self.config.num_patches)


def augmented(pixels: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """Returns pictures with random changes, and the views that these are, (B, 5).

    A view is (left, top, right, bottom, flipped), as in `sma_fast.masking.score_table`. Draws are
    the rows' own, see `sma_fast._draws`.

    Args:
        pixels: (B, channels, height, width).
        how: one of `AUGMENTATIONS`, see `MAETraining`.
    """
    batch, device = len(pixels), pixels.device
    view = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0], device=device).repeat(batch, 1)
    if how == "none":
        return pixels, view
    draws = _draws.rand((batch, 5), None, device)
    flipped = draws[:, 0] < 0.5  # (B,)
    view[:, 4] = flipped.float()
    if how == "flip":
        return torch.where(flipped[:, None, None, None], pixels.flip(3), pixels), view
    area = _AREA[0] + (_AREA[1] - _AREA[0]) * draws[:, 1]
    low, high = (torch.tensor(x, device=device).log() for x in _ASPECT)
    aspect = (low + (high - low) * draws[:, 2]).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    left, top = draws[:, 3] * (1 - width), draws[:, 4] * (1 - height)
    view[:, :4] = torch.stack([left, top, left + width, top + height], dim=1)
    # from [-1, 1] of the view to [-1, 1] of the picture
    turned = torch.where(flipped, -width, width)
    nothing = torch.zeros_like(width)
    across = torch.stack([turned, nothing, 2 * left + width - 1], dim=1)
    down = torch.stack([nothing, height, 2 * top + height - 1], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), pixels.shape, align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False), view


def _of_some(output: MAEOutput, counts: Tensor) -> MAEOutput:
    # counts (B,) bool: the loss is of these pictures only
    masked = output.mask & counts[:, None]
    loss = torch.where(masked, output.patch_loss, 0.0).sum() / masked.sum().clamp(min=1)
    return output._replace(loss=loss)
