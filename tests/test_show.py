"""sma-fast show: what is drawn, and that it is drawn."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from PIL import Image

from sma_fast import cli
from sma_fast.masking.sma import SMAMasking
from sma_fast.models import SMAConfig, SMAForPrediction, SMAForPretraining
from sma_fast.training import checkpoints, show_plots
from sma_fast.training.checkpoints import CheckpointError
from sma_fast.training.data import (
    ByteSequences,
    DataError,
    Pictures,
    TableColumns,
    Targets,
)
from sma_fast.training.options import DataOptions
from sma_fast.training.run import Encodings
from sma_fast.training.show import MOST, line, prepare, sign
from sma_fast.training.show_plots import BARS, LINE, LINES, PictureRow, TableRow, TextRow

TEXTS = ["CC(=O)Oc1ccccc1C(=O)O", "C", "CCO", "N#Cc1ccc(Br)cc1", "CC \tÄ", "C" * 61]
NAMES = ["energy", "mass", "phi", "a_name_that_is_longer_than_all_others", "eta"]
ENCODERS = ("cross_attention", "self_attention")
MASKS = [(encoder, mask) for encoder in ENCODERS for mask in ("guided", "random")]
SIZE = (6, 8)


def save(folder: Path, encodings: Encodings, encoder="cross_attention", mask="guided", **changes):
    """Returns a folder as training leaves it, with an untrained model."""
    masking = {"mask_ratio": 0.4, "num_per_query": 2, "mask_self": encoder == "self_attention"}
    sizes = {
        "input_type": encodings.inputs.input_type,
        "input_channels": getattr(encodings.inputs, "channels", 1),
        "max_position_embeddings": encodings.inputs.max_length,
        "encoder_type": encoder,
        "embedded_channels": 16,
        "latent_channels": 16,
        "num_latents": 1400,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "decoder_heads": 1,
        "initializer_range": 0.3,
        "pe_initializer_range": 0.3,
        "share_embedding_weights": False,
        "masking": SMAMasking(**masking, mask=mask),
    }
    torch.manual_seed(0)
    kind = SMAForPretraining if encodings.labels is None else SMAForPrediction
    folder.mkdir()
    kind(SMAConfig(**{**sizes, **changes})).save_pretrained(folder)
    encodings.save(folder)
    checkpoints.mark_complete(folder)
    return folder


def texts(tmp_path, rows=TEXTS, length=64, **options):
    file = tmp_path / "molecules.csv"
    file.write_text("smiles,other\n" + "".join(f"{row},1\n" for row in rows))
    encodings = Encodings(ByteSequences("smiles", length))
    return save(tmp_path / "molecule", encodings, **options), source(tmp_path, file)


def table(tmp_path, names=NAMES, rows=4, **options):
    file = tmp_path / "events.csv"
    values = np.random.default_rng(0).normal(3.0, 50.0, (rows, len(names)))
    lines = [",".join(names), *(",".join(f"{v:.6f}" for v in row) for row in values)]
    file.write_text("\n".join(lines) + "\n")
    encoding = TableColumns(names, names, 1.0 + np.arange(len(names)), 50.0 + np.arange(len(names)))
    return (
        save(tmp_path / "physics", Encodings(encoding), **options),
        source(tmp_path, file),
        values,
    )


def pictures(tmp_path, channels=3, **options):
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        pixels = rng.integers(0, 256, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name / "0.png")
    mean = [100.0, 110.0, 120.0][:channels]
    encoding = Pictures("image", SIZE, channels, None, mean, [60.0] * channels)
    return save(tmp_path / "image", Encodings(encoding), **options), source(tmp_path, folder)


def source(tmp_path: Path, path: Path, **options) -> DataOptions:
    return DataOptions((str(path),), cache=str(tmp_path / "cache"), **options)


def check(row, encoder, mask, tokens):
    assert row.mask.shape == (tokens,)
    assert row.masked == round(0.4 * tokens)
    assert (row.loss is None) == (row.masked == 0)
    if mask == "random":
        assert row.scores is None and row.queries == 0 and not len(row.drawn)
        return
    assert row.scores.shape == (tokens,) and row.scores.mean() == pytest.approx(1)
    first = np.zeros(tokens, bool)
    if encoder == "self_attention":
        assert len(row.drawn) == row.queries
        first[row.drawn] = True
        assert row.mask[row.drawn].all() or row.queries > row.masked  # mask_self
    else:
        assert row.queries >= 1 and not len(row.drawn)
    rest = row.mask & ~first
    if rest.any() and not row.mask.all():
        assert row.scores[rest].min() >= row.scores[~row.mask].max()


@pytest.mark.parametrize("encoder, mask", MASKS)
def test_a_text(tmp_path, encoder, mask):
    folder, data = texts(tmp_path, encoder=encoder, mask=mask)
    title, rows = prepare(folder, data, chosen=range(1, len(TEXTS) + 1))
    assert title == f"molecule: {mask} masks, 40% of the tokens"
    for number, (row, text) in enumerate(zip(rows, TEXTS, strict=True), start=1):
        assert isinstance(row, TextRow)
        assert (row.number, row.place) == (number, f"molecules.csv, line {number + 1}")
        check(row, encoder, mask, len(text.encode()))
        assert row.true == [sign(byte + 6) for byte in text.encode()]
        assert [p is not None for p in row.predicted] == row.mask.tolist()
        assert 0 <= row.right <= row.masked
        assert line(row).startswith(f"row {number} (molecules.csv, line {number + 1}): ")
    assert rows[4].true == ["C", "C", "␣", "→", "c3", "84"]
    assert line(rows[1]) == "row 2 (molecules.csv, line 3): 1 tokens, 0 masked, loss -"


@pytest.mark.parametrize("encoder, mask", MASKS)
def test_a_table_is_shown_in_its_units(tmp_path, encoder, mask):
    folder, data, values = table(tmp_path, encoder=encoder, mask=mask)
    for row, expected in zip(prepare(folder, data)[1], values, strict=True):
        assert isinstance(row, TableRow) and row.names == NAMES
        check(row, encoder, mask, len(NAMES))
        np.testing.assert_allclose(row.true, expected, atol=1e-4)
        assert (np.isnan(row.predicted) == ~row.mask).all()
        off = (row.predicted - row.true)[row.mask] / row.std[row.mask]
        assert (off**2).mean() == pytest.approx(row.loss, rel=1e-3)


@pytest.mark.parametrize("encoder, mask", MASKS)
@pytest.mark.parametrize("channels", (1, 3))
def test_a_picture(tmp_path, encoder, mask, channels):
    folder, data = pictures(tmp_path, channels, encoder=encoder, mask=mask)
    rows = prepare(folder, data, rows=2)[1]
    assert [row.place for row in rows] == ["pictures/cat/0.png", "pictures/dog/0.png"]
    for row in rows:
        assert isinstance(row, PictureRow)
        check(row, encoder, mask, SIZE[0] * SIZE[1])
        assert row.true.shape == row.predicted.shape == (*SIZE, channels)
        hidden = row.mask.reshape(SIZE)
        np.testing.assert_array_equal(row.true[~hidden], row.predicted[~hidden])
        assert (row.true[hidden] != row.predicted[hidden]).any()
        for pixels in (row.true, row.predicted):
            assert pixels.min() >= 0 and pixels.max() <= 1
    if channels == 3:
        file = np.asarray(Image.open(tmp_path / "pictures" / "cat" / "0.png")) / 255
        np.testing.assert_allclose(rows[0].true, file, atol=1e-5)


def test_damaged_pictures_are_left_out(tmp_path, capsys):
    folder, data = pictures(tmp_path)
    cat = tmp_path / "pictures" / "cat" / "0.png"
    cat.write_bytes(cat.read_bytes()[:-40])
    with pytest.raises(DataError, match="--skip-damaged"):
        prepare(folder, data, rows=2)
    rows = prepare(folder, dataclasses.replace(data, skip_damaged=True), rows=1)[1]
    assert [row.place for row in rows] == ["pictures/dog/0.png"]
    assert "1 damaged pictures left out" in capsys.readouterr().err


def test_pictures_of_any_range(tmp_path):
    values = np.random.default_rng(0).normal(0, 3, (2, SIZE[0] * SIZE[1])).astype(np.float32)
    np.save(tmp_path / "digits.npy", values)
    folder = save(tmp_path / "m", Encodings(Pictures("values", SIZE, 1, None, [0.0], [3.0])))
    row = prepare(folder, source(tmp_path, tmp_path / "digits.npy"), chosen=[2])[1][0]
    assert row.place == "digits.npy, row 2"
    assert row.true.min() == 0 and row.true.max() == 1


def test_a_row_does_not_depend_on_the_others(tmp_path):
    folder, data = texts(tmp_path, encoder="self_attention")
    _, several = prepare(folder, data, chosen=[6, 1, 4, 1])
    assert [row.number for row in several] == [6, 1, 4]
    for row in several:
        alone = prepare(folder, data, chosen=[row.number])[1][0]
        assert alone.mask.tolist() == row.mask.tolist() and alone.loss == row.loss
    other = prepare(folder, data, chosen=[6], seed=1)[1][0]
    assert other.mask.tolist() != several[0].mask.tolist()


def test_rows_are_drawn_by_the_seed(tmp_path):
    folder, data = texts(tmp_path)
    numbers = [[row.number for row in prepare(folder, data, 3, seed=s)[1]] for s in (0, 0, 1, 2, 3)]
    assert numbers[0] == numbers[1] and len({tuple(n) for n in numbers}) > 1
    assert all(len(set(n)) == 3 and n == sorted(n) for n in numbers)


def test_columns_of_another_name_and_the_test_part(tmp_path):
    folder, _ = texts(tmp_path)
    file = tmp_path / "other.tsv"
    file.write_text("smi\tpart\nCCCC\ttrain\nCO\ttest\nCCN\tvalid\n")
    with pytest.raises(DataError, match="'smiles'.*'smi', 'part'"):
        prepare(folder, source(tmp_path, file), rows=1)
    data = source(tmp_path, file, inputs=("smi",), split_column="part")
    assert [row.place for row in prepare(folder, data, rows=1)[1]] == ["other.tsv, line 3"]


def test_what_does_not_fit_is_left_out(tmp_path):
    folder, data = texts(tmp_path, ["C" * 1300], 1300, encoder="self_attention")
    (row,) = prepare(folder, data, rows=1)[1]
    assert f"(the first {LINE * LINES} are drawn)" in show_plots._heading(row)
    show_plots.draw(tmp_path / "long.png", "long", [row])
    (tmp_path / "wide").mkdir()
    names = [f"column {i}" for i in range(BARS * 3)]
    folder, data, _ = table(tmp_path / "wide", names, 1)
    (row,) = prepare(folder, data, rows=1)[1]
    columns = show_plots._columns(row)
    assert len(columns) == BARS and row.mask[columns].all() and row.masked > BARS
    assert row.scores[columns].min() >= np.sort(row.scores[row.mask])[-BARS]
    show_plots.draw(tmp_path / "wide.png", "wide", [row])


@pytest.mark.parametrize("encoder, mask", MASKS)
@pytest.mark.parametrize("kind", (texts, table, pictures))
def test_the_command_writes_a_png(tmp_path, capsys, kind, encoder, mask):
    folder, data, *_ = kind(tmp_path, encoder=encoder, mask=mask)
    out = tmp_path / "new" / "masks.png"
    cache = ["--cache", str(tmp_path / "cache")]
    asked = ["show", str(folder), *data.source, *cache, "--out", str(out)]
    assert cli.main([*asked, "--row", "2", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert printed[0].startswith("row 2 (") and printed[1].startswith("row 1 (")
    assert printed[2] == f"{out}: 2 rows"
    assert [path.name for path in out.parent.iterdir()] == ["masks.png"]
    height, width, _ = image.imread(out).shape
    assert 350 < height < 3000 and 1000 < width < 3000
    written = out.read_bytes()
    assert cli.main([*asked, "--row", "2", "1"]) == 0 and out.read_bytes() == written


def test_colours_show_small_differences_and_survive_large_ones(tmp_path):
    def scale(*scores):
        none = {"queries": 1, "drawn": np.zeros(0, int), "true": [], "predicted": []}
        row = TextRow(
            number=1, place="", mask=np.zeros(len(scores)), loss=None, scores=scores, **none
        )
        norm, extend = show_plots.scale([row])
        return norm.vmin, norm.vmax, extend

    assert scale(1.0, 1.0) == (0.9, 1.1, "neither")
    low, high, extend = scale(*np.linspace(0.8, 1.2, 201), 150.0)
    assert 0.8 <= low < 0.81 and 1.19 < high < 1.21 and extend == "both"


@pytest.mark.parametrize(
    "given, message",
    [
        (["--rows", "7"], "rows: got 7, allowed is at most 6"),
        (["--rows", str(MOST + 1)], f"rows: got {MOST + 1}, allowed is 1 to {MOST}"),
        (["--row", "1", "7"], "row: got 7, allowed is 1 to 6"),
        (["--seed", "-1"], "seed: got -1, allowed is 0 to"),
        (["--out", "masks.pdf"], "out: got masks.pdf, allowed is a name that ends with .png"),
        (["--input", "smiles", "other"], "input: got 2 columns, allowed is 1"),
        (["--input", "smile"], "'smile', allowed is one of those there are: 'smiles', 'other'"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    folder, data = texts(tmp_path)
    cache = ["--cache", str(tmp_path / "cache")]
    assert cli.main(["show", str(folder), *data.source, *cache, *given]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.p*"))


def test_rows_or_row(capsys):
    with pytest.raises(SystemExit):
        cli.main(["show", "m", "d.csv", "--rows", "1", "--row", "2"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_bad_rows(tmp_path):
    folder, data = texts(tmp_path, ["CC", "", "C" * 65])
    with pytest.raises(DataError, match="molecules.csv, line 3, column 'smiles': got an empty"):
        prepare(folder, data, chosen=[2])
    with pytest.raises(DataError, match="line 4, column 'smiles': got 65 bytes, allowed is at mos"):
        prepare(folder, data, chosen=[3])
    assert len(prepare(folder, data, chosen=[1])[1]) == 1  # only what is drawn is read


def test_bad_checkpoints(tmp_path):
    folder, data, values = table(tmp_path)
    with pytest.raises(ValueError, match="input: got mass, allowed is energy, mass, phi"):
        prepare(folder, source(tmp_path, data.source[0], inputs=("mass",)))
    with pytest.raises(CheckpointError, match="nowhere"):
        prepare(tmp_path / "nowhere", data)
    labels = Targets(["mass"], [0.0], [1.0])
    encodings = Encodings(TableColumns(NAMES, NAMES, [0] * 5, [1] * 5), labels)
    tuned = save(tmp_path / "tuned", encodings, num_labels=1, problem_type="regression")
    with pytest.raises(CheckpointError, match="tuned: holds a fine-tuned model.*name the folder"):
        prepare(tuned, data)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="5 bytes"):
        prepare(folder, data)


def test_an_old_picture_survives_a_full_disk(tmp_path, monkeypatch, capsys):
    folder, data = texts(tmp_path)
    out = tmp_path / "masks.png"
    out.write_bytes(b"old")

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache = ["--cache", str(tmp_path / "cache")]
    assert cli.main(["show", str(folder), *data.source, *cache, "--out", str(out)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert out.read_bytes() == b"old" and not list(tmp_path.glob(".masks*"))
