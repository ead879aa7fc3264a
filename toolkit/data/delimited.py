"""csv (RFC 4180 quoting) and tsv (no quoting: a quote is a character), read row by row and exactly."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from toolkit.data.files import bounded_lines, open_text
from toolkit.data.rows import MAX_CHARACTERS, ProblemList, RowBuilder, Rows, missing_columns, wanted_columns
from toolkit.errors import DataError, Problem, nearest

NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
Record = tuple[int, list[str]]


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read.

    Attributes:
        text: Column of the text.
        label: Column of the label; None reads no labels.
        header: Column names of a file that has no header line; None: the first line holds them.
        only: A column and the value it must have; other rows are passed over.
        others: Further columns, kept as they are, each with the recipe's field that names it.
    """

    text: str
    label: str | None
    header: tuple[str, ...] | None = None
    only: tuple[str, str] | None = None
    others: Mapping[str, str] = field(default_factory=dict)


def read_csv(path: Path, where: str, columns: Columns) -> Rows:
    """Read comma-separated rows; see :func:`_read` for the errors."""
    return _read(path, where, columns, delimiter=",")


def read_tsv(path: Path, where: str, columns: Columns) -> Rows:
    """Read tab-separated rows, in which a quote is a character; see :func:`_read` for the errors."""
    return _read(path, where, columns, delimiter="\t")


def _read(path: Path, where: str, columns: Columns, *, delimiter: str) -> Rows:
    """Read a file that ``check_text_file`` accepted.

    Raises:
        DataError: A wrong header, rows with too many or too few fields, an unbalanced quote, an empty text, a missing
            label, a field above the cap; every wrong row has its line.
    """
    with open_text(path) as handle:
        lines = bounded_lines(handle, where)
        records = _csv_records(lines, path, where) if delimiter == "," else _plain_records(lines)
        header = list(columns.header) if columns.header else _header(records, where, delimiter)
        _check_columns(header, where, columns, delimiter)
        return _fill(records, header, columns, ProblemList(where), delimiter)


def _plain_records(lines: Iterator[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        stripped = line.rstrip("\r\n")
        if stripped:
            yield number, stripped.split("\t")


def _csv_records(lines: Iterator[str], path: Path, where: str) -> Iterator[Record]:
    # The limit is global to the csv module: it is set for each row and put back, so no one else sees it.
    reader = csv.reader(lines, strict=True)
    while True:
        start = reader.line_num + 1
        before = csv.field_size_limit(MAX_CHARACTERS)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(_csv_problem(path, where, start, reader.line_num, str(error))) from error
        finally:
            csv.field_size_limit(before)
        if fields is None:
            return
        if fields:
            yield start, fields


def _csv_problem(path: Path, where: str, start: int, end: int, error: str) -> Problem:
    opened = _quote_opened(path, start, end)
    if "field limit" in error:
        wrong = f"a field of more than {MAX_CHARACTERS} characters"
        right = f"a quote opened in line {opened} may not be closed" if opened and opened < end else "shorter fields"
        return Problem(f"{where}:{start}", "", wrong, right)
    if "unexpected end" in error or (opened is not None and opened < end):
        wrong = "a quote opens in this line and is not closed properly"
        return Problem(f"{where}:{opened or start}", "", wrong, 'a quote inside a quoted field is written ""')
    wrong = "text follows a closing quote"
    return Problem(f"{where}:{opened or start}", "", wrong, 'a quote inside a quoted field is written ""')


def _quote_opened(path: Path, start: int, end: int) -> int | None:
    """Return the line where the last quoted field of lines start to end opened, by a scan of RFC 4180 states."""
    opened, state = None, "start"
    with open_text(path) as handle:
        for number, line in enumerate(islice(handle, start - 1, end), start=start):
            for character in line:
                if state == "quoted":
                    state = "closed" if character == '"' else "quoted"
                elif character == ",":
                    state = "start"
                elif character == '"' and state == "start":
                    opened, state = number, "quoted"
                elif character == '"' and state == "closed":
                    state = "quoted"
                elif state == "closed" and character not in "\r\n":
                    return opened
                elif state == "start":
                    state = "plain"
    return opened


def _header(records: Iterator[Record], where: str, delimiter: str) -> list[str]:
    line, header = next(records, (1, []))
    if not header:
        raise DataError(Problem(where, "", "the file is empty", "a header and rows"))
    repeated = sorted({name for name in header if header.count(name) > 1}) if len(header) < 10_000 else []
    if repeated:
        names = ", ".join(repr(name) for name in repeated)
        raise DataError(Problem(f"{where}:{line}", "header", f"column {names} occurs twice", "every column once"))
    return header


def _check_columns(header: Sequence[str], where: str, columns: Columns, delimiter: str) -> None:
    wanted = wanted_columns(columns.text, columns.label, columns.others)
    problems = missing_columns(f"{where}:1", header, wanted)
    if not problems:
        return
    if other := _other_delimiter(header, columns, delimiter):
        wrong = f"the fields are separated by a {NAMES[other]}, expected a {NAMES[delimiter]}"
        fix = {",": "name the file .csv", "\t": "name the file .tsv"}.get(other, "save it with commas or tabs")
        raise DataError(Problem(f"{where}:1", "header", wrong, fix))
    right = ""
    if len(problems) == len(wanted) and len(header) >= len(wanted):
        right = f"{problems[0].right}; is the header line missing?"
    raise DataError(
        Problem(problem.where, problem.field, problem.wrong, right or f"{problem.right}{_near(column, header)}")
        for problem, column in zip(problems, [c for _, c in wanted if c not in header], strict=True)
    )


def _near(column: str, header: Sequence[str]) -> str:
    hint = nearest(column, header)
    return f"; {hint}" if hint else ""


def _other_delimiter(header: Sequence[str], columns: Columns, delimiter: str) -> str:
    """Return the delimiter that would make a wanted column appear, or nothing."""
    text = delimiter.join(header)
    for other in NAMES:
        fields = [field.strip('"') for field in text.split(other)]
        wanted = {columns.text, columns.label, *columns.others}
        if other != delimiter and wanted & set(fields) and len(fields) > 1:
            return other
    return ""


def _fill(
    records: Iterator[Record], header: Sequence[str], columns: Columns, problems: ProblemList, delimiter: str
) -> Rows:
    builder = RowBuilder(problems, text_column=columns.text, label_column=columns.label, others=columns.others)
    width, text = len(header), header.index(columns.text)
    label = text if columns.label is None else header.index(columns.label)
    others = [header.index(name) for name in columns.others]
    keep = _filter(header, columns.only)
    for line, fields in records:
        if len(fields) != width:
            _wrong_width(problems, line, fields, header, delimiter)
        elif keep(fields):
            builder.add(fields[text], fields[label], line, [fields[index] for index in others])
    return builder.finish()


def _filter(header: Sequence[str], only: tuple[str, str] | None) -> Callable[[list[str]], bool]:
    if only is None:
        return lambda fields: True
    index, value = header.index(only[0]), only[1]
    return lambda fields: fields[index] == value


def _wrong_width(problems: ProblemList, line: int, fields: list[str], header: Sequence[str], delimiter: str) -> None:
    count = f"{len(fields)} fields, the header has {len(header)}"
    if len(fields) < len(header):
        problems.add(line, header[len(fields)], f"the field is missing: {count}", "a value for every column")
    else:
        fix = "put the field that holds a comma in quotes" if delimiter == "," else "no tab inside a field"
        problems.add(line, "", f"too many fields: {count}", fix)
