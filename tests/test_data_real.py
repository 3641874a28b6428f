"""The real data: counts as in SOURCES.md, and batches of each."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sma_fast.training.data import (
    ByColumn,
    ByIndex,
    ByteSequences,
    ClassLabels,
    Collator,
    Examples,
    Pictures,
    TableColumns,
    Targets,
    load,
    load_splits,
)

DATA = Path(
    os.environ.get("SMA_FAST_DATA") or Path(__file__).resolve().parents[1] / "../shared/data"
)

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no real data in {DATA}: set SMA_FAST_DATA"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def counts(parts):
    return {name: len(part) for name, part in parts.items()}


def first_batch(examples, size=32):
    return next(iter(DataLoader(examples, batch_size=size, collate_fn=Collator())))


def test_higgs(cache):
    split = ByIndex({"test": 5000, "valid": 2000, "train": None}, seed=0)
    parts = load_splits(DATA / "higgs/higgs_pool.npz", split, cache=cache)
    assert counts(parts) == {"test": 5000, "valid": 2000, "train": 46233 - 7000}
    encoding = TableColumns.fit(parts["train"], ["X"])
    labels = ClassLabels.fit(parts["train"], "y")
    assert (encoding.max_length, labels.names) == (28, ["0", "1"])
    examples = Examples(parts["train"], encoding, labels)
    inputs = np.stack([sample["inputs"] for sample in examples.__getitems__(range(39233))])
    assert np.abs(inputs.mean(axis=0)).max() < 1e-4
    assert np.abs(inputs.std(axis=0) - 1).max() < 1e-4
    batch = first_batch(examples)
    assert batch["inputs"].shape == (32, 28, 1) and batch["inputs"].dtype == torch.float32
    assert set(batch) == {"inputs", "labels"}


@pytest.mark.parametrize(
    "name, rows, expected",
    [
        ("esol", 1128, (902, 113, 113)),
        ("freesolv", 642, (513, 64, 65)),
        ("bbbp", 2050, (1631, 204, 204)),  # 11 rows are "drop"
    ],
)
def test_molecules(name, rows, expected, cache):
    dataset = load(DATA / f"chem/{name}.csv", inputs="smiles", labels="label", cache=cache)
    assert len(dataset) == rows
    parts = ByColumn("scaffold_split").apply(dataset)
    assert tuple(counts(parts).values()) == expected
    kind = ClassLabels if name == "bbbp" else Targets
    labels = kind.fit(parts["train"], "label")
    encoding = ByteSequences("smiles", 512)
    for part in parts.values():
        assert Examples(part, encoding, labels).check() == len(part)
    batch = first_batch(Examples(parts["train"], encoding, labels))
    assert (batch["inputs"] > 0).equal(batch["attention_mask"] == 1)
    text = encoding.decode(batch["inputs"][1]).decode()
    assert text == parts["train"][1]["smiles"]


def test_chembl(cache):
    dataset = load(DATA / "chem/chembl30_90k.smi.gz", cache=cache)
    assert len(dataset) == 89418
    assert dataset[0]["smiles"] == "CCc1cccc2c(C(=O)CCl)c[nH]c12"
    assert Examples(dataset, ByteSequences("smiles", 512)).check() == 89418


def test_fluorescence(cache):
    parts = load_splits(DATA / "protein/avgfp_tape.csv.gz", ByColumn(), cache=cache)
    assert sum(counts(parts).values()) == 54025
    labels = Targets.fit(parts["train"])
    assert labels.mean[0] == pytest.approx(3.18, abs=0.02)
    test = np.array([float(label) for label in parts["test"]["label"]])
    assert test.mean() == pytest.approx(2.08, abs=0.02)  # as README of the data warns
    encoded = labels.encode({"label": test})["labels"]
    assert labels.to_units(encoded) == pytest.approx(test, rel=1e-5, abs=1e-5)
    batch = first_batch(Examples(parts["test"], ByteSequences("seq", 237), labels))
    assert batch["inputs"].shape[1] <= 237


def test_stability(cache):
    files = {part: DATA / f"protein/stability.{part}.csv.gz" for part in ("train", "valid", "test")}
    parts = load_splits(files, cache=cache, inputs="seq", labels="label")
    assert counts(parts) == {"train": 53614, "valid": 2512, "test": 12851}
    labels = Targets.fit(parts["train"])
    encoding = ByteSequences.fit(parts["train"], "seq")
    for part in parts.values():
        assert Examples(part, encoding, labels).check() == len(part)
    assert "attention_mask" not in first_batch(Examples(parts["valid"], encoding, labels))


def test_unlabeled_proteins(cache):
    path = DATA / "protein/unlabeled_40k.txt.gz"
    dataset = load(path, cache=cache)
    assert len(dataset) == 40000
    encoding = ByteSequences("text", 512, alphabet="ABCDEFGHIKLMNOPQRSTUVWXYZ")
    assert Examples(dataset, encoding).check() == 40000
    longer = load(path, inputs="text", min_length=51, cache=cache)  # as Pfam is used
    lengths = [len(text) for text in longer["text"]]
    assert 50 < min(lengths) and max(lengths) <= 512 and len(longer) < 40000


def test_pictures(cache):
    path = DATA / "vision/cifar10_jpeg_12k.zip"
    split = ByColumn("split", {"train": "train", "test": "test"})
    parts = load_splits(path, split, cache=cache)
    assert counts(parts) == {"train": 10000, "test": 2000}
    labels = ClassLabels.fit(parts["train"])
    assert labels.num_labels == 10 and labels.names[:2] == ["airplane", "automobile"]
    per_class = np.bincount(labels.encode({"label": parts["test"]["label"][:]})["labels"])
    assert per_class.tolist() == [200] * 10
    encoding = Pictures.fit(parts["train"].select(range(0, 10000, 10)))
    batch = first_batch(Examples(parts["test"], encoding, labels))
    assert batch["inputs"].shape == (32, 1024, 3) and batch["inputs"].dtype == torch.float32
    assert 110 < encoding.mean.mean() < 130 and 55 < encoding.std.mean() < 70
