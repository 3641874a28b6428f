"""Bytes and columns as tokens."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sma_fast.training.data import (
    ByteSequences,
    DataError,
    Examples,
    TableColumns,
    from_state,
    load,
)


def opened(tmp_path, contents, name="a.csv", **options):
    path = tmp_path / name
    data = contents.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return load(path, cache=tmp_path / "cache", **options)


def again(thing):
    return from_state(json.loads(json.dumps(thing.state())))


def test_bytes():
    encoding = ByteSequences("s", 9)
    inputs = encoding.encode({"s": ["AB", "ä\0", "MKVMKVMKV"]})["inputs"]
    assert [i.tolist() for i in inputs] == [
        [71, 72],
        [0xC3 + 6, 0xA4 + 6, 6],
        [ord(c) + 6 for c in "MKVMKVMKV"],
    ]
    assert all(i.dtype == np.int64 for i in inputs)
    assert encoding.vocabulary == 262
    assert encoding.decode([1, *inputs[1], 0, 0]) == "ä\0".encode()
    assert again(encoding).state() == encoding.state()


def test_truncation_is_a_choice():
    encoding = ByteSequences("s", 2, too_long="truncate", alphabet="ABC")
    inputs = encoding.encode({"s": ["A", "BCA", "BCxx", "CB"]})["inputs"]
    assert [encoding.decode(i) for i in inputs] == [b"A", b"BC", b"BC", b"CB"]
    assert again(encoding).state() == encoding.state()


def test_length_of_the_longest(tmp_path):
    dataset = opened(tmp_path, "seq\nMK\nMKÄ\n")
    assert ByteSequences.fit(dataset, "seq").max_length == 4
    assert ByteSequences.fit(dataset, "seq", max_length=9).max_length == 9


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_sequences_refused(name, tmp_path):
    dataset = opened(tmp_path, "seq,y\nMKV,1\n\nMKVL,1\nMJ,2\n,3\n", name)

    def check(message, rows, **options):
        with pytest.raises(DataError, match=message) as error:
            Examples(dataset.select(rows), ByteSequences("seq", **options)).check()
        assert str(error.value).startswith(str(tmp_path / name))

    check(r"line 4, column 'seq': got 4 bytes, allowed is at most 3", [0, 1], max_length=3)
    check(
        r"line 5, column 'seq': got byte 0x4a \('J'\) at position 2, allowed is one of KLMV",
        [0, 2],
        max_length=9,
        alphabet="VMKL",
    )
    check(r"line 6, column 'seq': got an empty text", [0, 3], max_length=9)
    with pytest.raises(DataError, match="got column 'sequence', allowed is one of .*'seq', 'y'"):
        Examples(dataset, ByteSequences("sequence", 9))


def test_arguments_refused():
    for arguments, message in (
        (("s", 0), "max_length: got 0"),
        (("s", 3, "cut"), "too_long: got 'cut', allowed is error, truncate"),
        (("s", 3, "error", "Ä"), "alphabet: got 'Ä'"),
    ):
        with pytest.raises(DataError, match=message):
            ByteSequences(*arguments)
    with pytest.raises(DataError, match="column 's' of int64, allowed is text"):
        ByteSequences("s", 3).encode({"s": [1, 2]})
    with pytest.raises(DataError, match="row 2 of the batch, column 's': got no text"):
        ByteSequences("s", 3).encode({"s": ["A", None]})
    with pytest.raises(DataError, match="got kind 'Bytes', allowed is one of ByteSequences"):
        from_state({"kind": "Bytes"})
    with pytest.raises(DataError, match="got no entry 'column'"):
        from_state({"kind": "ByteSequences"})


def test_columns_are_standardised_by_train_alone(tmp_path):
    values = np.random.default_rng(0).normal(5, 3, (9000, 2))
    text = "".join(f"{i},{a!r},{b!r},7\n" for i, (a, b) in enumerate(values.tolist()))
    dataset = opened(tmp_path, "id,a,b,same\n" + text)
    encoding = TableColumns.fit(dataset.select(range(8500)), exclude=["id"])
    assert encoding.names == ["a", "b", "same"]
    assert np.allclose(encoding.mean, [*values[:8500].mean(0), 7], rtol=1e-12)
    assert np.allclose(encoding.std, [*values[:8500].std(0), 1], rtol=1e-12)
    rows = dataset.select(range(8500, 9000))
    for coder in (encoding, again(encoding)):
        inputs = coder.encode({n: rows[n][:] for n in ("a", "b", "same")})["inputs"]
        assert inputs.shape == (500, 3, 1) and inputs.dtype == np.float32
        expected = (values[8500:] - values[:8500].mean(0)) / values[:8500].std(0)
        assert np.allclose(inputs[:, :2, 0], expected, atol=1e-5)
        assert (inputs[:, 2] == 0).all()


def test_large_offsets_lose_nothing(tmp_path):
    dataset = opened(tmp_path, "a\n" + "".join(f"{1e9 + i % 2}\n" for i in range(10000)))
    encoding = TableColumns.fit(dataset)
    assert encoding.std[0] == pytest.approx(0.5, rel=1e-6)


def test_lists_are_columns():
    encoding = TableColumns(["x", "y"], ["x[0]", "x[1]", "y"], [0, 1, 2], [1, 2, 4])
    inputs = encoding.encode({"x": [[1, 3], [0.5, 1]], "y": [2, 6]})["inputs"]
    assert inputs[..., 0].tolist() == [[1, 1, 0], [0.5, 0, 1]]
    with pytest.raises(DataError, match=r"row 1 of the batch: got 4 values, allowed is 3"):
        encoding.encode({"x": [[1, 2, 3]], "y": [1]})
    with pytest.raises(DataError, match=r"row 2 of the batch, column 'x': got 1 values, allowed"):
        encoding.encode({"x": [[1, 2], [1]], "y": [1, 1]})
    with pytest.raises(DataError, match=r"row 2 of the batch, column 'x\[1\]': got nan"):
        encoding.encode({"x": [[1, 2], [1, float("nan")]], "y": [1, 1]})


def test_numbers_as_people_write_them():
    encoding = TableColumns(["x"], ["x"], [0], [1])
    inputs = encoding.encode({"x": ["1", " 2.5 ", "+3", "-1e-2", ".5"]})["inputs"]
    assert inputs.ravel().tolist() == pytest.approx([1, 2.5, 3, -0.01, 0.5])
    assert encoding.encode({"x": [True, False]})["inputs"].ravel().tolist() == [1, 0]


def test_dates_are_no_numbers(tmp_path):
    table = pa.table({"a": [1.0, 2.0], "b": pa.array([0, 1], pa.date32())})
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = load(tmp_path / "a.parquet", cache=tmp_path)
    with pytest.raises(DataError, match=r"got column 'b' of date32.*choose other columns"):
        TableColumns.fit(dataset)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize(
    "cell, shown",
    [
        ("", "an empty cell"),
        ("NaN", "'NaN'"),
        ("NA", "'NA'"),
        ("x1", "'x1'"),
        ("inf", "'inf'"),
        ("1_000", "'1_000'"),
        ("True", "'True'"),
    ],
)
def test_cells_refused(cell, shown, name, tmp_path):
    dataset = opened(tmp_path, f"a,b\n1,2\n\n3,{cell}\n", name)
    message = f"line 4, column 'b': got {shown}, allowed is a finite number"
    with pytest.raises(DataError, match=message) as error:
        TableColumns.fit(dataset)
    assert str(error.value).startswith(str(tmp_path / name))
    encoding = TableColumns.fit(dataset.select([0]))
    with pytest.raises(DataError, match=message):
        Examples(dataset, encoding).check()


def test_columns_refused(tmp_path):
    dataset = opened(tmp_path, "a,b\n1,2\n")
    with pytest.raises(DataError, match="got column 'c', allowed is one of .*'a', 'b'"):
        TableColumns.fit(dataset, ["c"])
    with pytest.raises(DataError, match="columns: got none"):
        TableColumns.fit(dataset, exclude=["a", "b"])
    with pytest.raises(DataError, match="column 'x' of struct<.*>, allowed are numbers"):
        TableColumns(["x"], ["x"], [0], [1]).encode({"x": [{"a": 1}]})
