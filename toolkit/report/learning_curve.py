"""The learning curve: a figure against the training rows, as a PNG."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.durable import write_file_atomically
from toolkit.report.curves import FAINT, INK, SECOND, STYLE, VALIDATION

# The first of these that a run has is drawn.
FIGURES = ("f1_macro", "accuracy", "r2", "loss")


def draw_learning_curve(runs: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draw what a recipe reaches with so many training rows, and beside it what TF-IDF with a linear model does.

    Args:
        runs: Of ``toolkit.resampling.learning_curve``.
        path: The PNG to write.

    Raises:
        OSError: If the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    name = next(name for name in FIGURES if name in runs[0]["figures"])
    rows = [run["parts"]["train"] for run in runs]
    with rc_context(STYLE):
        figure: Figure = Figure(figsize=(5.4, 3.7), layout="constrained")
        panel = figure.add_subplot()
        values = [run["figures"][name] for run in runs]
        panel.plot(rows, values, color=VALIDATION, lw=2, marker="o", ms=4.5, label="this recipe")
        for baseline in ("tfidf_logistic_regression", "tfidf_ridge"):
            if all(name in run["baselines"].get(baseline, {}) for run in runs):
                cheap = [run["baselines"][baseline][name] for run in runs]
                panel.plot(rows, cheap, color=SECOND, ls="--", lw=2, marker="o", ms=4.5, label="TF-IDF, linear")
        panel.set_xscale("log")
        panel.set_xticks(rows, [f"{count:,}" for count in rows])
        panel.minorticks_off()
        panel.set_title(name.replace("_", " "), loc="left", fontsize=11, color=INK)
        panel.set_xlabel("training rows", color=FAINT)
        panel.legend(frameon=False, fontsize=9, labelcolor=INK)
        png = io.BytesIO()
        figure.savefig(png, dpi=160, format="png")
    write_file_atomically(path, png.getvalue())
