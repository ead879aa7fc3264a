"""Hub data sets, where the ``datasets`` library is installed."""

from __future__ import annotations

import pytest

from toolkit.data.hub import content_sha256, read_hub_dataset, rows_of_dataset
from toolkit.errors import DataError

datasets = pytest.importorskip("datasets")


def test_class_ids_become_names() -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "n": datasets.Value("int8"),
        }
    )
    table = {"text": ["007", "b", "c"], "label": [1, 0, 1], "n": [1, 2, 3]}
    dataset = datasets.Dataset.from_dict(table, features=features)
    rows = rows_of_dataset(dataset, "o/n", text_column="text", label_column="label")
    assert rows.texts is not None
    assert rows.labels is not None
    assert rows.texts.to_pylist() == ["007", "b", "c"]
    assert [rows.labels[row] for row in range(3)] == ["pos", "neg", "pos"]
    picked = rows_of_dataset(dataset.select([2, 0]), "o/n", text_column="text", label_column="label")
    assert picked.texts is not None
    assert picked.texts.to_pylist() == ["c", "007"]
    assert content_sha256(rows) != content_sha256(picked)
    with pytest.raises(DataError, match="no column 'sentence'"):
        rows_of_dataset(dataset, "o/n", text_column="sentence", label_column="label")


def test_offline_hub_id_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"nobody/nothing: data\.source: the data set cannot be loaded"):
        read_hub_dataset("nobody/nothing", text_column="text", label_column="label")


def test_lists_of_class_ids_become_lists_of_names() -> None:
    labels = datasets.Sequence(datasets.ClassLabel(names=["joy", "anger", "fear"]))
    features = datasets.Features({"text": datasets.Value("string"), "labels": labels})
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "labels": [[2, 0], []]}, features=features)
    rows = rows_of_dataset(
        dataset, "o/n", text_column="text", label_column=None, others={"labels": "data.label_column"}
    )
    assert [rows.others["labels"][row] for row in range(2)] == ['["fear", "joy"]', "[]"]
