"""Splits by group, by time and by fold, and samples of the training part: nothing leaks, and no row is lost unsaid."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from toolkit.config.load import load_recipe
from toolkit.config.schema import DataSettings
from toolkit.data.grouping import cut_by_time, merged_groups
from toolkit.data.load import load_data
from toolkit.data.parts import LoadedData
from toolkit.errors import DataError, RecipeError

WriteFile = Callable[[str, "bytes | str"], str]
THIRDS = {"train": 0.5, "validation": 0.25, "test": 0.25}


def table(values: list[Any], column: str, texts: list[str] | None = None) -> str:
    texts = texts or [f"text {i}" for i in range(len(values))]
    pairs = enumerate(zip(texts, values, strict=True))
    rows = [f"{text},{'ham' if i % 2 else 'spam'},{value}\n" for i, (text, value) in pairs]
    return f"text,label,{column}\n" + "".join(rows)


def rows_of(data: LoadedData) -> dict[str, list[int]]:
    return {name: part.row_numbers.tolist() for name, part in data.parts.items()}


@pytest.mark.parametrize("seed", range(5))
def test_merged_groups_are_connected_components(seed: int) -> None:
    chance = np.random.default_rng(seed)
    one, other = chance.integers(0, 60, 100), chance.integers(0, 70, 100)
    links = csr_matrix((one[:, None] == one) | (other[:, None] == other))
    _, expected = connected_components(links, directed=False)
    found = merged_groups(one, other)
    assert ((found[:, None] == found) == (expected[:, None] == expected)).all()


def test_a_long_chain_of_groups_is_one() -> None:
    rows = np.arange(1000)
    assert set(merged_groups(rows // 2, (rows + 1) // 2)) == {0}


def test_a_group_stays_in_one_part_and_so_do_repeats_across_groups(write: WriteFile) -> None:
    groups = [f"author {i // 4}" for i in range(200)]
    texts = [f"text {i}" for i in range(200)]
    # Two authors who wrote the same text are kept together.
    texts[100] = texts[0]
    path = write("a.csv", table(groups, "author", texts))
    data = load_data(DataSettings(source=path, split={"group_column": "author"}))
    parts = rows_of(data)
    assert sorted(chain.from_iterable(parts.values())) == list(range(200))
    assert [len(rows) for rows in parts.values()] == [140, 20, 40]
    place = {row: name for name, rows in parts.items() for row in rows}
    assert all(place[row] == place[row - row % 4] for row in range(200))
    assert place[0] == place[100]
    plain = rows_of(load_data(DataSettings(source=path)))
    assert any(len({name for name, rows in plain.items() if 4 * g in rows or 4 * g + 1 in rows}) > 1 for g in range(50))


def test_a_row_without_a_group_and_a_group_in_two_files(write: WriteFile) -> None:
    path = write("a.csv", table(["x", "", "y"] * 10, "author"))
    with pytest.raises(DataError, match=r"a.csv:3: author: is empty \(a group in every row\)"):
        load_data(DataSettings(source=path, split={"group_column": "author"}))
    train = write("b.csv", table(["x", "y"] * 20, "author"))
    test = write("c.csv", table(["y", "z"], "author", ["new", "newer"]))
    with pytest.raises(
        DataError, match=r"b.csv: data.split.group_column: 1 groups of data.train .*data.test, 'y' first"
    ):
        load_data(DataSettings(train=train, test=test, split={"group_column": "author"}))
    with pytest.raises(DataError, match=r"data.split.group_column: no column 'thread'"):
        load_data(DataSettings(source=path, split={"group_column": "thread"}))


@pytest.mark.parametrize(
    "values",
    [
        list(range(100, 0, -1)),
        [f"2024-01-01T{(99 - i) // 60:02d}:{(99 - i) % 60:02d}" for i in range(100)],
        [f"20{99 - i:02d}-03-01" for i in range(100)],
        [f"20{99 - i:02d}-03-01T00:00:00Z" for i in range(100)],
    ],
    ids=["numbers", "minutes", "dates", "utc"],
)  # fmt: skip
def test_the_oldest_train_and_the_newest_test(write: WriteFile, values: list[Any]) -> None:
    path = write("a.csv", table(values, "when"))
    data = load_data(DataSettings(source=path, split={"time_column": "when", **THIRDS}))
    assert rows_of(data) == {
        "train": list(range(50, 100)), "validation": list(range(25, 50)), "test": list(range(25))
    }  # fmt: skip
    assert data.warnings == []


def test_equal_times_stay_together_and_later_repeats_are_left_out(write: WriteFile) -> None:
    times = np.array([1, 2, 2, 2, 3, 4, 5, 6])
    assert {name: rows.tolist() for name, rows in cut_by_time(times, None, {"train": 0.25, "test": 0.75}).items()} == {
        "train": [0, 1, 2, 3], "test": [4, 5, 6, 7]
    }  # fmt: skip
    texts = [f"text {i}" for i in range(40)]
    texts[30] = texts[35] = texts[0]
    path = write("a.csv", table(list(range(40)), "when", texts))
    data = load_data(DataSettings(source=path, split={"time_column": "when", **THIRDS}))
    assert rows_of(data)["test"] == [31, 32, 33, 34, 36, 37, 38, 39]
    assert data.warnings[-1] == f"{path}: 2 rows repeat the text of an older part and are left out"
    kept = load_data(DataSettings(source=path, duplicates="allow", split={"time_column": "when", **THIRDS}))
    assert rows_of(kept)["test"] == list(range(30, 40))


def test_what_is_no_time_has_its_line(write: WriteFile) -> None:
    path = write("a.csv", table(["2024-01-01", "yesterday", "2024-01-02"] * 10, "when"))
    with pytest.raises(DataError, match=r"a.csv:3: when: 'yesterday' is no time \(numbers alone, or dates"):
        load_data(DataSettings(source=path, split={"time_column": "when"}))


def test_folds_share_out_all_rows_and_every_one_is_test_once(write: WriteFile) -> None:
    texts = [f"text {i}" for i in range(100)]
    texts[50] = texts[1]
    path = write("a.csv", table(["x"] * 100, "when", texts))
    found = []
    for fold in range(1, 6):
        parts = rows_of(load_data(DataSettings(source=path, split={"folds": 5, "fold": fold})))
        assert sorted(chain.from_iterable(parts.values())) == list(range(100))
        assert [len(rows) for rows in parts.values()] == pytest.approx([70, 10, 20], abs=2)
        assert len([name for name, rows in parts.items() if {1, 50} & set(rows)]) == 1
        found += parts["test"]
    assert sorted(found) == list(range(100))


def test_a_kept_split_knows_what_it_was_made_with(write: WriteFile, tmp_path: Any) -> None:
    path, kept = write("a.csv", table([f"g{i // 5}" for i in range(100)], "author")), tmp_path / "split.json"
    first = load_data(DataSettings(source=path, split={"folds": 4}), split_file=kept)
    assert rows_of(load_data(DataSettings(source=path, split={"folds": 4}), split_file=kept)) == rows_of(first)
    for other, field in (({"folds": 4, "fold": 2}, "split.fold"), ({"group_column": "author"}, "split.folds")):
        with pytest.raises(DataError, match=f"data.{field}: "):
            load_data(DataSettings(source=path, split=other), split_file=kept)


def test_training_rows_grow_and_the_other_parts_stay(write: WriteFile) -> None:
    path = write("a.csv", table(["x"] * 200, "when"))
    whole = rows_of(load_data(DataSettings(source=path)))
    before: set[int] = set()
    for size in (10, 40, 100, 1000):
        data = load_data(DataSettings(source=path, train_rows=size))
        parts = rows_of(data)
        assert (parts["validation"], parts["test"]) == (whole["validation"], whole["test"])
        assert before <= set(parts["train"]) <= set(whole["train"])
        assert len(parts["train"]) == min(size, 140)
        assert data.counts["train"]["ham"] == data.counts["train"]["spam"]
        before = set(parts["train"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.split={time_column: a, group_column: b}"], "data.split.time_column: rows cannot be cut by time"),
        (["data={train: a.csv, validation: b.csv, test: c.csv, split: {time_column: a}}"],
         "data.split.time_column: every part has its own file"),
        (["data.split={time_column: a, folds: 3}"], "data.split.folds: folds take turns"),
        (["data.split={folds: 3, fold: 4}"], "data.split.fold: there is no such fold (1 to data.split.folds)"),
        (["data.split.folds=1"], "data.split.folds: 1 is not allowed"),
        (["data.near_duplicates=0.2"], "data.near_duplicates: 0.2 is not allowed"),
        (["training.balanced_batches=true", "data.problem_type=regression"], "training.balanced_batches: only texts"),
        (["training.balanced_batches=true", "training.max_tokens_per_batch=100"], "batches of like length"),
    ],
)  # fmt: skip
def test_wishes_that_exclude_each_other(tmp_path: Any, overrides: list[str], said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {base: gpt2-mini}\ndata: {source: a.csv}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert said in str(caught.value)
