"""metrics.jsonl: one JSON line per log step and per evaluation, appended while training runs."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from toolkit.durable import room_on_disk, write_file_atomically
from toolkit.errors import OutputError, Problem


class MetricsLog:
    """The log of one run.

    A log line holds ``step``, ``epoch``, ``loss``, ``learning_rate``, ``memory: {allocated, reserved, rss}`` and what
    else the trainer measures; an evaluation line holds ``step`` and ``validation: {loss, accuracy, f1_macro}``; at the
    end, a line for each phase holds ``step`` and ``phase``, as in result.json.

    Args:
        path: The file; made at the first line.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line; it must have a ``step``. A number that is not finite is written as null: JSON has no NaN."""
        text = json.dumps(_finite({"step": line["step"], **line}), ensure_ascii=False, allow_nan=False)
        # One write of a whole line: a killed process leaves complete lines only.
        raw = text.encode("utf-8") + b"\n"
        with room_on_disk(self.path.parent, needed=len(raw)), self.path.open("ab") as file:
            file.write(raw)

    def read(self) -> list[dict[str, Any]]:
        """Return every line, oldest first; an empty list before the first.

        A last line without its newline (the machine lost power) is left out.

        Raises:
            OutputError: If a complete line is not a JSON object with a step.
        """
        if not self.path.exists():
            return []
        *lines, _unfinished = self.path.read_bytes().split(b"\n")
        return [self._parse(raw, number) for number, raw in enumerate(lines, start=1)]

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, for a resume from the checkpoint of ``step``."""
        if not self.path.exists():
            return
        kept = [json.dumps(line, ensure_ascii=False) + "\n" for line in self.read() if line["step"] <= step]
        write_file_atomically(self.path, "".join(kept))

    def _parse(self, raw: bytes, number: int) -> dict[str, Any]:
        where = f"{self.path}:{number}"
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise OutputError(Problem(where, "", f"not JSON: {error}", "a line that training wrote")) from error
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise OutputError(Problem(where, "step", "missing", "a line that training wrote"))
        return line


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
