"""Cuts: exact sizes, no text on both sides, the same on every machine, kept on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.repeats import content_keys, first_of_groups, repeat_groups, repeats_of
from toolkit.data.rows import Rows
from toolkit.data.splits import Split, cut, oversample, read_split, sample, save_split, undersample
from toolkit.data.tokens import TokenTable
from toolkit.errors import DataError

FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def text_rows(texts: list[str], chunk: int = 3) -> Rows:
    chunks = [pa.array(texts[low : low + chunk], type=pa.large_string()) for low in range(0, len(texts), chunk)]
    return Rows("a.csv", pa.chunked_array(chunks, type=pa.large_string()), None, None)


def test_strata_are_cut_to_the_row() -> None:
    strata = np.repeat([0, 1], [1000, 100])
    parts = cut(strata, None, FRACTIONS, seed=1)
    assert {name: np.bincount(strata[rows]).tolist() for name, rows in parts.items()} == {
        "train": [700, 70],
        "validation": [100, 10],
        "test": [200, 20],
    }
    assert np.sort(np.concatenate(list(parts.values()))).tolist() == list(range(1100))
    again, other = cut(strata, None, FRACTIONS, seed=1), cut(strata, None, FRACTIONS, seed=2)
    assert all((parts[name] == again[name]).all() for name in parts)
    assert any(parts[name].tolist() != other[name].tolist() for name in parts)


def test_a_cut_is_the_same_on_every_machine() -> None:
    parts = cut(np.zeros(10, dtype=np.int64), None, FRACTIONS, seed=123)
    assert {name: rows.tolist() for name, rows in parts.items()} == GOLDEN


GOLDEN: dict[str, list[int]] = {"train": [0, 2, 3, 4, 6, 7, 9], "validation": [8], "test": [1, 5]}


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    texts=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_repeats_stay_together_and_every_row_is_used(labels: list[int], texts: int, seed: int) -> None:
    strata = np.array(labels)
    groups = np.random.default_rng(seed).integers(0, texts, len(labels))
    parts = cut(strata, groups, FRACTIONS, seed=seed)
    assert np.sort(np.concatenate(list(parts.values()))).tolist() == list(range(len(labels)))
    where = [set(groups[rows].tolist()) for rows in parts.values()]
    assert len(set.union(*where)) == sum(map(len, where))
    alone = cut(strata, None, FRACTIONS, seed=seed)
    assert set(strata[alone["train"]].tolist()) == set(labels)


def test_repeats_are_spread_over_the_parts() -> None:
    groups = np.concatenate([np.repeat(np.arange(300), 2), np.arange(300, 5000)])
    parts = cut(np.zeros(len(groups), dtype=np.int64), groups, FRACTIONS, seed=3)
    assert [len(parts[name]) for name in FRACTIONS] == [3710, 530, 1060]
    shares = [(groups[rows] < 300).sum() / 600 for rows in parts.values()]
    assert np.allclose(shares, list(FRACTIONS.values()), atol=0.08)


def test_fractions_below_one_leave_rows_unused() -> None:
    parts = cut(np.zeros(100, dtype=np.int64), None, {"train": 0.5, "test": 0.2}, seed=1)
    assert [len(rows) for rows in parts.values()] == [50, 20]


def test_undersample_and_sample() -> None:
    codes = np.repeat([3, 5, 9], [50, 30, 20])
    rows = undersample(codes, seed=1)
    assert np.bincount(codes[rows])[[3, 5, 9]].tolist() == [20, 20, 20]
    assert (np.diff(rows) > 0).all()
    rows = sample(codes, 10, seed=1)
    assert np.bincount(codes[rows])[[3, 5, 9]].tolist() == [5, 3, 2]
    assert len(sample(codes, 1000, seed=1)) == 100
    assert undersample(codes, seed=1).tolist() != undersample(codes, seed=2).tolist()


def test_groups_are_exact_equality() -> None:
    texts = ["a", "b", "a", "A", "a ", "ab", "b", "é", "e\u0301"]
    groups = repeat_groups(content_keys(text_rows(texts)))
    for one, first in enumerate(texts):
        for two, second in enumerate(texts):
            assert (groups[one] == groups[two]) == (first == second)
    assert first_of_groups(groups).tolist() == [0, 1, 3, 4, 5, 7, 8]
    sliced = Rows("a.csv", text_rows(texts).texts.slice(2, 5), None, None)  # type: ignore[union-attr]
    assert (content_keys(sliced) == content_keys(text_rows(texts))[2:7]).all()


def test_token_rows_repeat_too() -> None:
    table = TokenTable(np.array([1, 2, 1, 2, 1, 2], dtype=np.int32), np.array([0, 2, 4, 5, 6]))
    groups = repeat_groups(content_keys(Rows("a.npy", None, table, None)))
    assert groups[0] == groups[1]
    assert len(set(groups.tolist())) == 3


def test_repeats_have_one_number_in_all_tables() -> None:
    found = repeats_of({"train": text_rows(["a", "b", "c", "b"]), "test": text_rows(["x", "b"])})
    train, test = found["train"], found["test"]
    assert train[1] == train[3] == test[1]
    assert len({*train.tolist(), *test.tolist()}) == 4


def a_split() -> Split:
    parts = {"train": np.array([0, 2]), "validation": np.array([1]), "test": np.empty(0, dtype=np.int64)}
    return Split("ab" * 32, 7, {"balance": None, "split": {"train": 0.7}}, parts)


def test_split_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run" / "split.json"
    save_split(path, a_split())
    found = read_split(path, a_split(), rows=3)
    assert {name: rows.tolist() for name, rows in found.parts.items()} == {
        "train": [0, 2],
        "validation": [1],
        "test": [],
    }
    record = json.loads(path.read_text())
    assert record["format"] == 1
    assert record["origin_sha256"] == "ab" * 32
    assert [file.name for file in path.parent.iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"origin_sha256": "cd" * 32}, "origin_sha256: the data changed since"),
        ({"seed": 8}, "data.split.seed: 8 when the split was made, 7 now"),
        ({"settings": {"balance": "undersample", "split": {"train": 0.7}}}, "data.balance: 'undersample' when"),
        ({"parts": {"train": [0, 3], "validation": [1], "test": []}}, "the row numbers are no cut of 3 rows"),
        ({"parts": {"train": [0, -1], "validation": [1], "test": []}}, "the row numbers are no cut"),
        ({"parts": {"train": [0, 1], "validation": [1], "test": []}}, "the row numbers are no cut"),
        ({"parts": {"train": [0, 1]}}, "the row numbers are no cut"),
        ({"parts": {"train": [[0], [1]], "validation": [2], "test": []}}, "not a split file"),
        ({"parts": {"train": [0.5], "validation": [2], "test": []}}, "not a split file"),
        ({"parts": {"train": ["x"]}}, "not a split file"),
        ({"parts": None}, "not a split file"),
        ({"format": 2}, "not a split file"),
    ],
)
def test_other_split_files_are_refused(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    path = tmp_path / "split.json"
    save_split(path, a_split())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError) as caught:
        read_split(path, a_split(), rows=3)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_is_no_split(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    path.write_bytes(b"\xff{")
    with pytest.raises(DataError, match="not a split file"):
        read_split(path, a_split(), rows=3)


def test_oversampling_repeats_rare_rows_evenly() -> None:
    codes = np.array([0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2])
    rows = oversample(codes, seed=3)
    assert (np.bincount(codes[rows]) == 7).all()
    assert (rows == np.sort(rows)).all()
    repeats = np.bincount(rows, minlength=len(codes))
    assert (repeats[1:8] == 1).all()
    assert repeats[0] == 7
    assert sorted(repeats[8:]) == [2, 2, 3]
    assert (rows == oversample(codes, seed=3)).all()
