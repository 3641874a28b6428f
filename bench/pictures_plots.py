"""The two figures of bench.pictures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sma_fast.masking.selfmae import SelfMAEMasking
from sma_fast.models import MAEForPretraining
from sma_fast.training import show_mae

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


def masks(
    path: Path, model: MAEForPretraining, pixels: Tensor, colours: Callable[[Tensor], np.ndarray]
) -> None:
    """Writes pictures, one column each, from similarity to reconstruction, half way in training.

    Args:
        path: of the PNG.
        model: whose embeddings selfmae cuts.
        pixels: (B, 3, H, W), standardised.
        colours: makes (B, H, W, 3) in [0, 1] of them.
    """
    generator = torch.Generator().manual_seed(0)
    shown = show_mae.look(model, pixels, SelfMAEMasking(), colours, 0.5, generator)
    show_mae.draw(path, shown)
