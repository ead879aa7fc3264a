"""What a row is to be given: one label, any number of labels, or numbers; from the strings of a file to arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import DataSettings, ProblemType
from toolkit.data.labels import LabelColumn, LabelMap
from toolkit.data.rows import MAX_LABELS, Rows
from toolkit.errors import DataError, Problem, nearest

# Label ids int64 (rows,), label sets uint8 (rows, labels) of 0 and 1, or numbers float32 (rows, targets).
Targets = NDArray[Any]

BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
# Numbers are stratified by so many equally filled bins, of at least so many rows: a small bin has no tenth to give.
BINS, BIN_ROWS = 10, 20


@dataclass(frozen=True)
class TargetFormat:
    """Where a file keeps its targets.

    Attributes:
        problem_type: As transformers spells it.
        column: Column of one label, of a list of labels, or of a number.
        columns: Instead of it: columns of 0 and 1, a label each, or of numbers, a target each.
        separator: Between the labels of a list that is no JSON.
    """

    problem_type: ProblemType = "single_label_classification"
    column: str = "label"
    columns: tuple[str, ...] = ()
    separator: str = "|"

    @staticmethod
    def of(settings: DataSettings) -> TargetFormat:
        """Return what a recipe's data section says."""
        columns = tuple(settings.label_columns or ())
        return TargetFormat(settings.problem_type, settings.label_column, columns, settings.label_separator)

    @property
    def label_column(self) -> str | None:
        """What ``read_rows`` reads as the label; None where targets are among the other columns."""
        return self.column if self.problem_type == "single_label_classification" else None

    @property
    def others(self) -> tuple[str, ...]:
        """The other columns that hold targets."""
        return () if self.label_column is not None else self.columns or (self.column,)

    @property
    def fields(self) -> dict[str, str]:
        """The other columns with the recipe's fields that name them, as ``read_rows`` takes them."""
        return dict.fromkeys(self.others, "data.label_columns" if self.columns else "data.label_column")

    def label_map(self, tables: Iterable[Rows], listed: Iterable[str] | None) -> LabelMap:
        """Return the labels in id order: those listed, the names of the columns, or what the tables hold.

        Args:
            tables: Every table of the run.
            listed: ``data.labels``.

        Raises:
            DataError: More labels than a classifier could have.
        """
        if listed is not None:
            return LabelMap(tuple(listed))
        if self.columns or self.problem_type == "regression":
            return LabelMap(self.others)
        if self.label_column is not None:
            return LabelMap.from_found(name for rows in tables if rows.labels is not None for name in rows.labels.names)
        found: set[str] = set()
        for rows in tables:
            for value in rows.others[self.column].names:
                found |= self._set_of(value) or set()
            if len(found) > MAX_LABELS:
                right = "is this the label column, and data.label_separator right?"
                raise DataError(Problem(rows.where, self.column, f"more than {MAX_LABELS} different labels", right))
        return LabelMap.from_found(found)

    def encode(self, rows: Rows, label_map: LabelMap) -> Targets | None:
        """Return the targets of every row, or None where the rows were read without.

        Raises:
            DataError: A label that is not in ``label_map``, or a value that is no list, 0 or 1, or number; one line
                each, with its first row.
        """
        if self.label_column is not None:
            if rows.labels is None:
                return None
            return label_map.encode(rows.labels, where=rows.where, place=rows.place)
        if self.problem_type == "regression":
            return self._columns(rows, _number, right="a finite number").astype(np.float32)
        if self.columns:
            return self._columns(rows, lambda value: BITS.get(value.strip().lower()), right="0 or 1").astype(np.uint8)
        return self._sets(rows, label_map)

    def spell(self, rows: Rows, row: int) -> str:
        """Return the target of a row as it stands in the file."""
        if self.label_column is not None:
            return "" if rows.labels is None else rows.labels[row]
        return ", ".join(rows.others[name][row] for name in self.others)

    def _columns(self, rows: Rows, parse: Callable[[str], float | None], *, right: str) -> NDArray[np.float64]:
        found = np.empty((len(rows), len(self.others)))
        problems: list[Problem] = []
        for place, name in enumerate(self.others):
            column = rows.others[name]
            values = [parse(value) for value in column.names]
            wrong = [code for code, value in enumerate(values) if value is None]
            problems += [_problem(rows, name, column, code, right=right) for code in wrong[:20]]
            found[:, place] = np.array([math.nan if value is None else value for value in values])[column.codes]
        if problems:
            raise DataError(problems)
        return found

    def _sets(self, rows: Rows, label_map: LabelMap) -> NDArray[np.uint8]:
        column, known = rows.others[self.column], label_map.label2id
        distinct = np.zeros((len(column.names), len(known)), dtype=np.uint8)
        problems: list[Problem] = []
        for code, value in enumerate(column.names):
            labels = self._set_of(value)
            unknown = sorted((labels or set()) - known.keys())
            if labels is None or unknown:
                hint = nearest(unknown[0], label_map.names) if unknown else None
                right = f"some of {', '.join(label_map.names[:20])}" + (f"; {hint}" if hint else "")
                what = unknown[0] if unknown else value
                problems.append(_problem(rows, self.column, column, code, right=right, what=what))
            else:
                distinct[code, [known[label] for label in labels]] = 1
        if problems:
            raise DataError(problems[:20])
        return distinct[column.codes]

    def _set_of(self, value: str) -> set[str] | None:
        """Return the labels of a cell: a JSON list of strings or integers, or what the separator parts; or None."""
        if value.startswith("["):
            try:
                listed = json.loads(value)
            except ValueError:
                listed = None
            if isinstance(listed, list):
                plain = all(isinstance(one, str | int) and not isinstance(one, bool) for one in listed)
                return {str(one) for one in listed if str(one).strip()} if plain else None
        return {part.strip() for part in value.split(self.separator) if part.strip()}


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    # float32 is what a head gives.
    return number if abs(number) < 1e30 else None


