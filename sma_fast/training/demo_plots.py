"""The demo's two figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from sma_fast.training.demo_pretrain import Curve

GUIDED, RANDOM = "#c8502d", "#2d6cb4"
COLOURS = {"guided": GUIDED, "random": RANDOM}
_INK = LinearSegmentedColormap.from_list("ink", ["white", "black"])
_SCORE = LinearSegmentedColormap.from_list("score", ["white", GUIDED, "#4a1208"])


def draw_masks(path: Path, titles: Sequence[str], rows: Sequence[tuple]) -> None:
    """Writes a grid of pictures, one column each: picture, scores, masks, reconstructions.

    Args:
        path: of the PNG.
        titles: one for each picture.
        rows: (label, kind, images) from top to bottom; kind "ink" (images in [0, 1]) or "score"
            (at least 0), or a colour: then images is (pictures in [0, 1], masks), and what is
            masked is painted in it. Images are (pictures, height, width).
    """
    columns = len(titles)
    figure = Figure(figsize=(1.15 * columns + 3.0, 1.15 * len(rows) + 0.9), layout="constrained")
    widths = [1.0] * columns + [0.15]  # the last column holds the colour bar
    axes = figure.subplots(
        len(rows), columns + 1, squeeze=False, gridspec_kw={"width_ratios": widths}
    )
    for line, (label, kind, images) in zip(axes, rows, strict=True):
        *line, beside = line
        pictures, masks = images if kind not in ("ink", "score") else (images, None)
        top = max(float(np.max(pictures)), 1e-12) if kind == "score" else 1.0
        for axis, picture in zip(line, pictures, strict=True):
            colours = _SCORE if kind == "score" else _INK
            shown = axis.imshow(picture, cmap=colours, vmin=0, vmax=top, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        if masks is not None:
            paint = LinearSegmentedColormap.from_list("mask", [kind, kind])
            for axis, mask in zip(line, masks, strict=True):
                hidden = np.ma.masked_where(~mask, mask)
                axis.imshow(hidden, cmap=paint, alpha=0.85, interpolation="nearest")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=10)
        if kind == "score":
            figure.colorbar(shown, cax=beside, label="attention\nreceived")
        else:
            beside.remove()
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=11)
    figure.suptitle("What the model hides (painted over), and what it makes of the rest")
    figure.savefig(path, dpi=130)


def draw_curves(path: Path, curves: Mapping[str, Sequence[Curve]]) -> None:
    """Writes training loss over steps: each seed thin, their mean thick.

    Args:
        path: of the PNG.
        curves: for "guided" and "random", one curve for each seed, all with the same steps.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axis = figure.subplots()
    for mask, runs in curves.items():
        for run in runs:
            axis.plot(run.step, run.loss, color=COLOURS[mask], linewidth=0.7, alpha=0.4)
        mean = np.mean([run.loss for run in runs], axis=0)
        label = f"{mask} masks, mean of {len(runs)} seed{'s' if len(runs) > 1 else ''}"
        axis.plot(runs[0].step, mean, color=COLOURS[mask], linewidth=2.2, label=label)
    axis.set(
        xlabel="optimiser step",
        ylabel="squared error on masked pixels (standardised)",
        title="Pretraining loss on the digits",
        ylim=(0, None),
    )
    axis.text(
        0.01,
        0.02,
        "Each loss is over the pixels its own masks hide: their levels do not compare.",
        transform=axis.transAxes,
        fontsize=9,
        color="0.35",
    )
    axis.grid(color="0.9")
    axis.legend(frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
