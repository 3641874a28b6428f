"""Pictures that cannot be read: left out where that is asked for, and counted."""

import datasets
import numpy as np

from sma_fast.training.data.load import select
from sma_fast.training.data.pictures import damaged
from sma_fast.training.data.rows import FILE, LINE, source_of
from sma_fast.training.inputs import RunError, one_column, only_column, splits_of
from sma_fast.training.options import DataOptions
from sma_fast.training.start import say

_NAMED = 5  # of a source


class WholePictures:
    """Takes damaged pictures out of a source where that is asked for, and counts them.

    Args:
        data: the options.
    """

    def __init__(self, data: DataOptions) -> None:
        self.data, self.left_out = data, 0

    def __call__(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Returns the rows whose pictures are whole; says how many others there are.

        Args:
            rows: of a source, before it is cut into parts.

        Raises:
            RunError: where none is whole.
        """
        if not self.data.skip_damaged:
            return rows
        others = {FILE, LINE, *(self.data.exclude or ()), splits_of(self.data, rows)}
        column = one_column(self.data) or only_column("pictures", rows, others)
        bad, messages = damaged(rows, column)
        for message in messages[:_NAMED]:
            say(f"left out: {message.partition(';')[0]}")
        say(f"{len(messages)} damaged pictures left out")
        if bad.all():
            raise RunError(f"skip_damaged: no picture of {source_of(rows)} is whole")
        self.left_out += len(messages)
        return select(rows, np.flatnonzero(~bad)) if bad.any() else rows

    def counted(self) -> dict[str, int]:
        """Returns {"damaged_left_out": how many}, {} where it is not asked for."""
        return {"damaged_left_out": self.left_out} if self.data.skip_damaged else {}
