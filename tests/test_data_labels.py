"""Classes, several answers, and numbers to predict."""

import gzip
import json

import numpy as np
import pytest

from sma_fast.training.data import ClassLabels, DataError, MultiLabels, Targets, from_state, load


def opened(tmp_path, contents, name="a.csv"):
    path = tmp_path / name
    data = contents.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return load(path, cache=tmp_path / "cache")


def again(thing):
    return from_state(json.loads(json.dumps(thing.state())))


def test_classes(tmp_path):
    dataset = opened(tmp_path, "x,label\n1,wing\n2,NA\n3,wing\n")
    labels = ClassLabels.fit(dataset)
    assert (labels.names, labels.num_labels) == (["NA", "wing"], 2)
    encoded = again(labels).encode({"label": ["wing", "NA"]})["labels"]
    assert encoded.tolist() == [1, 0] and encoded.dtype == np.int64
    with pytest.raises(DataError, match="row 1 .*got class 'tail', allowed is .*: NA, wing;"):
        labels.encode({"label": ["tail"]})


def test_numbers_are_sorted_as_numbers(tmp_path):
    labels = ClassLabels.fit(opened(tmp_path, "label\n10\n9\n0\n"))
    assert labels.names == ["0", "9", "10"]
    for values in ([9, 10], [9.0, 10.0], ["9", "10"], np.array([9, 10], np.uint8)):
        assert labels.encode({"label": values})["labels"].tolist() == [1, 2]
    assert ClassLabels("y", ["0", "1"]).encode({"y": [True, False]})["labels"].tolist() == [1, 0]
    with pytest.raises(DataError, match="got 1.5, allowed is the name or number of a class"):
        labels.encode({"label": [1.5]})


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize(
    "kind, what", [(ClassLabels, "got no label"), (Targets, "got an empty cell")]
)
def test_a_missing_label(name, kind, what, tmp_path):
    dataset = opened(tmp_path, "x,label\n1,2\n2,\n", name)
    with pytest.raises(DataError, match=f"line 3, column 'label': {what}") as error:
        kind.fit(dataset)
    assert str(error.value).startswith(str(tmp_path / name))
    with pytest.raises(DataError, match="got column 'y', allowed is one of those there are: 'x'"):
        kind.fit(dataset, "y")


def test_several_answers(tmp_path):
    dataset = opened(tmp_path, "a,b\n1,0\n,1\nnan,2\n")
    labels = MultiLabels.fit(dataset.select([0, 1]), ["a", "b"])
    encoded = again(labels).encode({"a": ["1", ""], "b": ["0", "1.0"]})["labels"]
    assert encoded.dtype == np.float32 and labels.num_labels == 2
    assert np.array_equal(encoded, [[1, 0], [np.nan, 1]], equal_nan=True)
    with pytest.raises(DataError, match=r"line 4, column 'b': got 2, allowed is 0, 1 or nothing"):
        MultiLabels.fit(dataset, ["a", "b"])
    lists = MultiLabels(["y"], 2).encode({"y": [[1, None], [0, 1]]})["labels"]
    assert np.array_equal(lists, [[1, np.nan], [0, 1]], equal_nan=True)
    with pytest.raises(DataError, match="got 'NA', allowed is a finite number, or nothing"):
        labels.encode({"a": ["NA"], "b": ["1"]})


def test_missing_answers_can_be_left_out_of_a_loss():
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as loss

    labels = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])  # as the docstring of MultiLabels says
    logits = torch.zeros(2, 2, requires_grad=True)
    known = ~labels.isnan()
    each = loss(logits, labels.nan_to_num(), reduction="none")
    (each[known].mean()).backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 1] == 0


def test_targets(tmp_path):
    dataset = opened(tmp_path, "label,b\n1,5\n2,5\n6,5\n")
    labels = Targets.fit(dataset)
    assert labels.mean.tolist() == [3] and labels.num_labels == 1
    encoded = again(labels).encode({"label": ["1", "2", "6"]})["labels"]
    assert encoded.shape == (3,) and encoded.dtype == np.float32
    assert encoded.mean() == pytest.approx(0, abs=1e-6)
    assert encoded.std() == pytest.approx(1, rel=1e-6)
    assert labels.to_units(encoded) == pytest.approx([1, 2, 6], rel=1e-6)
    assert labels.to_units(encoded[:, None]).shape == (3, 1)
    both = Targets.fit(dataset, ["label", "b"])
    encoded = both.encode({"label": [1, 6], "b": [5, 6]})["labels"]
    assert encoded.shape == (2, 2) and encoded[:, 1].tolist() == [0, 1]  # constant: divided by 1
    assert both.to_units(encoded) == pytest.approx(np.array([[1, 5], [6, 6]]), rel=1e-6)
    with pytest.raises(DataError, match="row 1 of the batch, column 'label': got 'high'"):
        labels.encode({"label": ["high"]})
