"""compare.html, its picture, and compare.json."""

from __future__ import annotations

import json
import pathlib

from toolkit.durable import write_file_atomically
from toolkit.report.comparison import Comparison
from toolkit.report.html import inline
from toolkit.report.pareto import draw_pareto
from toolkit.report.render import fill


def write_comparison(comparison: Comparison, folder: pathlib.Path) -> None:
    """Write ``compare.html``, which needs nothing beside it, ``compare.png`` and ``compare.json``.

    Raises:
        OutputError: If the disk is full.
        OSError: If the folder cannot be written.
    """
    picture = folder / "compare.png"
    draw_pareto(comparison["recipes"], picture, enough=comparison["enough"])
    page = fill("compare.html.j2", comparison=comparison, picture=inline(picture))
    write_file_atomically(folder / "compare.html", page)
    text = json.dumps(comparison, indent=2, ensure_ascii=False, allow_nan=False)
    write_file_atomically(folder / "compare.json", text + "\n")
