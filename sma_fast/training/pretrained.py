"""Models from folders: those that training wrote, and those that only `save_pretrained` did."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import datasets

from sma_fast.models import MAEForPretraining, SMAForPrediction, SMAForPretraining
from sma_fast.training import checkpoints
from sma_fast.training.inputs import (
    DATA,
    Encodings,
    Inputs,
    RunError,
    fit_inputs,
    known_inputs,
    rows_to_read,
)
from sma_fast.training.options import DataOptions

RUN = "run.json"  # what was asked for, in the folder of a run


def load_model(
    folder: Path, kind: type
) -> SMAForPretraining | SMAForPrediction | MAEForPretraining:
    """Returns the model of a folder that training wrote: a run's, or one of its checkpoints.

    Raises:
        CheckpointError: where it is not whole, or of another kind.
    """
    if not folder.is_dir():
        raise checkpoints.CheckpointError(
            f"{folder}: no such folder: name one that sma-fast pretrain wrote"
        )
    checkpoints.check(folder)
    return _loaded(folder, kind)


def load_pretrained(folder: Path) -> tuple[SMAForPretraining, Inputs | None]:
    """Returns a pretrained model and the encoding of its inputs, None where the folder has none.

    A folder of `save_pretrained`, such as of a model from `load_published`, has none. One that
    training began to write has to be whole.

    Raises:
        CheckpointError: as `load_model`, and where it is a masked autoencoder of pictures.
    """
    _refuse_mae(folder)
    if only_saved(folder):
        return _loaded(folder, SMAForPretraining), None
    return load_model(folder, SMAForPretraining), Encodings.read(folder).inputs


def holds_mae(folder: Path) -> bool:
    """Returns whether a folder's config is that of a masked autoencoder of pictures."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return "patch_size" in json.loads((folder / "config.json").read_text())
    return False


def _refuse_mae(folder: Path) -> None:
    if holds_mae(folder):
        raise checkpoints.CheckpointError(
            f"{folder}: holds a masked autoencoder of pictures (pretrain --model mae), allowed is "
            "another model (sma-fast show draws this one)"
        )


def only_saved(folder: Path) -> bool:
    """Returns whether a folder is of `save_pretrained`, with no sign of a run that wrote it."""
    signs = (folder / DATA, folder / RUN, folder / checkpoints.COMPLETE, folder.parent / RUN)
    saved = {"config.json", "model.safetensors"} <= {path.name for path in folder.glob("*")}
    return saved and not any(path.exists() for path in signs)


def open_pretrained(
    folder: Path,
    data: DataOptions,
    called: str = "inputs",
    chosen: Callable[[datasets.Dataset], datasets.Dataset] | None = None,
) -> tuple[SMAForPretraining, Inputs, datasets.Dataset]:
    """Returns a pretrained model, the encoding of its inputs, and the rows of `data` to look at.

    Args:
        folder: of `pretrain`, or of `save_pretrained` alone, where its tokens are bytes.
        data: where the rows are.
        called: what messages call `data.inputs`.
        chosen: as for `open_parts`.

    Raises:
        RunError, DataError, CheckpointError: saying what to do.
    """
    model, known = load_pretrained(folder)
    if known is not None:
        return model, known_inputs(known, data, called), rows_to_read(data, chosen)
    if model.config.input_type != "discrete":
        raise RunError(
            f"{folder}: has no {DATA}, so nothing says how its table or pictures were "
            "standardised: name a folder that sma-fast pretrain or finetune wrote"
        )
    rows = rows_to_read(data, chosen)
    return model, fit_inputs("bytes", rows, data, model.config), rows


def preset_of(folder: Path) -> dict[str, str]:
    """Returns "preset" and "scale" of the run that a folder or checkpoint is of, {} if unknown.

    Raises:
        CheckpointError: for a masked autoencoder of pictures.
    """
    _refuse_mae(folder)
    for file in (folder / RUN, folder.parent / RUN):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            options = json.loads(file.read_text())["options"]
            return {"preset": options["preset"], "scale": options["scale"]}
    return {}


def _loaded(folder: Path, kind: type) -> SMAForPretraining | SMAForPrediction | MAEForPretraining:
    try:
        with contextlib.redirect_stdout(None):  # huggingface_hub says where it loads from
            return kind.from_pretrained(folder)
    except (ValueError, TypeError, OSError) as error:
        raise checkpoints.CheckpointError(
            f"{folder}: holds no {kind.__name__}: {error}: name another folder"
        ) from None
