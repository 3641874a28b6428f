"""What the Trainer sees: a data set of encoded samples, and batches of them."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import numpy as np
import torch

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.rows import Rows, arrow


class Encoding(Protocol):
    """What inputs and labels have in common."""

    columns: list[str]

    def encode(self, batch: Rows) -> dict[str, Any]:
        """Returns arrays by name, one entry for each row."""

    def state(self) -> dict[str, Any]:
        """Returns all that is needed to encode the same way again, as JSON."""


class Examples(torch.utils.data.Dataset):
    """Samples of a data set, encoded when they are asked for.

    Args:
        dataset: as `load` or a split returns it.
        *encodings: of inputs, and of labels where there are any.

    Attributes:
        numbered: whether a sample has its own number, "index".
        checksum: CRC-32 of all encoded rows, None before `check`.

    Raises:
        DataError: where a column is not there; lists those there are.
    """

    def __init__(self, dataset: datasets.Dataset, *encodings: Encoding) -> None:
        columns = [name for encoding in encodings for name in encoding.columns]
        self._rows = arrow(dataset, columns)
        self._encodings = encodings
        self.numbered = False
        self.checksum: int | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns one sample: "inputs" (N,) or (N, channels), and "labels" where there are any."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Returns samples, read and encoded together; a DataLoader asks this way."""
        # in one piece at once: each row is a chunk, and column by column takes five times as long
        fields = self._encode(self._rows[list(indices)].combine_chunks())
        if self.numbered:
            fields["index"] = np.asarray(indices)
        return [{name: values[i] for name, values in fields.items()} for i in range(len(indices))]

    def check(self) -> int:
        """Encodes every row once, so that a bad one is found before training and not in it.

        Returns:
            The number of rows.

        Raises:
            DataError: for the first bad row.
        """
        number = checksum = 0
        for table in self._rows.iter(1024):
            fields = self._encode(table)
            number += len(fields["inputs"])
            for values in fields.values():
                if isinstance(values, list):  # rows of many lengths
                    lengths = np.array([len(row) for row in values])
                    checksum = zlib.crc32(lengths, checksum)
                    values = np.concatenate(values)
                checksum = zlib.crc32(np.ascontiguousarray(values), checksum)
        self.checksum = checksum
        return number

    def _encode(self, table) -> dict[str, Any]:
        rows = Rows(table, self._rows.features)
        fields: dict[str, Any] = {}
        for encoding in self._encodings:
            fields |= encoding.encode(rows)
        return fields


@dataclass(frozen=True)
class Collator:
    """Makes a batch of samples, shorter ones padded on the right with 0.

    Args:
        multiple: batches are padded to a multiple of it.
        always_mask: whether there is an attention mask where nothing was padded, too.
    """

    multiple: int = 1
    always_mask: bool = False

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise DataError(f"multiple: got {self.multiple}, allowed is at least 1")

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns a batch.

        Args:
            samples: B of them, "inputs" (n,) int64 or (n, channels) float32.

        Returns:
            "inputs" (B, N) int64 or (B, N, channels) float32; "attention_mask" (B, N) int64, 1 is
            valid, left out where no sample was padded; "labels" where the samples have them, of
            shape (B,) or (B, L); so "index" (B,) int64.
        """
        rows = [np.asarray(sample["inputs"]) for sample in samples]
        lengths = np.array([len(row) for row in rows])
        longest = -(-int(lengths.max()) // self.multiple) * self.multiple
        padded = bool((lengths < longest).any())
        if padded:
            inputs = np.zeros((len(rows), longest, *rows[0].shape[1:]), rows[0].dtype)
            for target, row in zip(inputs, rows, strict=True):
                target[: len(row)] = row
        else:
            inputs = np.stack(rows)
        batch = {"inputs": torch.from_numpy(inputs)}
        if padded or self.always_mask:
            valid = np.arange(longest) < lengths[:, None]
            batch["attention_mask"] = torch.from_numpy(valid.astype(np.int64))
        if "labels" in samples[0]:
            labels = np.stack([np.asarray(sample["labels"]) for sample in samples])
            batch["labels"] = torch.from_numpy(labels)
        if "index" in samples[0]:
            batch["index"] = torch.tensor([int(sample["index"]) for sample in samples])
        return batch


def pad_batch(batch: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Returns a batch of token ids whose rows are `length` long, padded on the right with 0.

    Args:
        batch: what `Collator` returns, of rows that are not longer.
        length: N.
    """
    missing = length - batch["inputs"].shape[1]
    if not missing:
        return dict(batch)
    valid = batch.get("attention_mask")
    if valid is None:
        valid = torch.ones_like(batch["inputs"])
    pad = torch.nn.functional.pad
    return {
        **batch,
        "inputs": pad(batch["inputs"], (0, missing)),
        "attention_mask": pad(valid, (0, missing)),
    }
