"""A sweep's space: which fields of a recipe vary, and between which values."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from toolkit.config.document import Document, parse_yaml
from toolkit.config.load import load_recipe, read_text
from toolkit.errors import Problem, RecipeError

RIGHT = "a list of values, or {low: 1e-4, high: 1e-2, log: true}"
RANGE = ("low", "high", "log", "step")


@dataclass(frozen=True)
class Dimension:
    """One field that varies.

    Attributes:
        path: Its dotted name in a recipe.
        choices: Values it may have, as JSON; empty for a range.
        low: Lowest value of a range.
        high: Highest value, included.
        log: Whether values are drawn evenly over the logarithm.
        step: Distance of the values of a range; None for any number between.
    """

    path: str
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether the range is one of integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must be right in a recipe for all of them to be."""
        return self.choices or (self.low, self.high)

    def override(self, value: Any) -> str:
        """Return the override that gives the field a value of this space."""
        return f"{self.path}={value if self.choices else json.dumps(value)}"


def read_space(path: str, *, recipe: str, overrides: tuple[str, ...]) -> list[Dimension]:
    """Read a space and try every choice, and both ends of every range, in the recipe.

    Args:
        path: YAML: dotted field to a list of values, or to ``{low, high, log, step}``.
        recipe: The recipe that is varied.
        overrides: Of the command line.

    Raises:
        RecipeError: With every problem, one line each.
    """
    document = parse_yaml(read_text(pathlib.Path(path)), source=path)
    if not isinstance(document.data, dict) or not document.data:
        raise RecipeError(Problem(path, "", "names no field", "dotted.field: " + RIGHT))
    problems: list[Problem] = []
    dimensions: list[Dimension] = []
    for field, value in document.data.items():
        try:
            dimension = _dimension(str(field), value)
        except ValueError as error:
            problems.append(Problem(document.where((field,)), str(field), str(error), RIGHT))
            continue
        dimensions.append(dimension)
        problems += _tried(dimension, document, recipe=recipe, overrides=overrides)
    if problems:
        raise RecipeError(problems)
    return dimensions


def _dimension(field: str, value: Any) -> Dimension:
    if field.partition(".")[0] == "output":
        raise ValueError("where a run is kept changes no result")
    if isinstance(value, list):
        choices = tuple(json.dumps(one, ensure_ascii=False, sort_keys=True) for one in value)
        if len(set(choices)) < 2 or len(set(choices)) < len(choices):
            raise ValueError("fewer than two different values, or one of them twice")
        return Dimension(field, choices=choices)
    if not isinstance(value, dict) or not {"low", "high"} <= set(value) or not set(value) <= set(RANGE):
        raise ValueError("neither a list nor a range")
    low, high, log, step = (value.get(name) for name in RANGE)
    numbers = [number for number in (low, high, step) if number is not None]
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise ValueError("low, high and step are numbers")
    assert low is not None
    assert high is not None
    if not low < high or (step is not None and not step > 0):
        raise ValueError("low is not below high, or step not above 0")
    if not isinstance(log, bool | None) or (log and (low <= 0 or step is not None)):
        raise ValueError("log: true needs low above 0, and no step")
    return Dimension(field, low=low, high=high, log=bool(log), step=step)


def _tried(dimension: Dimension, document: Document, *, recipe: str, overrides: tuple[str, ...]) -> Iterator[Problem]:
    """Yield what is wrong with the values of a field, placed where the space names it."""
    for value in dimension.ends:
        override = dimension.override(value)
        try:
            load_recipe(recipe, (*overrides, override))
        except RecipeError as error:
            for problem in error.problems:
                own = problem.where == f"command line: {override}"
                yield replace(problem, where=document.where((dimension.path,))) if own else problem
            return
