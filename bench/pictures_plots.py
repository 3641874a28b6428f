"""The two figures of bench.pictures."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import sma_fast
from sma_fast.masking.random import count_masked
from sma_fast.masking.selfmae import SelfMAEMasking

COLOURS = {
    "random": "#2d6cb4",
    "attmask": "#4f9d57",
    "selfmae": "#c8502d",
    "selfmae-kept": "#c9a227",
    "selfmae-informed": "#7b4fa3",
}


def curves(path: Path, summary: dict) -> None:
    """Writes accuracy over epochs: linear probe and k-NN, mean and spread of each mask.

    Args:
        path: of the PNG.
        summary: of bench.pictures.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, name, title in zip(
        figure.subplots(1, 2), ("linear", "knn"), ("linear probe", "k-NN"), strict=True
    ):
        for mask, entry in summary["masks"].items():
            epochs = [p["epoch"] for p in entry["probes"]]
            mean = np.array([p[name]["mean"] for p in entry["probes"]])
            spread = np.array([p[name]["std"] or 0.0 for p in entry["probes"]])
            colour = COLOURS.get(mask)
            axis.plot(epochs, mean, marker="o", color=colour, label=mask)
            axis.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15)
        axis.set(xlabel="epoch of pretraining", ylabel="test accuracy", title=title)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def masks(path: Path, model: torch.nn.Module, pixels: Tensor) -> None:
    """Writes pictures, one column each, from similarity to reconstruction.

    Args:
        path: of the PNG.
        model: MAEForPretraining.
        pixels: (B, 3, H, W), standardised.
    """
    policy, half_way = SelfMAEMasking(), 0.5
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x = model.embeddings(pixels)
        cut = sma_fast.bipartition(x)
        scores = sma_fast.informed_scores(x, cut)
        unit = torch.nn.functional.normalize(x, dim=2)
        most = cut.vector.abs().argmax(1)  # the patch that differs most
        similarity = (unit @ unit[torch.arange(len(x)), most][:, :, None])[:, :, 0]
        number = count_masked(model.config.num_patches, model.config.mask_ratio)
        informed = sma_fast.select_tokens(scores, num_masked=number).mask
        hinted = policy(model, pixels, half_way, generator)
        made = model.pictures(pixels, model(pixels, hinted))
    side = round(model.config.num_patches**0.5)
    patch = model.config.patch_size

    def grid(values: Tensor) -> np.ndarray:
        square = values.float().reshape(-1, side, side)
        return square.repeat_interleave(patch, 1).repeat_interleave(patch, 2).numpy()

    def shown(values: Tensor) -> np.ndarray:
        low, high = pixels.amin((1, 2, 3), True), pixels.amax((1, 2, 3), True)
        return ((values - low) / (high - low)).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    hidden = shown(pixels)
    rows = [
        ("picture", hidden, None),
        ("similarity to the\npatch that differs most", grid(similarity), "viridis"),
        ("eigenvector", grid(cut.vector), "coolwarm"),
        ("cut: the object", grid(cut.labels), "gray"),
        ("score", grid(scores), "viridis"),
        ("informed mask", hidden * ~grid(informed).astype(bool)[..., None], None),
        (
            f"half way: hints are\n{policy.hints(half_way):.0%} of what is visible\n"
            "(orange: of the object)",
            _marked(hidden, grid(hinted.mask).astype(bool), grid(informed).astype(bool)),
            None,
        ),
        ("reconstruction", shown(made), None),
    ]
    figure = Figure(figsize=(1.15 * len(pixels) + 2, 1.15 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(pixels), squeeze=False)
    for line, (label, images, colours) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, cmap=colours, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=10)
    figure.savefig(path, dpi=130)


def _marked(pictures: np.ndarray, masked: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """Returns pictures without masked patches, where visible ones that rank would mask are orange.

    Args:
        pictures: (B, H, W, 3) in [0, 1].
        masked, ranked: (B, H, W) bool.
    """
    orange = np.array([1.0, 0.55, 0.1])
    tinted = np.where((ranked & ~masked)[..., None], (pictures + orange) / 2, pictures)
    return tinted * ~masked[..., None]
