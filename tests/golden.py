"""Recorded runs of published code, from shared/golden beside the repository."""

import os
from pathlib import Path

import numpy as np
import pytest


def golden(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of one recorded run, or skips where it is not there.

    SMA_FAST_DATA names shared/data; without it, shared/ is looked for beside the repository.
    """
    data = os.environ.get("SMA_FAST_DATA")
    shared = Path(data, "..") if data else Path(__file__).parents[2] / "shared"
    file = shared / "golden" / f"{name}.npz"
    if not file.exists():
        required = "golden" in os.environ.get("SMA_FAST_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(f"no golden files: {file} is not there")
    with np.load(file) as archive:
        return {key: archive[key] for key in archive.files}
