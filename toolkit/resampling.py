"""One recipe on other rows: cross-validation over folds, and the learning curve over sizes of the training part.

Every run is an ordinary one in a folder of its own, so an interrupted series goes on where it stopped, and finished
runs are not run again.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from toolkit.config.load import load_recipe
from toolkit.config.schema import Recipe
from toolkit.durable import write_file_atomically
from toolkit.errors import InputError, Problem
from toolkit.finetune import finetune
from toolkit.listener import SILENT, Listener
from toolkit.report.learning_curve import draw_learning_curve

Series = dict[str, Any]


def cross_validate(
    path: str, overrides: Sequence[str] = (), *, folds: int, listener: Listener = SILENT
) -> tuple[Series, pathlib.Path]:
    """Train a recipe once for each fold, tested on that fold.

    Args:
        path: The recipe.
        overrides: ``dotted.path=value`` each.
        folds: How many, at least 2.
        listener: Hears of every run.

    Returns:
        What ``folds.json`` holds, and its folder: a run for each fold with its test figures, and their ``mean`` and
        ``deviation`` (of the sample, n - 1).

    Raises:
        InputError: The recipe, its data or its base are wrong.
    """
    folder = _folder(path, overrides, "folds")
    chosen = [f"data.split.folds={folds}", "data.split.fold={}"]
    found = _run(path, overrides, folder, "fold", range(1, folds + 1), chosen, listener)
    names = found["runs"][0]["figures"]
    values = {name: [run["figures"][name] for run in found["runs"]] for name in names}
    found["mean"] = {name: statistics.fmean(column) for name, column in values.items()}
    found["deviation"] = {name: statistics.stdev(column) for name, column in values.items()}
    _write(folder / "folds.json", found)
    return found, folder


def learning_curve(
    path: str, overrides: Sequence[str] = (), *, sizes: Sequence[int], listener: Listener = SILENT
) -> tuple[Series, pathlib.Path]:
    """Train a recipe on samples of its training rows, each larger one holding the smaller; the test part stays.

    Args:
        path: The recipe.
        overrides: ``dotted.path=value`` each.
        sizes: Training rows of each run.
        listener: Hears of every run.

    Returns:
        What ``learning_curve.json`` holds, and its folder, which has ``learning_curve.png`` too: a run for each size
        with its figures.

    Raises:
        InputError: The recipe, its data or its base are wrong.
    """
    folder = _folder(path, overrides, "rows")
    found = _run(path, overrides, folder, "rows", sorted(set(sizes)), ["data.train_rows={}"], listener)
    _write(folder / "learning_curve.json", found)
    draw_learning_curve(found["runs"], folder / "learning_curve.png")
    return found, folder


def _folder(path: str, overrides: Sequence[str], suffix: str) -> pathlib.Path:
    return pathlib.Path(f"{load_recipe(path, overrides).output.dir}-{suffix}")


def _run(
    path: str,
    overrides: Sequence[str],
    folder: pathlib.Path,
    name: str,
    values: Sequence[int],
    chosen: Sequence[str],
    listener: Listener,
) -> Series:
    """Run a recipe for each value; all recipes are checked before the first run."""
    recipes = [_recipe(path, overrides, folder / f"{name}-{value}", chosen, value) for value in values]
    runs = []
    for value, recipe in zip(values, recipes, strict=True):
        listener.say(f"{name} {value} of {', '.join(map(str, values))}")
        record = finetune(recipe, listener=listener)
        metrics: Any = record["metrics"]
        judged = metrics["test"] or metrics["validation"]
        if judged is None:
            wrong, right = "there are no rows to judge a run by", "data.split.test above 0"
            raise InputError(Problem(path, "data.split.test", wrong, right))
        beside = metrics["baselines"] or {}
        runs.append(
            {
                name: value,
                "folder": f"{name}-{value}",
                "parts": record["data"]["rows"],
                "figures": _numbers(judged),
                "baselines": {baseline: _numbers(figures) for baseline, figures in beside.items()},
            }
        )
    return {"format": 1, "recipe": path, "overrides": list(overrides), "runs": runs}


def _recipe(path: str, overrides: Sequence[str], folder: pathlib.Path, chosen: Sequence[str], value: int) -> Recipe:
    own = [template.format(value) for template in chosen]
    # JSON is YAML: a folder's name stays text whatever it looks like.
    return load_recipe(path, [*overrides, *own, f"output.dir={json.dumps(str(folder))}"])


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def _write(path: pathlib.Path, found: Series) -> None:
    write_file_atomically(path, json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
