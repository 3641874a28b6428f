"""Cuts a data set into parts such as train, valid and test."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.load import Source, load, select
from sma_fast.training.data.rows import batches, source_of
from sma_fast.training.data.text import ROWS

PARTS = ("train", "valid", "test")
MOST = 1000  # different values of a column that tells splits


class ByColumn:
    """Parts by the values of a column; rows with other values are left out.

    Args:
        column: its name, such as "scaffold_split".
        parts: value or values of each part. Default: train, valid and test by these names.
    """

    def __init__(
        self, column: str = "split", parts: Mapping[str, str | Sequence[str]] | None = None
    ) -> None:
        parts = {name: name for name in PARTS} if parts is None else dict(parts)
        self.column = column
        self.parts = {n: [v] if isinstance(v, str) else list(v) for n, v in parts.items()}
        values = [value for chosen in self.parts.values() for value in chosen]
        if not values or len(set(values)) < len(values):
            raise DataError(f"parts: got {parts}, allowed are values that are in one part each")

    def apply(self, dataset: datasets.Dataset) -> dict[str, datasets.Dataset]:
        """Returns the parts.

        Args:
            dataset: as `load` returns it.

        Returns:
            Part by name, rows in the order they had.

        Raises:
            DataError: where no row has a value; lists the values there are.
        """
        found: dict[str, list[np.ndarray]] = {}
        begin = 0
        for rows in batches(dataset, [self.column], ROWS):
            column = rows.column(self.column)
            feature = rows.features.get(self.column)
            for value in column.unique():
                hits = pc.equal(column, value) if value.is_valid else pc.is_null(column)
                name = value.as_py()
                if isinstance(feature, datasets.ClassLabel) and name is not None:
                    name = feature.names[name]
                chosen = np.flatnonzero(hits.to_numpy(zero_copy_only=False))
                found.setdefault(str(name), []).append(begin + chosen)
            begin += len(rows)
            if len(found) > MOST:
                raise DataError(
                    f"{source_of(dataset)}, column {self.column!r}: got more than {MOST} different "
                    "values, allowed is the name of a split in each row; choose another column"
                )
        result = {}
        for part, values in self.parts.items():
            for value in values:
                if value not in found:
                    raise DataError(
                        f"{source_of(dataset)}, column {self.column!r}: got split {value!r} for "
                        f"part {part!r}, allowed is one of {', '.join(sorted(found)[:20])}"
                    )
            chosen = np.sort(np.concatenate([a for value in values for a in found[value]]))
            result[part] = select(dataset, chosen)
        return result

    def state(self) -> dict[str, Any]:
        """Returns the arguments as JSON, for `from_state`."""
        return {"kind": "ByColumn", "column": self.column, "parts": self.parts}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ByColumn":
        """Returns the split that gave `state`."""
        return cls(state["column"], state["parts"])


class ByIndex:
    """Parts of one pool by a seeded permutation of its rows.

    Parts are cut from the permutation in the order given, so the first ones stay the same
    whatever is asked of the later ones: with test first, trains of 1,000 and 10,000 rows share
    test, and the small one lies in the large one.

    Args:
        sizes: of each part: rows (int), a share of the pool (float in (0, 1], rounded down), or
            None for all that is left, at most once and last. Shares that add up to 1 leave no
            row out: the last one takes the rest.
        seed: of the permutation.
        rows: of the pool, where a state is restored.
        digest: of the indices, where a state is restored.
    """

    def __init__(
        self,
        sizes: Mapping[str, int | float | None],
        seed: int = 0,
        *,
        rows: int | None = None,
        digest: str | None = None,
    ) -> None:
        self.sizes, self.seed, self.rows, self.digest = dict(sizes), seed, rows, digest
        for number, (part, size) in enumerate(self.sizes.items(), start=1):
            whole = isinstance(size, int) and not isinstance(size, bool) and size > 0
            share = isinstance(size, float) and 0 < size <= 1
            rest = size is None and number == len(self.sizes)
            if not (whole or share or rest):
                raise DataError(
                    f"sizes: got {size!r} for part {part!r}, allowed is a number of rows from 1, "
                    "a share in (0, 1], or None for the rest in the last part"
                )
        if not self.sizes:
            raise DataError("sizes: got no part, allowed is at least 1")

    def indices(self, rows: int, source: str = "pool") -> dict[str, np.ndarray]:
        """Returns the row numbers of each part.

        Args:
            rows: of the pool.
            source: its name, for messages.

        Returns:
            (n,) int64 by part, ascending, 0-based.

        Raises:
            DataError: where the pool is too small, or not the one of a restored state.
        """
        if self.rows not in (None, rows):
            raise DataError(
                f"{source}: got {rows} rows, allowed is {self.rows} as when the split was made; "
                "give the same data, or split anew"
            )
        # RandomState, because numpy promises the same permutation in every version of it
        order = np.random.RandomState(self.seed).permutation(rows).astype(np.int64)
        sizes = dict(self.sizes)
        if all(isinstance(size, float) for size in sizes.values()):
            if abs(sum(sizes.values()) - 1) < 1e-9:  # shares of all: nothing is left over
                sizes[list(sizes)[-1]] = None
        result, begin = {}, 0
        for part, size in sizes.items():
            if size is None:
                count = rows - begin
            else:
                count = math.floor(size * rows + 1e-9) if isinstance(size, float) else size
            if not 0 < count <= rows - begin:
                raise DataError(
                    f"{source}: got {count} rows for part {part!r}, allowed is 1 to "
                    f"{rows - begin} that are left of {rows}; make the parts smaller"
                )
            result[part] = np.sort(order[begin : begin + count])
            begin += count
        digest = hashlib.sha256(b"".join(i.astype("<i8").tobytes() for i in result.values()))
        if self.digest not in (None, digest.hexdigest()):
            raise DataError(f"{source}: the stored split cannot be made again; split anew")
        self.rows, self.digest = rows, digest.hexdigest()
        return result

    def apply(self, dataset: datasets.Dataset) -> dict[str, datasets.Dataset]:
        """Returns the parts; from then on `state` knows the pool's size and the indices' digest.

        Args:
            dataset: as `load` returns it.

        Returns:
            Part by name, rows in the order they had.

        Raises:
            DataError: as `indices`.
        """
        chosen = self.indices(len(dataset), source_of(dataset) or "pool")
        return {part: select(dataset, rows) for part, rows in chosen.items()}

    def state(self) -> dict[str, Any]:
        """Returns the arguments as JSON, for `from_state`."""
        return {
            "kind": "ByIndex",
            "sizes": [[part, size] for part, size in self.sizes.items()],
            "seed": self.seed,
            "rows": self.rows,
            "digest": self.digest,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ByIndex":
        """Returns the split that gave `state`; other data than then are refused."""
        sizes = {part: size for part, size in state["sizes"]}
        return cls(sizes, state["seed"], rows=state["rows"], digest=state["digest"])


def load_splits(
    source: Source | Mapping[str, Source],
    split: ByColumn | ByIndex | None = None,
    *,
    cache: str | os.PathLike | None = None,
    **options: Any,
) -> dict[str, datasets.Dataset]:
    """Returns the parts of a source.

    Args:
        source: as for `load`; or one for each part, as a dict.
        split: how to cut one source; None where each part has its own.
        cache: as for `load`.
        **options: as for `load`, the same for every part.

    Returns:
        Data set by part.

    Raises:
        DataError: as `load` and the split.
    """
    if isinstance(source, Mapping):
        if split is not None or not source:
            raise DataError(
                f"split: got {type(split).__name__} and {len(source)} sources, allowed is None and "
                "at least 1 source where each part has its own"
            )
        return {part: load(one, cache=cache, **options) for part, one in source.items()}
    if split is None:
        raise DataError(
            "split: got None, allowed is ByColumn, ByIndex, or a dict with a source for each part"
        )
    return split.apply(load(source, cache=cache, **options))
