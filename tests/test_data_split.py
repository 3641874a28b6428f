"""Parts by a column, by files, by a seeded permutation."""

import json

import numpy as np
import pytest

from sma_fast.training.data import ByColumn, ByIndex, DataError, from_state, load, load_splits


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.csv"
    kinds = ["train", "drop", "test", "train", "valid", "val"]
    path.write_text("x,kind\n" + "".join(f"{i},{kind}\n" for i, kind in enumerate(kinds)))
    return path


def again(thing):
    return from_state(json.loads(json.dumps(thing.state(), sort_keys=True)))


def x(parts):
    return {name: [int(v) for v in part["x"]] for name, part in parts.items()}


def test_by_column(path, tmp_path):
    split = ByColumn("kind", {"train": "train", "valid": ["valid", "val"], "test": "test"})
    for how in (split, again(split)):
        parts = load_splits(path, how, cache=tmp_path / "cache")
        assert x(parts) == {"train": [0, 3], "valid": [4, 5], "test": [2]}
        assert parts["valid"]["__line__"][:] == [6, 7]
    assert list(ByColumn().parts) == ["train", "valid", "test"]


def test_by_column_refused(path, tmp_path):
    with pytest.raises(
        DataError, match=r"a\.csv, column 'kind': got split 'dev' .* drop, test, train, val, valid"
    ):
        load_splits(path, ByColumn("kind", {"valid": "dev"}), cache=tmp_path / "cache")
    with pytest.raises(DataError, match="got column 'split', allowed is one of .*'x', 'kind'"):
        load_splits(path, ByColumn(), cache=tmp_path / "cache")
    with pytest.raises(DataError, match="values that are in one part each"):
        ByColumn("kind", {"train": "a", "test": ["a"]})


def test_by_files(path, tmp_path):
    parts = load_splits({"train": path, "test": str(path)}, cache=tmp_path / "cache")
    assert {name: len(part) for name, part in parts.items()} == {"train": 6, "test": 6}
    with pytest.raises(DataError, match="split: got ByColumn and 1 sources"):
        load_splits({"train": path}, ByColumn())
    with pytest.raises(DataError, match="split: got None"):
        load_splits(path)


def test_by_index():
    split = ByIndex({"test": 30, "valid": 0.1, "train": None}, seed=3)
    parts = split.indices(200)
    assert {name: len(rows) for name, rows in parts.items()} == {
        "test": 30,
        "valid": 20,
        "train": 150,
    }
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(200))
    assert all((np.diff(rows) > 0).all() for rows in parts.values())
    restored = again(split)
    assert all(np.array_equal(rows, restored.indices(200)[n]) for n, rows in parts.items())
    with pytest.raises(DataError, match="got 201 rows, allowed is 200 as when the split was made"):
        restored.indices(201)
    assert not np.array_equal(ByIndex({"test": 30}, seed=4).indices(200)["test"], parts["test"])


def test_the_permutation_never_changes():
    rows = ByIndex({"a": 3, "b": 2}, seed=0).indices(10)
    assert {name: found.tolist() for name, found in rows.items()} == {"a": [2, 4, 8], "b": [1, 9]}
    state = ByIndex({"a": 3}, seed=0).state() | {"rows": 10, "digest": "0"}
    with pytest.raises(DataError, match="cannot be made again"):
        from_state(state).indices(10)


def test_budgets_share_their_test_rows():
    small = ByIndex({"test": 50, "train": 10}, seed=1).indices(300)
    large = ByIndex({"test": 50, "train": 100}, seed=1).indices(300)
    assert np.array_equal(small["test"], large["test"])
    assert set(small["train"]) < set(large["train"])


def test_shares_cover_the_pool():
    for rows in range(4, 60):
        parts = ByIndex({"a": 0.5, "b": 0.25, "c": 0.25}).indices(rows)
        assert sum(map(len, parts.values())) == rows


def test_by_index_on_a_data_set(path, tmp_path):
    split = ByIndex({"test": 2, "train": None})
    parts = load_splits(path, split, cache=tmp_path / "cache")
    assert sorted(sum(x(parts).values(), [])) == list(range(6))
    assert x(again(split).apply(load(path, cache=tmp_path / "cache"))) == x(parts)


def test_by_index_refused(path, tmp_path):
    for sizes in ({"a": 0}, {"a": 1.5}, {"a": None, "b": 1}, {"a": True}):
        with pytest.raises(DataError, match="sizes: got"):
            ByIndex(sizes)
    with pytest.raises(DataError, match="sizes: got no part"):
        ByIndex({})
    with pytest.raises(
        DataError, match=r"a\.csv: got 5 rows for part 'train', allowed is 1 to 4 that are left"
    ):
        load_splits(path, ByIndex({"test": 2, "train": 5}), cache=tmp_path / "cache")
    with pytest.raises(DataError, match="got 0 rows for part 'rest'"):
        ByIndex({"all": 3, "rest": None}).indices(3)
