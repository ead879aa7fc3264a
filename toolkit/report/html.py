"""report.html: one self-contained page that says what was trained, how good it is and what it cost."""

from __future__ import annotations

import base64
import pathlib
from collections.abc import Sequence
from typing import TypedDict

from toolkit.durable import write_file_atomically
from toolkit.report.render import render
from toolkit.report.run_record import RunRecord


class ErrorExample(TypedDict):
    """A wrong prediction to show: text, label, predicted label and its probability (0 to 1; None for numbers)."""

    text: str
    label: str
    predicted: str
    probability: float | None


def write_report(
    record: RunRecord,
    path: pathlib.Path,
    *,
    recipe: str,
    errors: Sequence[ErrorExample] = (),
    curves: pathlib.Path | None = None,
    confusion: pathlib.Path | None = None,
    memory: pathlib.Path | None = None,
) -> None:
    """Write the report; images are embedded, so the file can be moved or mailed.

    Args:
        record: The run.
        path: The file to write.
        recipe: The resolved recipe as YAML.
        errors: Wrong predictions on the test part, surest first.
        curves: PNG that ``draw_curves`` wrote.
        confusion: PNG that ``draw_confusion`` wrote.
        memory: PNG that ``draw_memory`` wrote.

    Raises:
        OSError: If an image cannot be read or the report not written.
    """
    images = {"curves": inline(curves), "confusion": inline(confusion), "timeline": inline(memory)}
    page = render("report.html.j2", record=record, recipe=recipe, extra={"errors": list(errors), **images})
    write_file_atomically(path, page)


def inline(image: pathlib.Path | None) -> str | None:
    """Return a PNG as a data URL; None without one."""
    if image is None:
        return None
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode("ascii")
