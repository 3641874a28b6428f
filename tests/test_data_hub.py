"""Names of the Hugging Face hub, with a hub that answers from memory."""

import datasets
import pytest

from sma_fast.training.data import (
    ByColumn,
    ByteSequences,
    ClassLabels,
    DataError,
    Examples,
    load,
    load_splits,
)


@pytest.fixture
def hub(monkeypatch):
    calls = []
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )

    def table(texts, labels):
        return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)

    found = datasets.DatasetDict(
        {"train": table(["A", "BC"], [0, 1]), "validation": table(["D"], [-1])}
    )

    def load_dataset(name, config=None, *, split=None, cache_dir=None):
        calls.append((name, config, split))
        if name == "jxie/none":
            raise datasets.exceptions.DatasetNotFoundError("not there")
        if name == "jxie/other":
            return datasets.DatasetDict(
                a=found["train"], b=found["train"].remove_columns("text").add_column("text", [1, 2])
            )
        return found if split is None else found[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_splits_become_a_column(hub, tmp_path):
    dataset = load("jxie/pfam", cache=tmp_path)
    assert dataset["text"][:] == ["A", "BC", "D"]
    assert dataset["split"][:] == ["train", "train", "validation"]
    assert hub == [("jxie/pfam", None, None)]
    parts = load_splits(
        "jxie/pfam",
        ByColumn("split", {"train": "train", "valid": "validation"}),
        cache=tmp_path,
    )
    assert {name: len(part) for name, part in parts.items()} == {"train": 2, "valid": 1}


def test_one_part_and_a_configuration(hub, tmp_path):
    dataset = load("jxie/higgs", config="small", part="train", cache=tmp_path)
    assert len(dataset) == 2
    assert hub == [("jxie/higgs", "small", "train")]


def test_any_name_with_the_format_given(hub, tmp_path):
    assert len(load("imdb", format="hub", cache=tmp_path)) == 3


def test_encoded_as_local_files_are(hub, tmp_path):
    dataset = load("jxie/guacamol", cache=tmp_path, inputs="text", max_length=1)
    labels = ClassLabels.fit(dataset)
    assert labels.names == ["no", "yes"]
    examples = Examples(dataset, ByteSequences("text", 4), labels)
    assert examples[0]["inputs"].tolist() == [ord("A") + 6]
    with pytest.raises(DataError, match="jxie/guacamol, validation, row 1, column 'label': got no"):
        examples.check()


def test_refused(hub, tmp_path):
    with pytest.raises(DataError, match="jxie/none: got no such file here, and the Hugging Face"):
        load("jxie/none", cache=tmp_path)
    with pytest.raises(DataError, match="splits a, b with columns that do not fit"):
        load("jxie/other", cache=tmp_path)
    with pytest.raises(DataError, match="got 2 names"):
        load(["jxie/a", "jxie/b"], cache=tmp_path)
