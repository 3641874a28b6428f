"""NumPy and Parquet files."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from sma_fast.training.data import DataError, binary, load


def zipped(path):
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "a.parquet"
    data = pa.table(
        {
            "seq": ["MK", None, "A"],
            "x": [1.5, 2.5, float("nan")],
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
        }
    )
    pyarrow.parquet.write_table(data, path, row_group_size=2)
    return path


@pytest.mark.parametrize("change", [lambda path: path, zipped])
def test_parquet(table, change, tmp_path):
    path = change(table)
    dataset = load(path, cache=tmp_path / "cache")
    assert dataset["seq"][:] == ["MK", None, "A"]
    assert dataset["kind"][:] == ["a", "b", "a"]
    assert dataset["__line__"][:] == [1, 2, 3]
    assert dataset.features["__file__"].names == [f"{path}, row"]


@pytest.mark.parametrize("change", [lambda path: path, zipped])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(order, change, tmp_path, monkeypatch):
    monkeypatch.setattr(binary, "ROWS", 3)
    array = np.asarray(np.random.default_rng(0).normal(size=(8, 2, 3)), ">f4", order=order)
    np.save(tmp_path / "a.npy", array)
    dataset = load(change(tmp_path / "a.npy"), cache=tmp_path / "cache")
    assert np.array_equal(np.array(dataset["values"][:], np.float32), array.reshape(8, 6))
    assert dataset["__line__"][:] == list(range(1, 9))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, tmp_path):
    x, y = np.arange(6.0).reshape(3, 2), np.array([1, 0, 1], np.uint8)
    save(tmp_path / "a.npz", X=x, y=y, name=np.array(["a", "bc", ""]))
    for path in (tmp_path / "a.npz", zipped(tmp_path / "a.npz")):
        dataset = load(path, cache=tmp_path / "cache")
        assert dataset["X"][:] == x.tolist()
        assert dataset["y"][:] == [1, 0, 1]
        assert dataset["name"][:] == ["a", "bc", ""]
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".arrow"] * 2


def test_refused(tmp_path, table):
    cache = tmp_path / "cache"

    def refused(name, message):
        with pytest.raises(DataError, match=message) as error:
            load(tmp_path / name, cache=cache)
        assert str(tmp_path / name) in str(error.value)
        assert not list(cache.iterdir())

    np.savez(tmp_path / "lengths.npz", X=np.zeros(3), y=np.zeros(2))
    refused("lengths.npz", "arrays of X: 3, y: 2 rows")
    np.savez(tmp_path / "scalar.npz", X=np.float64(3))
    refused("scalar.npz", r"array 'X\.npy': got no rows")
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    refused("none.npy", "got no rows")
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    refused("object.npy", "got no array")
    whole = (tmp_path / "lengths.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-30])
    refused("cut.npz", r"got no whole \.npz file")
    (tmp_path / "cut.npz.gz").write_bytes(gzip.compress(bytes(range(256)) * 9)[:-20])
    refused("cut.npz.gz", "the gzip file is truncated")
    (tmp_path / "cut.parquet").write_bytes(table.read_bytes()[:-20])
    refused("cut.parquet", "got no whole Parquet file")
    for name in ("empty.npy", "empty.npz", "empty.parquet"):
        (tmp_path / name).write_bytes(b"")
        refused(name, "the file is empty")
    with pytest.raises(DataError, match="allowed is None for parquet"):
        load(table, columns=["a"], cache=cache)
