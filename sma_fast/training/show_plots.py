"""The figure of `show`: for each row the scores, what is masked, and what the model predicts."""

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

LINE = 60  # characters of a line
LINES = 20  # of a row
BARS = 40  # of a row
DPI = 150
_SCORE = LinearSegmentedColormap.from_list("score", ["#ffffff", "#9cc3e6", "#2d6cb4", "#08254d"])
_NUMBERS = (1.25, 1.56, 1.87)  # right edges of a table's numbers, bars end at 1
_SCORED = "attention received (1 = an even share)"
_NO_SCORES = "random masks: no scores"
_RIGHT, _WRONG, _FRAME, _PALE, _PAINT = "#0b7a4b", "#d1310f", "#111111", "#dde7f2", "#c8502d"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is drawn of one row of N tokens.

    Attributes:
        number: of the row, from 1.
        place: file and line.
        mask: (N,) bool, True = masked.
        loss: of this row; None where nothing is masked.
        scores: (N,) attention that a token received, 1 = an even share; None: random masks.
        queries: how many were drawn; 0: random masks.
        drawn: (R,) tokens whose queries were drawn; none where latents are the queries.
    """

    number: int
    place: str
    mask: np.ndarray
    loss: float | None
    scores: np.ndarray | None
    queries: int
    drawn: np.ndarray

    @property
    def masked(self) -> int:
        """How many tokens are masked."""
        return int(self.mask.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRow(Row):
    """A sequence of bytes.

    Attributes:
        true: N characters, or two hexadecimal digits where a byte is none.
        predicted: N of them; None where nothing is masked.
    """

    true: list[str]
    predicted: list[str | None]

    @property
    def right(self) -> int:
        """How many masked bytes the model predicts."""
        return sum(a == b for a, b in zip(self.true, self.predicted, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableRow(Row):
    """Columns of numbers, in their own units.

    Attributes:
        names: of the N columns.
        true: (N,).
        predicted: (N,), NaN where nothing is masked.
        std: (N,) standard deviations of the train part.
    """

    names: list[str]
    true: np.ndarray
    predicted: np.ndarray
    std: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureRow(Row):
    """A picture.

    Attributes:
        true: (H, W, 1 or 3) in [0, 1].
        predicted: the same with masked pixels as the model predicts them.
    """

    true: np.ndarray
    predicted: np.ndarray


def draw(target: BinaryIO, title: str, rows: Sequence[Row]) -> None:
    """Writes the figure as a PNG.

    Args:
        target: where to.
        title: above all rows.
        rows: at least 1, all of one kind.
    """
    kinds = {TextRow: _draw_texts, TableRow: _draw_tables, PictureRow: _draw_pictures}
    figure = kinds[type(rows[0])](title, rows)
    FigureCanvasAgg(figure)
    figure.savefig(target, dpi=DPI, format="png", facecolor="white")


def scale(rows: Sequence[Row], power: float = 1.0) -> tuple[Normalize, str]:
    """Returns the colours' range, the same for all rows, and how a colour bar continues.

    One token of 100 lies below and one above it: the few that are far out would leave all others
    white.

    Args:
        rows: at least 1.
        power: below 1 shows more of low scores.
    """
    scores = np.concatenate([np.ones(1) if row.scores is None else row.scores for row in rows])
    low, high = np.quantile(scores, (0.01, 0.99))
    low, high = min(low, 0.9), max(high, 1.1)  # where all are even, all look even
    below, above = scores.min() < low, scores.max() > high
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}
    return PowerNorm(power, low, high), extend[bool(below), bool(above)]


def _draw_texts(title: str, rows: Sequence[TextRow]) -> Figure:
    # an axes over the whole figure, in inches from the upper left corner
    cell, high, under, between = 0.165, 0.24, 0.2, 0.09
    left, right, top, bottom, head = 0.65, 0.35, 0.5, 1.0, 0.42
    width = max(7.6, left + right + cell * min(LINE, max(len(row.true) for row in rows)))
    lines = [min(LINES, -(-len(row.true) // LINE)) for row in rows]
    height = top + bottom + sum(head + n * (high + under + between) + 0.12 for n in lines)
    figure = Figure(figsize=(width, height), dpi=DPI)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    axis.text(left, 0.16, title, size=12, weight="bold", va="top")
    colours, extend = scale(rows)
    y = top
    for row, count in zip(rows, lines, strict=True):
        axis.text(left, y + 0.27, _heading(row), size=9.5, va="bottom")
        y += head - 0.06
        patches, faces, frames = [], [], []
        for place in range(min(len(row.true), LINE * LINES)):
            number, inside = divmod(place, LINE)
            x, upper = left + inside * cell, y + number * (high + under + between)
            if inside == 0:
                axis.text(x - 0.1, upper + high / 2, str(place + 1), **_small("right"))
            face = "#f2f2f2" if row.scores is None else _SCORE(colours(row.scores[place]))
            patches.append(Rectangle((x, upper), cell, high))
            faces.append(face)
            _character(axis, x + cell / 2, upper + high / 2, row.true[place], _ink(face))
            if row.mask[place]:
                frames.append(Rectangle((x + 0.012, upper + 0.012), cell - 0.024, high - 0.024))
                wrong = row.predicted[place] != row.true[place]
                colour = _WRONG if wrong else _RIGHT
                middle = upper + high + under / 2
                _character(axis, x + cell / 2, middle, row.predicted[place], colour, weight="bold")
        axis.add_collection(PatchCollection(patches, facecolor=faces, edgecolor="#d0d0d0", lw=0.5))
        axis.add_collection(PatchCollection(frames, facecolor="none", edgecolor=_FRAME, lw=1.3))
        inside = [d for d in row.drawn if d < LINE * LINES]
        axis.scatter(
            [left + (d % LINE + 0.5) * cell for d in inside],
            [y + d // LINE * (high + under + between) - 0.035 for d in inside],
            **_QUERY,
        )
        y += count * (high + under + between) + 0.18
    _text_legend(axis, left, height - 0.78, rows)
    if rows[0].scores is not None:
        bar = figure.add_axes((left / width, 0.42 / height, 2.6 / width, 0.12 / height))
        _colour_bar(figure, bar, colours, extend)
    return figure


def _text_legend(axis: Axes, x: float, y: float, rows: Sequence[TextRow]) -> None:
    axis.add_patch(Rectangle((x, y - 0.1), 0.165, 0.2, fill=False, edgecolor=_FRAME, lw=1.3))
    words = [("masked, beneath it what the model predicts:", "0.25")]
    words += [("right", _RIGHT), ("or", "0.25"), ("wrong", _WRONG)]
    after, offset = axis.transData.transform((x + 0.25, y)), 0
    for word, colour in words:
        weight = "normal" if colour == "0.25" else "bold"
        text = axis.annotate(word, (x + 0.25, y), (offset, 0), textcoords="offset pixels", **_note)
        text.set(color=colour, weight=weight)
        offset = text.get_window_extent().x1 - after[0] + 5
    if any(len(row.drawn) for row in rows):
        end = axis.transData.inverted().transform((after[0] + offset, after[1]))[0]
        axis.scatter([end + 0.15], [y], **_QUERY)
        axis.text(end + 0.25, y, "its query was drawn", **_note)
    if rows[0].scores is None:
        axis.text(x, y + 0.3, _NO_SCORES, **_note)


def _draw_tables(title: str, rows: Sequence[TableRow]) -> Figure:
    shown = [_columns(row) for row in rows]
    most = max(map(len, shown))
    pairs = list(zip(rows, shown, strict=True))
    across = min(2, len(rows))
    down = -(-len(rows) // across)
    names = 0.075 * max(min(24, len(row.names[i])) for row, s in pairs for i in s) + 0.3
    width, height = names + 2.2 + 2.3, 0.19 * most + 1.2
    total = (0.2 + across * width, 0.75 + down * height)
    figure = Figure(figsize=total)
    figure.text(0.2 / total[0], 1 - 0.12 / total[1], title, size=12, weight="bold", va="top")
    note = ("bold name" if rows[0].scores is None else "dark bar, bold name") + ": masked"
    if any(len(row.drawn) for row in rows):
        note += "; ▸ its query was drawn"
    figure.text(0.2 / total[0], 1 - 0.38 / total[1], note, size=9, va="top", color="0.25")
    furthest = max((row.scores.max() for row in rows if row.scores is not None), default=1.0)
    for index, (row, columns) in enumerate(pairs):
        left = 0.2 + index % across * width + names
        top = 0.75 + index // across * height + 0.6
        used = 0.19 * len(columns)
        box = (left / total[0], 1 - (top + used) / total[1], 2.2 / total[0], used / total[1])
        axis = figure.add_axes(box)
        _bars(axis, row, columns, furthest)
        axis.text(
            -names / 2.2, 1 + 0.27 / used, _heading(row, "\n"), size=9.5, transform=axis.transAxes
        )
    return figure


def _columns(row: TableRow) -> np.ndarray:
    # the columns that are drawn: all, or the masked ones and those of the highest scores
    if len(row.names) <= BARS:
        return np.arange(len(row.names))
    scores = np.zeros(len(row.names)) if row.scores is None else row.scores
    return np.sort(np.lexsort((-scores, ~row.mask))[:BARS])


def _bars(axis: Axes, row: TableRow, columns: np.ndarray, furthest: float) -> None:
    places = np.arange(len(columns))
    masked = row.mask[columns]
    if row.scores is not None:
        colours = [_SCORE(0.72) if m else _PALE for m in masked]
        axis.barh(places, row.scores[columns], height=0.74, color=colours)
        axis.axvline(1.0, color="0.6", lw=0.8, ls=":")
    else:
        axis.text(0.5, 0.5, _NO_SCORES, transform=axis.transAxes, **_note | {"ha": "center"})
    across = axis.get_yaxis_transform()
    for place in places[masked]:
        band = Rectangle((0, place - 0.5), 1.9, 1, color="#fdf1e3", zorder=0, transform=across)
        band.set_clip_on(False)
        axis.add_patch(band)
    axis.set(xlim=(0, furthest * 1.05), ylim=(len(columns) - 0.5, -0.5), yticks=places)
    labels = [("▸ " if i in row.drawn else "") + _short(row.names[i]) for i in columns]
    axis.set_yticklabels(labels, size=8)
    for label, hidden in zip(axis.get_yticklabels(), masked, strict=True):
        label.set_weight("bold" if hidden else "normal")
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel(_SCORED if row.scores is not None else "", size=8)
    if row.scores is None:
        axis.set_xticks([])
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for x, heading in zip(_NUMBERS, ("true", "model", "off (sd)"), strict=True):
        axis.text(x, -0.8, heading, transform=across, **_small("right") | {"va": "bottom"})
    for place, i in enumerate(columns):
        texts = [_number(row.true[i], row.std[i])]
        if row.mask[i]:
            off = (row.predicted[i] - row.true[i]) / row.std[i]
            texts += [_number(row.predicted[i], row.std[i]), f"{round(off, 1) + 0.0:+.1f}"]
        for x, text in zip(_NUMBERS, texts, strict=False):
            style = _small("right") | {"color": "black" if row.mask[i] else "0.45"}
            axis.text(x, place, text, transform=across, **style)


def _number(value: float, std: float) -> str:
    # to about a fiftieth of the deviation
    digits = round(1.7 - math.log10(std))
    if not 0 <= digits <= 6:
        return f"{value:.3g}"
    return f"{round(value, digits) + 0.0:.{digits}f}"  # 0.0: no "-0.00"


def _draw_pictures(title: str, rows: Sequence[PictureRow]) -> Figure:
    side, gap, head, top = 1.75, 0.12, 0.32, 0.8
    tall = side * rows[0].true.shape[0] / rows[0].true.shape[1]
    total = (4 * side + 5 * gap + 0.1, top + len(rows) * (tall + head) + 0.72)
    figure = Figure(figsize=total)
    figure.text(gap / total[0], 1 - 0.14 / total[1], title, size=12, weight="bold", va="top")
    colours, extend = scale(rows, 0.6)
    for index, name in enumerate(("picture", "scores", "masked", "reconstruction")):
        middle = gap + index * (side + gap) + side / 2
        place = {"ha": "center", "va": "bottom"}
        figure.text(middle / total[0], 1 - (top - 0.12) / total[1], name, size=10, **place)
    for number, row in enumerate(rows):
        y = top + number * (tall + head) + head
        text = _heading(row)
        figure.text(gap / total[0], 1 - (y - 0.07) / total[1], text, size=9, va="bottom")
        size = row.true.shape[:2]
        painted = row.true.copy() if row.true.shape[2] == 3 else row.true.repeat(3, 2)
        mask = row.mask.reshape(size)
        painted[mask] = np.array([int(_PAINT[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        scores = None if row.scores is None else row.scores.reshape(size)
        for index, picture in enumerate((row.true, scores, painted, row.predicted)):
            x = gap + index * (side + gap)
            box = (x / total[0], 1 - (y + tall) / total[1], side / total[0], tall / total[1])
            axis = figure.add_axes(box)
            axis.set(xticks=[], yticks=[])
            if picture is None:
                text = textwrap.fill(_NO_SCORES, 14)
                axis.text(0.5, 0.5, text, transform=axis.transAxes, **_note | {"ha": "center"})
                continue
            style = {"cmap": _SCORE, "norm": colours} if index == 1 else {"cmap": "gray"}
            style |= {} if index == 1 else {"vmin": 0, "vmax": 1}
            axis.imshow(np.squeeze(picture), interpolation="nearest", aspect="auto", **style)
            if index == 1 and len(row.drawn):
                axis.scatter(row.drawn % size[1], row.drawn // size[1], s=7, c=_WRONG, marker=".")
    if scores is not None:
        x = gap + side + gap
        bar = figure.add_axes((x / total[0], 0.5 / total[1], 2.2 / total[0], 0.12 / total[1]))
        _colour_bar(figure, bar, colours, extend)
    if any(len(row.drawn) for row in rows):
        note = "red dots: their queries were drawn"
        figure.text(0.99, 0.4 / total[1], note, size=9, color="0.25", ha="right")
    return figure


def _heading(row: Row, between: str = ": ") -> str:
    by = f"by {row.queries} {'query' if row.queries == 1 else 'queries'}" if row.queries else ""
    text = f"{row.masked} of {len(row.mask)} tokens masked {by or 'at random'}"
    if row.loss is None:
        text += ", too few for the ratio"
    else:
        text += f", {row.right} predicted right" if isinstance(row, TextRow) else ""
        text += f", loss {row.loss:.2f}"
    if isinstance(row, TextRow) and len(row.mask) > LINE * LINES:
        text += f" (the first {LINE * LINES} are drawn)"
    elif isinstance(row, TableRow) and len(row.mask) > BARS:
        text += f" ({BARS} of the columns are drawn)"
    return (row.place if len(row.place) <= 48 else "…" + row.place[-47:]) + between + text


def _colour_bar(figure: Figure, axis: Axes, colours: Normalize, extend: str) -> None:
    bar = figure.colorbar(
        ScalarMappable(colours, _SCORE), cax=axis, orientation="horizontal", extend=extend
    )
    ticks = MaxNLocator(4).tick_values(colours.vmin, colours.vmax)
    bar.set_ticks([tick for tick in ticks if colours.vmin <= tick <= colours.vmax])
    bar.minorticks_off()
    bar.set_label(_SCORED, size=9)
    bar.ax.tick_params(labelsize=8)


def _character(axis: Axes, x: float, y: float, text: str, colour, **style) -> None:
    size = 10 if len(text) == 1 else 6.5
    place = {"ha": "center", "va": "center_baseline", "family": "DejaVu Sans Mono"}
    axis.text(x, y, text, size=size, color=colour, parse_math=False, **place, **style)


def _ink(face) -> str:
    if isinstance(face, str):
        return "black"
    return "black" if np.dot(face[:3], (0.299, 0.587, 0.114)) > 0.48 else "white"


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _small(ha: str) -> dict:
    return {"size": 8, "color": "0.45", "ha": ha, "va": "center"}


_note = {"size": 9, "va": "center", "color": "0.25"}
_QUERY = {"marker": "v", "s": 16, "color": _WRONG, "zorder": 3, "linewidths": 0}
