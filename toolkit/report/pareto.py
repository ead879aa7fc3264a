"""Accuracy against cost, recipe by recipe, with the line of those that nothing cheaper beats."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from toolkit.report.curves import BEST, FAINT, INK, MIB, TRAIN, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from toolkit.report.comparison import RecipeRow


class _Point(TypedDict):
    name: str
    cost: float
    accuracy: float
    interval: list[float]


def draw_pareto(recipes: Sequence[RecipeRow], path: pathlib.Path, *, enough: str) -> None:
    """Draw accuracy with its interval against peak memory, and against minutes.

    Args:
        recipes: Those without a finished run are left out.
        path: The PNG to write.
        enough: Name of the recipe that is marked.

    Raises:
        OutputError: If the disk is full.
        OSError: If the file cannot be written.
    """
    with figure(path, columns=2, title="") as panels:
        for panel, axis in zip(panels, ("peak memory (MiB)", "minutes"), strict=True):
            points: list[_Point] = []
            for row in recipes:
                if (measured := row["measured"]) is not None:
                    cost = measured["peak_bytes"] / MIB if "memory" in axis else measured["seconds"] / 60
                    interval = measured["accuracy_interval"]
                    points.append(_Point(name=row["name"], cost=cost, accuracy=measured["accuracy"], interval=interval))
            _draw(panel, points, enough=enough)
            panel.set_xlabel(axis, color=FAINT)
            panel.set_title("test accuracy", loc="left", fontsize=11, color=INK)


def front(costs: Sequence[float], accuracies: Sequence[float]) -> list[int]:
    """Return the places of the points that no other beats in one without being worse in the other, cheapest first."""
    order = sorted(range(len(costs)), key=lambda place: (costs[place], -accuracies[place]))
    kept: list[int] = []
    for place in order:
        if not kept or accuracies[place] > accuracies[kept[-1]]:
            kept.append(place)
    return kept


def _draw(panel: Axes, points: Sequence[_Point], *, enough: str) -> None:
    costs, accuracies = [point["cost"] for point in points], [point["accuracy"] for point in points]
    line = front(costs, accuracies)
    panel.plot([costs[i] for i in line], [accuracies[i] for i in line], color=TRAIN, lw=1.4, ls="--", zorder=1)
    # Names of points of like accuracy stand above and below in turn.
    for place, point in enumerate(sorted(points, key=lambda one: one["accuracy"])):
        colour = BEST if point["name"] == enough else TRAIN
        low, high = point["interval"]
        # At the very end of the range, rounding may put the accuracy outside of its interval.
        spread = [[max(0.0, point["accuracy"] - low)], [max(0.0, high - point["accuracy"])]]
        panel.errorbar(point["cost"], point["accuracy"], yerr=spread, fmt="o", ms=6, color=colour, lw=1, alpha=0.9)
        panel.annotate(
            point["name"], (point["cost"], point["accuracy"]), (7, -11 if place % 2 else 4),
            textcoords="offset points", fontsize=7.5, color=colour if colour == BEST else INK,
        )  # fmt: skip
    panel.margins(x=0.18)
    panel.set_xlim(left=max(0.0, panel.get_xlim()[0]))
    panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
