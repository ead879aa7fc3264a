"""Texts to classify, from a file or from a pipe; a bad line is named, never guessed at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import IO

from toolkit.data.rows import wrong_text
from toolkit.data.sources import read_rows
from toolkit.errors import DataError, Problem

STDIN = "stdin"


def read_texts(source: str, *, text_column: str, stdin: IO[bytes]) -> Iterable[str]:
    """Return the texts of ``source``; the first one of a pipe is read at once, the others as they are asked for.

    Args:
        source: ``-`` for stdin with a text a line, or a data file (.txt, csv, tsv, jsonl, parquet).
        text_column: Column of the text, where the file has columns.
        stdin: What ``-`` reads.

    Raises:
        DataError: If there is no text, or it cannot be read exactly.
    """
    if source == "-":
        lines = _lines(stdin)
        first = next(lines, None)
        if first is None:
            raise DataError(Problem(STDIN, "", "is empty", "a text a line"))
        return chain([first], lines)
    rows, _ = read_rows(source, text_column=text_column, label_column=None)
    if rows.texts is None:
        raise DataError(Problem(source, "", "holds token ids, not texts", "csv, tsv, jsonl, parquet or txt"))
    return (str(text) for text in rows.texts)


def _lines(stream: IO[bytes]) -> Iterator[str]:
    for number, raw in enumerate(stream, start=1):
        where = f"{STDIN}:{number}"
        try:
            # utf-8-sig: a byte order mark of the first line is no part of its text.
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(Problem(where, "", f"not UTF-8 at byte {error.start}", "UTF-8 text")) from error
        if wrong := wrong_text(text):
            raise DataError(Problem(where, "text", *wrong))
        yield text
