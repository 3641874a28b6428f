"""show: what a pretrained model hides of a few rows, why, and what it makes of the rest.

Each row goes through the model alone, so that what is hidden of it depends on the row and the seed
and not on the rows beside it.
"""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from sma_fast.models import MAEForPretraining, SMAForPretraining
from sma_fast.training import show_mae, show_plots
from sma_fast.training.checkpoints import CheckpointError
from sma_fast.training.damaged import WholePictures
from sma_fast.training.data import ByteSequences, DataError, Examples, Pictures, TableColumns
from sma_fast.training.data.rows import Rows, arrow
from sma_fast.training.data.sequences import SPECIAL
from sma_fast.training.inputs import Encodings, RunError, known_inputs, rows_to_read
from sma_fast.training.options import DataOptions
from sma_fast.training.pretrained import holds_mae, load_model, only_saved, open_pretrained
from sma_fast.training.show_mae import Shown
from sma_fast.training.show_plots import PictureRow, Row, TableRow, TextRow

MOST = 24  # rows of a figure
_NO_SCORES = {"scores": None, "queries": 0, "drawn": np.zeros(0, np.int64)}
_SIGNS = {ord(" "): "␣", ord("\t"): "→", ord("\n"): "↵", ord("\r"): "←"}


def show(
    folder: Path,
    data: DataOptions,
    out: Path,
    rows: int = 4,
    chosen: Sequence[int] | None = None,
    seed: int = 0,
) -> list[str]:
    """Draws what a pretrained model hides of some rows, and returns a line of text for each.

    Args:
        folder: that `pretrain` wrote, or one of its checkpoints.
        data: of which `source` is read whole; with `split_column` or a `test` source, the test
            part.
        out: the PNG.
        rows: how many to draw at random, in [1, 24].
        chosen: their numbers instead, from 1.
        seed: of the rows and of what is hidden, at least 0.

    Returns:
        A line for each row (number, place, tokens, masked, loss), and one with the PNG's path.

    Raises:
        ValueError, RunError, DataError, CheckpointError: saying what to do.
    """
    _check_out(out)
    drawing = io.BytesIO()
    if holds_mae(folder):
        _check_choice(rows, chosen, seed)
        title, shown, prepared = _pictures(folder, data, rows, chosen, seed)
        show_mae.draw(drawing, shown, title)
    else:
        title, prepared = prepare(folder, data, rows, chosen, seed)
        show_plots.draw(drawing, title, prepared)
    beside = out.with_name(f".{out.name}.{os.getpid()}")  # a full disk leaves no half picture
    try:
        beside.write_bytes(drawing.getvalue())
        beside.replace(out)
    except OSError as error:
        raise RunError(
            f"{out}: cannot be written ({error.strerror or error}): make room on that disk, or "
            "name another file with --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return [line(row) for row in prepared] + [f"{out}: {len(prepared)} rows"]


def prepare(
    folder: Path,
    data: DataOptions,
    rows: int = 4,
    chosen: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[str, list[Row]]:
    """Returns the title of what `show` draws, and its rows.

    Args:
        folder, data, rows, chosen, seed: as for `show`.

    Raises:
        ValueError, RunError, DataError, CheckpointError: saying what to do.
    """
    _check_choice(rows, chosen, seed)
    if not only_saved(folder) and Encodings.read(folder).labels is not None:
        raise CheckpointError(
            f"{folder}: holds a fine-tuned model, which masks nothing: name the folder of sma-fast "
            "pretrain that it was trained from"
        )
    model, inputs, dataset = open_pretrained(folder, data, "input", WholePictures(data))
    model.eval()
    numbers = _numbers(len(dataset), rows, chosen, seed)
    examples, table = Examples(dataset, inputs), arrow(dataset, inputs.columns)
    masking = model.config.masking
    how = f"{folder.absolute().name}: {masking.mask} masks, {masking.mask_ratio:.0%} of the tokens"
    return how, [_row(model, inputs, examples, table, number, seed) for number in numbers]


def _pictures(
    folder: Path, data: DataOptions, rows: int, chosen: Sequence[int] | None, seed: int
) -> tuple[str, Shown, list[Row]]:
    # of a masked autoencoder
    model = load_model(folder, MAEForPretraining).eval()
    mask, policy = show_mae.policy_of(folder, model)
    inputs = known_inputs(Encodings.read(folder).inputs, data, "input")
    dataset = rows_to_read(data, WholePictures(data))
    numbers = _numbers(len(dataset), rows, chosen, seed)
    examples, table = Examples(dataset, inputs), arrow(dataset, inputs.columns)
    colours, parts, found = show_mae.colours_of(inputs), [], []
    for number in numbers:
        pixels = torch.from_numpy(np.asarray(examples[number - 1]["inputs"]))[None]
        pixels = pixels.unflatten(1, inputs.size).permute(0, 3, 1, 2).contiguous()
        part = show_mae.look(model, pixels, policy, colours, 1.0, _generator(seed, number))
        place = _place(Rows(table[[number - 1]], table.features), inputs)
        loss = float(part.loss[0]) if part.mask.any() else None
        found.append(Row(number=number, place=place, mask=part.mask[0], loss=loss, **_NO_SCORES))
        parts.append(part)
    ratio = f"{model.config.mask_ratio:.0%} of the patches"
    return f"{folder.absolute().name}: {mask} masks, {ratio}", show_mae.joined(parts), found


def line(row: Row) -> str:
    """Returns what the console says about a row."""
    loss = "-" if row.loss is None else f"{row.loss:.4f}"
    return (
        f"row {row.number} ({row.place}): {len(row.mask)} tokens, {row.masked} masked, loss {loss}"
    )


def _row(
    model: SMAForPretraining,
    inputs: ByteSequences | TableColumns | Pictures,
    examples: Examples,
    table: datasets.Dataset,
    number: int,
    seed: int,
) -> Row:
    values = torch.from_numpy(np.asarray(examples[number - 1]["inputs"]))[None]
    if values.shape[1] > model.config.max_position_embeddings:
        raise DataError(
            f"row {number}: got {values.shape[1]} tokens, allowed is at most "
            f"{model.config.max_position_embeddings}, the model's length"
        )
    with torch.inference_mode():
        output = model(values, generator=_generator(seed, number))
    rows = Rows(table[[number - 1]], table.features)
    common = {
        "number": number,
        "place": _place(rows, inputs),
        "mask": output.mask[0].numpy(),
        "loss": output.loss.item() if output.mask.any() else None,
        "scores": _even_shares(output.scores),
        "queries": _queries(model, values.shape[1]),
        "drawn": _drawn(model, values, _generator(seed, number)),
    }
    ids = output.ids_masked[0]
    prediction = output.logits[0][ids >= 0].float()
    ids = ids[ids >= 0].numpy()
    if isinstance(inputs, ByteSequences):
        predicted: list[str | None] = [None] * values.shape[1]
        for place, token in zip(ids, prediction.argmax(1).tolist(), strict=True):
            predicted[place] = sign(token)
        return TextRow(**common, true=[sign(t) for t in values[0].tolist()], predicted=predicted)
    # back to the units of the data
    true = values[0].numpy() * inputs.std.reshape(-1, inputs.channels) + inputs.mean.reshape(
        -1, inputs.channels
    )
    return _continuous(inputs, rows, common, true, ids, prediction.numpy())


def _continuous(
    inputs: TableColumns | Pictures,
    rows: Rows,
    common: dict,
    true: np.ndarray,
    ids: np.ndarray,
    prediction: np.ndarray,
) -> Row:
    if isinstance(inputs, TableColumns):
        predicted = np.full(len(true), np.nan)
        predicted[ids] = prediction[:, 0] * inputs.std[ids] + inputs.mean[ids]
        return TableRow(
            **common, names=inputs.names, true=true[:, 0], predicted=predicted, std=inputs.std
        )
    predicted = true.copy()
    predicted[ids] = prediction * inputs.std + inputs.mean
    low, high = 0.0, 255.0
    if _path(rows, inputs) is None:  # lists of pixels have no range of their own
        low, high = float(true.min()), float(true.max())
    shape = (*inputs.size, inputs.channels)
    true, predicted = (
        ((pixels - low) / max(high - low, 1e-12)).clip(0, 1).reshape(shape)
        for pixels in (true, predicted)
    )
    return PictureRow(**common, true=true, predicted=predicted)


def sign(token: int) -> str:
    """Returns how a token of `ByteSequences` is drawn: a character, or two hexadecimal digits."""
    byte = token - SPECIAL
    if byte < 0:
        return "□"  # padding and other special tokens, which no data hold
    return _SIGNS.get(byte) or (chr(byte) if 0x20 < byte < 0x7F else f"{byte:02x}")


def _even_shares(scores: Tensor | None) -> np.ndarray | None:
    # the attention a token received, over what it would if all received the same
    if scores is None:
        return None
    found = np.nan_to_num(scores[0].double().numpy())
    return found / max(found.mean(), 1e-30)


def _drawn(model: SMAForPretraining, values: Tensor, generator: torch.Generator) -> np.ndarray:
    # the tokens whose queries were drawn; latents are no tokens
    masking = model.config.masking
    if masking.mask == "random" or model.encoder.latents is not None:
        return np.zeros(0, np.int64)
    drawn = masking.draw_tokens(values, None, generator)[0]  # the model's first draw, again
    return drawn[drawn >= 0].numpy()


def _queries(model: SMAForPretraining, tokens: int) -> int:
    masking, latents = model.config.masking, model.encoder.latents
    if masking.mask == "random":
        return 0
    return masking.count_queries(tokens, tokens if latents is None else len(latents))


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def _place(rows: Rows, inputs: ByteSequences | TableColumns | Pictures) -> str:
    if isinstance(inputs, Pictures) and (path := _path(rows, inputs)):
        return "/".join(Path(path).parts[-3:])
    file, comma, line = rows.place(0).rpartition(", ")
    return f"{Path(file).name}{comma}{line}"


def _path(rows: Rows, inputs: Pictures) -> str | None:
    cell = rows.column(inputs.column)[0].as_py()
    return cell.get("path") or "" if isinstance(cell, dict) else None


def _numbers(total: int, rows: int, chosen: Sequence[int] | None, seed: int) -> list[int]:
    if chosen is None:
        if rows > total:
            raise ValueError(f"rows: got {rows}, allowed is at most {total}, as many as there are")
        drawn = np.random.default_rng(seed).choice(total, rows, replace=False, shuffle=False)
        return sorted(int(i) + 1 for i in drawn)
    for number in chosen:
        if not 1 <= number <= total:
            raise ValueError(f"row: got {number}, allowed is 1 to {total}")
    return list(dict.fromkeys(chosen))


def _check_choice(rows: int, chosen: Sequence[int] | None, seed: int) -> None:
    if not 1 <= rows <= MOST:
        raise ValueError(f"rows: got {rows}, allowed is 1 to {MOST}")
    if chosen is not None and not 1 <= len(chosen) <= MOST:
        raise ValueError(f"row: got {len(chosen)} numbers, allowed is 1 to {MOST}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, allowed is 0 to {2**32 - 1}")


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise ValueError(f"out: got {out}, allowed is a name that ends with .png")
    if out.is_dir():
        raise ValueError(f"out: got {out}, a folder, allowed is the name of a file")
    out.parent.mkdir(parents=True, exist_ok=True)
