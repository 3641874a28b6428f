"""Data sets of the Hugging Face hub, with the same extra columns as local files."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.rows import LINE
from sma_fast.training.data.store import stored
from sma_fast.training.data.text import ROWS


def open_hub(name: str, config: str | None, part: str | None, cache: Path) -> datasets.Dataset:
    """Returns a data set of the hub, its splits told apart by column "split".

    Args:
        name: such as "jxie/higgs".
        config: its configuration, where it has several.
        part: the only split to read. Default: all.
        cache: folder of downloaded and converted files.

    Returns:
        Memory-mapped data set.

    Raises:
        DataError: where it cannot be opened, or columns of splits do not fit.
    """
    try:
        found = datasets.load_dataset(name, config, split=part, cache_dir=str(cache / "hub"))
    except Exception as error:  # hub, network, configuration and builders each have their own
        raise DataError(
            f"{name}: got no such file here, and the Hugging Face hub gave none "
            f"({type(error).__name__}: {error}); check the name, config and part, or the network"
        ) from error
    if isinstance(found, datasets.Dataset):
        found = {part or str(found.split or "train"): found}
    splits = dict(found)
    try:
        dataset = datasets.concatenate_datasets(list(splits.values()))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{name}: got splits {', '.join(splits)} with columns that do not fit ({error}), "
            "allowed is one of them: give part="
        ) from error
    if not len(dataset):
        raise DataError(f"{name}: got no rows in splits {', '.join(splits)}")
    places = [f"{name}, {split}, row" for split in splits]
    counts = [len(rows) for rows in splits.values()]
    names = [None] * len(splits) if "split" in dataset.column_names else list(splits)
    key = [config, part, counts, names]
    return datasets.concatenate_datasets(
        [dataset, stored(_places(counts, names), places, key, cache)], axis=1
    )


def _places(counts: list[int], names: list[str | None]):
    for place, (count, name) in enumerate(zip(counts, names, strict=True)):
        for begin in range(0, count, ROWS):
            rows = min(ROWS, count - begin)
            columns = {LINE: pa.array(np.arange(begin + 1, begin + rows + 1))}
            if name is not None:
                columns["split"] = pa.array([name] * rows, pa.string())
            yield place, pa.table(columns)
