"""What is in a file comes out, exactly, whatever the format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.data import rows as rows_module
from toolkit.data.rows import Rows
from toolkit.data.sources import read_rows
from toolkit.errors import CapabilityError, DataError

WriteFile = Callable[[str, "bytes | str"], str]

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.text(CHARACTERS, min_size=1).filter(lambda text: not text.isspace())
TABLES = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pairs(rows: Rows) -> list[tuple[str, str]]:
    assert rows.texts is not None
    assert rows.labels is not None
    return [(text, rows.labels[row]) for row, text in enumerate(rows.texts.to_pylist())]


def read(path: str) -> Rows:
    return read_rows(path, text_column="text", label_column="label")[0]


@FUZZ
@given(table=TABLES)
def test_csv_round_trip(write: WriteFile, table: list[tuple[str, str]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *table])
    assert pairs(read(write("a.csv", buffer.getvalue()))) == table


@FUZZ
@given(table=TABLES)
def test_jsonl_and_parquet_round_trip(write: WriteFile, tmp_path: Path, table: list[tuple[str, str]]) -> None:
    lines = "".join(json.dumps({"label": label, "text": text}) + "\n" for text, label in table)
    assert pairs(read(write("a.jsonl", lines))) == table
    texts, labels = zip(*table, strict=True)
    pq.write_table(pa.table({"text": list(texts), "label": list(labels)}), tmp_path / "a.parquet")
    assert pairs(read(str(tmp_path / "a.parquet"))) == table


@FUZZ
@given(table=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8))
def test_tsv_round_trip(write: WriteFile, table: list[tuple[str, str]]) -> None:
    clean = str.maketrans("\t\r\n", "___")
    table = [(text.translate(clean), label.translate(clean)) for text, label in table]
    content = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in table)
    assert pairs(read(write("a.tsv", content))) == table


@FUZZ
@given(content=st.binary(max_size=200), suffix=st.sampled_from(["csv", "tsv", "jsonl", "txt", "npy", "parquet"]))
def test_fuzzed_bytes_give_rows_or_a_data_error(write: WriteFile, content: bytes, suffix: str) -> None:
    label = None if suffix == "txt" else "label"
    head = b"" if suffix in {"npy", "parquet"} else b"text,label\n"
    for data in (content, head + content):
        try:
            rows, origin = read_rows(write(f"a.{suffix}", data), text_column="text", label_column=label)
        except DataError:
            continue
        assert len(rows) == origin.rows > 0


@FUZZ
@given(body=st.text(alphabet='",\n\r a', max_size=30))
def test_accepted_csv_is_read_as_the_csv_module_reads_it(write: WriteFile, body: str) -> None:
    content = "text,label\nx,y\n" + body
    expected = [tuple(row) for row in csv.reader(io.StringIO(content, newline="")) if row][1:]
    try:
        rows = read(write("a.csv", content))
    except DataError:
        return
    assert pairs(rows) == expected


def test_chunks_do_not_show(write: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", 3)
    content = "text,label\n" + "".join(f"text {i},{i % 3}\n" for i in range(11))
    rows = read(write("a.csv", content))
    assert rows.texts is not None
    assert rows.texts.num_chunks == 4
    assert pairs(rows) == [(f"text {i}", str(i % 3)) for i in range(11)]
    taken = rows.take(np.array([9, 0, 4]))
    assert pairs(taken) == [("text 9", "0"), ("text 0", "0"), ("text 4", "1")]
    assert [taken.place(row).rsplit(":", 1)[1] for row in range(3)] == ["11", "2", "6"]


def test_origin_carries_the_hash_of_the_file(write: WriteFile) -> None:
    _, origin = read_rows(write("a.csv", "text,label\na,b\n"), text_column="text", label_column="label")
    assert origin.as_dict()["rows"] == 1
    assert origin.sha256 == "ec6a4a4aa824691f0804aabf5ebd23d51db8334b01e907f0f790bbe42866939a"


def test_txt_is_a_text_a_line(write: WriteFile) -> None:
    rows, _ = read_rows(write("a.txt", "one, two\n\n \nthree\n"), text_column="text", label_column=None)
    assert rows.texts is not None
    assert rows.texts.to_pylist() == ["one, two", "three"]
    assert rows.labels is None


def test_parquet_types(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    labels = pa.array([1, 0, 1], type=pa.int8())
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode(), "label": labels}), path)
    assert pairs(read(str(path))) == [("a", "1"), ("b", "0"), ("a", "1")]
    for column, expected in (([1.5, 2.0, 3.0], "the column holds double"), (["x", None, " "], "label is missing")):
        pq.write_table(pa.table({"text": ["a", "b", "c"], "label": column}), path)
        with pytest.raises(DataError, match=expected):
            read(str(path))
    pq.write_table(pa.table({"text": ["a", None, " "], "label": ["x", "y", "z"]}), path)
    with pytest.raises(DataError) as caught:
        read(str(path))
    assert [str(problem) for problem in caught.value.problems] == [
        f"{path}:2: text: null (a text in every row)",
        f"{path}:3: text: only white space (a text in every row)",
    ]


def test_parquet_strings_must_be_utf8(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], type=pa.binary()).buffers())
    pq.write_table(pa.table({"text": bad, "label": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="not UTF-8"):
        read(str(tmp_path / "a.parquet"))


def test_npy_rows_end_at_their_padding(tmp_path: Path) -> None:
    np.save(
        tmp_path / "a.npy", np.array([[5, 0, 7, 0, 0, 1], [9, 9, 9, 9, 9, 0], [3, 0, 0, 0, 0, 10]], dtype=np.uint16)
    )
    rows = read(str(tmp_path / "a.npy"))
    assert rows.token_ids is not None
    assert rows.labels is not None
    assert [row.tolist() for row in rows.token_ids] == [[5, 0, 7], [9, 9, 9, 9, 9], [3]]
    assert [rows.labels[row] for row in range(3)] == ["1", "0", "10"]
    without, _ = read_rows(str(tmp_path / "a.npy"), text_column="text", label_column=None)
    assert without.labels is None
    assert len(without) == 3


def test_npy_rows_may_end_with_several_columns(tmp_path: Path) -> None:
    """Named by `data.label_columns` in the order in which they stand; other columns an array does not have."""
    np.save(tmp_path / "a.npy", np.array([[5, 0, 7, 0, 1, 0, 4], [9, 0, 0, 0, 0, 1, -2]]))
    names = dict.fromkeys(("b", "a", "c"), "data.label_columns")
    rows, _ = read_rows(str(tmp_path / "a.npy"), text_column="text", label_column=None, others=names)
    assert rows.token_ids is not None
    assert rows.labels is None
    assert [row.tolist() for row in rows.token_ids] == [[5, 0, 7], [9]]
    assert {name: [column[0], column[1]] for name, column in rows.others.items()} == {
        "b": ["1", "0"], "a": ["0", "1"], "c": ["4", "-2"]
    }  # fmt: skip
    with pytest.raises(DataError, match=r"data\.split\.group_column: a \.npy file has no column 'g'"):
        read_rows(
            str(tmp_path / "a.npy"),
            text_column="text",
            label_column=None,
            others=names | {"g": "data.split.group_column"},
        )
    many = dict.fromkeys("abcdefg", "data.label_columns")
    with pytest.raises(DataError, match=r"shape \(2, 7\) \(integers of shape \(rows, tokens \+ 7\), the labels last"):
        read_rows(str(tmp_path / "a.npy"), text_column="text", label_column=None, others=many)


def test_a_text_column_given_as_label_is_refused(write: WriteFile) -> None:
    content = "text,label\n" + "".join(f"a,{i}\n" for i in range(rows_module.MAX_LABELS + 1))
    with pytest.raises(DataError, match=f":{rows_module.MAX_LABELS + 2}: label: more than 10000 different labels"):
        read(write("a.csv", content))


def test_hub_id_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.data.hub.find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match=r"owner/name: data\.source: .*pip install 'classifier-toolkit\[hub\]'"):
        read("owner/name")
