"""Curves of a run, its confusion matrix and its memory over time, as PNG files."""

from __future__ import annotations

import io
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from toolkit.durable import write_file_atomically
from toolkit.report.run_record import MemoryRecord, PhaseRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2933", "#6b7785", "#e4e7eb"
TRAIN, VALIDATION, SECOND, BEST = "#2f6fb0", "#d1495b", "#3d8361", "#b7791f"
LARGEST_WITH_NUMBERS = 12
MIB = 2**20
QUALITY = {"accuracy", "r2"}

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "white",
    # A label such as "$100" or "a_b" is text, not a formula.
    "text.parse_math": False,
}

History = Sequence[Mapping[str, Any]]


def draw_curves(history: History, path: pathlib.Path, *, title: str, best_step: int | None = None) -> None:
    """Draw loss (training and validation), and what else was measured of validation, against the step.

    That is accuracy and macro F1 of labels, R2 and rank correlation of numbers.

    Args:
        history: Lines of metrics.jsonl.
        path: The PNG to write.
        title: Name of the run.
        best_step: Step whose weights were kept; marked.

    Raises:
        OutputError: If the disk is full.
        OSError: If the file cannot be written.
    """
    evaluations = [(line["step"], line["validation"]) for line in history if line.get("validation")]
    judged = [(step, figures) for step, figures in evaluations if QUALITY & figures.keys()]
    with figure(path, columns=2 if judged else 1, title=title) as axes:
        _draw_loss(axes[0], history, evaluations)
        if judged:
            _draw_quality(axes[1], judged)
        last_step = max((line["step"] for line in history), default=1)
        for place, panel in enumerate(axes):
            if best_step is not None:
                _mark_best(panel, best_step, note=place == 0)
            panel.set_xlim(0, last_step * 1.03)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(frameon=False, fontsize=9, labelcolor=INK)
        if judged and best_step is not None:
            _note_best(axes[1], judged, best_step)


def draw_confusion(confusion: Sequence[Sequence[int]], labels: Sequence[str], path: pathlib.Path) -> None:
    """Draw a confusion matrix: rows are true labels, shaded by their share of the row.

    Args:
        confusion: (C, C) counts, rows true, columns predicted.
        labels: The C names in id order.
        path: The PNG to write.

    Raises:
        OutputError: If the disk is full.
        OSError: If the file cannot be written.
    """
    counts = np.asarray(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(1.3 + 0.85 * len(labels), 3.6, 11))
    with figure(path, columns=1, title="", size=(side, side)) as (panel,):
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        names = [label if len(label) <= 18 else label[:17] + "…" for label in labels]
        tilt = 0 if max(map(len, names)) * len(names) < 26 else 45
        panel.set_xticks(range(len(names)), names, rotation=tilt, ha="right" if tilt else "center")
        panel.set_yticks(range(len(names)), names)
        panel.set_xlabel("predicted", color=FAINT)
        panel.set_ylabel("true", color=FAINT)
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        if len(names) <= LARGEST_WITH_NUMBERS:
            _write_cells(panel, counts, shares)


def draw_memory(memory: MemoryRecord, history: History, path: pathlib.Path) -> None:
    """Draw the peak of each phase over time, what was held at each log line, and the predicted peak.

    Args:
        memory: Of result.json; it has phases.
        history: Lines of metrics.jsonl; those of an earlier process of a resumed run are left out.
        path: The PNG to write.

    Raises:
        OSError: If the file cannot be written.
    """
    counted: Literal["allocated", "rss"] = "allocated" if memory["kind"] == "cuda allocated" else "rss"
    phases = memory["phases"]
    start = phases[0]["time"]
    with figure(path, columns=1, title="", size=(8.6, 3.7)) as (panel,):
        for place, phase in enumerate(phases):
            begin, peak = phase["time"] - start, phase[counted] / MIB
            ends = [begin, begin + phase["seconds"]]
            panel.axvspan(*ends, color=GRID, alpha=0.55 if place % 2 else 0.25, lw=0)
            panel.plot(ends, [peak, peak], color=VALIDATION, lw=2.2, label=None if place else "peak of the phase")
        held = [(line["time"] - start, line["memory"][counted] / MIB) for line in history if "memory" in line]
        held = [point for point in held if point[0] >= 0]
        if held:
            panel.plot(*zip(*held, strict=True), color=TRAIN, lw=1.4, marker="o", ms=3, label="held at a log line")
        if memory["predicted_bytes"] is not None:
            panel.axhline(memory["predicted_bytes"] / MIB, color=BEST, lw=1.4, ls="--", label="predicted peak")
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        _name_phases(panel, phases, start=start)
        panel.set_ylabel("memory (MiB)", color=FAINT)
        panel.set_xlabel("seconds", color=FAINT)
        panel.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")


