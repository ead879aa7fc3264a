"""Shows recipes side by side, and the trials of a sweep."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from rich.table import Table

from toolkit.console import OUT, human_bytes, human_seconds

if TYPE_CHECKING:
    from toolkit.experiments.sweep import Sweep
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


def print_sweep(found: Sweep) -> None:
    """Print a line for each trial, the best one, and where its recipe lies."""
    table = Table(box=None)
    for name in ("trial", found["metric"], "state"):
        table.add_column(name, justify="right" if name != "state" else "left")
    table.add_column("settings", overflow="fold")
    for trial in found["trials"]:
        value = "" if trial["value"] is None else f"{trial['value']:.4f}"
        style = "bold" if trial["number"] == found["best"] else None
        table.add_row(str(trial["number"]), value, trial["state"], " ".join(trial["overrides"]), style=style)
    OUT.print(table)
    OUT.print(f"best recipe: {found['recipe']}", markup=False, soft_wrap=True)
