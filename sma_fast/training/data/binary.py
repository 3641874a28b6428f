"""Readers of NumPy and Parquet files: Arrow tables with row numbers, a few MB at a time."""

import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.lines import decompress
from sma_fast.training.data.rows import LINE
from sma_fast.training.data.text import BYTES, ROWS, check_names


def read_npy(path: Path, scratch: Path) -> Iterator[pa.Table]:
    """Returns the rows of a NumPy array as column "values".

    Args:
        path: .npy, memory-mapped; a gzipped one is unpacked into `scratch` first.
        scratch: folder for files that go when reading ends.

    Returns:
        Tables with row numbers. Rows of more than one value become lists, flattened.

    Raises:
        DataError: for a damaged file, or one that holds Python objects or no rows.
    """
    with _plain(path, scratch) as file:
        yield from _array_tables(path, {"values": _mapped(path, file)})


def read_npz(path: Path, scratch: Path) -> Iterator[pa.Table]:
    """Returns the arrays of a .npz file as columns with their names.

    Args:
        path: arrays with the same number of rows; unpacked into `scratch` and memory-mapped.
        scratch: folder for files that go when reading ends.

    Returns:
        Tables with row numbers. Rows of more than one value become lists, flattened.

    Raises:
        DataError: for a damaged file, or arrays with different numbers of rows.
    """
    with _plain(path, scratch) as file, tempfile.TemporaryDirectory(dir=scratch) as folder:
        arrays = {}
        try:
            with zipfile.ZipFile(file) as archive:
                for number, name in enumerate(archive.namelist()):
                    target = Path(folder, f"{number}.npy")
                    with archive.open(name) as packed, open(target, "wb") as unpacked:
                        while block := packed.read(1 << 20):
                            unpacked.write(block)
                    arrays[name.removesuffix(".npy")] = _mapped(path, target, f", array {name!r}")
        except (zipfile.BadZipFile, EOFError) as error:
            raise DataError(
                f"{path}: got no whole .npz file ({error}), allowed is what numpy.savez writes; "
                "copy or save it again"
            ) from error
        if arrays:
            check_names(list(arrays), str(path))
            yield from _array_tables(path, arrays)


def _mapped(path: Path, file: Path, what: str = "") -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"{path}{what}: got no array ({error}), allowed is what numpy.save writes from "
            "numbers or strings; save it again"
        ) from error
    if not isinstance(array, np.ndarray) or array.ndim == 0 or array.dtype.names:
        raise DataError(f"{path}{what}: got no rows, allowed is an array of at least 1 dimension")
    return array


def _array_tables(path: Path, arrays: Mapping[str, np.ndarray]) -> Iterator[pa.Table]:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise DataError(f"{path}: got arrays of {shown} rows, allowed is the same number in all")
    total = max(lengths.values())
    width = sum(array[:1].nbytes for array in arrays.values())
    step = max(1, min(ROWS, BYTES // max(1, width)))
    for begin in range(0, total, step):
        end = min(total, begin + step)
        columns = {name: _arrow(array[begin:end]) for name, array in arrays.items()}
        yield pa.table(columns | {LINE: pa.array(np.arange(begin + 1, end + 1))})


def _arrow(array: np.ndarray) -> pa.Array:
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    if array.ndim == 1:
        return pa.array(array)
    width = int(np.prod(array.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), width)


def read_parquet(path: Path, scratch: Path) -> Iterator[pa.Table]:
    """Returns the rows of a Parquet file, columns with the types they have there.

    Args:
        path: .parquet; a gzipped one is unpacked into `scratch` first.
        scratch: folder for files that go when reading ends.

    Returns:
        Tables with row numbers.

    Raises:
        DataError: for a damaged file.
    """
    with _plain(path, scratch) as file:
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                check_names(parquet.schema_arrow.names, str(path))
                row, size = (
                    1,
                    sum(
                        parquet.metadata.row_group(group).total_byte_size
                        for group in range(parquet.num_row_groups)
                    ),
                )
                rows = BYTES * parquet.metadata.num_rows // max(1, size)
                for batch in parquet.iter_batches(max(1, min(ROWS, rows))):
                    table = pa.table(batch).replace_schema_metadata()
                    yield _decoded(table).append_column(
                        LINE, pa.array(np.arange(row, row + len(batch)))
                    )
                    row += len(batch)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{path}: got no whole Parquet file ({error}); copy or write it again"
            ) from error


def _decoded(table: pa.Table) -> pa.Table:
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(
                index, field.name, table.column(index).cast(field.type.value_type)
            )
    return table


@contextmanager
def _plain(path: Path, scratch: Path) -> Iterator[Path]:
    # the file itself, or a decompressed copy of it
    with open(path, "rb") as stream:
        start = stream.read(2)
    if not start:
        raise DataError(f"{path}: the file is empty (0 bytes); write it again")
    if start != b"\x1f\x8b" and path.suffix.lower() != ".gz":
        yield path
        return
    with tempfile.NamedTemporaryFile(dir=scratch) as copy:
        decompress(path, copy)
        copy.flush()
        yield Path(copy.name)
