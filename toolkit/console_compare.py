"""Shows recipes side by side, and which one is enough."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from rich.table import Table

from toolkit.console import OUT, human_bytes, human_seconds

if TYPE_CHECKING:
    from toolkit.report.comparison import Comparison, RecipeRow


def print_comparison(comparison: Comparison, folder: pathlib.Path) -> None:
    """Print a line for each recipe, the verdict, and where the page lies."""
    table = Table(box=None)
    table.add_column("recipe", overflow="fold")
    for name in ("accuracy", "95 % interval", "p", "peak", "time", "trained"):
        table.add_column(name, justify="right")
    for row in comparison["recipes"]:
        style = "bold" if row["name"] == comparison["enough"] else None
        table.add_row(row["name"], *_cells(row, best=comparison["best"]), style=style)
    OUT.print(table)
    for row in comparison["recipes"]:
        for run in row["runs"]:
            if run["failed"]:
                OUT.print(f"{row['name']}, seed {run['seed']}: failed, {run['failed']}", markup=False, soft_wrap=True)
    for sentence in comparison["verdict"]:
        OUT.print(sentence, markup=False, soft_wrap=True)
    OUT.print(f"page: {folder / 'compare.html'}", markup=False, soft_wrap=True)


def _cells(row: RecipeRow, *, best: str) -> list[str]:
    measured = row["measured"]
    if measured is None:
        return ["failed", "", "", "", "", ""]
    low, high = measured["accuracy_interval"]
    p_value = "best" if row["name"] == best else "" if measured["p_value"] is None else f"{measured['p_value']:.2g}"
    return [
        f"{100 * measured['accuracy']:.2f} %",
        f"{100 * low:.1f} to {100 * high:.1f} %",
        p_value,
        human_bytes(measured["peak_bytes"]),
        human_seconds(measured["seconds"]),
        f"{measured['trainable']:,}",
    ]