def _name_phases(panel: Axes, phases: Sequence[PhaseRecord], *, start: float) -> None:
    """Write each phase's name above its band; short ones lean over, none stands on its neighbour."""
    whole = phases[-1]["time"] + phases[-1]["seconds"] - start
    free = -1.0
    for phase in phases:
        middle = (phase["time"] - start + phase["seconds"] / 2) / max(whole, 1e-9)
        place = max(middle, free)
        free = place + 0.042
        panel.text(
            place * whole, 1.02, phase["name"], transform=panel.get_xaxis_transform(), rotation=30, fontsize=8,
            color=FAINT, ha="left", va="bottom",
        )  # fmt: skip


def _draw_loss(panel: Axes, history: History, evaluations: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    logged = [(line["step"], line["loss"]) for line in history if line.get("loss") is not None]
    if logged:
        steps, losses = (np.asarray(column, dtype=float) for column in zip(*logged, strict=True))
        smooth = len(losses) >= 12
        panel.plot(steps, losses, color=TRAIN, alpha=0.28 if smooth else 1, lw=1.1, label=None if smooth else "train")
        if smooth:
            panel.plot(steps, _smoothed(losses), color=TRAIN, lw=2, label="train (smoothed)")
    if evaluations:
        steps = np.asarray([step for step, _ in evaluations], dtype=float)
        panel.plot(
            steps, [v["loss"] for _, v in evaluations], color=VALIDATION, lw=2, marker="o", ms=4.5, label="validation"
        )
    panel.set_ylim(bottom=0)
    numbers = bool(evaluations) and "r2" in evaluations[0][1]
    _dress(panel, "loss (squared error)" if numbers else "loss (nats)")


def _draw_quality(panel: Axes, judged: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    steps = [step for step, _ in judged]
    numbers = "r2" in judged[0][1]
    for key, name, colour, style in (
        ("f1_macro", "macro F1 (validation)", SECOND, "--"),
        ("accuracy", "accuracy (validation)", VALIDATION, "-"),
        ("spearman", "Spearman (validation)", SECOND, "--"),
        ("r2", "R² (validation)", VALIDATION, "-"),
    ):
        if judged[0][1].get(key) is not None:
            values = [figures[key] for _, figures in judged]
            panel.plot(steps, values, color=colour, ls=style, lw=2, marker="o", ms=4.5, label=name)
    if numbers:
        panel.set_ylim(top=1.01)
        _dress(panel, "R² and rank correlation")
        return
    low = min(float(panel.get_ylim()[0]), 0.95)
    low = max(0.0, low - 0.02)
    panel.set_ylim(low, 1.01)
    # The room above 100 % is for the markers; there is nothing to read there.
    panel.set_yticks([tick for tick in panel.get_yticks() if low <= tick <= 1 + 1e-9])
    panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    _dress(panel, "accuracy and macro F1")


def _dress(panel: Axes, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_title(name, loc="left", fontsize=11, color=INK)
    panel.set_xlabel("optimizer step", color=FAINT)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _mark_best(panel: Axes, step: int, *, note: bool) -> None:
    panel.axvline(step, color=BEST, lw=1.2, ls=":", zorder=0, label=f"best: step {step}" if note else None)


def _note_best(panel: Axes, judged: Sequence[tuple[int, Mapping[str, Any]]], step: int) -> None:
    """Write the accuracy of the kept weights beside their point."""
    value = next((figures.get("accuracy") for at, figures in judged if at == step), None)
    if value is not None:
        text = f"{100 * value:.1f} %"
        panel.annotate(
            text, (step, value), (-7, 8), textcoords="offset points", ha="right", color=BEST, fontweight="bold"
        )


def _write_cells(panel: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.55 else INK
        text = f"{count:,}\n{100 * shares[row, column]:.1f} %"
        panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the mean over a window of a twentieth of the run, centred, shorter at the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


@contextmanager
def figure(
    path: pathlib.Path, *, columns: int, title: str, size: tuple[float, float] | None = None
) -> Iterator[Sequence[Axes]]:
    """Yield the panels of a figure and write it at the end; no global state of pyplot is touched."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        drawing: Figure = Figure(figsize=size or (5.4 * columns, 3.7), layout="constrained")
        panels = [drawing.add_subplot(1, columns, place + 1) for place in range(columns)]
        if title:
            drawing.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        yield panels
        with warnings.catch_warnings():
            # A label in a script the bundled font lacks is drawn as a box; that is no reason to fail a run.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
            png = io.BytesIO()
            # Laid out once: savefig would do so before each of its two passes.
            engine = drawing.get_layout_engine()
            assert engine is not None
            engine.execute(drawing)
            drawing.set_layout_engine("none")
            drawing.savefig(png, dpi=160, format="png", bbox_inches="tight", pad_inches=0.12)
        write_file_atomically(path, png.getvalue())
