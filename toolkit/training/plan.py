"""Which rows every optimizer step sees: a pure function of a seed and a step number.

The sampler's position is therefore data. Nothing is skipped or replayed on resume, and any number of processes walks
the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.config.schema import TrainingSettings
from toolkit.data.shuffle import balanced_order, epoch_order, token_batches

Rows = npt.NDArray[np.int64]


@dataclass
class StepPlan:
    """Random global batches over ``rows`` rows.

    Attributes:
        rows: Number of training rows.
        batch_size: Rows of one micro-step on one process.
        accumulation: Micro-steps of one optimizer step.
        processes: Number of processes that share a global batch.
        seed: Seed of the shuffles.
        epochs: Passes over the rows, or None.
        max_steps: Optimizer steps, used where epochs is None.
        labels: Label id of each row for balanced batches, int64, shape (rows,); None: rows come as they are.
    """

    rows: int
    batch_size: int
    accumulation: int
    processes: int
    seed: int
    epochs: int | None
    max_steps: int | None
    labels: Rows | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._epoch = -1
        self._order: Rows = np.empty(0, dtype=np.int64)

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step over all processes; the last step of an epoch may be smaller."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return -(-self.rows // self.global_batch)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.epochs is not None:
            return self.first_step(self.epochs)
        assert self.max_steps is not None
        return self.max_steps

    def first_step(self, epoch: int) -> int:
        """Return the step (from 0) with which an epoch (from 0) begins."""
        return epoch * self.steps_per_epoch

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch and the place within it of step ``step`` (from 0)."""
        return divmod(step, self.steps_per_epoch)

    def ends_epoch(self, steps: int) -> bool:
        """Return whether an epoch ends after ``steps`` steps."""
        return self.locate(steps)[1] == 0

    def epoch_of(self, steps: int) -> float:
        """Return how many epochs are done after ``steps`` steps."""
        epoch, place = self.locate(steps)
        return epoch + place / (self.first_step(epoch + 1) - self.first_step(epoch))

    def window(self, step: int) -> Rows:
        """Return the row numbers of optimizer step ``step`` (from 0), over all processes."""
        epoch, position = self.locate(step)
        if epoch != self._epoch:
            self._order, self._epoch = self._ordered(epoch), epoch
        return self._order[position * self.global_batch : (position + 1) * self.global_batch]

    def _ordered(self, epoch: int) -> Rows:
        if self.labels is None:
            return epoch_order(self.rows, seed=self.seed, epoch=epoch)
        return balanced_order(self.labels, seed=self.seed, epoch=epoch)

    def micro_batches(self, step: int, *, rank: int) -> list[Rows]:
        """Return the micro-batches of one process, the same number for every process.

        A process that the short last window leaves without rows gets an empty micro-batch, so that all take part in
        every collective call.
        """
        window = self.window(step)
        mine = window[rank :: self.processes]
        largest = -(-len(window) // self.processes)
        count = -(-largest // self.batch_size)
        return [mine[i * self.batch_size : (i + 1) * self.batch_size] for i in range(count)]

    def describe(self) -> str:
        """Return the sizes of a step and of the run in words."""
        return (
            f"{self.batch_size} rows x {self.accumulation} micro-steps x {self.processes} processes = "
            f"{self.global_batch} a step, {self.steps_per_epoch} steps an epoch, {self.total_steps} in all"
        )


@dataclass
class TokenBudgetPlan(StepPlan):
    """Batches of like length that hold at most ``max_tokens`` tokens, in random order; ``batch_size`` is unused.

    Attributes:
        lengths: Tokens of each row, int64, shape (rows,).
        max_tokens: Rows times the longest row of a micro-batch on one process.
    """

    lengths: Rows
    max_tokens: int

    def __post_init__(self) -> None:
        self._epoch = -1
        self._batches: list[Rows] = []
        # First step of every epoch that was asked for; their number differs a little from epoch to epoch.
        self._starts = [0]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in the first pass over the rows."""
        return self.first_step(1)

    def first_step(self, epoch: int) -> int:
        """Return the step (from 0) with which an epoch (from 0) begins."""
        while len(self._starts) <= epoch:
            batches = self._load(len(self._starts) - 1)
            self._starts.append(self._starts[-1] - (-len(batches) // (self.accumulation * self.processes)))
        return self._starts[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch and the place within it of step ``step`` (from 0)."""
        epoch = 0
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch, step - self.first_step(epoch)

    def window(self, step: int) -> Rows:
        """Return the row numbers of optimizer step ``step`` (from 0), over all processes."""
        return np.concatenate(self._window(step))

    def micro_batches(self, step: int, *, rank: int) -> list[Rows]:
        """Return the micro-batches of one process, the same number for every process (the last may be empty)."""
        window = self._window(step)
        mine = window[rank :: self.processes]
        return mine + [np.empty(0, dtype=np.int64)] * (-(-len(window) // self.processes) - len(mine))

    def describe(self) -> str:
        """Return the sizes of a step and of the run in words."""
        return (
            f"{self.max_tokens:,} tokens x {self.accumulation} micro-steps x {self.processes} processes a step, "
            f"{self.rows / self.steps_per_epoch:.1f} rows on average, {self.steps_per_epoch} steps an epoch, "
            f"{self.total_steps} in all"
        )

    def _window(self, step: int) -> list[Rows]:
        epoch, place = self.locate(step)
        size = self.accumulation * self.processes
        return self._load(epoch)[place * size : (place + 1) * size]

    def _load(self, epoch: int) -> list[Rows]:
        if epoch != self._epoch:
            self._batches = token_batches(self.lengths, max_tokens=self.max_tokens, seed=self.seed, epoch=epoch)
            self._epoch = epoch
        return self._batches


def build_plan(
    settings: TrainingSettings, *, lengths: Rows, processes: int, labels: npt.NDArray[Any] | None = None
) -> StepPlan:
    """Return the plan of a recipe's training section.

    Args:
        settings: Batch sizes, epochs, seed.
        lengths: Tokens of each training row, int64, shape (rows,).
        processes: How many share a global batch.
        labels: Label id of each training row; needed for balanced batches.
    """
    sizes: dict[str, Any] = {
        "rows": len(lengths),
        "batch_size": settings.batch_size,
        "accumulation": settings.gradient_accumulation_steps,
        "processes": processes,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "max_steps": settings.max_steps,
    }
    if settings.max_tokens_per_batch is None:
        return StepPlan(**sizes, labels=labels if settings.balanced_batches else None)
    return TokenBudgetPlan(**sizes, lengths=lengths, max_tokens=settings.max_tokens_per_batch)
