"""Opens files, folders, zip files and hub names as one memory-mapped data set."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sma_fast.training.data import binary, picture_files, text
from sma_fast.training.data.errors import DataError
from sma_fast.training.data.hub import open_hub
from sma_fast.training.data.rows import FILE, LINE, batches, check_columns, source_of
from sma_fast.training.data.store import cache_folder, stored

Source = str | os.PathLike | Sequence[str | os.PathLike]

EXTENSIONS = {
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "text": (".txt", ".text"),
    "fasta": (".fasta", ".fa", ".faa", ".fna", ".fas"),
    "smi": (".smi", ".smiles"),
    "npy": (".npy",),
    "npz": (".npz",),
    "parquet": (".parquet", ".pq"),
    "pictures": (".zip",),
}
FORMATS = (*EXTENSIONS, "hub")
_TEXT = {
    "csv": (text.read_csv, "line"),
    "tsv": (text.read_tsv, "line"),
    "jsonl": (text.read_jsonl, "line"),
    "text": (text.read_text, "line"),
    "fasta": (text.read_fasta, "record at line"),
    "smi": (text.read_smi, "line"),
}
_BINARY = {"npy": binary.read_npy, "npz": binary.read_npz, "parquet": binary.read_parquet}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    source: Source,
    *,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    inputs: str | Sequence[str] | None = None,
    labels: str | Sequence[str] | None = None,
    min_length: int | None = None,
    max_length: int | None = None,
    cache: str | os.PathLike | None = None,
    config: str | None = None,
    part: str | None = None,
) -> datasets.Dataset:
    """Returns the rows of a source as a memory-mapped data set.

    Files are converted once, a few MB at a time, into Arrow files in `cache`, and again when they
    change. Cells of text formats stay strings, "NA" and "" too; encodings make numbers of them.
    Beside its own columns a data set has the place of each row, for messages: `__file__`,
    `__line__`.

    Args:
        source: a path, several with the same columns, or a name on the Hugging Face hub
            ("jxie/higgs"). Gzipped files are unpacked on the way.
        format: one of FORMATS. Default: by the extension; a folder holds pictures; a name with one
            "/" that is no file is a hub name.
        columns: names of columns, for CSV and TSV without a header line, or instead of the names
            that text ("text"), FASTA ("sequence", "header") and .smi ("smiles", "name") give.
        inputs: column(s) that must be there.
        labels: column(s) that must be there.
        min_length: rows whose `inputs` column is shorter are left out, in UTF-8 bytes.
        max_length: rows whose `inputs` column is longer are left out, in UTF-8 bytes.
        cache: folder of converted files; as much disk as the source unpacked. Default: "sma_fast"
            in the cache of Hugging Face datasets. Files of sources that changed are not deleted.
        config: configuration of a hub name.
        part: the only split of a hub name to read. Default: all, told apart by column "split".

    Returns:
        datasets.Dataset. Pictures have columns "image", "label" (the folder's name, where there
        are several folders) and "split" (where the outer folders are train, test, ...); .npy has
        "values"; .npz has its arrays, rows of more than one value as flat lists.

    Raises:
        DataError: naming the file, and the line or row where there is one.
    """
    folder = cache_folder(cache)
    paths = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not paths:
        raise DataError("source: got no path, allowed is at least 1")
    kinds = [_format_of(path, format) for path in paths]
    if columns is not None:
        text.check_names(list(columns), "columns")
    if "hub" in kinds:
        if len(paths) > 1:
            raise DataError(f"source: got {len(paths)} names, allowed is 1 where it is on the hub")
        dataset = open_hub(str(paths[0]), config, part, folder)
    else:
        files = [Path(path).expanduser().absolute() for path in paths]
        dataset = _converted(files, kinds, columns, folder)
    named = [[n] if isinstance(n, str) else list(n or ()) for n in (inputs, labels)]
    check_columns(named[0] + named[1], dataset.column_names, source_of(dataset))
    if min_length is not None or max_length is not None:
        dataset = _of_length(dataset, named[0], min_length or 0, max_length)
    return dataset


def brings_splits(source: Source, format: str | None, dataset: datasets.Dataset) -> bool:
    """Returns whether a source comes cut into splits: one of the hub, or folders of pictures.

    Args:
        source, format: as for `load`.
        dataset: what it returned.
    """
    paths = [source] if isinstance(source, str | os.PathLike) else list(source)
    kinds = {_format_of(path, format) for path in paths}
    return kinds <= {"hub", "pictures"} and "split" in dataset.column_names


def select(dataset: datasets.Dataset, rows: np.ndarray) -> datasets.Dataset:
    """Returns some rows of a data set, without copying them.

    Args:
        dataset: to choose from.
        rows: (n,) int64 indices in ascending order.

    Returns:
        Data set of n rows.
    """
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return dataset.select(range(int(rows[0]), int(rows[-1]) + 1))
    return dataset.select(rows)


def _format_of(path: str | os.PathLike, format: str | None) -> str:
    if format is not None and format not in FORMATS:
        raise DataError(f"format: got {format!r}, allowed is one of {', '.join(FORMATS)}")
    if format == "hub":
        return format
    local = Path(path).expanduser()
    suffixes = local.suffixes[:-1] if local.suffix.lower() == ".gz" else local.suffixes
    suffix = suffixes[-1].lower() if suffixes else ""
    by_suffix = next((name for name, known in EXTENSIONS.items() if suffix in known), None)
    if not local.exists():
        if format is None and by_suffix is None and _HUB_NAME.fullmatch(str(path)):
            return "hub"
        raise DataError(
            f"{local}: got no such file or folder, allowed is one that exists, or a hub name such "
            "as jxie/higgs"
        )
    found = format or ("pictures" if local.is_dir() else by_suffix)
    if found is None:
        known = " ".join(suffix for suffixes in EXTENSIONS.values() for suffix in suffixes)
        raise DataError(
            f"{local}: got unknown extension {suffix!r}, allowed is one of {known} (with or "
            f"without .gz), or format= one of {', '.join(FORMATS)}"
        )
    if local.is_dir() and found != "pictures":
        raise DataError(f"{local}: got a folder, allowed is a file for format {found!r}")
    return found


def _converted(
    files: Sequence[Path], kinds: Sequence[str], columns: Sequence[str] | None, folder: Path
) -> datasets.Dataset:
    readers, places, key = [], [], [list(columns) if columns is not None else None]
    for path, kind in zip(files, kinds, strict=True):
        reader, unit = _reader(path, kind, columns, folder)
        readers.append(reader)
        places.append(f"{path}, {unit}")
        state = path.stat()
        key.append([str(path), kind, state.st_size, state.st_mtime_ns])
        if path.is_dir():
            key.append(picture_files.list_folder(path))
    if len(set(places)) < len(places):
        raise DataError(f"source: got {', '.join(map(str, files))}, allowed is each file once")
    try:
        return stored(_tables(files, kinds, readers), places, key, folder)
    except OSError as error:
        named = error.filename or ", ".join(map(str, files))
        raise DataError(f"{named}: cannot be read ({error.strerror or error})") from error


def _reader(
    path: Path, kind: str, columns: Sequence[str] | None, folder: Path
) -> tuple[Callable[[], Iterator[pa.Table]], str]:
    if kind in _TEXT:
        read, unit = _TEXT[kind]
        return partial(read, path, columns), unit
    if columns is not None:
        raise DataError(f"{path}: got columns={list(columns)!r}, allowed is None for {kind}")
    if kind in _BINARY:
        return partial(_BINARY[kind], path, folder), "row"
    if path.is_dir():
        return partial(picture_files.read_folder, path), "picture"
    return partial(picture_files.read_zip, path), "picture"


def _tables(files, kinds, readers) -> Iterator[tuple[int, pa.Table]]:
    for place, (path, kind, read) in enumerate(zip(files, kinds, readers, strict=True)):
        rows = 0
        for table in read():
            rows += len(table)
            yield place, table
        if not rows:
            what = "pictures" if kind == "pictures" else "rows"
            why = "empty, or a header only"
            if path.is_dir():
                archive = next(iter(sorted(path.glob("*.zip"))), None)
                why = "the folder holds none" + (
                    f", but {archive.name}: name that" if archive else ""
                )
            raise DataError(
                f"{path}: got no {what} ({why}), allowed is at least 1 of {kind}; give another "
                "one, or the format (--format) if it holds something else"
            )


def _of_length(
    dataset: datasets.Dataset, inputs: Sequence[str], least: int, most: int | None
) -> datasets.Dataset:
    source = source_of(dataset)
    if len(inputs) != 1:
        raise DataError(
            f"inputs: got {list(inputs)}, allowed is one column where min_length or max_length "
            "is given: name it, such as smiles, sequence or text"
        )
    most = np.inf if most is None else most
    kept, begin = [], 0
    for rows in batches(dataset, inputs, text.ROWS):
        column = rows.column(inputs[0])
        if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
            raise DataError(
                f"{source}: got column {inputs[0]!r} of {column.type}, allowed is text where "
                "min_length or max_length is given"
            )
        lengths = pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False)
        kept.append(begin + np.flatnonzero((lengths >= least) & (lengths <= most)))
        begin += len(rows)
    chosen = np.concatenate(kept)
    if not len(chosen):
        raise DataError(
            f"{source}: got no row with {least} to {most} bytes in column {inputs[0]!r}; "
            "change min_length or max_length"
        )
    return select(dataset, chosen)


__all__ = ["EXTENSIONS", "FILE", "FORMATS", "LINE", "Source", "load", "select"]
