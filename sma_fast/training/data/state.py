"""Encodings, labels and splits out of the JSON that a checkpoint keeps."""

from collections.abc import Mapping
from typing import Any

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.labels import ClassLabels, MultiLabels, Targets
from sma_fast.training.data.pictures import Pictures
from sma_fast.training.data.sequences import ByteSequences
from sma_fast.training.data.split import ByColumn, ByIndex
from sma_fast.training.data.tables import TableColumns

KINDS = {
    kind.__name__: kind
    for kind in (
        ByteSequences,
        TableColumns,
        Pictures,
        ClassLabels,
        MultiLabels,
        Targets,
        ByColumn,
        ByIndex,
    )
}


def from_state(state: Mapping[str, Any]) -> Any:
    """Returns the encoding, labels or split whose `state()` gave `state`.

    Args:
        state: with its "kind".

    Returns:
        An object of that class.

    Raises:
        DataError: for an unknown kind, or an entry that is missing.
    """
    kind = state.get("kind") if isinstance(state, Mapping) else None
    if kind not in KINDS:
        raise DataError(f"state: got kind {kind!r}, allowed is one of {', '.join(KINDS)}")
    try:
        return KINDS[kind].from_state(state)
    except KeyError as error:
        raise DataError(f"state of {kind}: got no entry {error}; is the file damaged?") from error
