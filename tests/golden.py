"""Recorded runs of published code, from shared/golden beside the repository."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

RECORDED = (
    "image_cross",
    "image_cross_noise",
    "language_cross",
    "molecule_self",
    "molecule_self_mean",
    "physics_self",
    "protein_cross_wide",
)


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


def load_recorded(name: str) -> dict:
    """Returns the arrays of one recorded run as tensors, without weights and gradients."""
    return {
        key: value if value.dtype.kind == "U" else torch.as_tensor(value)
        for key, value in golden(name).items()
        if not key.startswith(("weight/", "grad/"))
    }


def recorded_draws(data: dict, masking: dict, scale: float) -> dict:
    """Returns the recorded draws as query_index, head_index and noise.

    Theirs shuffle lists: the queries, and, where noise is on, a list of candidates that depends on
    the scores. This says which of them were drawn, and gives all that were no candidates the
    lowest noise, so that drawing one of those would show.
    """
    logits, valid = data["attn_logits"], data["attention_mask"] == 1
    batch, heads, queries, tokens = logits.shape
    ratio, per_query = masking["masking_ratio"], masking["num_per_query"]
    ragged = masking["varying_length"]
    index = torch.full((batch, queries), -1)
    noise = torch.zeros(batch, tokens)
    for row in range(batch):
        own = int(valid[row].sum()) if ragged and queries == tokens else tokens
        drawn = data[f"randperm/{row}"][: round(own * ratio / per_query)]
        index[row, : len(drawn)] = drawn.sort().values
        if int(data["n_randperm"]) == batch:
            continue
        rows = logits[row, :, drawn].softmax(-1)  # (H, R, N)
        if "head_index" in data:
            scores = sum(rows[data["head_index"][row, query], i] for i, query in enumerate(drawn))
        else:
            scores = rows.mean(0).sum(0)
        if masking["mask_self"]:
            scores[drawn] = heads
        initial = masking["select_initial_ratio"]
        if ragged:
            count = round(ratio * (1 - initial * scale) * int(valid[row].sum()))
            others = valid[row].clone()
            others[scores.topk(count).indices] = False
            candidates = others.nonzero()[:, 0]
        else:
            candidates = scores.topk(round((ratio + (initial - ratio) * scale) * tokens)).indices
        order = candidates[data[f"randperm/{batch + row}"]]
        noise[row, order] = torch.linspace(0.1, 0.9, len(order))
    width = int((index >= 0).sum(1).max())
    index = index[:, :width]
    return {"query_index": index, "head_index": data.get("head_index"), "noise": noise}
