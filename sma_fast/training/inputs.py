"""From the options of a run to encoded rows: parts, encodings, what checkpoints keep of them."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import datasets
import numpy as np

from sma_fast.models import MAEConfig, SMAConfig
from sma_fast.training.checkpoints import CheckpointError
from sma_fast.training.data import (
    ByColumn,
    ByIndex,
    ByteSequences,
    ClassLabels,
    DataError,
    Examples,
    MultiLabels,
    Pictures,
    TableColumns,
    Targets,
    from_state,
    load_splits,
)
from sma_fast.training.data.load import brings_splits, load, select
from sma_fast.training.data.rows import FILE, LINE
from sma_fast.training.options import DataOptions

Inputs = ByteSequences | TableColumns | Pictures
Labels = ClassLabels | MultiLabels | Targets
ENCODINGS = {"bytes": ByteSequences, "table": TableColumns, "pictures": Pictures}
DATA = "data.json"


class RunError(ValueError):
    """Raised where a run cannot start or go on; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Encodings:
    """How rows become inputs and labels; a checkpoint keeps it."""

    inputs: Inputs
    labels: Labels | None = None

    def save(self, folder: Path, examples: Mapping[str, Examples] | None = None) -> None:
        """Writes data.json into `folder`.

        Args:
            folder: of a checkpoint.
            examples: checked parts, of which rows and checksum are kept. Default: none.
        """
        (folder / DATA).write_text(self._text(examples or {}))

    def check_unchanged(self, folder: Path, examples: Mapping[str, Examples]) -> None:
        """Refuses to go on from a checkpoint of other data.

        Args:
            folder: of the checkpoint.
            examples: checked parts.

        Raises:
            RunError: where rows or encodings are not those of data.json.
        """
        before, now = json.loads((folder / DATA).read_text()), json.loads(self._text(examples))
        if before != now:
            changed = [name for name in now if before.get(name) != now[name]]
            raise RunError(
                f"{folder}: the data are not those that the run began with ({', '.join(changed)} "
                "differ): bring those back, or start again in another folder with --out"
            )

    def _text(self, examples: Mapping[str, Examples]) -> str:
        state: dict[str, object] = {"inputs": self.inputs.state()}
        if self.labels is not None:
            state["labels"] = self.labels.state()
        for part, rows in examples.items():
            state[part] = {"rows": len(rows), "checksum": rows.checksum}
        return json.dumps(state, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Encodings":
        """Returns what `save` wrote.

        Raises:
            CheckpointError: where data.json is missing or damaged.
        """
        file = folder / DATA
        try:
            state = json.loads(file.read_text())
            labels = from_state(state["labels"]) if "labels" in state else None
            return cls(from_state(state["inputs"]), labels)
        except FileNotFoundError:
            raise CheckpointError(
                f"{file}: is missing: name a folder that sma-fast wrote"
            ) from None
        except (DataError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: is damaged: {error}: take another checkpoint") from None


def open_parts(
    data: DataOptions,
    labels: tuple[str, ...] = (),
    chosen: Callable[[datasets.Dataset], datasets.Dataset] | None = None,
) -> dict[str, datasets.Dataset]:
    """Returns the rows by part: "train", and perhaps "valid" and "test".

    Data sets of the hub and folders of pictures that bring splits keep them, unless a share for
    the test part is asked for; beside sources of the other parts, one's own part of them counts.

    Args:
        data: where they are.
        labels: columns that must be there.
        chosen: returns the rows of a source that count, before it is cut. Default: all.

    Raises:
        RunError: where such a source has no such part.
        DataError: as `load` and the split.
    """
    named = {
        "format": data.format,
        "columns": data.columns,
        "inputs": data.inputs,
        "labels": labels or None,
        "min_length": data.min_length,
        "max_length": data.max_length,
        "cache": data.cache,
    }
    source = data.source if len(data.source) > 1 else data.source[0]
    if data.validation or data.test:
        own = {"train": source, "valid": data.validation, "test": data.test}
        own = {part: path for part, path in own.items() if path is not None}
        parts = load_splits(own, **named)
        if chosen is not None:
            parts = {part: chosen(rows) for part, rows in parts.items()}
        for part, path in own.items():
            if brings_splits(path, data.format, parts[part]):
                parts[part] = _same_part(parts[part], data, part, path)
    else:
        rows = load(source, **named)
        if chosen is not None:
            rows = chosen(rows)
        column = splits_of(data, rows)
        if column is None or (data.test_share and not data.split_column):
            sizes = {"test": data.test_share or 0.0, "valid": data.share_to_validate}
            sizes = {part: share for part, share in sizes.items() if share > 0}
            return ByIndex({**sizes, "train": None}, data.split_seed).apply(rows)
        parts = _by_column(rows, data, column)
    if "valid" not in parts and "train" in parts and data.share_to_validate > 0:
        cut = ByIndex({"valid": data.share_to_validate, "train": None}, data.split_seed)
        parts |= cut.apply(parts["train"])
    return parts


def splits_of(data: DataOptions, rows: datasets.Dataset) -> str | None:
    """Returns the column that tells parts apart, None where there is none.

    Args:
        data: `split_column`, or where the rows come from.
        rows: what `load` returned.
    """
    if data.split_column:
        return data.split_column
    return "split" if brings_splits(data.source, data.format, rows) else None


def _same_part(
    rows: datasets.Dataset, data: DataOptions, part: str, path: object
) -> datasets.Dataset:
    found = _by_column(rows, data, "split")
    if part not in found:
        raise RunError(
            f"{path}: brings the splits {', '.join(found)}, allowed as source of the {part} part "
            "is one that has it, or that has none"
        )
    return found[part]


def _by_column(
    rows: datasets.Dataset, data: DataOptions, column: str
) -> dict[str, datasets.Dataset]:
    if column not in rows.column_names:
        return ByColumn(column).apply(rows)  # says which columns there are
    usual = {
        "train": ["train", "training"],
        "valid": ["valid", "validation", "val", "dev"],
        "test": ["test"],
    }
    free = set(map(str, rows.unique(column))) - set((data.parts or {}).values())
    named = {part: [v for v in values if v in free] for part, values in usual.items()}
    named |= {part: [value] for part, value in (data.parts or {}).items()}
    named = {part: values for part, values in named.items() if any(values)}
    return ByColumn(column, named or None).apply(rows)


def fit_inputs(
    encoding: str,
    train: datasets.Dataset,
    data: DataOptions,
    config: SMAConfig | MAEConfig,
    labels: tuple[str, ...] = (),
) -> Inputs:
    """Returns the encoding of inputs, with mean and standard deviation of the train part.

    Args:
        encoding: a name of `ENCODINGS`.
        train: rows of the train part.
        data: which columns are inputs, and how they are read.
        config: of the model, for the longest sequence and the channels of pictures.
        labels: columns that are none.
    """
    left_out = {*labels, FILE, LINE, *(data.exclude or ())}
    left_out |= {splits_of(data, train)} - {None}
    both = sorted(set(data.inputs or ()) & set(labels))
    if both:
        raise RunError(f"labels: got {', '.join(both)}, which --input names as an input too")
    if encoding == "table":
        return TableColumns.fit(train, data.inputs, sorted(left_out))
    column = one_column(data) or only_column(encoding, train, left_out)
    if encoding == "bytes":
        return ByteSequences(column, config.max_position_embeddings, data.too_long, data.alphabet)
    size, channels = data.size, getattr(config, "input_channels", None)
    if isinstance(config, MAEConfig):
        size, channels = (config.image_size, config.image_size), config.num_channels
        if data.size not in (None, size):
            raise RunError(
                f"size: got {data.size}, allowed is {size}, that of the model: change it with "
                "--set image_size=..."
            )
    return Pictures.fit(train, column, size=size, channels=channels, resize=data.resize)


def check_options(kind: type, data: DataOptions) -> None:
    """Refuses options that mean nothing for an encoding.

    Args:
        kind: of the encoding, a value of `ENCODINGS`.
        data: the options.

    Raises:
        RunError: naming the option.
    """
    given = {
        "alphabet": (data.alphabet is not None, ByteSequences, "sequences"),
        "too_long": (data.too_long != "error", ByteSequences, "sequences"),
        "resize": (data.resize is not None, Pictures, "pictures"),
        "size": (data.size is not None, Pictures, "pictures"),
        "skip_damaged": (data.skip_damaged, Pictures, "pictures"),
    }
    for name in ("min_length", "max_length"):
        given[name] = (getattr(data, name) is not None, ByteSequences, "sequences")
    for name, (is_given, allowed, called) in given.items():
        if is_given and kind is not allowed:
            raise RunError(f"{name}: got {getattr(data, name)!r}, allowed is for {called} only")


def known_inputs(known: Inputs, data: DataOptions, called: str = "inputs") -> Inputs:
    """Returns the encoding of a checkpoint for rows that may name the column otherwise.

    Args:
        known: the encoding.
        data: where the rows are.
        called: what messages call `data.inputs`.

    Raises:
        RunError: where a table's columns are not those that the checkpoint was trained on.
    """
    check_options(type(known), data)
    read = sorted(set(data.exclude or ()) & set(known.columns))
    if read:
        raise RunError(f"exclude: got {', '.join(read)}, which the checkpoint was trained to read")
    if isinstance(known, TableColumns):
        if data.inputs and list(data.inputs) != list(known.columns):
            raise RunError(
                f"{called}: got {', '.join(data.inputs)}, allowed is {', '.join(known.columns)}, "
                "what the checkpoint was trained on"
            )
        return known
    column = one_column(data, called) or known.column
    if isinstance(known, ByteSequences):
        alphabet = data.alphabet or known.alphabet
        return ByteSequences(column, known.max_length, data.too_long, alphabet)
    if data.size:
        raise RunError(
            f"size: allowed is None beside a checkpoint, whose pictures are {known.size}"
        )
    resize = data.resize or known.resize
    return Pictures(column, known.size, known.channels, resize, known.mean, known.std)


def one_column(data: DataOptions, called: str = "inputs") -> str | None:
    """Returns the column that sequences or pictures stand in, None where none was named."""
    if data.inputs and len(data.inputs) != 1:
        raise RunError(
            f"{called}: got {len(data.inputs)} columns, allowed is 1 but for tables: name one"
        )
    return data.inputs[0] if data.inputs else None


def rows_to_read(
    data: DataOptions, chosen: Callable[[datasets.Dataset], datasets.Dataset] | None = None
) -> datasets.Dataset:
    """Returns the rows of the test part where there is one, as training cut it, or all of them.

    Args:
        data, chosen: as for `open_parts`.

    Raises:
        RunError: where there are parts but no test part, or for a validation part.
        DataError: as `open_parts`.
    """
    if data.validation or data.validation_share:
        raise RunError("validation, validation_share: allowed is neither but in training")
    parts = open_parts(dataclasses.replace(data, validation_share=0.0), chosen=chosen)
    if "test" in parts:
        return parts["test"]
    if data.split_column or set(parts) != {"train"}:
        raise RunError(
            f"split_column: got {data.split_column or 'split'!r}, which has no test part ("
            f"{', '.join(parts)}): name it with --split-column and --parts test=VALUE"
        )
    return parts["train"]


def only_column(encoding: str, train: datasets.Dataset, left_out: set[str]) -> str:
    """Returns the column that sequences or pictures stand in where none was named.

    Args:
        encoding: a name of `ENCODINGS`.
        train: rows.
        left_out: columns that it cannot be.

    Raises:
        DataError: where there are several; lists them.
    """
    names = [name for name in train.column_names if name not in left_out]
    if encoding == "pictures" and "image" in names:
        return "image"
    for usual in ("sequence", "smiles", "text"):
        if usual in names:
            return usual
    if len(names) != 1:
        raise DataError(f"inputs: got none, allowed is one of the columns {', '.join(names)}")
    return names[0]


def fit_labels(task: str, train: datasets.Dataset, labels: tuple[str, ...]) -> Labels:
    """Returns the encoding of labels, with classes, or mean and deviation, of the train part."""
    if task == "classification":
        return ClassLabels.fit(train, labels[0])
    return (MultiLabels if task == "multilabel" else Targets).fit(train, list(labels))


def drawn_rows(train: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    """Returns `limit` rows of the train part, drawn by `seed`, in their order.

    Raises:
        RunError: where there are fewer.
    """
    if limit is None:
        return train
    if limit > len(train):
        raise RunError(
            f"limit_train: got {limit}, allowed is at most {len(train)}, the rows of the train part"
        )
    drawn = np.random.default_rng(seed).permutation(len(train))[:limit]
    return select(train, np.sort(drawn))  # files may be sorted by label


def encoded(parts: Mapping[str, datasets.Dataset], encodings: Encodings) -> dict[str, Examples]:
    """Returns the parts as encoded samples, each encoded once now: a bad row is found before hours.

    Raises:
        DataError: naming the row.
    """
    both = [encodings.inputs] + ([] if encodings.labels is None else [encodings.labels])
    examples = {part: Examples(rows, *both) for part, rows in parts.items()}
    for part in examples.values():
        part.check()
    return examples
