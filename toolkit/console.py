"""What a person sees on the terminal: progress, tables, and one line for every error."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from toolkit.report.wording import OWN_HEAD

if TYPE_CHECKING:
    from toolkit.report.run_record import RunRecord


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Let the command line answer with its exit code; rich would exit with 1."""
        raise BrokenPipeError


OUT = _Terminal(highlight=False)
ERR = _Terminal(stderr=True, highlight=False)
NAMES = {
    "majority": "commonest label",
    "tfidf_logistic_regression": "TF-IDF with logistic regression",
    "mean": "mean",
    "tfidf_ridge": "TF-IDF with ridge regression",
}
FIGURES = ("accuracy", "f1_macro", "f1_micro", "mean_average_precision", "r2", "spearman", "mae", "loss", "perplexity")


def human_bytes(count: float) -> str:
    """Return ``412 MiB`` or ``1.2 GiB``."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def human_seconds(seconds: float) -> str:
    """Return ``42 s`` or ``3 min 5 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


class TerminalListener:
    """Shows a run on stderr: lines for what was decided, a bar for the steps.

    The bar shows loss, tokens a second, memory and the time left; where stderr is no terminal, evaluations alone are
    printed.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        (self._bar.console if self._bar else ERR).print(text, markup=False, soft_wrap=True)

    def advance(self, what: str, *, done: int, total: int) -> None:
        """Show a bar for long work beside the training; it closes when all is done."""
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=ERR,
                disable=not ERR.is_terminal,
            )
            self._task = self._bar.add_task(what, total=total)
            self._bar.start()
        if self._task is not None:
            self._bar.update(self._task, completed=done)
        if done == total:
            self.end()

    def begin(self, *, total: int, done: int) -> None:
        """Open the progress bar at ``done`` of ``total`` steps."""
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]}  {task.fields[memory]}"),
            TimeRemainingColumn(),
            console=ERR,
            disable=not ERR.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total, completed=done, loss="-", speed="", memory="")
        self._bar.start()

    def step(self, step: int, loss: float) -> None:
        """Move the bar to ``step``."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.3f}")

    def logged(self, *, tokens_per_second: float, memory_bytes: int) -> None:
        """Refresh speed and memory."""
        if self._bar is not None and self._task is not None:
            speed = f"{tokens_per_second:,.0f} tokens/s"
            self._bar.update(self._task, speed=speed, memory=human_bytes(memory_bytes))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print a validation result."""
        figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"step {step}: validation {figures}")

    def end(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def print_result(record: RunRecord, folder: pathlib.Path) -> None:
    """Print the figures of a finished run and where its files lie."""
    table = Table(title=f"{record['name']}: {record['status']}", title_justify="left", show_header=False, box=None)
    for name, value in _rows(record):
        table.add_row(name, value)
    OUT.print(table)
    artifact = record["artifact"]["folder"]
    for label, name in (("report", "report.html"), ("card", "README.md"), (artifact, artifact)):
        # Never wrapped: a path is there to be copied.
        OUT.print(f"{label + ':':<10}{folder / name}", soft_wrap=True, markup=False)
    if record["artifact"]["head"]:
        OUT.print(f"{'head:':<10}{OWN_HEAD}", soft_wrap=True, markup=False)


def _rows(record: RunRecord) -> list[tuple[str, str]]:
    base, parameters, timing = record["base"], record["parameters"], record["timing"]
    used = base["used"] + (f"  (offline, instead of {base['requested']})" if base["offline"] else "")
    served = ", ".join(f"{origin['served']} ({origin['rows']:,} rows)" for origin in record["data"]["origins"])
    rows = [
        ("base", used),
        ("data", served),
        ("split", "  ".join(f"{part} {count:,}" for part, count in record["data"]["rows"].items())),
        ("trained", f"{parameters['trainable']:,} of {parameters['total']:,} parameters"),
    ]
    kept = record["prefix_cache"]
    if kept is not None:
        how = f"in {human_seconds(kept['seconds'])}" if kept["seconds"] else "in an earlier run"
        rows.append(("frozen", f"{kept['blocks']} blocks ran once, {human_bytes(kept['bytes'])} of states, {how}"))
    for part in ("validation", "test"):
        metrics: Any = record["metrics"][part]
        if metrics is not None:
            rows.append((part, _figures(metrics)))
            rows.extend(_decision(metrics))
    if record["metrics"]["baselines"]:
        beside = record["metrics"]["baselines"].items()
        shown = "accuracy" if record["problem_type"] != "regression" else "mae"
        rows.append(("beside", "  ".join(f"{NAMES[name]} {figures[shown]:.4f}" for name, figures in beside)))
    memory = record["memory"]
    predicted = memory["predicted_bytes"]
    rows.append(
        (
            "cost",
            f"{record['steps']:,} steps in {human_seconds(timing['train_seconds'])}, "
            f"{timing['tokens_per_second']:,.0f} tokens/s, "
            f"peak {human_bytes(memory['peak_bytes'])} ({memory['kind']})"
            + (f", predicted {human_bytes(predicted)}" if predicted is not None else ""),
        )
    )
    return rows


def _figures(metrics: Mapping[str, Any]) -> str:
    text = "  ".join(f"{name} {metrics[name]:.4f}" for name in FIGURES if name in metrics)
    interval = metrics.get("accuracy_interval")
    return text + (f"  (accuracy 95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _decision(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a fitted temperature and tuned thresholds make of a part."""
    rows = []
    if found := metrics.get("calibrated"):
        text = f"temperature {found['temperature']:.3g}: ece {metrics['ece']:.4f} -> {found['ece']:.4f}"
        rows.append(("  calibrated", text))
    if found := metrics.get("tuned"):
        from_ = ", ".join(f"{name} from {threshold:.3g}" for name, threshold in found["thresholds"].items())
        rows.append(("  tuned", f"{_figures(found)}  ({from_})"))
    return rows


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Print the figures of an evaluation as a table per label, or per target."""
    OUT.print(f"rows {metrics['rows']:,}  loss {metrics['loss']:.4f}")
    if "accuracy" in metrics:
        low, high = metrics["accuracy_interval"]
        OUT.print(f"accuracy {metrics['accuracy']:.4f}  (95 % interval {low:.4f} to {high:.4f})")
    shown = ("f1_macro", "f1_micro", "mean_average_precision", "mcc", "ece", "mae", "r2", "pearson", "spearman")
    OUT.print("  ".join(f"{name} {metrics[name]:.4f}" for name in shown if name in metrics))
    if found := metrics.get("calibrated"):
        OUT.print("calibrated: " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()))
    if found := metrics.get("tuned"):
        figures = "  ".join(f"{name} {found[name]:.4f}" for name in ("accuracy", *shown) if name in found)
        from_ = ", ".join(f"{name} from {threshold:.4f}" for name, threshold in found["thresholds"].items())
        OUT.print(f"tuned: {figures}  ({from_})", markup=False)
    each = metrics["per_label"] if "per_label" in metrics else metrics["per_target"]
    columns = list(next(iter(each.values())))
    table = Table("label", *(column.replace("support", "rows") for column in columns), box=None)
    for label, row in each.items():
        cells = (row[name] for name in columns)
        table.add_row(label, *(f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in cells))
    OUT.print(table)


def print_series(found: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Print the figures of a recipe's runs on other rows, a line each, and their mean where they are folds."""
    names = [name for name in FIGURES if name in found["runs"][0]["figures"]]
    table = Table("run", "train", *names, box=None)
    for run in found["runs"]:
        table.add_row(run["folder"], f"{run['parts']['train']:,}", *(f"{run['figures'][name]:.4f}" for name in names))
    if "mean" in found:
        table.add_row("mean", "", *(f"{found['mean'][name]:.4f}" for name in names))
        table.add_row("deviation", "", *(f"{found['deviation'][name]:.4f}" for name in names))
    OUT.print(table)
    OUT.print(f"kept in:  {folder}", soft_wrap=True, markup=False)


def print_error(text: str) -> None:
    """Write error lines to stderr as they are: no wrapping, no colour, so that editors and scripts can parse them."""
    sys.stderr.write(text.rstrip("\n") + "\n")
