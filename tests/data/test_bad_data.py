"""Rows 38 to 63b of bad_inputs.md: each wrong data file gets its line."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from toolkit.config.schema import DataSettings
from toolkit.data.load import load_data
from toolkit.data.parts import LoadedData
from toolkit.data.rows import MAX_CHARACTERS, Rows
from toolkit.data.sources import read_rows
from toolkit.data.tokens import TokenTable
from toolkit.errors import DataError

WriteFile = Callable[[str, "bytes | str"], str]

GOOD = "text,label\n" + "".join(f"text {i},{'ham' if i % 2 else 'spam'}\n" for i in range(40))

WRONG = {
    "39 empty": ("a.csv", "", ": the file is empty"),
    "39 only a mark": ("a.csv", b"\xef\xbb\xbf", "the file is empty"),
    "40 header only": ("a.csv", "text,label\n", ": there are no rows"),
    "41 no header": ("a.csv", "hello,ham\nfree,spam\n", ":1: data.text_column: no column 'text' (the columns are "
                     "'hello', 'ham'; is the header line missing?)"),
    "42 semicolons": ("a.csv", "text;label\na;ham\n", "separated by a semicolon, expected a comma"),
    "42 tabs in csv": ("a.csv", "text\tlabel\na\tham\n", "name the file .tsv"),
    "42 commas in tsv": ("a.tsv", "text,label\na,ham\n", "name the file .csv"),
    "43 column": ("a.csv", "text,labels\na,ham\n", ":1: data.label_column: no column 'label' (the columns are "
                  "'text', 'labels'; did you mean labels?)"),
    "44 duplicate header": ("a.csv", "text,label,text\na,ham,b\n", ":1: header: column 'text' occurs twice"),
    "44 duplicate key": ("a.jsonl", '{"text": "a", "text": "b", "label": "c"}\n', ":1: not usable JSON: key 'text'"),
    "45 extra field": ("a.csv", GOOD + "one, two,ham\n", ":42: too many fields: 3 fields, the header has 2"),
    "45 extra tab": ("a.tsv", "text\tlabel\na\tb\tham\n", ":2: too many fields"),
    "46 missing field": ("a.csv", "text,label\nfine,ham\n\nlost\n", ":4: label: the field is missing"),
    "47 quote to the end": ("a.csv", 'text,label\nok,ham\n"open,ham\nx,spam\n', ":3: a quote opens in this line"),
    "47 quote closed by the next": ("a.csv", 'text,label\nok,ham\n"open,ham\n"x",spam\n', ":3: a quote opens"),
    "47 second field": ("a.csv", 'label,text\nham,"one\ntwo"\nham,"a\nb\n', ":4: a quote opens in this line"),
    "47 text after a quote": ("a.csv", 'text,label\n"x"y,ham\n', ":2: text follows a closing quote"),
    "48 latin-1": ("a.csv", "text,label\ncafé,ham\n".encode("latin-1"), ":2: not UTF-8 at byte offset 14"),
    "48 cut off": ("a.csv", b"text,label\ncaf\xc3", ":2: not UTF-8 at byte offset 14"),
    "48 UTF-16": ("a.csv", "text,label\na,ham\n".encode("utf-16"), ":1: UTF-16 text (mark at byte offset 0)"),
    "49 NUL": ("a.csv", "text,label\na\0b,ham\n", ":2: a NUL byte at offset 12"),
    "49 NUL in JSON": ("a.jsonl", '{"text": "a\\u0000", "label": "x"}', ":1: text: a NUL character"),
    "52 empty text": ("a.csv", "text,label\na,ham\n,spam\n", ":3: text: the text is empty"),
    "52 white space": ("a.tsv", "text\tlabel\n \u00a0\tham\n", ":2: text: only white space"),
    "52 null text": ("a.jsonl", '{"text": null, "label": "x"}\n', ":1: text: null"),
    "53 missing label": ("a.csv", "text,label\na,ham\nb,\nc, \nd,\n", ":5: label: the label is missing"),
    "53 null label": ("a.jsonl", '{"text": "a", "label": null}\n', ":1: label: null"),
    "57 large field": ("a.csv", f"text,label\n{'x' * (MAX_CHARACTERS + 1)},ham\n", ":2: a field of more than"),
    "57 large text": ("a.tsv", f"text\tlabel\n{'x' * (MAX_CHARACTERS + 1)}\tham\n", ":2: text: a text of"),
    "57 unclosed quote": ("a.csv", 'text,label\n"x,ham\n' + "y,spam\n" * 200_000, "quote opened in line 2 may not"),
    "57 endless line": ("a.jsonl", "[" * 9_000_000, ":1: a line of 8000000 characters or more"),
    "62 JSONL": ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', ":2: not JSON at column"),
    "62 not an object": ("a.jsonl", '["a", "x"]\n', ":1: a JSON list (one JSON object a line)"),
    "62 no key": ("a.jsonl", '{"texts": "a", "label": "x"}\n', ":1: data.text_column: no column 'text'"),
    "62 deep": ("a.jsonl", '{"text":' + "[" * 100_000 + "\n", ":1: not "),
    "62 NaN": ("a.jsonl", '{"text": "a", "label": NaN}\n', ":1: not usable JSON: NaN is not JSON"),
    "62 number as text": ("a.jsonl", '{"text": 7, "label": "x"}\n', ":1: text: 7 (a string)"),
    "62 boolean label": ("a.jsonl", '{"text": "a", "label": true}\n', ":1: label: true (a string or an integer)"),
    "62 half a character": ("a.jsonl", '{"text": "\\ud83d", "label": "a"}\n', ":1: text: half of a surrogate pair"),
    "63 gzip": ("a.csv", gzip.compress(GOOD.encode()), ": the content is gzip, not text (unpack it first)"),
    "63 not parquet": ("a.parquet", b"PAR1 but no more", ": not a readable parquet file"),
    "txt": ("a.txt", "one\ntwo\n", "a .txt file has no labels"),
    "suffix": ("a.xlsx", "x", ".xlsx is not a data format"),
}  # fmt: skip


def load(where: str, **settings: object) -> LoadedData:
    return load_data(DataSettings.model_validate({"source": where, **settings}))


@pytest.mark.parametrize(("name", "content", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_file_gets_its_line(write: WriteFile, name: str, content: bytes | str, expected: str) -> None:
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(path) for line in lines)
    assert any(expected in line for line in lines), lines


def test_38_missing_file_names_its_neighbour(write: WriteFile, tmp_path: Path) -> None:
    write("training.csv", GOOD)
    with pytest.raises(DataError, match=r"trainin\.csv: no such file \(did you mean .*training\.csv\?\)"):
        load(str(tmp_path / "trainin.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="a folder"):
        load(str(tmp_path / "folder.csv"))
    with pytest.raises(DataError, match="did you mean sms_spam"):
        load("sms_span")


def test_all_wrong_rows_are_reported_together_and_capped(write: WriteFile) -> None:
    path = write("a.csv", "text,label\n" + ",ham\n" * 50)
    with pytest.raises(DataError) as caught:
        load(path)
    assert len(caught.value.problems) == 21
    assert str(caught.value.problems[-1]) == f"{path}: and 30 more such problems"


def test_problems_of_several_files_come_together(write: WriteFile) -> None:
    train, test = write("train.csv", "text,label\n,ham\n"), write("test.csv", "")
    with pytest.raises(DataError) as caught:
        load_data(DataSettings(train=train, test=test))
    assert [problem.where for problem in caught.value.problems] == [f"{train}:2", test]


def texts_of(rows: Rows) -> list[str]:
    assert rows.texts is not None
    return [str(text) for text in rows.texts.to_pylist()]


def read(path: str) -> Rows:
    return read_rows(path, text_column="text", label_column="label")[0]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_50_marks_and_line_ends_are_accepted(write: WriteFile, end: str, mark: str) -> None:
    lines = [f"{mark}text,label", "a,ham", '"b\nc",spam', "d,ham"]
    rows = read(write("a.csv", end.join(lines) + end))
    assert texts_of(rows) == ["a", "b\nc", "d"]
    assert rows.lines is not None
    assert rows.lines.tolist() == [2, 3, 5]
    plain = [f"{mark}text\tlabel", 'a "\tham', "b\tspam"]
    assert texts_of(read(write("a.tsv", end.join(plain)))) == ['a "', "b"]
    objects = [f'{mark}{{"text": "a", "label": 1}}', "", '{"text": "b", "label": "0"}']
    assert texts_of(read(write("a.jsonl", end.join(objects)))) == ["a", "b"]


AWKWARD = ["NA", "null", "007", "1e5", "True", "nan", "None", "-0", " padded ", "1,000", "#c", "'q'", "\u2028x", "1.0"]


def test_51_awkward_strings_stay_themselves(write: WriteFile) -> None:
    body = "".join(f'"{text}","{text}"\n' for text in AWKWARD)
    rows = read(write("a.csv", "text,label\n" + body))
    assert texts_of(rows) == AWKWARD
    assert rows.labels is not None
    assert [rows.labels[row] for row in range(len(rows))] == AWKWARD
    rows = read(write("a.tsv", "text\tlabel\n" + "".join(f"{text}\t{text}\n" for text in AWKWARD)))
    assert texts_of(rows) == AWKWARD


def test_54_label_outside_the_list(write: WriteFile) -> None:
    path = write("a.csv", GOOD + "x,Spam\ny,Spam\nz,eggs\n")
    with pytest.raises(DataError) as caught:
        load(path, labels=["ham", "spam"])
    first, second = map(str, caught.value.problems)
    assert first == (
        f"{path}:42: label: 'Spam' is not one of the labels, in 2 rows (one of ham, spam; did you mean spam?)"
    )
    assert second.startswith(f"{path}:44: label: 'eggs' is not one of the labels")


def test_55_label_only_in_test(write: WriteFile) -> None:
    test = write("test.csv", "text,label\nnew,eggs\n")
    settings = DataSettings(train=write("train.csv", GOOD), test=test)
    with pytest.raises(DataError, match=r"test\.csv: data\.test: label 'eggs' occurs in test but never in train"):
        load_data(settings)


def test_56_one_class_only(write: WriteFile) -> None:
    path = write("a.csv", "text,label\n" + "".join(f"text {i},ham\n" for i in range(20)))
    with pytest.raises(DataError, match=r"a\.csv: data\.train: every training row has the label 'ham'"):
        load(path, labels=["ham", "spam"])


def test_59_same_text_in_two_files(write: WriteFile) -> None:
    train, test = write("train.csv", GOOD), write("test.csv", "text,label\ntext 7,ham\ntext 8,spam\nnew,ham\n")
    with pytest.raises(DataError) as caught:
        load_data(DataSettings(train=train, test=test))
    assert str(caught.value).startswith(f"{train}:9: data.duplicates: 2 rows of data.train have a text that is also in")
    removed = load_data(DataSettings(train=train, test=test, duplicates="remove"))
    assert len(removed.test) == 3
    assert len(removed.train) + len(removed.validation) == 38
    allowed = load_data(DataSettings(train=train, test=test, duplicates="allow"))
    assert len(allowed.train) + len(allowed.validation) == 40


def test_60_same_text_with_two_labels_is_warned_of(write: WriteFile) -> None:
    path = write("a.csv", GOOD + "text 7,spam\ntext 8,spam\n")
    warnings = load(path).warnings
    assert warnings == [
        f"{path}: text: 2 of 42 rows repeat an earlier text",
        f"{path}:9: label: 1 texts occur with two labels or more (one label for a text)",
        f"{path}:9: label: 'ham' here, 'spam' in {path}:42",
    ]


def test_61_fewer_rows_than_classes(write: WriteFile) -> None:
    path = write("a.csv", "text,label\na,ham\nb,spam\n")
    split = {"train": 1.0, "validation": 0.0, "test": 0.0}
    with pytest.raises(DataError, match="2 training rows for 3 labels"):
        load(path, labels=["ham", "spam", "eggs"], split=split)


def npy(values: np.ndarray, *, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=pickled)
    return buffer.getvalue()


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a data file was unpickled",))


ARRAYS = {
    "rank 1": (npy(np.arange(6)), "an array of shape (6,)"),
    "rank 3": (npy(np.ones((2, 3, 4), dtype=int)), "an array of shape (2, 3, 4)"),
    "one column": (npy(np.ones((5, 1), dtype=int)), "an array of shape (5, 1)"),
    "float": (npy(np.ones((4, 3))), "token ids: an array of float64"),
    "object": (npy(np.array([[Bomb(), 1]], dtype=object), pickled=True), "an object array"),
    "pickle": (pickle.dumps(Bomb()), "an object array"),
    "no rows": (npy(np.ones((0, 3), dtype=int)), "there are no rows"),
    "only padding": (npy(np.array([[5, 0, 1], [0, 0, 1]])), ":2: token ids: a row without tokens"),
    "negative": (npy(np.array([[5, 0, 1], [-5, 3, 1]])), ":2: token ids: id -5"),
    "too large": (npy(np.array([[2**40, 0, 1]])), ":1: token ids: id 1099511627776"),
    "garbage": (b"\x93NUMPY and no more", "not a readable .npy file"),
}


@pytest.mark.parametrize(("content", "expected"), ARRAYS.values(), ids=ARRAYS)
def test_63b_wrong_arrays(write: WriteFile, content: bytes, expected: str) -> None:
    path = write("a.npy", content)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(path)
    assert expected in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_63b_a_header_that_claims_gigabytes(write: WriteFile) -> None:
    path = write("a.npy", b"\x93NUMPY\x03\x00" + (2**32 - 1).to_bytes(4, "little") + b"{'descr': '<i8'}")
    code = (
        "import resource, sys, numpy, toolkit.data.load as load\n"
        "from toolkit.errors import DataError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**31, resource.RLIM_INFINITY))\n"
        "try:\n    numpy.load(sys.argv[1], mmap_mode='r')\nexcept MemoryError:\n    print('memory')\n"
        "from toolkit.data.arrays import _load_npy\n"
        "try:\n    _load_npy(sys.argv[1], 'a.npy', targets=1)\nexcept DataError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "memory"
    assert "not a readable .npy file" in done.stdout


def test_63b_ids_above_the_vocabulary() -> None:
    table = TokenTable(np.array([1, 2, 3, 50_257], dtype=np.int32), np.array([0, 1, 2, 4]))
    table.check_vocabulary(50_258, where="a.npy")
    with pytest.raises(DataError, match=r"a\.npy:3: token ids: token id 50257 is outside .* \(ids from 0 to 50256\)"):
        table.check_vocabulary(50_257, where="a.npy")


def test_reading_data_imports_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers'} & {*sys.modules}"
    code = f"import sys, toolkit.data.load, toolkit.data.tokenize; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
