"""The same text twice: inside a table, with two labels, or on both sides of a cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from toolkit.data.rows import Rows
from toolkit.data.targets import Targets, as_ids
from toolkit.errors import DataError, Problem

# Texts with two labels that are listed one by one.
LISTED = 10


def content_keys(rows: Rows) -> NDArray[np.void]:
    """Return a 128-bit hash of every text (or row of token ids), 16 bytes each, shape (rows,).

    Two million texts take 3 s and 32 MB; Arrow's dictionary of them took 37 s and 1 GB.
    """
    if rows.keys is not None:
        return rows.keys
    digests = bytearray()
    for data, bounds in _byte_runs(rows):
        view, ends = memoryview(data).cast("B"), bounds.tolist()
        for start, end in pairwise(ends):
            digests += blake2b(view[start:end], digest_size=16).digest()
    return np.frombuffer(digests, dtype=[("high", ">u8"), ("low", ">u8")])


def _byte_runs(rows: Rows) -> Iterator[tuple[memoryview, NDArray[np.int64]]]:
    if rows.token_ids is not None:
        yield np.ascontiguousarray(rows.token_ids.ids).data, rows.token_ids.offsets * 4
        return
    for chunk in rows.texts.chunks if rows.texts is not None else ():
        _, offsets, data = chunk.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        yield memoryview(data or b""), bounds


def repeat_groups(keys: NDArray[np.void]) -> NDArray[np.int64]:
    """Return a number per row, int64, shape (rows,), equal where the keys are; numbered in no particular order.

    Args:
        keys: From ``content_keys``, shape (rows,).
    """
    order = np.lexsort((keys["low"], keys["high"]))
    ranked = keys[order]
    groups = np.empty(len(keys), dtype=np.int64)
    groups[order] = np.cumsum(np.concatenate([np.zeros(1, dtype=bool), ranked[1:] != ranked[:-1]])[: len(keys)])
    return groups


def first_of_groups(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows that are the first of their group, ascending, int64, shape (groups,)."""
    return np.sort(np.unique(groups, return_index=True)[1])


def repeats_of(tables: Mapping[str, Rows], *, near: float | None = None) -> dict[str, NDArray[np.int64]]:
    """Return a number for each row of each table, int64 (rows,), equal where texts are, in one table or two.

    Args:
        tables: The files by part.
        near: Similarity from which texts count as the same; None: only equal ones.

    Raises:
        DataError: ``near``, and a table holds token ids.
    """
    rows = list(tables.values())
    groups = repeat_groups(np.concatenate([content_keys(one) for one in rows]))
    parts = np.split(groups, np.cumsum([len(one) for one in rows])[:-1])
    if near is not None:
        for one in rows:
            if one.texts is None:
                wrong = "token ids are no texts to compare"
                raise DataError(Problem(one.where, "data.near_duplicates", wrong, "null, or a file of texts"))
        # Off the start-up path: few recipes ask for it.
        from toolkit.data.near_duplicates import near_groups

        parts = near_groups(rows, parts, similarity=near)
    return dict(zip(tables, parts, strict=True))


def leaking_rows(
    tables: Mapping[str, Rows],
    groups: Mapping[str, NDArray[np.int64]],
    duplicates: Literal["refuse", "remove", "allow"],
) -> dict[str, NDArray[np.int64]]:
    """Return the rows of each table to drop so that no text is in two of them.

    Args:
        tables: The given files by part, in the order train, validation, test.
        groups: From ``repeats_of``.
        duplicates: refuse, remove (from the earlier part), or allow.

    Raises:
        DataError: ``refuse``, and a text is in two parts; one line for each pair of parts, with the count.
    """
    names = list(tables)
    dropped = {name: np.empty(0, dtype=np.int64) for name in names}
    problems = []
    pairs = [(early, late) for i, early in enumerate(names) for late in names[i + 1 :]]
    for early, late in pairs if duplicates != "allow" else []:
        found = np.flatnonzero(np.isin(groups[early], groups[late]))
        if len(found) and duplicates == "refuse":
            wrong = f"{len(found)} rows of data.{early} have a text that is also in data.{late}"
            right = f"data.duplicates: remove drops them from {early}, allow keeps the leak"
            problems.append(Problem(tables[early].place(int(found[0])), "data.duplicates", wrong, right))
        dropped[early] = np.union1d(dropped[early], found)
    if problems:
        raise DataError(problems)
    return dropped


def repeat_warnings(
    rows: Rows, groups: NDArray[np.int64], labels: Targets | None, *, spell: Callable[[int], str]
) -> list[str]:
    """Return a line on repeated texts, a line on texts with two labels, and a line for each of the first ten of these.

    Args:
        rows: The table.
        groups: int64, shape (rows,), equal where texts are equal.
        labels: Targets of all rows; None without supervision.
        spell: Row to its label in words.
    """
    sizes = np.bincount(groups)
    again = len(groups) - int(np.count_nonzero(sizes))
    if not again:
        return []
    lines = [str(Problem(rows.where, "text", f"{again} of {len(groups)} rows repeat an earlier text"))]
    # Rows whose text stands alone are in no conflict, and are most.
    repeated = np.flatnonzero(sizes[groups] > 1)
    conflicts = [] if labels is None else _conflicts(groups[repeated], as_ids(labels[repeated]))
    if conflicts:
        wrong = f"{len(conflicts)} texts occur with two labels or more"
        first = rows.place(int(repeated[conflicts[0][0]]))
        lines.append(str(Problem(first, "label", wrong, "one label for a text")))
    for one, other in conflicts[:LISTED]:
        row, differs = int(repeated[one]), int(repeated[other])
        wrong = f"{spell(row)!r} here, {spell(differs)!r} in {rows.place(differs)}"
        lines.append(str(Problem(rows.place(row), "label", wrong)))
    return lines


def _conflicts(groups: NDArray[np.int64], ids: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the first row of each text with two labels, and the first with another one, in their order."""
    order = np.lexsort((np.arange(len(groups)), groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    first = order[np.repeat(starts, np.diff(starts, append=len(order)))]
    differs = np.flatnonzero(ids[order] != ids[first])
    found = {int(first[place]): int(order[place]) for place in reversed(differs.tolist())}
    return sorted(found.items())
