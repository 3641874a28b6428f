"""Columns as floating point numbers, and their mean and standard deviation in one pass."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.rows import Rows

_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
_LISTS = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)


def is_list(kind: pa.DataType) -> bool:
    """Returns whether values of an Arrow type are lists."""
    return any(test(kind) for test in _LISTS)


def floats(rows: Rows, name: str, *, allow_missing: bool = False) -> np.ndarray:
    """Returns a column as numbers.

    Args:
        rows: B rows.
        name: of a column of numbers, of text that holds numbers, or of lists of either.
        allow_missing: whether null, "" and NaN are allowed; they become NaN.

    Returns:
        (B, W) float64, W = 1 unless the column holds lists.

    Raises:
        DataError: for a cell that is missing, infinite, no number, or a list of another length.
    """
    array = rows.column(name)
    width = None
    if is_list(array.type):
        array, width = _flat(rows, name, array)
    values = _cast(rows, name, array, width)
    bad = np.isinf(values) if allow_missing else ~np.isfinite(values)
    if bad.any():
        raise _refused(rows, name, array, width, int(np.flatnonzero(bad)[0]), allow_missing)
    return values.reshape(len(rows), width or 1)


def _flat(rows: Rows, name: str, array: pa.Array) -> tuple[pa.Array, int]:
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    width = int(lengths[0]) if len(lengths) else 0
    wrong = np.flatnonzero((lengths != width) | (lengths == 0))
    if len(wrong):
        raise DataError(
            f"{rows.place(int(wrong[0]))}, column {name!r}: got {lengths[wrong[0]]} values, "
            f"allowed is the same number in all rows, at least 1 (here {width}); mend the row"
        )
    return array.flatten(), width


def _cast(rows: Rows, name: str, array: pa.Array, width: int | None) -> np.ndarray:
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = pc.utf8_trim_whitespace(array)
        array = pc.if_else(pc.equal(array, ""), pa.scalar(None, array.type), array)
        try:
            array = pc.cast(array, pa.float64())
        except pa.ArrowInvalid:
            array = pa.array([_number(text) for text in array.to_pylist()], pa.float64())
    elif pa.types.is_boolean(array.type):
        array = pc.cast(pc.cast(array, pa.int64()), pa.float64())
    elif any(test(array.type) for test in _NUMBERS):
        array = pc.cast(array, pa.float64(), safe=False)
    else:  # dates, for instance, which Arrow would count from 1970
        raise DataError(
            f"{rows.source() or 'batch'}: got column {name!r} of {array.type}, allowed are "
            "numbers; choose other columns"
        )
    return array.to_numpy(zero_copy_only=False)


def _number(text: str | None) -> float | None:
    # what Arrow does not read and Python does, such as "+1"; inf stands for what is no number
    if text is None:
        return None
    try:
        return math.inf if "_" in text else float(text)
    except ValueError:
        return math.inf


def _refused(
    rows: Rows, name: str, array: pa.Array, width: int | None, cell: int, allow_missing: bool
) -> DataError:
    row, inside = divmod(cell, width or 1)
    column = name if width is None else f"{name}[{inside}]"
    allowed = "a finite number, or nothing" if allow_missing else "a finite number"
    return DataError(
        f"{rows.place(row)}, column {column!r}: got {_shown(array[cell])}, allowed is {allowed}; "
        "mend the cell or leave the row out"
    )


def _shown(value: pa.Scalar) -> str:
    found = value.as_py()
    return "an empty cell" if found in (None, "") else repr(found)[:40]


class Moments:
    """Mean and standard deviation of columns, from batches, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._squares = 0.0

    def add(self, values: np.ndarray) -> None:
        """Takes one batch in.

        Args:
            values: (B, W) float64.
        """
        if not len(values):
            return
        mean = values.mean(axis=0)
        squares = ((values - mean) ** 2).sum(axis=0)
        total = self.count + len(values)
        step = mean - self._mean
        self._squares = self._squares + squares + step**2 * (self.count * len(values) / total)
        self._mean = self._mean + step * (len(values) / total)
        self.count = total

    def result(self) -> tuple[list[float], list[float]]:
        """Returns what to subtract and what to divide by.

        Returns:
            Mean and population standard deviation of each column; 1 instead of the deviation
            where a column is constant, up to rounding.
        """
        mean = np.atleast_1d(self._mean)
        std = np.atleast_1d(np.sqrt(self._squares / max(1, self.count)))
        constant = std <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
        return mean.tolist(), np.where(constant, 1.0, std).tolist()
