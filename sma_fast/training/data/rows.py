"""Rows of a data set as Arrow columns that know the file and the line they came from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa

from sma_fast.training.data.errors import DataError

# every data set that `load` opens has these two columns beside its own
FILE = "__file__"  # ClassLabel; its names are places such as "/data/a.csv, line"
LINE = "__line__"  # the line or row in that place, 1-based


class Rows:
    """Some rows of a data set.

    Args:
        table: their columns.
        features: of the data set, for the names of files and classes.
    """

    def __init__(self, table: pa.Table, features: Mapping[str, Any] | None = None) -> None:
        self.table = table
        self.features = features or {}

    @classmethod
    def of(cls, batch: "Rows | pa.Table | Mapping[str, Sequence]") -> "Rows":
        """Returns `batch` as Rows.

        Args:
            batch: Rows, an Arrow table, or columns as a dict of lists.

        Returns:
            Rows.
        """
        if isinstance(batch, Rows):
            return batch
        return cls(batch if isinstance(batch, pa.Table) else pa.table(dict(batch)))

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> pa.Array:
        """Returns one column in one piece.

        Args:
            name: of the column.

        Returns:
            Array of len(self) values.

        Raises:
            DataError: where there is no such column; lists those there are.
        """
        check_columns([name], self.table.column_names, self.source())
        found = self.table.column(name).combine_chunks()
        if isinstance(found, pa.ChunkedArray):  # no chunk at all, or more than one array can hold
            found = pa.concat_arrays(found.chunks) if found.num_chunks else pa.array([], found.type)
        return found.dictionary_decode() if pa.types.is_dictionary(found.type) else found

    def place(self, row: int) -> str:
        """Returns where a row came from, such as "/data/a.csv, line 7".

        Args:
            row: in [0, len(self)).

        Returns:
            Text for a message.
        """
        if FILE not in self.table.column_names or FILE not in self.features:
            return f"row {row + 1} of the batch"
        file = self.table.column(FILE)[row].as_py()
        return f"{self.features[FILE].names[file]} {self.table.column(LINE)[row].as_py()}"

    def source(self) -> str:
        """Returns the file of the first row, for messages about all of them."""
        return self.place(0).rpartition(", ")[0] if len(self) else ""


def batches(dataset: datasets.Dataset, columns: Sequence[str], size: int = 4096) -> Iterator[Rows]:
    """Returns all rows of a data set, in order, without holding them.

    Args:
        dataset: as `load` returns it.
        columns: those to read, beside the place of a row.
        size: rows of a batch.

    Returns:
        Iterator of Rows.

    Raises:
        DataError: where a column is not there; lists those there are.
    """
    for table in arrow(dataset, columns).iter(batch_size=size):
        yield Rows(table, dataset.features)


def arrow(dataset: datasets.Dataset, columns: Sequence[str]) -> datasets.Dataset:
    """Returns the data set with `columns` and places only, giving Arrow tables.

    Args:
        dataset: as `load` returns it.
        columns: those to keep.

    Returns:
        Data set of the same rows.

    Raises:
        DataError: where a column is not there; lists those there are.
    """
    check_columns(columns, dataset.column_names, source_of(dataset))
    places = [name for name in (FILE, LINE) if name in dataset.column_names]
    wanted = [name for name in dict.fromkeys(columns) if name not in places] + places
    return dataset.select_columns(wanted).with_format("arrow")


def check_columns(wanted: Sequence[str], there: Sequence[str], source: str) -> None:
    """Raises DataError unless all `wanted` columns are there.

    Args:
        wanted: names asked for.
        there: names of the data set.
        source: the file, for the message.

    Raises:
        DataError: naming the first that is missing, and those there are.
    """
    for name in wanted:
        if name not in there:
            shown = ", ".join(repr(n) for n in there if n not in (FILE, LINE))
            raise DataError(
                f"{source + ': ' if source else ''}got column {name!r}, allowed is one of those "
                f"there are: {shown}"
            )


def source_of(dataset: datasets.Dataset) -> str:
    """Returns the files of a data set, for messages about all of it.

    Args:
        dataset: as `load` returns it.

    Returns:
        The first file and how many more there are, or "" where that is not known.
    """
    if FILE not in dataset.column_names:
        return ""
    names = [name.rpartition(", ")[0] for name in dataset.features[FILE].names]
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
