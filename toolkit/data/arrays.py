"""parquet (texts in columns) and npy (token ids with the label, or a column for each, behind them)."""

from __future__ import annotations

import json
import tokenize
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from toolkit.data.labels import LabelColumn
from toolkit.data.rows import (
    MAX_CHARACTERS,
    MAX_LABELS,
    NONE,
    ProblemList,
    Rows,
    missing_columns,
    too_many_labels,
    wanted_columns,
    wrong_text,
)
from toolkit.data.tokens import TokenTable
from toolkit.errors import DataError, Problem

NPY_ROWS = 65_536
# numpy parses a damaged header as Python, and takes a file that begins with PK for an archive.
NPY_ERRORS = (
    ValueError, EOFError, OSError, OverflowError, SyntaxError, RecursionError, tokenize.TokenError, zipfile.BadZipFile,
    # A header that claims gigabytes; the values themselves are mapped, and take no memory.
    MemoryError,
)  # fmt: skip


def read_parquet(
    path: Path, where: str, *, text_column: str, label_column: str | None, others: Mapping[str, str] = NONE
) -> Rows:
    """Read columns of a parquet file; row i counts as line i + 1.

    Raises:
        DataError: Not parquet, a missing or wrongly typed column, a null, an empty text.
    """
    import pyarrow.parquet as pq  # 8 MiB that no other file needs

    wanted = wanted_columns(text_column, label_column, others)
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            problems = missing_columns(where, names, wanted)
            problems += [Problem(where, c, "the column occurs twice") for _, c in wanted if names.count(c) > 1]
            if problems:
                raise DataError(problems)
            table = file.read(columns=list(dict.fromkeys(column for _, column in wanted)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(Problem(where, "", f"not a readable parquet file: {str(error)[:120]}")) from error
    return rows_of_table(table, where, text_column=text_column, label_column=label_column, others=others)


def rows_of_table(
    table: pa.Table, where: str, *, text_column: str, label_column: str | None, others: Mapping[str, str] = NONE
) -> Rows:
    """Return the text, label and other columns of an Arrow table as rows.

    Raises:
        DataError: A column of another type, a null, an empty text, no rows.
    """
    if not table.num_rows:
        raise DataError(Problem(where, "", "there are no rows", "at least one row of data"))
    problems = ProblemList(where)
    texts = _strings(table.column(text_column), where, text_column, numbers=False)
    _check_texts(texts, problems, text_column)
    labels = None
    if label_column is not None:
        strings = _strings(table.column(label_column), where, label_column, numbers=True)
        labels = _labels(strings, problems, label_column)
    further = {name: _other(table.column(name), problems, name) for name in others}
    problems.raise_if_any()
    return Rows(where, texts, None, labels, others=further)


def _other(column: pa.ChunkedArray, problems: ProblemList, name: str) -> LabelColumn:
    """Code a column of any type: lists as their JSON, all else as the string that Arrow makes of it."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in column.to_pylist()]
    else:
        try:
            values = column.cast(pa.large_string()).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            wrong = f"the column holds {column.type}"
            raise DataError(Problem(problems.where, name, wrong, "strings, numbers, times or lists")) from error
    for row, value in enumerate(values):
        if value is None:
            problems.add(row + 1, name, "null", "a value in every row")
    return LabelColumn.from_strings(value or "" for value in values)


def _strings(column: pa.ChunkedArray, where: str, name: str, *, numbers: bool) -> pa.ChunkedArray:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not text and not (numbers and pa.types.is_integer(kind)):
        right = "strings or integers" if numbers else "strings"
        raise DataError(Problem(where, name, f"the column holds {column.type}", right))
    strings = column.cast(pa.large_string())
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(Problem(where, name, f"not UTF-8: {str(error)[:120]}", "UTF-8 strings")) from error
    return strings


def _check_texts(texts: pa.ChunkedArray, problems: ProblemList, name: str) -> None:
    import pyarrow.compute as pc  # 0.1 s to import, for columnar files alone

    trimmed = pc.binary_length(pc.utf8_trim_whitespace(texts))
    suspect = pc.or_(pc.equal(trimmed, 0), pc.greater(pc.utf8_length(texts), MAX_CHARACTERS))
    suspect = pc.fill_null(pc.or_(suspect, pc.match_substring(texts, "\0")), True)
    for row in np.flatnonzero(suspect.to_numpy()):
        text = texts[int(row)].as_py()
        wrong = ("null", "a text in every row") if text is None else wrong_text(text)
        if wrong:
            problems.add(int(row) + 1, name, *wrong)


def _labels(labels: pa.ChunkedArray, problems: ProblemList, name: str) -> LabelColumn:
    import pyarrow.compute as pc

    coded = pc.dictionary_encode(labels).combine_chunks()
    if len(coded.dictionary) > MAX_LABELS:
        too_many_labels(problems.where, name)
    names = tuple(coded.dictionary.to_pylist())
    codes = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False)
    blank = [-1] + [code for code, label in enumerate(names) if not label.strip()]
    for row in np.flatnonzero(np.isin(codes, blank)):
        problems.add(int(row) + 1, name, "the label is missing", "a label in every row")
    return LabelColumn(names, codes.astype(np.int32))


def read_npy(path: Path, where: str, *, with_labels: bool, others: Sequence[str] = ()) -> Rows:
    """Read token ids, int, shape (rows, tokens + 1): the last column is the label, trailing zeros are padding.

    Row i counts as line i + 1. Whether the ids fit a vocabulary is checked by ``TokenTable.check_vocabulary``.

    Args:
        path: The file.
        where: Its name for error messages.
        with_labels: Whether the label is kept.
        others: Names of the last columns, in their order, where a row has several targets instead of a label.

    Raises:
        DataError: Not an array file, an object array (never unpickled), another rank or type, a row without tokens.
    """
    tail = max(1, len(others))
    values = _load_npy(path, where, targets=tail)
    problems = ProblemList(where)
    lengths = np.zeros(len(values), dtype=np.int64)
    for low in range(0, len(values), NPY_ROWS):
        block = np.asarray(values[low : low + NPY_ROWS, :-tail])
        lengths[low : low + NPY_ROWS] = _lengths(block, low, problems)
    problems.raise_if_any()
    table = TokenTable.from_lengths(np.empty(int(lengths.sum()), dtype=np.int32), lengths)
    for low in range(0, len(values), NPY_ROWS):
        block = np.asarray(values[low : low + NPY_ROWS, :-tail])
        high = low + len(block)
        real = np.arange(block.shape[1]) < lengths[low:high, None]
        table.ids[table.offsets[low] : table.offsets[high]] = block[real]
    labels = _npy_labels(values[:, -1], where) if with_labels else None
    columns = {name: _npy_labels(values[:, place - tail], where) for place, name in enumerate(others)}
    return Rows(where, None, table, labels, others=columns)


def _load_npy(path: Path, where: str, *, targets: int) -> NDArray[np.integer]:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_ERRORS as error:
        wrong = "an object array, which only a pickle can hold" if "bject" in str(error) else "not a readable .npy file"
        raise DataError(Problem(where, "", wrong, "integers, saved by numpy.save")) from error
    right = f"integers of shape (rows, tokens + {targets}), the label{'s' * (targets > 1)} last"
    if not isinstance(values, np.ndarray):
        values.close()
        raise DataError(Problem(where, "", "an archive of arrays", right))
    if values.dtype.kind not in "iu":
        raise DataError(Problem(where, "token ids", f"an array of {values.dtype}", right))
    if values.ndim != 2 or values.shape[1] <= targets:
        raise DataError(Problem(where, "token ids", f"an array of shape {values.shape}", right))
    if not len(values):
        raise DataError(Problem(where, "", "there are no rows", "at least one row of data"))
    return values


def _lengths(block: NDArray[np.integer], low: int, problems: ProblemList) -> NDArray[np.int64]:
    real = block != 0
    lengths = np.where(real.any(axis=1), block.shape[1] - np.argmax(real[:, ::-1], axis=1), 0)
    for row in np.flatnonzero(lengths == 0):
        problems.add(low + int(row) + 1, "token ids", "a row without tokens", "at least one id that is not 0")
    for row in np.flatnonzero((block < 0).any(axis=1) | (block > np.iinfo(np.int32).max).any(axis=1)):
        bad = next(int(value) for value in block[row] if value < 0 or value > np.iinfo(np.int32).max)
        problems.add(low + int(row) + 1, "token ids", f"id {bad}", "ids from 0 to the vocabulary's size")
    return lengths.astype(np.int64)


def _npy_labels(column: NDArray[np.integer], where: str) -> LabelColumn:
    names, codes = np.unique(column, return_inverse=True)
    if len(names) > MAX_LABELS:
        too_many_labels(where, "label")
    return LabelColumn(tuple(str(int(name)) for name in names), codes.astype(np.int32))
