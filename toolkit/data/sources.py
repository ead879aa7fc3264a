"""From what a recipe names (a set, a file, a hub id) to rows and where they came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from toolkit.data.arrays import read_npy, read_parquet
from toolkit.data.delimited import Columns, read_csv, read_tsv
from toolkit.data.files import check_text_file, sha256_of
from toolkit.data.hub import HUB_ID, read_hub_dataset
from toolkit.data.jsonlines import read_jsonl, read_txt
from toolkit.data.named_sets import NAMED_SETS, read_named_set
from toolkit.data.rows import NONE, Origin, Rows
from toolkit.data.table_cache import cached_rows
from toolkit.errors import DataError, Problem, nearest

__all__ = ["SUFFIXES", "Origin", "Rows", "read_rows"]

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".npy")


def read_rows(
    where: str, *, text_column: str, label_column: str | None, others: Mapping[str, str] = NONE
) -> tuple[Rows, Origin]:
    """Read a named set, a data file or a hub data set; the strings returned are the strings in the file.

    Args:
        where: One of ``NAMED_SETS``, a path with one of ``SUFFIXES``, or ``owner/name[:config][@split]``.
        text_column: Column of the text; unused for .npy and .txt.
        label_column: Column of the label; None reads no labels. In .npy it is always the last column.
        others: Further columns to keep as strings, each with the recipe's field that names it; .txt has none, and of
            .npy those of ``data.label_columns`` are the last ones, in their order.

    Raises:
        DataError: It does not exist or cannot be read exactly; every problem has its line.
        CapabilityError: A hub id without the ``datasets`` library.
    """
    if where in NAMED_SETS:
        return read_named_set(where, text_column=text_column, label_column=label_column, others=others)
    path = Path(where)
    if path.suffix.lower() in SUFFIXES:
        return _read_file(path, where, Columns(text_column, label_column, others=others))
    if not path.exists() and re.fullmatch(HUB_ID, where):
        return read_hub_dataset(where, text_column=text_column, label_column=label_column, others=others)
    listed = f"a file ({', '.join(SUFFIXES)}), a hub id (owner/name), or one of {', '.join(NAMED_SETS)}"
    hint = nearest(where, NAMED_SETS)
    wrong = f"{path.suffix or 'no suffix'} is not a data format" if path.exists() else "no such data"
    raise DataError(Problem(where, "data.source", wrong, f"{hint} {listed}" if hint else listed))


def _read_file(path: Path, where: str, columns: Columns) -> tuple[Rows, Origin]:
    suffix = path.suffix.lower()
    text_column, label_column, others = columns.text, columns.label, columns.others
    if suffix == ".txt" and label_column is not None:
        raise DataError(Problem(where, "data.label_column", "a .txt file has no labels", "csv, tsv or jsonl"))
    absent = {n: field for n, field in others.items() if suffix == ".txt" or field != "data.label_columns"}
    if suffix in (".txt", ".npy") and absent:
        right = "csv, tsv, jsonl or parquet"
        raise DataError(
            Problem(where, field, f"a {suffix} file has no column {name!r}", right) for name, field in absent.items()
        )
    sha256 = sha256_of(path, where)

    def parse() -> Rows:
        if suffix in TEXT_SUFFIXES:
            check_text_file(path, where)
        if suffix == ".csv":
            return read_csv(path, where, columns)
        if suffix == ".tsv":
            return read_tsv(path, where, columns)
        if suffix == ".parquet":
            return read_parquet(path, where, text_column=text_column, label_column=label_column, others=others)
        if suffix == ".npy":
            return read_npy(path, where, with_labels=label_column is not None, others=tuple(others))
        if suffix == ".txt":
            return read_txt(path, where)
        return read_jsonl(path, where, text_column=text_column, label_column=label_column, others=others)

    rows = cached_rows(path, where, sha256=sha256, columns=(text_column, label_column, *others), parse=parse)
    return rows, Origin(where, where, sha256, len(rows))
