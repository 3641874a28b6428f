"""Text formats: rows, line numbers, and what is said about malformed files."""

import gzip
import io
import re

import numpy as np
import pytest

from sma_fast.training.data import DataError, load
from sma_fast.training.data import text as text_formats

CSV = 'seq,label\nMKV,1\nNA,\n\n"A,B",2\n'
FASTA = ">one first protein\nMKV\nLLA\n\n>two\nAC\n"
SMI = "CCO ethanol\nC\n\nc1ccccc1\tbenzene ring\n"
JSONL = '{"seq": "MKV", "y": 1.50}\n\n{"seq": "A", "y": null}\n'

GOOD = {  # name: contents, columns, lines
    "a.csv": (CSV, {"seq": ["MKV", "NA", "A,B"], "label": ["1", "", "2"]}, [2, 3, 5]),
    "a.tsv": ("seq\tlabel\nMKV\t1\n", {"seq": ["MKV"], "label": ["1"]}, [2]),
    "a.txt": ("MKV\n\nA C \r\nNA", {"text": ["MKV", "A C ", "NA"]}, [1, 3, 4]),
    "a.fasta": (
        FASTA,
        {"sequence": ["MKVLLA", "AC"], "header": ["one first protein", "two"]},
        [1, 5],
    ),
    "a.smi": (
        SMI,
        {"smiles": ["CCO", "C", "c1ccccc1"], "name": ["ethanol", "", "benzene ring"]},
        [1, 2, 4],
    ),
    "a.jsonl": (JSONL, {"seq": ["MKV", "A"], "y": ["1.50", None]}, [1, 3]),
}


def write(path, contents):
    data = contents.encode() if isinstance(contents, str) else contents
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def own(dataset):
    return {name: dataset[name][:] for name in dataset.column_names if "__" not in name}


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("name", GOOD)
def test_rows_and_lines(name, zipped, tmp_path):
    contents, columns, lines = GOOD[name]
    path = write(tmp_path / (name + zipped), contents)
    dataset = load(path, cache=tmp_path / "cache")
    assert own(dataset) == columns
    assert dataset["__line__"][:] == lines
    assert dataset.features["__file__"].names[0].startswith(f"{path}, ")
    assert dataset.cache_files  # memory-mapped


@pytest.mark.parametrize("name", GOOD)
def test_the_same_from_small_chunks(name, tmp_path, monkeypatch):
    contents, columns, lines = GOOD[name]
    monkeypatch.setattr(text_formats, "ROWS", 1)
    dataset = load(write(tmp_path / name, contents), cache=tmp_path / "cache")
    assert own(dataset) == columns
    assert dataset["__line__"][:] == lines


def test_quoted_line_ends_count_as_lines(tmp_path):
    path = write(tmp_path / "a.csv", 'a,b\n"x\ny",1\nz,2\n')
    dataset = load(path, cache=tmp_path)
    assert dataset["a"][:] == ["x\ny", "z"]
    assert dataset["__line__"][:] == [2, 4]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n")
    assert own(load(path, cache=tmp_path)) == {"a": ["1"], "b": ["2"]}


def test_names_for_a_file_without_header(tmp_path):
    path = write(tmp_path / "a.csv", "1,2\n3,4\n")
    dataset = load(path, columns=["y", "x"], cache=tmp_path)
    assert own(dataset) == {"y": ["1", "3"], "x": ["2", "4"]}
    assert dataset["__line__"][:] == [1, 2]


def test_format_overrides_the_extension(tmp_path):
    path = write(tmp_path / "a.csv", "MKV,1\n")
    assert own(load(path, format="text", cache=tmp_path)) == {"text": ["MKV,1"]}


def test_json_lists_and_booleans(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"x": null, "y": true}\n{"x": [1, 2.5], "y": false}\n')
    assert own(load(path, cache=tmp_path)) == {"x": [None, ["1", "2.5"]], "y": ["1", "0"]}


def test_a_long_cell(tmp_path):
    path = write(tmp_path / "a.csv", f"seq\n{'A' * 300_000}\n")
    assert len(load(path, cache=tmp_path)["seq"][0]) == 300_000


def test_several_files_are_one_data_set(tmp_path):
    paths = [
        write(tmp_path / "a.csv", "a,b\n1,2\n"),
        write(tmp_path / "b.csv.gz", "b,a\n3,4\n"),
    ]
    dataset = load(paths, cache=tmp_path)
    assert own(dataset) == {"a": ["1", "4"], "b": ["2", "3"]}
    assert dataset.features["__file__"].names == [f"{path}, line" for path in paths]
    write(paths[1], "b,c\n3,4\n")
    with pytest.raises(DataError, match=r"b\.csv\.gz: got columns b, c, allowed is a, b"):
        load(paths, cache=tmp_path)


def test_lengths(tmp_path):
    path = write(tmp_path / "a.txt", "A\nABC\nÄÄ\nABCDE\n")
    dataset = load(path, inputs="text", min_length=2, max_length=4, cache=tmp_path)
    assert dataset["text"][:] == ["ABC", "ÄÄ"]  # in bytes
    assert dataset["__line__"][:] == [2, 3]
    with pytest.raises(DataError, match="no row with 9 to inf bytes"):
        load(path, inputs="text", min_length=9, cache=tmp_path)
    with pytest.raises(DataError, match="inputs: got"):
        load(path, min_length=9, cache=tmp_path)


