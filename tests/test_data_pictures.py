"""Folders and zip files of pictures, and pixels as tokens."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from sma_fast.training.data import (
    ByColumn,
    ClassLabels,
    DataError,
    Examples,
    Pictures,
    from_state,
    load,
)
from sma_fast.training.data.pictures import damaged

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 2, 3, 3), np.uint8)
LAYOUT = ["train/cat/1.png", "train/dog/1.png", "train/dog/2.PNG", "test/cat/1.png"]


def png(pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def make(where, names, pictures=None):
    files = dict(zip(names, pictures or [png(p) for p in PIXELS], strict=False))
    if where.suffix == ".zip":
        with zipfile.ZipFile(where, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_bytes(data)
    return where


@pytest.fixture(params=["folder", "all.zip"])
def where(request, tmp_path):
    return tmp_path / request.param


def test_classes_and_splits_are_folders(where, tmp_path):
    make(where, [*LAYOUT, "train/cat/notes.txt"])
    dataset = load(where, cache=tmp_path / "cache")
    assert dataset["label"][:] == ["cat", "cat", "dog", "dog"]
    parts = ByColumn("split", {"train": "train", "test": "test"}).apply(dataset)
    assert {name: len(part) for name, part in parts.items()} == {"train": 3, "test": 1}
    encoding = Pictures.fit(parts["train"])
    assert (encoding.size, encoding.max_length, encoding.channels) == ((2, 3), 6, 3)
    labels = ClassLabels.fit(parts["train"])
    sample = Examples(parts["test"], encoding, labels)[0]
    train = PIXELS[:3].reshape(-1, 3).astype(np.float64)
    expected = (PIXELS[3].reshape(6, 3) - train.mean(0)) / train.std(0)
    assert sample["inputs"].dtype == np.float32 and sample["inputs"].shape == (6, 3)
    assert np.allclose(sample["inputs"], expected, atol=1e-6)
    assert sample["labels"] == 0


def test_other_layouts(where, tmp_path):
    def columns(*names):
        dataset = load(make(where, names), cache=tmp_path / "cache")
        return {name: dataset[name][:] for name in ("split", "label") if name in dataset.features}

    assert columns("1.png", "2.png") == {}
    where = where.with_name("b" + where.suffix)
    assert columns("cat/1.png", "dog/1.png") == {"label": ["cat", "dog"]}
    where = where.with_name("c" + where.suffix)
    assert columns("test/1.png", "train/1.png") == {"split": ["test", "train"]}
    where = where.with_name("d" + where.suffix)
    assert columns("all/cat/1.png", "all/dog/1.png") == {"label": ["cat", "dog"]}
    where = where.with_name("e" + where.suffix)
    with pytest.raises(DataError, match="b.png: got a picture outside of the class folders"):
        columns("cat/a.png", "b.png")


def test_state(where, tmp_path):
    encoding = Pictures.fit(load(make(where, LAYOUT), cache=tmp_path / "cache"))
    again = from_state(json.loads(json.dumps(encoding.state())))
    rows = {"image": [{"bytes": png(PIXELS[0]), "path": None}]}
    assert np.array_equal(encoding.encode(rows)["inputs"], again.encode(rows)["inputs"])


def test_grey_and_resized(where, tmp_path):
    pictures = [png(PIXELS[0]), png(PIXELS[1, :, :2, 0]), png(PIXELS[2])]
    dataset = load(make(where, ["1.png", "2.png", "3.png"], pictures), cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"2\.png: got a picture of 2 x 2 pixels, allowed is 2 x 3"):
        Pictures.fit(dataset)
    encoding = Pictures.fit(dataset, size=(4, 4), resize="bilinear", channels=1)
    assert Examples(dataset, encoding)[1]["inputs"].shape == (16, 1)
    with pytest.raises(DataError, match="size: got None"):
        Pictures.fit(dataset, resize="box")
    with pytest.raises(DataError, match="resize: got 'best'"):
        Pictures.fit(dataset, size=(4, 4), resize="best")
    with pytest.raises(DataError, match="channels: got 2"):
        Pictures.fit(dataset, channels=2)


@pytest.mark.parametrize("data", [b"", b"no picture", png(PIXELS[0])[:-30]])
def test_a_broken_picture(where, tmp_path, data):
    make(where, ["1.png", "2.png"], [png(PIXELS[0]), data])
    dataset = load(where, cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"2\.png: got no whole picture") as error:
        Pictures.fit(dataset)
    assert str(where) in str(error.value)
    assert "object at 0x" not in str(error.value)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("place", ["name", "bytes"])
def test_a_broken_member_of_a_zip(tmp_path, compression, place):
    """Found where it is opened, and by `damaged`; the rest is as it was."""
    where = tmp_path / "all.zip"
    with zipfile.ZipFile(where, "w", compression) as archive:
        for number, pixels in enumerate(PIXELS):
            archive.writestr(f"{number}.png", png(pixels))
        at = archive.getinfo("2.png").header_offset + 30
    data = bytearray(where.read_bytes())
    data[at + (0 if place == "name" else 40)] ^= 1
    where.write_bytes(data)
    dataset = load(where, cache=tmp_path / "cache")
    assert len(dataset) == 4
    bad, messages = damaged(dataset, "image")
    assert bad.tolist() == [False, False, True, False]
    assert f"{where}/2.png: got no whole picture (no bytes, or damaged ones" in messages[0]
    with pytest.raises(DataError, match=r"2\.png: got no whole picture"):
        Pictures.fit(dataset)
    kept = Pictures.fit(dataset.select([0, 1, 3]))
    assert kept.encode({"image": [{"bytes": png(PIXELS[3]), "path": None}]})["inputs"].any()


def test_a_zip_with_a_password(tmp_path):
    where = make(tmp_path / "all.zip", ["1.png"])
    data = bytearray(where.read_bytes())
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(start) + flags] |= 1
    where.write_bytes(data)
    with pytest.raises(DataError, match=r"all\.zip: cannot be unpacked .*unpack it into a folder"):
        load(where, cache=tmp_path / "cache")


def test_sixteen_bits_are_refused(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 2), 60000, np.uint16)).save(stream, "png")
    make(tmp_path / "in", ["1.png"], [stream.getvalue()])
    with pytest.raises(DataError, match="1.png: got a picture of mode I;16"):
        Pictures.fit(load(tmp_path / "in", cache=tmp_path / "cache"))


def test_nothing_and_broken_zips(where, tmp_path):
    make(where, ["a.txt"], [b""])
    with pytest.raises(DataError, match="got no pictures"):
        load(where, cache=tmp_path / "cache")
    (tmp_path / "cut.zip").write_bytes(make(tmp_path / "b.zip", LAYOUT).read_bytes()[:-40])
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "inner.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"outer: got no pictures .*but inner\.zip: name that"):
        load(tmp_path / "outer", cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"cut\.zip: got no whole zip file"):
        load(tmp_path / "cut.zip", cache=tmp_path / "cache")


def test_pixels_of_an_array(tmp_path):
    np.savez(tmp_path / "a.npz", image=PIXELS)
    dataset = load(tmp_path / "a.npz", cache=tmp_path / "cache")
    encoding = Pictures.fit(dataset, size=(2, 3))
    assert np.allclose(
        encoding.encode({"image": [PIXELS[1].reshape(-1).tolist()]})["inputs"][0],
        (PIXELS[1].reshape(6, 3) - PIXELS.reshape(-1, 3).mean(0)) / PIXELS.reshape(-1, 3).std(0),
        atol=1e-6,
    )
    with pytest.raises(DataError, match="size: got None for column 'image'"):
        Pictures.fit(dataset)
    with pytest.raises(DataError, match=r"row 1, column 'image': got 18 values, allowed is 2 \* 2"):
        Pictures.fit(dataset, size=(2, 2))
