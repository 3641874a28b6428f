"""Samples to batches, also in worker processes."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sma_fast.training.data import (
    ByteSequences,
    Collator,
    DataError,
    Examples,
    MultiLabels,
    TableColumns,
    Targets,
    load,
)


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "seq,a,y\n" + "".join(f"{'MKVLA' * 3:.{i % 7 + 1}},{i},{i}\n" for i in range(40))
    )
    return load(path, cache=tmp_path / "cache")


@pytest.fixture
def examples(dataset):
    return Examples(dataset, ByteSequences("seq", 9), Targets.fit(dataset, "y"))


def test_ragged():
    rows = [{"inputs": np.array(ids)} for ids in ([7, 8, 9], [5], [4, 4])]
    batch = Collator()(rows)
    assert batch["inputs"].tolist() == [[7, 8, 9], [5, 0, 0], [4, 4, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["inputs"].dtype == batch["attention_mask"].dtype == torch.int64
    assert set(batch) == {"inputs", "attention_mask"}
    batch = Collator(multiple=4)(rows)
    assert batch["inputs"].shape == batch["attention_mask"].shape == (3, 4)
    assert batch["attention_mask"].sum(1).tolist() == [3, 1, 2]


def test_equal_lengths_need_no_mask():
    rows = [{"inputs": np.ones(4, np.int64)}] * 2
    assert set(Collator()(rows)) == set(Collator(multiple=2)(rows)) == {"inputs"}
    assert Collator(always_mask=True)(rows)["attention_mask"].tolist() == [[1] * 4] * 2
    assert Collator(multiple=3)(rows)["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    with pytest.raises(DataError, match="multiple: got 0"):
        Collator(multiple=0)


def test_channels():
    rows = [{"inputs": np.ones((n, 3), np.float32)} for n in (2, 4)]
    batch = Collator()(rows)
    assert batch["inputs"].shape == (2, 4, 3) and batch["inputs"].dtype == torch.float32
    assert batch["inputs"][0].sum() == 6
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_labels(dataset):
    for labels, shape in (
        (Targets.fit(dataset, ["y", "a"]), (40, 2)),
        (MultiLabels(["y"]), (2, 1)),
    ):
        examples = Examples(dataset, TableColumns.fit(dataset, ["a"]), labels)
        batch = Collator()(examples.__getitems__(range(shape[0])))
        assert batch["inputs"].shape == (shape[0], 1, 1)
        assert batch["labels"].shape == shape and batch["labels"].dtype == torch.float32


def test_one_sample_and_many_agree(examples):
    assert len(examples) == examples.check() == 40
    many = examples.__getitems__([3, 0, 39, -1])
    for index, sample in zip([3, 0, 39, 39], many, strict=True):
        alone = examples[index]
        assert np.array_equal(alone["inputs"], sample["inputs"])
        assert alone["labels"] == sample["labels"]
    with pytest.raises(IndexError):
        examples[40]


def collected(examples, workers, **options):
    loader = DataLoader(
        examples, batch_size=7, collate_fn=Collator(multiple=2), num_workers=workers, **options
    )
    return list(loader)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same(examples, context):
    expected = collected(examples, 0)
    found = collected(examples, 2, multiprocessing_context=context)
    assert len(found) == len(expected) == 6
    for left, right in zip(expected, found, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_an_error_of_a_worker_keeps_its_message(dataset):
    examples = Examples(dataset, ByteSequences("seq", 5))
    batches = iter(DataLoader(examples, batch_size=7, collate_fn=Collator(), num_workers=1))
    with pytest.raises(DataError, match=r"a\.csv, line 7, column 'seq': got 6 bytes"):
        next(batches)
    batches._shutdown_workers()  # else the garbage collector does, and waits 5 s


def test_pickles(examples):
    again = pickle.loads(pickle.dumps(examples))
    assert np.array_equal(again[5]["inputs"], examples[5]["inputs"])
    assert pickle.loads(pickle.dumps(Collator(4, True))) == Collator(4, True)
    assert str(pickle.loads(pickle.dumps(DataError("a")))) == "a"
