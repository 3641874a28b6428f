"""Pictures that cannot be read: left out where that is asked for, and counted."""

import datasets
import numpy as np

from sma_fast.training.data.load import select
from sma_fast.training.data.pictures import damaged
from sma_fast.training.data.rows import FILE, LINE
from sma_fast.training.inputs import RunError, one_column, only_column, splits_of
from sma_fast.training.options import DataOptions
from sma_fast.training.start import say

_NAMED = 5  # of a part


def leave_out_damaged(parts: dict[str, datasets.Dataset], data: DataOptions) -> dict[str, int]:
    """Takes damaged pictures out of `parts` where that is asked for, and says how many.

    Args:
        parts: by name; changed.
        data: the options.

    Returns:
        {"damaged_left_out": how many}, {} where it is not asked for.

    Raises:
        RunError: where no picture of a part is left.
    """
    if not data.skip_damaged:
        return {}
    number = 0
    for part, rows in parts.items():
        left_out = {FILE, LINE, *(data.exclude or ()), splits_of(data, rows)}
        column = one_column(data) or only_column("pictures", rows, left_out)
        bad, messages = damaged(rows, column)
        if bad.all():
            raise RunError(f"skip_damaged: no picture of the {part} part is whole: {messages[0]}")
        if bad.any():
            parts[part] = select(rows, np.flatnonzero(~bad))
        number += len(messages)
        for message in messages[:_NAMED]:
            say(f"left out: {message.partition(';')[0]}")
    say(f"{number} damaged pictures left out")
    return {"damaged_left_out": number}
