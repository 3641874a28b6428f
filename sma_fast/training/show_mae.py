"""show of a masked autoencoder: what a policy hides of pictures, why, and what is made of the rest.

Each picture is a column. Above what is masked stands what the policy goes by: for selfmae from
similarity to score, for attmask the attention of the class token.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from sma_fast import ops
from sma_fast.masking import AttMaskMasking, SelfMAEMasking
from sma_fast.masking.random import number_for
from sma_fast.models import MAEForPretraining
from sma_fast.training.checkpoints import CheckpointError
from sma_fast.training.data import Pictures
from sma_fast.training.mae import POLICY_WEIGHTS
from sma_fast.training.mae_presets import mae_policy
from sma_fast.training.pretrained import RUN

ORANGE = (1.0, 0.55, 0.1)


class Panel(NamedTuple):
    """A row of the figure: one image of each picture.

    Attributes:
        label: beside the row.
        images: (B, H, W, 3) in [0, 1], or (B, H, W) with a colour map.
        colours: the colour map's name.
    """

    label: str
    images: np.ndarray
    colours: str | None = None


class Shown(NamedTuple):
    """What is drawn of B pictures.

    Attributes:
        panels: rows of the figure, from above.
        mask: (B, N) bool, True = masked.
        loss: (B,) of each picture; NaN where nothing is masked.
    """

    panels: list[Panel]
    mask: np.ndarray
    loss: np.ndarray


def policy_of(folder: Path, model: MAEForPretraining) -> tuple[str, Any]:
    """Returns the name of the masks a model was trained with, and the policy that makes them.

    Scores that a table kept are made anew.

    Args:
        folder: that `pretrain` wrote, or one of its checkpoints.
        model: that it holds.

    Raises:
        CheckpointError: where nothing there says which masks these were.
    """
    run = next((file for file in (folder / RUN, folder.parent / RUN) if file.is_file()), None)
    try:
        options = json.loads(run.read_text())["options"]
        arguments = {k: v for k, v in options["masking"].items() if k != "table"}
        policy = mae_policy(options["mask"], model.config, arguments)
        if isinstance(policy, nn.Module):
            safetensors.torch.load_model(policy, str(folder / POLICY_WEIGHTS))
            policy.eval()
    except (AttributeError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: no {RUN} says which masks it was trained with ({error}): name a folder "
            "that sma-fast pretrain wrote"
        ) from None
    return options["mask"], policy


def colours_of(inputs: Pictures) -> Callable[[Tensor], np.ndarray]:
    """Returns what makes (B, H, W, 3) in [0, 1] of standardised (B, channels, H, W).

    Args:
        inputs: how the pictures were standardised.
    """
    mean, std = (torch.as_tensor(x, dtype=torch.float32) for x in (inputs.mean, inputs.std))

    def shown(pixels: Tensor) -> np.ndarray:
        plain = (pixels.float().permute(0, 2, 3, 1) * std + mean) / 255
        return plain.clamp(0, 1).expand(*plain.shape[:3], 3).numpy()

    return shown


def look(
    model: MAEForPretraining,
    pixels: Tensor,
    policy: Any,
    colours: Callable[[Tensor], np.ndarray],
    progress: float = 1.0,
    generator: torch.Generator | None = None,
) -> Shown:
    """Returns what a policy masks at some time of training, and what the model makes of the rest.

    Args:
        model: in evaluation mode.
        pixels: (B, channels, H, W), standardised.
        policy: of `sma_fast.masking`.
        colours: as `colours_of` makes it.
        progress: the share of training that is done, in [0, 1].
        generator: of the masks. Default: torch's global one.
    """
    picture, side, size = colours(pixels), model.config.image_size, model.config.patch_size

    def grid(values: Tensor) -> np.ndarray:
        square = values.float().reshape(-1, side // size, side // size)
        return square.repeat_interleave(size, 1).repeat_interleave(size, 2).numpy()

    with torch.no_grad():
        selection = policy(model, pixels, progress, generator)
        output = model(pixels, selection)
        made = colours(model.pictures(pixels, output))
        hidden = grid(selection.mask).astype(bool)[..., None]
        panels, masked = [Panel("picture", picture)], Panel("masked", picture * ~hidden)
        if isinstance(policy, SelfMAEMasking):
            reasons, ranked = _reasons(model, pixels, policy)
            ranked = grid(ranked).astype(bool)[..., None]
            panels += [Panel(label, grid(x), colour) for label, x, colour in reasons]
            panels.append(Panel("informed mask\n(whole: not cut)", picture * ~ranked))
            tinted = np.where(ranked & ~hidden, (picture + np.array(ORANGE)) / 2, picture)
            of = "masked is drawn" if policy.hints_by == "rest" else "visible are hints"
            label = (
                f"masked: {policy.hints(progress):.0%} of what is\n{of}\n(orange: by rank hidden)"
            )
            masked = Panel(label, tinted * ~hidden)
        elif isinstance(policy, AttMaskMasking):
            attention = model.attention_of_class_token(pixels, policy.layer)
            panels.append(
                Panel("attention of the\nclass token", grid(attention.mean(1)), "viridis")
            )
    panels += [masked, Panel("reconstruction", made)]
    number = output.mask.sum(1)
    loss = torch.where(output.mask, output.patch_loss, 0.0).sum(1) / number
    return Shown(panels, output.mask.numpy(), loss.numpy())


def _reasons(
    model: MAEForPretraining, pixels: Tensor, policy: SelfMAEMasking
) -> tuple[list[tuple[str, Tensor, str]], Tensor]:
    # what selfmae goes by, and the patches that rank alone would mask; none where it cannot tell
    x = model.embeddings(pixels, policy.layer, policy.norm)
    cut, scores = policy.cut(x)
    unit = nn.functional.normalize(x, dim=2)
    most = cut.vector.abs().argmax(1)  # the patch that differs most
    similarity = (unit @ unit[torch.arange(len(x)), most][:, :, None])[:, :, 0]
    number = number_for(model, policy.mask_ratio)
    ranked = ops.select_tokens(scores, num_masked=number).mask & cut.converged[:, None]
    object_ = "cut: the object" if policy.cluster == "object" else "cut: the one cluster"
    return [
        ("similarity to the\npatch that differs most", similarity, "viridis"),
        ("eigenvector", cut.vector, "coolwarm"),
        (object_, cut.labels, "gray"),
        ("score", scores, "viridis"),
    ], ranked


def joined(parts: Sequence[Shown]) -> Shown:
    """Returns pictures that were looked at one by one, side by side."""
    panels = [
        row[0]._replace(images=np.concatenate([panel.images for panel in row]))
        for row in zip(*(part.panels for part in parts), strict=True)
    ]
    mask, loss = (np.concatenate([getattr(p, name) for p in parts]) for name in ("mask", "loss"))
    return Shown(panels, mask, loss)


def draw(target: BinaryIO | Path, shown: Shown, title: str | None = None) -> None:
    """Writes the figure as a PNG.

    Args:
        target: where to.
        shown: its rows and columns.
        title: above them.
    """
    count = len(shown.mask)
    figure = Figure(figsize=(1.15 * count + 2, 1.15 * len(shown.panels)), layout="constrained")
    if title is not None:
        figure.suptitle(title, weight="bold", size=11)
    axes = figure.subplots(len(shown.panels), count, squeeze=False)
    for line, panel in zip(axes, shown.panels, strict=True):
        for axis, image in zip(line, panel.images, strict=True):
            axis.imshow(image, cmap=panel.colours, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(panel.label, rotation=0, ha="right", va="center", labelpad=10)
    figure.savefig(target, dpi=130, format="png", facecolor="white")
