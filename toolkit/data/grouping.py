"""Which rows stay together, and which come first: groups and times for splits."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import DataSettings
from toolkit.data.labels import LabelColumn
from toolkit.data.rows import Rows
from toolkit.data.splits import Split, cut
from toolkit.errors import DataError, Problem

Indices = NDArray[np.int64]


def cut_rows(
    settings: DataSettings,
    rows: Rows,
    chosen: Indices,
    alike: Indices,
    together: Indices | None,
    fractions: dict[str, float],
) -> dict[str, Indices]:
    """Return places in ``chosen`` by part, int64: by time, by groups, by folds, or by chance alone.

    Args:
        settings: The recipe's data section.
        rows: The whole table.
        chosen: Rows to cut, int64, shape (n,).
        alike: Stratum of each chosen row, int64, shape (n,).
        together: Number of each row of the table, equal where rows stay in one part; None: every row on its own.
        fractions: Share of each part.

    Raises:
        DataError: A row without a group, or with a time that is none.
    """
    wanted, seed = settings.split, settings.split.seed
    if wanted.time_column is not None:
        times = row_times(rows.others[wanted.time_column], rows, field=wanted.time_column)
        return cut_by_time(times[chosen], None if together is None else together[chosen], fractions)
    if wanted.group_column is not None:
        codes = group_codes(rows.others[wanted.group_column], rows, field=wanted.group_column)
        together = codes if together is None else merged_groups(together, codes)
    together = None if together is None else together[chosen]
    if wanted.folds is None:
        return cut(alike, together, fractions, seed=seed)
    folds = cut(alike, together, {str(fold): 1 / wanted.folds for fold in range(1, wanted.folds + 1)}, seed=seed)
    test = folds.pop(str(wanted.fold))
    rest = np.sort(np.concatenate(list(folds.values())))
    shares = {name: fractions[name] for name in fractions if name != "test"}
    shares = {name: share / sum(shares.values()) for name, share in shares.items()}
    inner = cut(alike[rest], None if together is None else together[rest], shares, seed=seed)
    return {**{name: rest[places] for name, places in inner.items()}, "test": test}


def split_columns(settings: DataSettings, part: str) -> dict[str, str]:
    """Return the columns that the cut of the training table, or the check of all files, looks at, with their fields."""
    group, time = settings.split.group_column, settings.split.time_column if part == "train" else None
    named = ((group, "data.split.group_column"), (time, "data.split.time_column"))
    return {name: field for name, field in named if name is not None}


def left_out(rows: Rows, groups: Indices, split: Split) -> list[str]:
    """Return a warning for the rows that a cut by time left out, if there are any."""
    used = np.concatenate(list(split.parts.values()))
    others = np.delete(np.arange(len(rows)), used)
    count = int(np.isin(groups[others], groups[used]).sum())
    return [f"{rows.where}: {count} rows repeat the text of an older part and are left out"] if count else []


def merged_groups(one: Indices, other: Indices) -> Indices:
    """Return a number per row, equal where equal numbers of ``one`` or of ``other`` connect rows, in any chain.

    Args:
        one: int64, shape (rows,).
        other: int64, shape (rows,).
    """
    found = np.arange(len(one))
    while True:
        before = found
        for groups in (one, other):
            _, codes = np.unique(groups, return_inverse=True)
            first = np.full(codes.max(initial=-1) + 1, len(one))
            np.minimum.at(first, codes, found)
            found = first[codes]
        # A chain of rows is walked in leaps, from each row to where its first row already is.
        found = found[found]
        if (found == before).all():
            return found


def group_codes(column: LabelColumn, rows: Rows, *, field: str) -> Indices:
    """Return a number for each row's group, int64 (rows,).

    Raises:
        DataError: A row without a group; its line.
    """
    _refuse_blank(column, rows, field=field, right="a group in every row")
    return column.codes.astype(np.int64)


def shared_groups(tables: Mapping[str, Rows], column: str) -> None:
    """Refuse a group that is in two given files.

    Raises:
        DataError: One line for each pair of parts, with the count and the first group.
    """
    names = {part: set(rows.others[column].names) for part, rows in tables.items()}
    parts = list(names)
    problems = []
    for place, early in enumerate(parts):
        for late in parts[place + 1 :]:
            both = sorted(names[early] & names[late])
            if both:
                wrong = f"{len(both)} groups of data.{early} are also in data.{late}, {both[0]!r} first"
                right = "every group in one file, or leave group_column out"
                problems.append(Problem(tables[early].where, "data.split.group_column", wrong, right))
    if problems:
        raise DataError(problems)


def row_times(column: LabelColumn, rows: Rows, *, field: str) -> NDArray[np.float64]:
    """Return a time for each row, float64 (rows,): the numbers of the column, or seconds since 1970 of its dates.

    Raises:
        DataError: A value that is neither a number nor a date of ISO 8601; its line.
    """
    numbers = [_number(value) for value in column.names]
    dates = any(value is None for value in numbers)
    values = [_date(value) for value in column.names] if dates else numbers
    wrong = [code for code, value in enumerate(values) if value is None]
    if wrong:
        right = "numbers alone, or dates such as 2024-03-09 or 2024-03-09T17:30"
        raise DataError(
            Problem(_place(column, code, rows), field, f"{column.names[code]!r} is no time", right)
            for code in wrong[:20]
        )
    return np.array(values, dtype=np.float64)[column.codes]


def cut_by_time(
    times: NDArray[np.float64], repeats: Indices | None, fractions: Mapping[str, float]
) -> dict[str, Indices]:
    """Cut rows into parts so that every part is later than the one before.

    Rows of the same time stay in one part. A text that repeats one of an earlier part is left out of the later ones: to
    move it would put the later row into the past.

    Args:
        times: float64, shape (rows,).
        repeats: int64, shape (rows,), equal where texts are; None keeps all.
        fractions: Share of each part, in their order; what is missing to 1 stays unused, the newest rows.

    Returns:
        Ascending row numbers of each part, int64.
    """
    order = np.argsort(times, kind="stable")
    ranked = times[order]
    ends = np.round(np.cumsum(list(fractions.values())) * len(times)).astype(np.int64)
    # A cut between equal times moves behind them.
    ends = np.where(ends > 0, np.searchsorted(ranked, ranked[np.maximum(ends - 1, 0)], side="right"), 0)
    part = np.full(len(times), len(fractions))
    part[order] = np.searchsorted(ends, np.arange(len(times)), side="right")
    left_out = np.zeros(len(times), dtype=bool)
    if repeats is not None:
        _, codes = np.unique(repeats, return_inverse=True)
        first = np.full(codes.max(initial=-1) + 1, len(fractions))
        np.minimum.at(first, codes, part)
        left_out = (part > first[codes]) & (part < len(fractions))
    return {name: np.flatnonzero((part == place) & ~left_out) for place, name in enumerate(fractions)}


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _date(value: str) -> float | None:
    try:
        # Python 3.10 does not read the Z of UTC; a date without a zone counts as one of UTC.
        date = datetime.datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.timezone.utc)
    return date.timestamp()


def _refuse_blank(column: LabelColumn, rows: Rows, *, field: str, right: str) -> None:
    blank = [code for code, value in enumerate(column.names) if not value.strip()]
    if blank:
        raise DataError(Problem(_place(column, blank[0], rows), field, "is empty", right))


def _place(column: LabelColumn, code: int, rows: Rows) -> str:
    return rows.place(int(np.flatnonzero(column.codes == code)[0]))
