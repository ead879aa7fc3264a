"""Token tables against lists of lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data.tokens import TokenTable

ROWS = st.lists(st.lists(st.integers(0, 50_000), max_size=9), min_size=1, max_size=12)


def table_of(rows: list[list[int]]) -> TokenTable:
    flat = np.array([token for row in rows for token in row], dtype=np.int32)
    return TokenTable.from_lengths(flat, np.array([len(row) for row in rows], dtype=np.int64))


def as_lists(table: TokenTable) -> list[list[int]]:
    return [row.tolist() for row in table]


@given(rows=ROWS, data=st.data())
def test_take_and_truncate(rows: list[list[int]], data: st.DataObject) -> None:
    table = table_of(rows)
    assert as_lists(table) == rows
    assert table.lengths.tolist() == [len(row) for row in rows]
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1)))
    assert as_lists(table.take(np.array(indices, dtype=np.int64))) == [rows[index] for index in indices]
    assert as_lists(table.truncate(4)) == [row[:4] for row in rows]
    kept = table.truncate(4, keep_last=True)
    assert as_lists(kept) == [row if len(row) <= 4 else [*row[:3], row[-1]] for row in rows]


def test_rows_are_addressed_like_a_list() -> None:
    table = table_of([[1, 2], [3]])
    assert table[-1].tolist() == [3]
    with pytest.raises(IndexError):
        table[2]


def test_many_rows_are_gathered_in_runs() -> None:
    lengths = np.arange(150_000) % 4
    table = TokenTable.from_lengths(np.arange(lengths.sum(), dtype=np.int32), lengths)
    backwards = np.arange(len(table))[::-1].copy()
    assert (table.take(backwards).take(backwards).ids == table.ids).all()
