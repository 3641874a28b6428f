"""Which rows, columns and models a run reads; labels stay out of inputs, parts of each other."""

import dataclasses
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sma_fast import cli
from sma_fast.training import run
from sma_fast.training.inputs import rows_to_read
from sma_fast.training.options import DataOptions, TrainOptions
from sma_fast.training.pretrained import preset_of
from sma_fast.training.show import show

TINY = {
    "embedded_channels": 16,
    "latent_channels": 16,
    "qk_channels": 16,
    "decoder_channels": 16,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 2,
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a CSV of 100 rows, the labels of which the other columns say nothing about."""
    path = tmp_path_factory.mktemp("run") / "table.csv"
    rng = np.random.default_rng(0)
    lines = ["a,b,c,part,y"]
    for row in range(100):
        part = "train" if row < 80 else "test"
        cells = [f"{x:.3f}" for x in rng.normal(size=3)]
        lines.append(",".join([*cells, part, str(int(row % 80 >= 40))]))  # sorted by label
    path.write_text("\n".join(lines) + "\n")
    return path


def data(table: Path, **changes: object) -> DataOptions:
    return DataOptions((str(table),), cache=str(table.parent / "cache"), **changes)


def options(out: Path, **changes: object) -> TrainOptions:
    given = {"preset": "physics", "scale": "small", "batch_size": 16, "steps": 2}
    return TrainOptions(out=out, **({"model": TINY, "progress_bar": False} | given | changes))


def test_labels_never_are_inputs(table: Path, tmp_path: Path) -> None:
    run.pretrain(options(tmp_path / "all"), data(table, split_column="part"))
    with pytest.raises(run.RunError, match=r"reads y as input.*pretrain again with --exclude y"):
        run.finetune(
            options(tmp_path / "leak"),
            data(table, split_column="part"),
            ("y",),
            "classification",
            tmp_path / "all",
        )
    run.pretrain(options(tmp_path / "without"), data(table, split_column="part", exclude=("y",)))
    assert run.Encodings.read(tmp_path / "without").inputs.columns == ["a", "b", "c"]
    results = run.finetune(
        options(tmp_path / "fine"),
        data(table, split_column="part"),
        ("y",),
        "classification",
        tmp_path / "without",
    )
    assert results["test"]["accuracy"] < 1
    with pytest.raises(run.RunError, match="labels: got y, which --input names as an input too"):
        run.finetune(
            options(tmp_path / "both"),
            data(table, split_column="part", inputs=("a", "y")),
            ("y",),
            "classification",
        )


def test_inputs_are_those_of_the_checkpoint(table: Path, tmp_path: Path) -> None:
    run.pretrain(options(tmp_path / "ab"), data(table, inputs=("a", "b")))
    other = data(table, inputs=("a", "c"))
    message = "inputs: got a, c, allowed is a, b, what the checkpoint was trained on"
    with pytest.raises(run.RunError, match=message):
        run.evaluate(tmp_path / "ab", other)
    with pytest.raises(run.RunError, match=message):
        run.finetune(options(tmp_path / "fine"), other, ("y",), "classification", tmp_path / "ab")
    with pytest.raises(run.RunError, match=r"size: got \(4, 4\), allowed is for pictures only"):
        run.evaluate(tmp_path / "ab", data(table, size=(4, 4)))
    assert "loss" in run.evaluate(tmp_path / "ab", data(table, inputs=("a", "b")))


def test_parts(table: Path) -> None:
    def rows(**changes: object) -> dict[str, set[int]]:
        parts = run.open_parts(data(table, **changes))
        return {name: set(part["__line__"]) for name, part in parts.items()}

    by_column = rows(split_column="part")  # no validation part: cut from train
    assert by_column["test"] == set(range(82, 102))
    assert len(by_column["valid"]) == 4 and len(by_column["train"]) == 76
    assert not by_column["valid"] & by_column["test"]
    assert set(rows(split_column="part", validation_share=0.0)) == {"train", "test"}
    own_test = rows(test=str(table))
    assert len(own_test["valid"]) == 5 and len(own_test["train"]) == 95
    assert {name: len(part) for name, part in rows(test_share=0.2).items()} == {
        "train": 75,
        "valid": 5,
        "test": 20,
    }
    for refused in (
        {"test_share": 0.1, "split_column": "part"},
        {"test_share": 0.1, "test": "x"},
        {"validation_share": 0.1, "validation": "x"},
    ):
        with pytest.raises(ValueError, match="_share: allowed without"):
            data(table, **refused)


def test_parts_by_any_value_and_a_train_part(table: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.csv"
    rows = ["a,part", *(f"{i},{i % 3}" for i in range(30))]
    numbers.write_text("\n".join(rows) + "\n")
    arguments = [
        "--cache",
        table.parent / "cache",
        "--out",
        tmp_path / "out",
        "--preset",
        "physics",
    ]
    arguments += ["--scale", "small", "--steps", "1", "--batch-size", "4", "--set"]
    arguments += [f"{name}={value}" for name, value in TINY.items()]
    arguments += ["--split-column", "part", "--parts", "train=0", "valid=1", "test=2"]
    assert cli.main([str(a) for a in ("pretrain", numbers, *arguments)]) == 0
    with pytest.raises(ValueError, match="parts: got 'foo', allowed is train, valid, test"):
        data(table, split_column="part", parts={"foo": "train"})
    with pytest.raises(run.RunError, match="split_column: got 'part', which has no train part"):
        run.pretrain(
            options(tmp_path / "none"), data(table, split_column="part", parts={"test": "train"})
        )


@pytest.mark.parametrize("more, counts", [({}, (57, 20)), ({"test_share": 0.1}, (68, 8))])
def test_folders_of_parts_stay_parts(more: dict, counts: tuple[int, int], tmp_path: Path) -> None:
    for number in range(80):
        part = "train" if number < 60 else "test"
        folder = tmp_path / "pictures" / part / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3), (number, 0, 0)).save(folder / f"{number}.png")
    source = DataOptions((str(tmp_path / "pictures"),), cache=str(tmp_path / "cache"), **more)
    parts = run.open_parts(source)
    assert (len(parts["train"]), len(parts["test"])) == counts
    if not more:
        assert {row["path"].split("/")[-3] for row in paths(parts["test"])} == {"test"}


def test_splits_of_sources_beside_others(tmp_path: Path) -> None:
    """Each source's own part of what it brings, or none at all."""
    for place, split, number in (("a", "train", 30), ("a", "test", 10), ("b", "valid", 6)):
        folder = tmp_path / place / split
        folder.mkdir(parents=True)
        for picture in range(number):
            Image.new("RGB", (3, 3), (picture, 0, 0)).save(folder / f"{picture}.png")

    def of(source: str, **more: str) -> DataOptions:
        more = {part: str(tmp_path / place) for part, place in more.items()}
        return DataOptions((str(tmp_path / source),), cache=str(tmp_path / "cache"), **more)

    parts = run.open_parts(of("a", validation="b"))
    assert {name: len(part) for name, part in parts.items()} == {"train": 30, "valid": 6}
    with pytest.raises(
        run.RunError, match="brings the splits train, test, allowed as source of the"
    ):
        run.open_parts(of("a", validation="a"))
    with pytest.raises(run.RunError, match=r"which has no test part \(valid\): name it with"):
        rows_to_read(of("b"))
    with pytest.raises(run.RunError, match=r"which has no train part \(valid\): name it with"):
        run._train_part(run.open_parts(of("b")), options(tmp_path), of("b"))


@pytest.mark.parametrize("kind", ["table", "sequences"])
def test_hub_names_with_splits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the published jxie/higgs and jxie/pfam are: nothing but the name is given."""

    def rows(number: int) -> datasets.Dataset:
        if kind == "table":
            columns = {name: [float(i % 7) for i in range(number)] for name in "abc"}
            return datasets.Dataset.from_dict({**columns, "y": [i % 2 for i in range(number)]})
        texts = ["MKVL" * (1 + i % 3) for i in range(number)]
        return datasets.Dataset.from_dict({"protein_seq": texts})

    found = datasets.DatasetDict(train=rows(60), test=rows(20))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    source = DataOptions(("jxie/made-up",), cache=str(tmp_path / "cache"))
    given = options(tmp_path / "out")
    if kind == "sequences":
        sizes = {"num_latents": 4, "v_channels": 16, "max_position_embeddings": 32}
        given = options(tmp_path / "out", preset="protein", model=TINY | sizes)
    run.pretrain(given, source)
    known = run.Encodings.read(tmp_path / "out").inputs
    assert known.columns == (["a", "b", "c", "y"] if kind == "table" else ["protein_seq"])
    saved_parts = json.loads((tmp_path / "out" / "data.json").read_text())
    assert saved_parts["train"]["rows"] == 57 and saved_parts["test"]["rows"] == 20
    assert "loss" in run.evaluate(tmp_path / "out", source)
    if kind == "table":
        fine = options(tmp_path / "fine")
        results = run.finetune(fine, source, ("y",), "classification")
        assert run.evaluate(tmp_path / "fine", source) == pytest.approx(results["test"])


def paths(rows: datasets.Dataset) -> list[dict]:
    return rows.cast_column("image", datasets.Image(decode=False))["image"]


def test_evaluate_cuts_the_test_part_as_training_did(table: Path, tmp_path: Path) -> None:
    rows = data(table, exclude=("part",), test_share=0.2)
    given = options(tmp_path / "out", steps=4)
    results = run.finetune(given, rows, ("y",), "classification")
    assert run.evaluate(tmp_path / "out", rows) == pytest.approx(results["test"])
    with pytest.raises(run.RunError, match="validation_share: allowed is neither"):
        run.evaluate(tmp_path / "out", data(table, exclude=("part",), validation_share=0.2))


def test_limited_rows_are_drawn_not_the_first(table: Path, tmp_path: Path) -> None:
    # the file is sorted by label: its first rows have one class only
    parts = data(table, split_column="part", inputs=("a", "b", "c"))
    limited = options(tmp_path / "out", limit_train=24)
    assert run.finetune(limited, parts, ("y",), "classification")["steps"] == 2
    train = run.open_parts(parts)["train"]
    chosen = [run.drawn_rows(train, 24, parts.split_seed)["__line__"] for _ in range(2)]
    assert list(chosen[0]) == list(chosen[1]) and len(chosen[0]) == 24
    assert list(run.drawn_rows(train, 24, 1)["__line__"]) != list(chosen[0])


def test_pictures_are_resized_on_request(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 255, (6 + number % 3, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    sizes = TINY | {"num_latents": 4, "v_channels": 16, "decoder_heads": 2}
    given = TrainOptions(
        out=tmp_path / "out",
        preset="image",
        scale="small",
        batch_size=8,
        steps=1,
        model=sizes,
        masking={"num_queries": 2},
        progress_bar=False,
    )
    source = DataOptions(
        (str(folder),), cache=str(tmp_path / "cache"), resize="bilinear", size=(4, 5)
    )
    run.pretrain(given, source)
    assert run.Encodings.read(tmp_path / "out").inputs.max_length == 20


def test_an_asked_warm_up_is_kept(table: Path, tmp_path: Path) -> None:
    parts = {"train": list(range(64))}
    for asked, expected in ((None, 2), (9, 9), (0, 0)):
        given = options(tmp_path / "out", steps=10, warmup_steps=asked)
        trainer = run._trainer(
            run.SMAForPretraining(given.config()), given, parts, run.Encodings(None), False
        )
        assert trainer.args.warmup_steps == expected


def test_evaluation_does_not_depend_on_its_batches(table: Path, tmp_path: Path) -> None:
    """Every row has masks of its own, and the loss is a mean over all masked tokens."""
    given = options(tmp_path / "out", save_steps=1)
    results = run.pretrain(given, data(table, split_column="part", inputs=("a", "b", "c")))
    step = results["validation"][-1]
    rows = table.read_text().splitlines()
    parts = run.open_parts(data(table, split_column="part"))
    kept = sorted(parts["valid"]["__line__"])
    valid = tmp_path / "valid.csv"
    valid.write_text("\n".join([rows[0], *(rows[line - 1] for line in kept)]) + "\n")
    for name in ("loss", "guided_loss"):
        losses = [run.evaluate(tmp_path / "out", data(valid), size)[name] for size in (1, 3, 64)]
        assert losses == pytest.approx([step[name]] * 3, rel=1e-6)
        losses = [run.evaluate(tmp_path / "out", data(table), size)[name] for size in (7, 100)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_validation_compares_masks(table: Path, tmp_path: Path) -> None:
    """A model scores the same under random masks, whichever masks it was trained with."""
    rows = data(table, split_column="part", inputs=("a", "b", "c"))
    run.pretrain(options(tmp_path / "guided", learning_rate=1e-9), rows)
    run.pretrain(options(tmp_path / "random", learning_rate=1e-9, mask="random"), rows)
    guided, control = (run.evaluate(tmp_path / name, data(table)) for name in ("guided", "random"))
    assert set(guided) == {"loss", "guided_loss"} and set(control) == {"loss"}
    assert guided["loss"] == pytest.approx(control["loss"], rel=1e-5)
    assert guided["loss"] != pytest.approx(guided["guided_loss"], rel=1e-3)


def test_a_test_part_that_is_not_there(table: Path, tmp_path: Path) -> None:
    run.pretrain(options(tmp_path / "out"), data(table, inputs=("a", "b", "c")))
    with pytest.raises(run.RunError, match=r"split_column: got 'part', which has no test part"):
        run.evaluate(tmp_path / "out", data(table, split_column="part", parts={"valid": "test"}))


# ---- models that only save_pretrained wrote ------------------------------------------------------


def saved(folder: Path, **changes: object) -> Path:
    config = options(folder, **changes).config({"max_position_embeddings": 3})
    run.SMAForPretraining(config).save_pretrained(folder)
    return folder


def test_finetune_from_save_pretrained(table: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    rows = data(table, split_column="part", inputs=("a", "b", "c"))
    given = options(tmp_path / "out", learning_rate=1e-9)
    run.finetune(given, rows, ("y",), "classification", source)
    before = run.SMAForPretraining.from_pretrained(source)
    after = run.SMAForPrediction.from_pretrained(tmp_path / "out")
    for name, weight in before.encoder.state_dict().items():
        torch.testing.assert_close(after.encoder.state_dict()[name], weight, rtol=0, atol=1e-6)
    assert "accuracy" in run.evaluate(tmp_path / "out", data(table, split_column="part"))


def test_what_does_not_fit_save_pretrained(table: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    more = ("y",), "classification", source
    rows = data(table, split_column="part", exclude=("part",))
    with pytest.raises(run.RunError, match="preset: got 'protein', allowed is the one that"):
        run.finetune(options(tmp_path / "out", preset="protein"), rows, *more)
    four = tmp_path / "four.csv"
    lines = table.read_text().splitlines()
    four.write_text(
        "\n".join(["d," + lines[0], *(f"{i},{row}" for i, row in enumerate(lines[1:]))])
    )
    with pytest.raises(run.RunError, match="max_position_embeddings: got 3, allowed is at least 4"):
        run.finetune(options(tmp_path / "out"), data(four, split_column="part"), *more)
    (source / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"holds no SMAForPretraining: .*model.safetensors"):
        run.finetune(options(tmp_path / "out"), rows, *more)


def test_evaluate_and_show_of_save_pretrained(table: Path, tmp_path: Path) -> None:
    with pytest.raises(run.RunError, match=r"source: has no data.json, so nothing says how"):
        run.evaluate(saved(tmp_path / "source"), data(table))
    sizes = {"num_latents": 4, "v_channels": 16, "max_position_embeddings": 32}
    given = options(tmp_path, preset="protein", model=TINY | sizes)
    run.SMAForPretraining(given.config()).save_pretrained(tmp_path / "bytes")
    texts = tmp_path / "texts.csv"
    texts.write_text("sequence,other\n" + "MKVLAAGIVGLCA,1\n" * 5)
    source = DataOptions((str(texts),), cache=str(tmp_path / "cache"))
    assert set(run.evaluate(tmp_path / "bytes", source)) == {"loss", "guided_loss"}
    assert len(show(tmp_path / "bytes", source, tmp_path / "masks.png", rows=2)) == 3


def test_a_run_is_not_taken_for_save_pretrained(table: Path, tmp_path: Path) -> None:
    """What training wrote has to be whole, whichever of its files is left."""
    run.pretrain(options(tmp_path / "out", save_steps=1), data(table, inputs=("a", "b", "c")))
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        for name in ("data.json", "complete.json"):
            (folder / name).unlink()
        with pytest.raises(ValueError, match=r"has no complete.json"):
            run.finetune(
                *(options(tmp_path / "new"), data(table, exclude=("part",))),
                *(("y",), "classification", folder),
            )


@pytest.mark.parametrize(
    "changes, more, message",
    [
        ({"masking": {"mask_ratio": 0.3}}, {}, "masking: allowed in pretraining only"),
        ({}, {"alphabet": "ABC"}, "alphabet: got 'ABC', allowed is for sequences only"),
        ({}, {"too_long": "truncate"}, "too_long: got 'truncate', allowed is for sequences"),
        ({}, {"size": (3, 3)}, "size: got .*, allowed is for pictures only"),
        ({}, {"min_length": 3}, "min_length: got 3, allowed is for sequences only"),
        ({"preset": "protein"}, {"resize": "bilinear"}, "resize: got 'bilinear', allowed is for"),
    ],
)
def test_options_that_mean_nothing(changes: dict, more: dict, message: str, tmp_path: Path) -> None:
    nowhere = DataOptions(("missing.csv",), **more)
    with pytest.raises(run.RunError, match=message):
        run.finetune(options(tmp_path / "out", **changes), nowhere, ("y",), "classification")


def test_patience_without_validation(table: Path, tmp_path: Path) -> None:
    rows = data(table, inputs=("a", "b", "c"), validation_share=0.0)
    with pytest.raises(run.RunError, match="patience: allowed with a validation part only"):
        run.finetune(options(tmp_path / "out", patience=1), rows, ("y",), "classification")
    with pytest.raises(run.RunError, match="patience: allowed in fine-tuning only"):
        run.pretrain(options(tmp_path / "out", patience=1), rows)


def test_a_column_that_the_checkpoint_reads(table: Path, tmp_path: Path) -> None:
    run.pretrain(options(tmp_path / "out"), data(table, inputs=("a", "b", "c")))
    with pytest.raises(run.RunError, match="exclude: got a, which the checkpoint was trained to"):
        run.evaluate(tmp_path / "out", data(table, exclude=("a", "part")))


def test_a_pretrained_encoder_stays_what_it_is(table: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    other = dataclasses.replace(
        options(tmp_path / "out"), model=TINY | {"num_self_attention_heads": 4}
    )
    rows = data(table, split_column="part", inputs=("a", "b", "c"))
    with pytest.raises(run.RunError, match="num_self_attention_heads: got 4, allowed is 2"):
        run.finetune(other, rows, ("y",), "classification", source)


def test_pretraining_keeps_the_last_weights(table: Path, tmp_path: Path) -> None:
    given = options(
        tmp_path / "out", steps=3, save_steps=1, learning_rate=0.1, scheduler="constant"
    )
    results = run.pretrain(given, data(table, inputs=("a", "b", "c")))
    losses = [entry["loss"] for entry in results["validation"]]
    assert losses[-1] != min(losses)  # else this test says nothing
    weights, last = (
        load_file(tmp_path / "out" / name / "model.safetensors") for name in ("", "checkpoint-3")
    )
    assert all(torch.equal(weights[name], last[name]) for name in weights)


def test_a_finished_run_is_left_alone(table: Path, tmp_path: Path) -> None:
    rows = data(table, inputs=("a", "b", "c"))
    results = run.pretrain(options(tmp_path / "out"), rows)
    file = tmp_path / "out" / "results.json"
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert run.pretrain(options(tmp_path / "out", resume=True), rows) == results
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    (tmp_path / "out" / "complete.json").unlink()  # killed before its end
    again = run.pretrain(options(tmp_path / "out", resume=True), rows)
    assert again["tokens_per_second"] == results["tokens_per_second"]
    assert 0 < again["seconds"] <= results["seconds"]


def test_preset_of_a_pretrained_model(table: Path, tmp_path: Path) -> None:
    run.pretrain(options(tmp_path / "out", save_steps=1), data(table, exclude=("part", "y")))
    names = {"preset": "physics", "scale": "small"}
    assert preset_of(tmp_path / "out") == preset_of(tmp_path / "out" / "checkpoint-1") == names
    assert preset_of(saved(tmp_path / "source")) == {}
    arguments = ["finetune", table, "--cache", table.parent / "cache", "--out", tmp_path / "fine"]
    arguments += ["--split-column", "part", "--label", "y", "--task", "classification"]
    arguments += ["--from", tmp_path / "out", "--steps", "1", "--batch-size", "16"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    asked = json.loads((tmp_path / "fine" / "run.json").read_text())["options"]
    assert {name: asked[name] for name in names} == names
