"""jsonl (an object a line) and txt (a text a line)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from toolkit.data.files import bounded_lines, open_text
from toolkit.data.rows import NONE, ProblemList, RowBuilder, Rows, missing_columns


class _DuplicateKey(ValueError):
    pass


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(f"key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def read_jsonl(
    path: Path, where: str, *, text_column: str, label_column: str | None, others: Mapping[str, str] = NONE
) -> Rows:
    """Read JSON lines; texts are strings, labels strings or integers, other values are kept as their JSON.

    Raises:
        DataError: A line is no JSON object, lacks a key, or holds another type; every wrong line is named.
    """
    problems = ProblemList(where)
    builder = RowBuilder(problems, text_column=text_column, label_column=label_column, others=others)
    with open_text(path) as handle:
        for number, line in enumerate(bounded_lines(handle, where), start=1):
            if not line.strip():
                continue
            record = _parse(line, number, problems)
            if record is None:
                continue
            text = _string(record, text_column, number, problems, numbers=False)
            label = "" if label_column is None else _string(record, label_column, number, problems, numbers=True)
            further = [_other(record, name, field, number, problems) for name, field in others.items()]
            known = [value for value in further if value is not None]
            if text is not None and label is not None and len(known) == len(others):
                builder.add(text, label, number, known)
    return builder.finish()


def _parse(line: str, number: int, problems: ProblemList) -> dict[str, object] | None:
    try:
        record = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        problems.add(number, "", f"not JSON at column {error.colno}: {error.msg}", "one JSON object a line")
        return None
    except (ValueError, RecursionError) as error:
        problems.add(number, "", f"not usable JSON: {str(error)[:80]}", "one flat JSON object a line")
        return None
    if not isinstance(record, dict):
        problems.add(number, "", f"a JSON {type(record).__name__}", "one JSON object a line")
        return None
    return record


def _string(record: dict[str, object], key: str, number: int, problems: ProblemList, *, numbers: bool) -> str | None:
    value = record.get(key)
    if isinstance(value, str):
        return value
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if key not in record:
        field = "data.label_column" if numbers else "data.text_column"
        for problem in missing_columns(problems.where, record, [(field, key)]):
            problems.add(number, problem.field, problem.wrong, problem.right)
    elif value is None:
        problems.add(number, key, "null", "a label in every row" if numbers else "a text in every row")
    else:
        wrong = json.dumps(value)[:60]
        problems.add(number, key, wrong, "a string or an integer" if numbers else "a string")
    return None


def _other(record: dict[str, object], key: str, field: str, number: int, problems: ProblemList) -> str | None:
    value = record.get(key)
    if value is not None:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if key in record:
        problems.add(number, key, "null", "a value in every row")
    for problem in missing_columns(problems.where, record, [(field, key)]):
        problems.add(number, problem.field, problem.wrong, problem.right)
    return None


def read_txt(path: Path, where: str) -> Rows:
    """Read one text a line, for training without labels; blank lines are passed over.

    Raises:
        DataError: A line is too long, or there are no texts.
    """
    builder = RowBuilder(ProblemList(where), text_column="text", label_column=None)
    with open_text(path) as handle:
        for number, line in enumerate(bounded_lines(handle, where), start=1):
            text = line.rstrip("\r\n")
            if text and not text.isspace():
                builder.add(text, "", number)
    return builder.finish()
