"""Labels: the exact strings of a file, their ids, and what may be wrong between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DataError, Problem, nearest


@dataclass(frozen=True)
class LabelColumn:
    """The label of every row as a code into the distinct strings.

    Attributes:
        names: Distinct labels, exactly as in the file, in order of appearance.
        codes: int32, shape (rows,), indices into ``names``.
    """

    names: tuple[str, ...]
    codes: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> str:
        return self.names[int(self.codes[row])]

    @staticmethod
    def from_strings(labels: Iterable[str]) -> LabelColumn:
        """Code a sequence of strings."""
        codes: dict[str, int] = {}
        column = np.fromiter((codes.setdefault(label, len(codes)) for label in labels), dtype=np.int32)
        return LabelColumn(tuple(codes), column)

    def take(self, indices: NDArray[np.int64]) -> LabelColumn:
        """Return the labels at ``indices``, shape (n,); names that no longer occur are dropped."""
        used, codes = np.unique(self.codes[indices], return_inverse=True)
        return LabelColumn(tuple(self.names[code] for code in used), codes.astype(np.int32))


@dataclass(frozen=True)
class LabelMap:
    """Label names in id order."""

    names: tuple[str, ...]

    @staticmethod
    def from_found(names: Iterable[str]) -> LabelMap:
        """Order the labels found in the data: by number if all are integers, else as strings."""
        found = sorted(set(names))
        if all(_is_integer(name) for name in found):
            found.sort(key=int)
        return LabelMap(tuple(found))

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each id, as config.json stores it."""
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        """Id of each name, as config.json stores it."""
        return {name: index for index, name in enumerate(self.names)}

    def encode(
        self, labels: LabelColumn | Sequence[str], *, where: str, place: Callable[[int], str] | None = None
    ) -> NDArray[np.int64]:
        """Return the id of every label, int64, shape (rows,).

        Args:
            labels: Exact label strings.
            where: File they came from.
            place: ``FILE:LINE`` of a row; by default ``where``.

        Raises:
            DataError: A label is none of the names; one line each, with its first row and its count.
        """
        column = labels if isinstance(labels, LabelColumn) else LabelColumn.from_strings(labels)
        known = self.label2id
        counts = np.bincount(column.codes, minlength=len(column.names))
        unknown = [code for code, name in enumerate(column.names) if name not in known and counts[code]]
        if unknown:
            raise DataError(self._unknown(column, code, int(counts[code]), where, place) for code in unknown[:20])
        table = np.array([known.get(name, -1) for name in column.names], dtype=np.int64)
        return table[column.codes] if len(column) else np.empty(0, dtype=np.int64)

    def _unknown(
        self, column: LabelColumn, code: int, count: int, where: str, place: Callable[[int], str] | None
    ) -> Problem:
        row = int(np.flatnonzero(column.codes == code)[0])
        name = column.names[code]
        wrong = f"{name!r} is not one of the labels" + (f", in {count} rows" if count > 1 else "")
        hint = nearest(name, self.names)
        right = f"one of {', '.join(self.names[:20])}" + (f"; {hint}" if hint else "")
        return Problem(place(row) if place else where, "label", wrong, right)

    def counts(self, ids: NDArray[np.int64]) -> dict[str, int]:
        """Rows of each label, from ids of shape (rows,)."""
        found = np.bincount(ids, minlength=len(self.names))
        return {name: int(found[index]) for index, name in enumerate(self.names)}


def _is_integer(name: str) -> bool:
    digits = name[1:] if name.startswith("-") else name
    return digits.isascii() and digits.isdigit() and len(digits) < 19 and str(int(name)) == name


def check_training_labels(ids: NDArray[np.int64], label_map: LabelMap, *, where: str) -> None:
    """Refuse training rows that no classifier can be learned from.

    Args:
        ids: int64, shape (rows,), labels of the training rows.
        label_map: All labels.
        where: File or set the rows came from.

    Raises:
        DataError: Fewer rows than labels, or rows of one label only.
    """
    present = [name for name, count in label_map.counts(ids).items() if count]
    if len(ids) < len(label_map.names):
        wrong = f"{len(ids)} training rows for {len(label_map.names)} labels"
        raise DataError(Problem(where, "data.train", wrong, "at least one row of every label"))
    if len(present) < 2:
        wrong = f"every training row has the label {present[0]!r}"
        raise DataError(Problem(where, "data.train", wrong, "rows of at least two labels"))


def check_held_out_labels(
    train: NDArray[np.int64], held_out: NDArray[np.int64], label_map: LabelMap, *, part: str, where: str
) -> None:
    """Refuse labels that training never shows.

    Args:
        train: int64, shape (rows,), labels of the training rows.
        held_out: int64, shape (rows,), labels of the other part.
        label_map: All labels.
        part: ``validation`` or ``test``.
        where: File the other part came from.

    Raises:
        DataError: A label occurs in ``held_out`` but not in ``train``.
    """
    seen = label_map.counts(train)
    missing = [name for name, count in label_map.counts(held_out).items() if count and not seen[name]]
    if missing:
        names = ", ".join(repr(name) for name in missing[:20])
        right = "training rows of every label; data.split.stratify keeps every label in train"
        raise DataError(Problem(where, f"data.{part}", f"label {names} occurs in {part} but never in train", right))
