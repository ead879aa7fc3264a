"""Where training's figures go: metrics.jsonl, the experiment tracker, and whoever listens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict

from accelerate import Accelerator

from toolkit.config.schema import Recipe
from toolkit.listener import Listener
from toolkit.report.metrics_log import MetricsLog
from toolkit.report.run_record import PhaseRecord
from toolkit.training.observer import StepRecord


class RunLog:
    """An ``Observer`` of the trainer; on processes other than the first it writes nothing.

    Args:
        metrics: The run's metrics.jsonl.
        recipe: Names the tracker and is logged to it.
        accelerator: Holds the tracker.
        listener: Hears everything.
    """

    def __init__(self, metrics: MetricsLog, *, recipe: Recipe, accelerator: Accelerator, listener: Listener) -> None:
        self._metrics, self._recipe = metrics, recipe
        self._accelerator, self._listener = accelerator, listener

    def begin(self, step: int) -> None:
        """Drop lines later than ``step``, which a resumed run writes again, and open the tracker."""
        if self._accelerator.is_main_process:
            self._metrics.truncate_after(step)
        if self._recipe.output.tracker is not None:
            flat = {
                f"{s}.{k}": v
                for s, d in self._recipe.model_dump(mode="json").items()
                if isinstance(d, dict)
                for k, v in d.items()
                if isinstance(v, (int, float, str, bool))
            }
            self._accelerator.init_trackers("classifier-toolkit", config=flat)

    def step(self, step: int, loss: float) -> None:
        """Pass a step on."""
        self._listener.step(step, loss)

    def logged(self, record: StepRecord) -> None:
        """Write a log line."""
        line = asdict(record)
        if self._accelerator.is_main_process:
            self._metrics.append(line)
        memory = {f"memory/{name}": float(value) for name, value in line.pop("memory").items()}
        self._track(
            {**{name: value for name, value in line.items() if name not in ("step", "time")}, **memory}, record.step
        )
        held = record.memory["allocated"] or record.memory["rss"]
        self._listener.logged(tokens_per_second=record.tokens_per_second, memory_bytes=held)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write an evaluation line."""
        if self._accelerator.is_main_process:
            self._metrics.append({"step": step, "validation": dict(metrics)})
        self._track({f"validation/{name}": value for name, value in metrics.items()}, step)
        self._listener.evaluated(step, metrics)

    def warned(self, line: str) -> None:
        """Pass a warning on."""
        self._listener.say(line)

    def phases(self, phases: Iterable[PhaseRecord], *, step: int) -> None:
        """Write a line for each phase of the run that ended, under the step after which it did."""
        for phase in phases if self._accelerator.is_main_process else ():
            self._metrics.append({"step": step, "phase": phase})

    def _track(self, values: dict[str, float], step: int) -> None:
        if self._recipe.output.tracker is not None:
            self._accelerator.log(values, step=step)
