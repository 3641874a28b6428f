"""Arrow files on disk that data sets are memory-mapped from."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.rows import FILE

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OLD = 24 * 3600  # seconds, after which nobody writes to an unfinished file
VERSION = 1  # of what is written; another one is written anew


def cache_folder(cache: str | os.PathLike | None) -> Path:
    """Returns the folder of converted files, made where it is missing.

    Args:
        cache: the folder. Default: "sma_fast" in the cache of Hugging Face datasets.

    Returns:
        Path.

    Raises:
        DataError: where it cannot be made.
    """
    folder = Path(cache or Path(datasets.config.HF_DATASETS_CACHE) / "sma_fast").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_place(folder, error) from error
    for left in folder.glob("*.part"):  # by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _OLD:
                left.unlink()
    return folder


def stored(
    tables: Iterator[tuple[int, pa.Table]], places: Sequence[str], key: Any, cache: Path
) -> datasets.Dataset:
    """Returns rows as a memory-mapped data set, written to `cache` where they are not yet there.

    A file appears under its name when it is complete, never before; two processes may write it at
    the same time.

    Args:
        tables: (index into `places`, some rows), at least one; read only where the file is not
            there.
        places: what stands before a line in messages, such as "/data/a.csv, line".
        key: JSON-able; what the file depends on.
        cache: folder.

    Returns:
        Data set with the column that names the place.

    Raises:
        DataError: where the folder is full or cannot be written to, or tables do not have the same
            columns.
        OSError: where a source cannot be read.
    """
    text = json.dumps([VERSION, list(places), key], sort_keys=True, default=str)
    target = cache / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.arrow"
    if not target.exists():
        try:
            descriptor, temporary = tempfile.mkstemp(dir=cache, suffix=".part")
        except OSError as error:
            raise _no_place(cache, error) from error
        try:
            with os.fdopen(descriptor, "wb") as sink:
                _write(tables, places, sink)
            os.replace(temporary, target)
        except BaseException as error:
            os.unlink(temporary)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise _no_place(cache, error) from error
            raise
    return datasets.Dataset.from_file(str(target))


def _write(tables: Iterator[tuple[int, pa.Table]], places: Sequence[str], sink: BinaryIO) -> None:
    writer = schema = None
    for place, table in tables:
        where = pa.array(np.full(len(table), place, np.int64))
        table = table.append_column(FILE, where)
        if writer is None:
            features = _features(table.schema, places[place])
            features[FILE] = datasets.ClassLabel(names=list(places))
            if "image" in features and features["image"] == dict(_PICTURE):
                features["image"] = datasets.Image()
            schema = features.arrow_schema
            writer = pa.ipc.new_stream(sink, schema)
        writer.write_table(_same_columns(table, schema, places[place]), max_chunksize=len(table))
    writer.close()
    sink.flush()


_PICTURE = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def _features(schema: pa.Schema, place: str) -> datasets.Features:
    try:
        return datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise DataError(
            f"{place.rpartition(', ')[0]}: got a column of a type that cannot be used ({error}); "
            "leave it out"
        ) from error


def _same_columns(table: pa.Table, schema: pa.Schema, place: str) -> pa.Table:
    if set(table.column_names) != set(schema.names):
        raise DataError(
            f"{place.rpartition(', ')[0]}: got columns {_shown(table.schema)}, allowed is "
            f"{_shown(schema)} as in the files before; open it on its own"
        )
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{place.rpartition(', ')[0]}: got other types of columns than before ({error}); "
            "open it on its own"
        ) from error


def _shown(schema: pa.Schema) -> str:
    return ", ".join(name for name in schema.names if not name.startswith("__"))


def _no_place(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"{folder}: cannot write converted data there ({error.strerror or error}); free some space "
        "or give another folder as cache"
    )
