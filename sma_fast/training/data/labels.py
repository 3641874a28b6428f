"""What a model learns to say: a class, several yes or no, or numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.numbers import Moments, floats
from sma_fast.training.data.rows import Rows, batches, source_of


class ClassLabels:
    """One class a row.

    Args:
        column: with the class: text, whole numbers or booleans.
        names: of the classes; the place of a name is its id.
    """

    problem_type = "single_label_classification"

    def __init__(self, column: str, names: Sequence[str]) -> None:
        self.column, self.names = column, list(names)
        self._ids = {name: index for index, name in enumerate(self.names)}
        if len(self._ids) < len(self.names) or not self.names:
            raise DataError(f"names: got {self.names}, allowed are classes once each, at least 1")

    @classmethod
    def fit(cls, dataset: datasets.Dataset, column: str = "label") -> "ClassLabels":
        """Returns the classes of a data set, sorted, as numbers where all are numbers.

        Args:
            dataset: the train part only.
            column: with the class.

        Returns:
            ClassLabels.

        Raises:
            DataError: for a missing label.
        """
        feature = dataset.features.get(column)
        if isinstance(feature, datasets.ClassLabel):
            return cls(column, feature.names)
        found: set[str] = set()
        for rows in batches(dataset, [column]):
            found.update(_class_names(rows, column))
        if not found:
            raise DataError(f"{source_of(dataset)}: got no rows, allowed is at least 1")
        try:
            return cls(column, sorted(found, key=int))
        except ValueError:
            return cls(column, sorted(found))

    @property
    def columns(self) -> list[str]:
        """Names of the columns that `encode` reads."""
        return [self.column]

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.names)

    def encode(self, batch: Rows | pa.Table | Mapping[str, Sequence]) -> dict[str, np.ndarray]:
        """Returns ids of classes.

        Args:
            batch: B rows.

        Returns:
            {"labels": (B,) int64}.

        Raises:
            DataError: for a missing label, or a class that the train part does not have.
        """
        rows = Rows.of(batch)
        names = _class_names(rows, self.column)
        ids = np.fromiter((self._ids.get(name, -1) for name in names), np.int64, len(names))
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            row = int(unknown[0])
            raise DataError(
                f"{rows.place(row)}, column {self.column!r}: got class {names[row]!r}, allowed is "
                f"one of the train rows': {', '.join(self.names[:20])}; mend the label"
            )
        return {"labels": ids}

    def state(self) -> dict[str, Any]:
        """Returns the arguments as JSON, for `from_state`."""
        return {"kind": "ClassLabels", "column": self.column, "names": self.names}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ClassLabels":
        """Returns the labels that gave `state`."""
        return cls(state["column"], state["names"])


def _class_names(rows: Rows, column: str) -> list[str]:
    array = rows.column(column)
    values, feature = array.to_pylist(), rows.features.get(column)
    if isinstance(feature, datasets.ClassLabel):
        values = [None if v is None or v < 0 else feature.names[v] for v in values]
    names = []
    for row, value in enumerate(values):
        if isinstance(value, bool | int) or isinstance(value, float) and value.is_integer():
            value = str(int(value))
        if value is None or value != value or value == "":
            raise DataError(
                f"{rows.place(row)}, column {column!r}: got no label, allowed is the name of a "
                "class; fill the cell or leave the row out"
            )
        if not isinstance(value, str):
            raise DataError(
                f"{rows.place(row)}, column {column!r}: got {value!r}, allowed is the name or "
                "number of a class; choose another column, or regression"
            )
        names.append(value)
    return names


class MultiLabels:
    """Several answers of yes (1) or no (0) a row, some of which may be missing.

    A missing answer (an empty cell, null or NaN) is NaN in the labels, and a loss has to leave it
    out: `known = ~labels.isnan()`, then the mean over `known` of the loss against
    `labels.nan_to_num()`.

    Args:
        columns: one for each answer, or one of lists.
        num_labels: number of answers. Default: that of columns.
    """

    problem_type = "multi_label_classification"

    def __init__(self, columns: Sequence[str], num_labels: int | None = None) -> None:
        self.columns = [columns] if isinstance(columns, str) else list(columns)
        self.num_labels = num_labels or len(self.columns)

    @classmethod
    def fit(cls, dataset: datasets.Dataset, columns: Sequence[str]) -> "MultiLabels":
        """Returns the labels with the number of answers of a data set.

        Args:
            dataset: the train part; its first rows are read.
            columns: as for the class.

        Returns:
            MultiLabels.

        Raises:
            DataError: for a cell that is neither 0, 1 nor missing.
        """
        found = cls(columns)
        rows = next(batches(dataset, found.columns, 256), None)
        return cls(columns, None if rows is None else found._values(rows).shape[1])

    def encode(self, batch: Rows | pa.Table | Mapping[str, Sequence]) -> dict[str, np.ndarray]:
        """Returns answers.

        Args:
            batch: B rows.

        Returns:
            {"labels": (B, num_labels) float32 of 0, 1 and NaN}.

        Raises:
            DataError: for a cell that is neither 0, 1 nor missing.
        """
        rows = Rows.of(batch)
        values = self._values(rows)
        if len(rows) and values.shape[1] != self.num_labels:
            raise DataError(
                f"{rows.place(0)}: got {values.shape[1]} labels, allowed is {self.num_labels}"
            )
        return {"labels": values.astype(np.float32)}

    def _values(self, rows: Rows) -> np.ndarray:
        parts = []
        for name in self.columns:
            part = floats(rows, name, allow_missing=True)
            wrong = np.argwhere(~((part == 0) | (part == 1) | np.isnan(part)))
            if len(wrong):
                row, index = wrong[0]
                raise DataError(
                    f"{rows.place(int(row))}, column {name!r}: got {part[row, index]:g}, allowed "
                    "is 0, 1 or nothing; mend the cell"
                )
            parts.append(part)
        return np.concatenate(parts, axis=1)

    def state(self) -> dict[str, Any]:
        """Returns the arguments as JSON, for `from_state`."""
        return {"kind": "MultiLabels", "columns": self.columns, "num_labels": self.num_labels}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "MultiLabels":
        """Returns the labels that gave `state`."""
        return cls(state["columns"], state["num_labels"])


class Targets:
    """Numbers to predict, standardised.

    Args:
        columns: one for each number.
        mean: (L,) what is subtracted, in the units of the column.
        std: (L,) what is divided by, after that.
    """

    problem_type = "regression"

    def __init__(self, columns: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> None:
        self.columns = [columns] if isinstance(columns, str) else list(columns)
        self.mean, self.std = np.asarray(mean, np.float64), np.asarray(std, np.float64)

    @classmethod
    def fit(cls, dataset: datasets.Dataset, columns: str | Sequence[str] = "label") -> "Targets":
        """Returns the labels with mean and standard deviation of a data set, in one pass.

        Args:
            dataset: the train part only.
            columns: one for each number.

        Returns:
            Targets.

        Raises:
            DataError: for a label that is missing or no finite number.
        """
        names, moments = cls(columns, [0], [1]).columns, Moments()
        for rows in batches(dataset, names):
            moments.add(np.concatenate([floats(rows, name) for name in names], axis=1))
        if not moments.count:
            raise DataError(f"{source_of(dataset)}: got no rows, allowed is at least 1")
        return cls(names, *moments.result())

    @property
    def num_labels(self) -> int:
        """L, how many numbers are predicted."""
        return len(self.mean)

    def encode(self, batch: Rows | pa.Table | Mapping[str, Sequence]) -> dict[str, np.ndarray]:
        """Returns standardised numbers.

        Args:
            batch: B rows.

        Returns:
            {"labels": (B,) float32, or (B, L) where L > 1}.

        Raises:
            DataError: for a label that is missing or no finite number.
        """
        rows = Rows.of(batch)
        values = np.concatenate([floats(rows, name) for name in self.columns], axis=1)
        if len(rows) and values.shape[1] != self.num_labels:
            raise DataError(
                f"{rows.place(0)}: got {values.shape[1]} labels, allowed is {self.num_labels}"
            )
        values = ((values.reshape(len(rows), -1) - self.mean) / self.std).astype(np.float32)
        return {"labels": values[:, 0] if self.num_labels == 1 else values}

    def to_units(self, predictions: np.ndarray) -> np.ndarray:
        """Returns predictions, or encoded labels, in the units of the columns.

        Args:
            predictions: (B,), (B, 1) or (B, L) as the model gives them.

        Returns:
            float64 of the same shape.
        """
        values = np.asarray(predictions, np.float64)
        if values.ndim == 1 and self.num_labels == 1:
            return values * self.std[0] + self.mean[0]
        return values * self.std + self.mean

    def state(self) -> dict[str, Any]:
        """Returns columns, mean and standard deviation as JSON, for `from_state`."""
        return {
            "kind": "Targets",
            "columns": self.columns,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Targets":
        """Returns the labels that gave `state`."""
        return cls(state["columns"], state["mean"], state["std"])
