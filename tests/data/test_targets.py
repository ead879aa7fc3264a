"""Label sets and numbers: the values of every file format, and a line for every value that is neither."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from toolkit.config.schema import DataSettings
from toolkit.data import table_cache
from toolkit.data.load import load_data
from toolkit.data.parts import LoadedData
from toolkit.data.targets import strata
from toolkit.errors import DataError

WriteFile = Callable[[str, "bytes | str"], str]
SETS: list[list[str]] = [["spam"], ["ham", "urgent"], [], ["spam", "urgent"], ["ham"]] * 8
SEVERAL = {"problem_type": "multi_label_classification", "label_column": "labels"}
NUMBERS = {"problem_type": "regression", "label_column": "score"}
NAMES = ("ham", "spam", "urgent")


def by_text(data: LoadedData) -> dict[str, list[float]]:
    found = {}
    for part in data.parts.values():
        assert part.texts is not None
        assert part.labels is not None
        found |= dict(zip(part.texts.to_pylist(), part.labels.tolist(), strict=True))
    return found


def check_sets(data: LoadedData) -> None:
    assert data.label_map is not None
    assert data.label_map.names == NAMES
    assert by_text(data) == {f"text {i}": [int(name in row) for name in NAMES] for i, row in enumerate(SETS)}
    assert data.train.labels is not None
    assert data.train.labels.dtype == np.uint8
    for name, part in data.parts.items():
        assert data.counts[name] == dict(zip(NAMES, part.labels.sum(0).tolist(), strict=True))


def csv_of(sets: list[str], column: str = "labels") -> str:
    cells = ["".join(['"', value.replace('"', '""'), '"']) for value in sets]
    return f"text,{column}\n" + "".join(f"text {i},{cell}\n" for i, cell in enumerate(cells))


def test_lists_in_csv_jsonl_and_parquet(write: WriteFile, tmp_path: Path) -> None:
    separated = write("a.csv", csv_of([" | ".join(row) for row in SETS]))
    check_sets(load_data(DataSettings(source=separated, **SEVERAL)))
    semicolons = write("b.csv", csv_of([";".join(row) for row in SETS]))
    check_sets(load_data(DataSettings(source=semicolons, label_separator=";", **SEVERAL)))
    as_json = write("c.csv", csv_of([json.dumps(row) for row in SETS]))
    check_sets(load_data(DataSettings(source=as_json, **SEVERAL)))
    lines = [json.dumps({"text": f"text {i}", "labels": row}) for i, row in enumerate(SETS)]
    check_sets(load_data(DataSettings(source=write("d.jsonl", "\n".join(lines)), **SEVERAL)))
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(40)], "labels": SETS}), tmp_path / "e.parquet")
    check_sets(load_data(DataSettings(source=str(tmp_path / "e.parquet"), **SEVERAL)))


def test_columns_of_0_and_1(write: WriteFile, tmp_path: Path) -> None:
    settings = {"problem_type": "multi_label_classification", "label_columns": list(NAMES)}
    rows = [",".join([f"text {i}", *(str(int(name in row)) for name in NAMES)]) for i, row in enumerate(SETS)]
    path = write("a.csv", "text,ham,spam,urgent\n" + "\n".join(rows))
    check_sets(load_data(DataSettings(source=path, **settings)))
    columns = {name: [name in row for row in SETS] for name in NAMES}
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(40)], **columns}), tmp_path / "b.parquet")
    check_sets(load_data(DataSettings(source=str(tmp_path / "b.parquet"), **settings)))


def test_sets_come_back_from_the_table_cache(write: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cache, "CACHE_BYTES", 1)
    path = write("a.csv", csv_of(["|".join(row) for row in SETS]))
    for _ in range(2):
        check_sets(load_data(DataSettings(source=path, **SEVERAL)))


def test_numbers(write: WriteFile, tmp_path: Path) -> None:
    expected = {f"text {i}": [np.float32(i / 8 - 1).item()] for i in range(40)}
    path = write("a.csv", csv_of([str(i / 8 - 1) for i in range(40)], "score"))
    data = load_data(DataSettings(source=path, **NUMBERS))
    assert by_text(data) == expected
    assert data.label_map is not None
    assert data.label_map.names == ("score",)
    assert data.counts == {}
    lines = [json.dumps({"text": f"text {i}", "score": i / 8 - 1}) for i in range(40)]
    assert by_text(load_data(DataSettings(source=write("b.jsonl", "\n".join(lines)), **NUMBERS))) == expected
    table = pa.table(
        {"text": [f"text {i}" for i in range(40)], "score": [i / 8 - 1 for i in range(40)], "n": range(40)}
    )
    pq.write_table(table, tmp_path / "c.parquet")
    two = DataSettings(source=str(tmp_path / "c.parquet"), problem_type="regression", label_columns=["score", "n"])
    assert by_text(load_data(two)) == {f"text {i}": [*expected[f"text {i}"], float(i)] for i in range(40)}


@pytest.mark.parametrize(
    ("cells", "settings", "line"),
    [
        (["1", "x", "x"], NUMBERS, "a.csv:3: score: 'x', in 2 rows is not a finite number (a finite number)"),
        (["1", "nan", "2"], NUMBERS, "a.csv:3: score: 'nan' is not a finite number (a finite number)"),
        (["1", "", "2"], NUMBERS, "a.csv:3: score: '' is not a finite number (a finite number)"),
        (["1", "1,5", "2"], NUMBERS, "a.csv:3: score: '1,5' is not a finite number (a finite number)"),
        (["3", "3", "3"], NUMBERS, "a.csv: data.train: every training row has score 3 (rows that differ)"),
        (["ham", "hma|spam", ""], SEVERAL | {"labels": ["ham", "spam"]},
         "a.csv:3: labels: 'hma' is not some of ham, spam (some of ham, spam; did you mean ham?)"),
        (["ham", "[1.5]", ""], SEVERAL | {"labels": ["ham", "spam"]},
         "a.csv:3: labels: '[1.5]' is not some of ham, spam (some of ham, spam)"),
        (["ham", "ham", "ham"], SEVERAL, "a.csv: data.train: every training row has the labels ham (rows that differ)"),
        (["1", "2", "0"], {"problem_type": "multi_label_classification", "label_columns": ["c"]},
         "a.csv:3: c: '2' is not 0 or 1 (0 or 1)"),
    ],
)  # fmt: skip
def test_a_wrong_value_has_its_line(write, monkeypatch, tmp_path, cells, settings, line) -> None:
    column = settings.get("label_column", "c")
    write("a.csv", csv_of(cells, column))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_data(DataSettings(source="a.csv", split={"train": 1.0, "validation": 0.0, "test": 0.0}, **settings))
    assert str(caught.value) == line


def test_files_without_such_columns(write: WriteFile, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[5, 6, 1], [7, 8, 0]]))
    with pytest.raises(DataError, match=r"a \.npy file has no column 'labels'"):
        load_data(DataSettings(source=str(tmp_path / "a.npy"), **SEVERAL))
    columns = {"problem_type": "multi_label_classification", "label_columns": ["a", "b"]}
    np.save(tmp_path / "a.npy", np.array([[5, 6, 1, 0], [7, 8, 0, 2]]))
    with pytest.raises(DataError, match=r"a\.npy:2: b: '2' is not 0 or 1"):
        load_data(DataSettings(source=str(tmp_path / "a.npy"), **columns))
    path = write("a.csv", csv_of(["a", "b"]))
    with pytest.raises(DataError, match=r"data.label_columns: no column 'x'.*the columns are 'text', 'labels'"):
        load_data(DataSettings(source=path, problem_type="regression", label_columns=["labels", "x"]))
    lines = write("b.jsonl", '{"text": "a", "labels": null}\n{"text": "b"}\n{"text": "c", "labels": ["a"]}')
    with pytest.raises(
        DataError, match=r"b.jsonl:1: labels: null.*\n.*b.jsonl:2: data.label_column: no column 'labels'"
    ):
        load_data(DataSettings(source=lines, **SEVERAL))


def test_a_label_that_only_the_test_file_has_is_refused(write: WriteFile) -> None:
    train, test = write("a.csv", csv_of(["a", "b", "a|b"])), write("b.csv", "text,labels\nx,c\ny,a\n")
    other = write("c.csv", "text,labels\nx,a\n")
    with pytest.raises(DataError, match=r"data.test: label 'c' occurs in test but never in train"):
        load_data(DataSettings(train=train, test=test, validation=other, duplicates="allow", **SEVERAL))


def test_numbers_far_from_what_a_head_gives_are_warned_of(write: WriteFile) -> None:
    path = write("a.csv", csv_of([str(100 + i) for i in range(40)], "score"))
    [warning] = load_data(DataSettings(source=path, **NUMBERS)).warnings
    assert "score is 1" in warning


def test_every_part_has_its_share_of_rare_labels_and_high_numbers(write: WriteFile) -> None:
    rare = ["a|rare" if i % 10 == 0 else "a" if i % 2 else "b" for i in range(200)]
    data = load_data(DataSettings(source=write("a.csv", csv_of(rare)), **SEVERAL))
    assert {name: counts["rare"] for name, counts in data.counts.items()} == {"train": 14, "validation": 2, "test": 4}
    numbers = write("b.csv", csv_of([str(i) for i in range(200)], "score"))
    parts = load_data(DataSettings(source=numbers, **NUMBERS)).parts
    assert [int((part.labels >= 180).sum()) for part in parts.values()] == [14, 2, 4]


def test_strata() -> None:
    sets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0]], dtype=np.uint8)
    assert strata(sets).tolist() == [0, 1, 3, 2, 0]
    assert np.bincount(strata(np.arange(300, dtype=np.float32)[:, None])).tolist() == [30] * 10
    assert np.bincount(strata(np.arange(40, dtype=np.float32)[:, None])).tolist() == [20, 20]
    assert strata(np.array([2, 0, 1])).tolist() == [2, 0, 1]


def test_texts_with_two_label_sets_are_listed(write: WriteFile) -> None:
    rows = [f"text {i},{'|'.join(row)}" for i, row in enumerate(SETS)]
    rows += ["text 6,urgent|ham", "text 1,spam", "text 6,ham|urgent", "text 1,spam"]
    path = write("a.csv", "text,labels\n" + "\n".join(rows))
    assert load_data(DataSettings(source=path, **SEVERAL)).warnings == [
        f"{path}: text: 4 of 44 rows repeat an earlier text",
        f"{path}:3: label: 1 texts occur with two labels or more (one label for a text)",
        f"{path}:3: label: 'ham|urgent' here, 'spam' in {path}:43",
    ]
