"""Columns as tokens: for tables of numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.numbers import Moments, floats
from sma_fast.training.data.rows import FILE, LINE, Rows, batches


class TableColumns:
    """Encodes each column of a table as a token of one channel, standardised.

    Args:
        columns: names of columns of numbers, or of lists of numbers, which give one token each.
        names: of the N tokens.
        mean: (N,) what is subtracted.
        std: (N,) what is divided by, after that.
    """

    input_type = "continuous"
    channels = 1

    def __init__(
        self,
        columns: Sequence[str],
        names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.columns, self.names = list(columns), list(names)
        self.mean, self.std = np.asarray(mean, np.float64), np.asarray(std, np.float64)

    @classmethod
    def fit(
        cls,
        dataset: datasets.Dataset,
        columns: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> "TableColumns":
        """Returns the encoding with mean and standard deviation of a data set, in one pass.

        Args:
            dataset: the train part only.
            columns: those to use. Default: all but `exclude`.
            exclude: columns that are no inputs, such as labels and splits.

        Returns:
            TableColumns; a constant column is divided by 1.

        Raises:
            DataError: for a cell that is missing or no finite number.
        """
        if columns is None:
            left_out = {FILE, LINE, *exclude}
            columns = [name for name in dataset.column_names if name not in left_out]
        if not columns:
            raise DataError(f"columns: got none, allowed are some of {dataset.column_names}")
        moments, widths = Moments(), []
        for rows in batches(dataset, columns):
            parts = [floats(rows, name) for name in columns]
            now = [part.shape[1] for part in parts]
            _check_width(rows, sum(now), sum(widths or now))
            widths = now
            moments.add(np.concatenate(parts, axis=1))
        names = []
        for name, width in zip(columns, widths, strict=True):
            names += [name] if width == 1 else [f"{name}[{index}]" for index in range(width)]
        return cls(columns, names, *moments.result())

    @property
    def max_length(self) -> int:
        """N, the number of tokens of every row."""
        return len(self.names)

    def encode(self, batch: Rows | pa.Table | Mapping[str, Sequence]) -> dict[str, np.ndarray]:
        """Returns standardised values.

        Args:
            batch: B rows.

        Returns:
            {"inputs": (B, N, 1) float32}.

        Raises:
            DataError: for a cell that is missing or no finite number.
        """
        rows = Rows.of(batch)
        values = np.concatenate([floats(rows, name) for name in self.columns], axis=1)
        if len(rows):
            _check_width(rows, values.shape[1], len(self.names))
        values = (values.reshape(len(rows), -1) - self.mean) / self.std
        return {"inputs": values.astype(np.float32)[:, :, None]}

    def state(self) -> dict[str, Any]:
        """Returns columns, mean and standard deviation as JSON, for `from_state`."""
        return {
            "kind": "TableColumns",
            "columns": self.columns,
            "names": self.names,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TableColumns":
        """Returns the encoding that gave `state`."""
        return cls(state["columns"], state["names"], state["mean"], state["std"])


def _check_width(rows: Rows, found: int, expected: int) -> None:
    if found != expected:
        raise DataError(
            f"{rows.place(0)}: got {found} values, allowed is {expected} as in the train rows; "
            "give lists of the same length in all rows"
        )
