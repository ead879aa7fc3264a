"""What every reader returns: rows as flat columns, and where they came from."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from toolkit.data.labels import LabelColumn
from toolkit.data.spool import TextSpool
from toolkit.data.tokens import TokenTable
from toolkit.errors import DataError, Problem

MAX_CHARACTERS = 1_000_000
MAX_LABELS = 10_000
MAX_PROBLEMS = 20
CHUNK_ROWS = 65_536
CHUNK_CHARACTERS = 16_000_000


# Without further columns; else each has the recipe's field that names it.
NONE: Mapping[str, str] = MappingProxyType({})
# Rows up to which plain lists are as quick as Arrow's take, which brings in pyarrow.compute: 0.1 s of start-up.
SMALL_TABLE = 20_000


@dataclass(frozen=True)
class Origin:
    """Where a table came from.

    Attributes:
        name: The name, path or id that was asked for.
        served: What served it: a path, a URL, a package with its version, or a hub id.
        sha256: Hash of the bytes read (of the texts and labels, for a hub data set).
        rows: Rows read.
        licence: Licence of the data, where known.
    """

    name: str
    served: str
    sha256: str
    rows: int
    licence: str | None = None

    def as_dict(self) -> dict[str, str | int | None]:
        """Return the fields as they stand in result.json."""
        return asdict(self)


@dataclass(frozen=True)
class Rows:
    """A table: either texts or token ids, with labels if it was read with them.

    Attributes:
        where: The file as given, for error messages.
        texts: Arrow large_string, ``rows`` long; None for token ids.
        token_ids: Rows of ids read from .npy; None for texts.
        labels: Exact label strings; None if read without.
        lines: int64, shape (rows,), the 1-based line each row starts on; None where row i is line i + 1.
        keys: Hashes of the contents, where they are known (``repeats.content_keys``).
        others: Further columns that were asked for, by name: groups, times, targets; a list is kept as its JSON.
    """

    where: str
    texts: pa.ChunkedArray | None
    token_ids: TokenTable | None
    labels: LabelColumn | None
    lines: NDArray[np.int64] | None = None
    keys: NDArray[np.void] | None = None
    others: Mapping[str, LabelColumn] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts or ()) if self.token_ids is None else len(self.token_ids)

    def place(self, row: int) -> str:
        """Return ``FILE:LINE`` of a row."""
        return f"{self.where}:{row + 1 if self.lines is None else self.lines[row]}"

    def take(self, indices: NDArray[np.int64]) -> Rows:
        """Return the rows at ``indices``, int64, shape (n,), copied in that order."""
        return Rows(
            self.where,
            None if self.texts is None else _take(self.texts, indices),
            None if self.token_ids is None else self.token_ids.take(indices),
            None if self.labels is None else self.labels.take(indices),
            np.asarray(indices + 1 if self.lines is None else self.lines[indices]),
        )


def _take(texts: pa.ChunkedArray, indices: NDArray[np.int64]) -> pa.ChunkedArray:
    if len(texts) <= SMALL_TABLE:
        values = texts.to_pylist()
        return pa.chunked_array([string_array([values[index] for index in indices.tolist()])])
    if (np.diff(indices) < 0).any():
        return texts.take(_index_array(indices))
    # Chunk by chunk: a take of the whole would first copy all chunks into one.
    starts = np.cumsum([0, *(len(chunk) for chunk in texts.chunks)])
    cuts = np.searchsorted(indices, starts)
    taken = TextSpool()
    for chunk, start, low, high in zip(texts.chunks, starts, cuts, cuts[1:], strict=False):
        taken.add(chunk.take(_index_array(indices[low:high] - start)))
    return taken.column()


def _index_array(indices: NDArray[np.int64]) -> pa.Int64Array:
    """Return an Arrow int64 array, without pandas (``string_array``): 50 MiB."""
    return pa.Int64Array.from_buffers(pa.int64(), len(indices), [None, pa.py_buffer(np.ascontiguousarray(indices))])


def string_array(values: list[str]) -> pa.LargeStringArray:
    """Return an Arrow large_string array.

    pa.array would do the same, and import pandas, where it is installed, to ask whether a list is one of its series:
    0.4 s of start-up.
    """
    encoded = [value.encode() for value in values]
    offsets = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum([len(value) for value in encoded], out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


class ProblemList:
    """Collects the problems of one pass; keeps the first twenty and counts the rest.

    Args:
        where: File the problems are in.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._kept: list[Problem] = []
        self._count = 0

    def add(self, line: int, field: str, wrong: str, right: str = "") -> None:
        """Note a problem on a 1-based line."""
        self._count += 1
        if self._count <= MAX_PROBLEMS:
            self._kept.append(Problem(f"{self.where}:{line}", field, wrong, right))

    def raise_if_any(self) -> None:
        """Raise DataError with all problems noted, if there are any."""
        if self._count > len(self._kept):
            self._kept.append(Problem(self.where, "", f"and {self._count - len(self._kept)} more such problems"))
        if self._kept:
            raise DataError(self._kept)


