"""Bytes as tokens: for proteins, molecules and language."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.rows import Rows, batches

PAD, BOS, EOS, MASK, CLS, SEP = range(6)  # none but PAD is ever added here
SPECIAL = 6
VOCABULARY = SPECIAL + 256
TOO_LONG = ("error", "truncate")
_TEXT = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
)


class ByteSequences:
    """Encodes text as the ids of its UTF-8 bytes: byte b is id b + 6.

    Ids 0 to 5 are padding, bos, eos, mask, cls and sep; only padding is used, by the collator.

    Args:
        column: with the text.
        max_length: bytes that the model takes, at least 1.
        too_long: "error" refuses longer texts, "truncate" keeps their first `max_length` bytes.
        alphabet: the only characters allowed, each of one byte. Default: all bytes.
    """

    vocabulary = VOCABULARY
    input_type = "discrete"

    def __init__(
        self, column: str, max_length: int, too_long: str = "error", alphabet: str | None = None
    ) -> None:
        if too_long not in TOO_LONG:
            raise DataError(f"too_long: got {too_long!r}, allowed is {', '.join(TOO_LONG)}")
        if max_length < 1:
            raise DataError(f"max_length: got {max_length}, allowed is at least 1")
        if alphabet is not None and (not alphabet or not alphabet.isascii()):
            raise DataError(f"alphabet: got {alphabet!r}, allowed are ASCII characters")
        self.column, self.max_length, self.too_long = column, max_length, too_long
        self.alphabet = None if alphabet is None else "".join(sorted(set(alphabet)))

    @property
    def columns(self) -> list[str]:
        """Names of the columns that `encode` reads."""
        return [self.column]

    def encode(self, batch: Rows | pa.Table | Mapping[str, Sequence]) -> dict[str, list]:
        """Returns token ids.

        Args:
            batch: B rows.

        Returns:
            {"inputs": B arrays of (length,) int64}.

        Raises:
            DataError: for text that is missing, empty or too long, or a byte out of the alphabet.
        """
        rows = Rows.of(batch)
        data, lengths = self._bytes(rows)
        self._check_lengths(rows, lengths)
        starts = np.cumsum(lengths) - lengths
        if lengths.max(initial=0) > self.max_length:
            inside = np.arange(len(data)) - np.repeat(starts, lengths)
            data = data[inside < self.max_length]
            lengths = np.minimum(lengths, self.max_length)
            starts = np.cumsum(lengths) - lengths
        self._check_alphabet(rows, data, starts)
        ids = data.astype(np.int64) + SPECIAL
        return {"inputs": np.split(ids, starts[1:]) if len(rows) else []}

    def _bytes(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        array = rows.column(self.column)
        if any(test(array.type) for test in _TEXT):
            array = array.cast(pa.large_binary())
        else:
            raise DataError(
                f"{rows.source() or 'batch'}: got column {self.column!r} of {array.type}, allowed "
                "is text; choose another column"
            )
        if array.null_count:
            raise self._refused(rows, array.is_null().index(True).as_py(), "no text")
        _, offsets, data = array.buffers()
        bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        if not len(array) or data is None:
            return np.zeros(0, np.uint8), np.zeros(len(array), np.int64)
        return np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]], np.diff(bounds)

    def _check_lengths(self, rows: Rows, lengths: np.ndarray) -> None:
        empty = np.flatnonzero(lengths == 0)
        if len(empty):
            raise self._refused(rows, int(empty[0]), "an empty text")
        long = np.flatnonzero(lengths > self.max_length)
        if len(long) and self.too_long == "error":
            raise DataError(
                f"{rows.place(int(long[0]))}, column {self.column!r}: got {lengths[long[0]]} "
                f"bytes, allowed is at most {self.max_length}; raise max_length and the model's "
                'length, leave long rows out (max_length of load), or choose too_long="truncate"'
            )

    def _refused(self, rows: Rows, row: int, what: str) -> DataError:
        return DataError(
            f"{rows.place(row)}, column {self.column!r}: got {what}, allowed is at least 1 byte; "
            "fill the cell or leave the row out"
        )

    def _check_alphabet(self, rows: Rows, data: np.ndarray, starts: np.ndarray) -> None:
        if self.alphabet is None:
            return
        known = np.zeros(256, bool)
        known[np.frombuffer(self.alphabet.encode(), np.uint8)] = True
        unknown = np.flatnonzero(~known[data])
        if len(unknown):
            row = int(np.searchsorted(starts, unknown[0], side="right")) - 1
            byte = int(data[unknown[0]])
            raise DataError(
                f"{rows.place(row)}, column {self.column!r}: got byte 0x{byte:02x} "
                f"({chr(byte)!r}) at position {unknown[0] - starts[row] + 1}, allowed is one of "
                f"{self.alphabet}; mend the text, or add it to alphabet"
            )

    def decode(self, ids: Sequence[int]) -> bytes:
        """Returns the bytes of token ids; special tokens are left out.

        Args:
            ids: (length,) in [0, 262).

        Returns:
            Bytes.
        """
        return bytes(int(i) - SPECIAL for i in ids if i >= SPECIAL)

    def state(self) -> dict[str, Any]:
        """Returns the arguments as JSON, for `from_state`."""
        return {
            "kind": "ByteSequences",
            "column": self.column,
            "max_length": self.max_length,
            "too_long": self.too_long,
            "alphabet": self.alphabet,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ByteSequences":
        """Returns the encoding that gave `state`."""
        return cls(state["column"], state["max_length"], state["too_long"], state["alphabet"])

    @classmethod
    def fit(cls, dataset: datasets.Dataset, column: str, **options: Any) -> "ByteSequences":
        """Returns the encoding with `max_length` of the longest text, unless it is given.

        Args:
            dataset: as `load` returns it.
            column: with the text.
            **options: as for the class.

        Returns:
            ByteSequences.
        """
        if "max_length" not in options:
            options["max_length"] = longest(dataset, column)
        return cls(column, **options)


def longest(dataset: datasets.Dataset, column: str) -> int:
    """Returns the number of UTF-8 bytes of the longest text, at least 1.

    Args:
        dataset: as `load` returns it.
        column: with the text.

    Returns:
        Bytes.
    """
    probe = ByteSequences(column, 1)
    lengths = (probe._bytes(rows)[1].max() for rows in batches(dataset, [column]))
    return max(1, int(max(lengths, default=1)))