def _problem(rows: Rows, field: str, column: LabelColumn, code: int, *, right: str, what: str | None = None) -> Problem:
    places = np.flatnonzero(column.codes == code)
    wrong = repr(column.names[code] if what is None else what)[:80]
    wrong += f", in {len(places)} rows" if len(places) > 1 else ""
    return Problem(rows.place(int(places[0])), field, f"{wrong} is not {right.partition(';')[0]}", right)


def strata(targets: Targets) -> NDArray[np.int64]:
    """Return a number for each row, int64 (rows,), by which splits and samples keep their shares.

    A label is its own number. A label set counts as its rarest label, so that rare labels reach every part; a number as
    its tenth of all numbers (of the first target).
    """
    if targets.ndim == 1:
        return targets.astype(np.int64)
    if targets.dtype == np.uint8:
        counts = targets.sum(axis=0, dtype=np.int64)
        # Behind the last label: rows without any.
        rarest = np.where(targets > 0, counts, len(targets) + 1).argmin(axis=1)
        return np.asarray(np.where(targets.any(axis=1), rarest, targets.shape[1]), dtype=np.int64)
    bins = min(BINS, max(1, len(targets) // BIN_ROWS))
    edges = np.quantile(targets[:, 0], np.linspace(0, 1, bins + 1)[1:-1])
    return np.asarray(np.searchsorted(edges, targets[:, 0], side="right"), dtype=np.int64)


def as_ids(targets: Targets) -> NDArray[np.int64]:
    """Return a number for each row, int64 (rows,), equal where the targets are."""
    if targets.ndim == 1:
        return targets.astype(np.int64)
    return np.unique(targets, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def counts(targets: Targets, label_map: LabelMap) -> dict[str, int]:
    """Rows of each label; empty for numbers."""
    if targets.ndim == 1:
        return label_map.counts(targets)
    if targets.dtype != np.uint8:
        return {}
    return dict(zip(label_map.names, targets.sum(axis=0, dtype=np.int64).tolist(), strict=True))


def check_targets(parts: Mapping[str, Targets], label_map: LabelMap, *, where: Mapping[str, str]) -> list[str]:
    """Refuse label sets and numbers that nothing can be learned from; return warnings.

    Args:
        parts: Targets of train, validation and test, uint8 or float32.
        label_map: Names of the labels or targets.
        where: File of each part.

    Raises:
        DataError: All training rows have the same targets, or a label occurs only outside the training rows.
    """
    train = parts["train"]
    if (train == train[0]).all():
        same = _spelt(train[0], label_map)
        raise DataError(Problem(where["train"], "data.train", f"every training row has {same}", "rows that differ"))
    if train.dtype != np.uint8:
        return _scale_warnings(train, label_map, where=where["train"])
    seen = np.asarray(train.any(axis=0))
    for name, part in parts.items():
        missing = np.flatnonzero(part.any(axis=0) & ~seen)
        if len(missing):
            names = ", ".join(repr(label_map.names[index]) for index in missing[:20])
            wrong = f"label {names} occurs in {name} but never in train"
            raise DataError(Problem(where[name], f"data.{name}", wrong, "training rows of every label"))
    absent = [name for name, there in zip(label_map.names, seen, strict=True) if not there]
    return [f"{where['train']}: label {', '.join(absent)} has no training rows"] if absent else []


def _spelt(row: Targets, label_map: LabelMap) -> str:
    if row.dtype == np.uint8:
        names = [name for name, there in zip(label_map.names, row, strict=True) if there]
        return f"the labels {', '.join(names)}" if names else "no label"
    return ", ".join(f"{name} {value:g}" for name, value in zip(label_map.names, row, strict=True))


def _scale_warnings(train: Targets, label_map: LabelMap, *, where: str) -> list[str]:
    """Say which targets lie far from what an untrained head gives, which is about 0."""
    means, spreads = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    far = [
        f"{name} is {mean:.4g} on average, with a deviation of {spread:.4g}"
        for name, mean, spread in zip(label_map.names, means, spreads, strict=True)
        if abs(mean) > 20 or spread > 20
    ]
    return [f"{where}: {'; '.join(far)}: numbers near 0 to 10 are learnt in fewer steps"] if far else []