class RowBuilder:
    """Turns rows that arrive one by one into flat columns.

    Args:
        problems: Receives what is wrong with single rows.
        text_column: Name of the text column, for messages.
        label_column: Name of the label column; None: rows have no label.
        others: Names of further columns, whose values may be anything.
    """

    def __init__(
        self, problems: ProblemList, *, text_column: str, label_column: str | None, others: Iterable[str] = ()
    ) -> None:
        self._problems = problems
        self._text_column = text_column
        self._label_column = label_column
        self._codes: dict[str, int] = {}
        self._labels = array("i")
        self._others: dict[str, tuple[dict[str, int], array[int]]] = {name: ({}, array("i")) for name in others}
        self._lines = array("q")
        self._spool = TextSpool()
        self._open: list[str] = []
        self._characters = 0

    def add(self, text: str, label: str, line: int, others: Sequence[str] = ()) -> None:
        """Append a row that starts on ``line``; the label is ignored when there is no label column."""
        wrong = wrong_text(text)
        if wrong:
            self._problems.add(line, self._text_column, *wrong)
        if self._label_column is not None:
            self._add_label(label, line)
        for (codes, column), value in zip(self._others.values(), others, strict=True):
            column.append(codes.setdefault(value, len(codes)))
        self._lines.append(line)
        self._open.append(text)
        self._characters += len(text)
        if self._characters >= CHUNK_CHARACTERS or len(self._open) >= CHUNK_ROWS:
            self._close_chunk()

    def _add_label(self, label: str, line: int) -> None:
        code = self._codes.get(label)
        if code is None:
            field = self._label_column or ""
            if not label.strip():
                self._problems.add(line, field, "the label is missing", "a label in every row")
            if len(self._codes) >= MAX_LABELS:
                too_many_labels(f"{self._problems.where}:{line}", field)
            code = self._codes.setdefault(label, len(self._codes))
        elif not label.strip():
            self._problems.add(line, self._label_column or "", "the label is missing", "a label in every row")
        self._labels.append(code)

    def _close_chunk(self) -> None:
        try:
            self._spool.add(string_array(self._open))
        except UnicodeEncodeError:
            lines = self._lines[-len(self._open) :]
            for text, line in zip(self._open, lines, strict=True):
                if any("\ud800" <= character <= "\udfff" for character in text):
                    self._problems.add(line, self._text_column, "half of a surrogate pair", "a valid character")
        self._open = []
        self._characters = 0

    def finish(self) -> Rows:
        """Return the rows.

        Raises:
            DataError: A row was wrong, or there are no rows.
        """
        self._close_chunk()
        self._problems.raise_if_any()
        where = self._problems.where
        if not self._lines:
            raise DataError(Problem(where, "", "there are no rows", "at least one row of data"))
        labels = LabelColumn(tuple(self._codes), np.frombuffer(self._labels, dtype=np.int32)) if self._codes else None
        texts = self._spool.column()
        others = {
            name: LabelColumn(tuple(codes), np.frombuffer(column, dtype=np.int32))
            for name, (codes, column) in self._others.items()
        }
        return Rows(where, texts, None, labels, np.frombuffer(self._lines, dtype=np.int64), others=others)


def wrong_text(text: str) -> tuple[str, str] | None:
    """Return what is wrong with a text and what would be right, or None."""
    if not text or text.isspace():
        return ("only white space" if text else "the text is empty"), "a text in every row"
    if len(text) > MAX_CHARACTERS:
        return f"a text of {len(text)} characters", f"at most {MAX_CHARACTERS}"
    if "\0" in text:
        return "a NUL character", "text without NUL"
    return None


def too_many_labels(where: str, field: str) -> None:
    """Raise DataError for a label column that is no label column."""
    raise DataError(Problem(where, field, f"more than {MAX_LABELS} different labels", "is this the label column?"))


def wanted_columns(text: str | None, label: str | None, others: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return pairs of the recipe's field and the column it names, for ``missing_columns``."""
    named = [("data.text_column", text), ("data.label_column", label)]
    named += [(field, name) for name, field in others.items()]
    return [(field, column) for field, column in named if column is not None]


def missing_columns(where: str, found: Iterable[str], wanted: Iterable[tuple[str, str | None]]) -> list[Problem]:
    """Return a problem for every wanted column that is absent.

    Args:
        where: ``FILE`` or ``FILE:LINE`` of the header.
        found: Columns there are.
        wanted: Pairs of the recipe's field and the column it names; None names none.
    """
    names = list(found)
    listed = ", ".join(repr(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")
    return [
        Problem(where, field, f"no column {column!r}", f"the columns are {listed}")
        for field, column in wanted
        if column is not None and column not in names
    ]