def test_converted_once_and_again_after_a_change(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "A\n")
    load(path, cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(text_formats.Lines, "__iter__", lambda self: pytest.fail("read again"))
        load(path, cache=tmp_path)
    write(path, "A\nB\n")
    assert load(path, cache=tmp_path)["text"][:] == ["A", "B"]


BAD = {  # name, contents, message
    "short row": ("a.csv", "a,b,c\n1,2,3\n\n1,2\n", r", line 4: got 2 cells, allowed is 3"),
    "long row": ("a.csv", "a,b\n1,2,3\n", r"line 2: got 3 cells, allowed is 2 \(a, b\)"),
    "open quote": ("a.csv", 'a,b\n1,"2\n3,4\n', r"line 2: got a malformed row"),
    "stray quote": ("a.csv", 'a,b\n1,2\n"3"x,4\n', r"line 3: got a malformed row"),
    "tsv row": ("a.tsv", "a\tb\n1\n", r", line 2: got 1 cells, allowed is 2"),
    "doubled name": ("a.csv", "a,a\n1,2\n", r"line 1: got column name 'a'"),
    "no name": ("a.csv", "a,\n1,2\n", r"line 1: got column name ''"),
    "not utf-8": ("a.txt", b"AB\nA\xffB\n", r", line 2: got byte 0xff at position 2"),
    "header only": ("a.csv", "a,b\n", r": got no rows"),
    "empty csv": ("a.csv", "", r": got no rows \(empty, or a header only"),
    "empty text": ("a.txt", "\n\n", r": got no rows"),
    "empty jsonl": ("a.jsonl", "", r": got no rows"),
    "fasta without header": ("a.fa", "\nMKV\n>a\nM\n", r", line 2: got 'MKV' before any"),
    "fasta without sequence": ("a.fa", ">a\nM\n>b\n>c\nM\n", r", line 3: got header 'b' with"),
    "no json": ("a.jsonl", '{"a": 1}\n{"a": \n', r", line 2: got no JSON"),
    "no object": ("a.jsonl", "[1, 2]\n", r"line 1: got '\[1, 2\]', allowed is one object"),
    "other keys": ("a.jsonl", '{"a": 1}\n\n{"b": 1}\n', r"line 3: got keys b, allowed is a"),
    "nested": ("a.jsonl", '{"a": {"b": 1}}\n', r"line 1, key 'a': got"),
    "list or not": ("a.jsonl", '{"a": 1}\n{"a": [1]}\n', r"line 2, key 'a': got .* string or numb"),
}


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("case", BAD)
def test_refused(case, zipped, tmp_path):
    name, contents, message = BAD[case]
    path = write(tmp_path / (name + zipped), contents)
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*" + message):
        load(path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())  # nothing half-written stays


def test_truncated_gzip(tmp_path):
    whole = gzip.compress("".join(f"{i * 7919 % 10007}\n" for i in range(20000)).encode())
    path = tmp_path / "a.txt.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.txt\.gz, after line [1-9]\d*: the gzip file is trunc"):
        load(path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    path.write_bytes(b"plain")
    with pytest.raises(DataError, match="allowed behind .gz is gzip"):
        load(path, cache=tmp_path / "cache")


def test_missing_files_and_unknown_extensions(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'no.csv'}: got no such file")):
        load(tmp_path / "no.csv", cache=tmp_path)
    with pytest.raises(DataError, match="no.csv: got no such file"):
        load("data/no.csv", cache=tmp_path)  # no hub name, for its extension
    path = write(tmp_path / "a.xyz", "1")
    with pytest.raises(DataError, match=r"a\.xyz: got unknown extension '\.xyz'.*\.csv"):
        load(path, cache=tmp_path)
    assert len(load(write(tmp_path / "A.TXT.GZ", gzip.compress(b"1")), cache=tmp_path)) == 1
    with pytest.raises(DataError, match=r"a\.xyz\.gz: got unknown extension '\.xyz'"):
        load(write(tmp_path / "a.xyz.gz", "1"), cache=tmp_path)
    with pytest.raises(DataError, match="format: got 'exe', allowed is one of csv"):
        load(path, format="exe", cache=tmp_path)
    with pytest.raises(DataError, match="got a folder"):
        load(tmp_path, format="csv", cache=tmp_path)


def test_missing_columns_list_those_there_are(tmp_path):
    path = write(tmp_path / "a.csv", CSV)
    with pytest.raises(DataError, match=r"a\.csv: got column 'y'.* there are: 'seq', 'label'$"):
        load(path, inputs="seq", labels="y", cache=tmp_path)


@pytest.mark.parametrize("name", ["a.csv", "a.npy.gz"])
def test_a_full_disk(name, tmp_path):
    resource = pytest.importorskip("resource", reason="no limits on this system")
    contents = b"seq\n" + b"MKVLAGHDER\n" * 100_000
    if name == "a.npy.gz":
        stream = io.BytesIO()
        np.save(stream, np.random.default_rng(0).normal(size=100_000))
        contents = stream.getvalue()
    path = write(tmp_path / name, contents)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"cache: cannot write .*give another folder as cache"):
            load(path, cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").iterdir())
    assert len(load(path, cache=tmp_path / "cache")) == 100_000


def test_a_cache_that_is_no_folder(tmp_path):
    path = write(tmp_path / "a.csv", CSV)
    with pytest.raises(DataError, match="cannot write converted data"):
        load(path, cache=path)
