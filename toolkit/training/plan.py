"""Which rows every optimizer step sees: a pure function of a seed and a step number.

The sampler's position is therefore data. Nothing is skipped or replayed on resume, and any number of processes walks
the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from toolkit.data.shuffle import epoch_order

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
    """

    rows: int
    batch_size: int
    accumulation: int
    processes: int
    seed: int
    epochs: int | None
    max_steps: int | None

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
            return self.epochs * self.steps_per_epoch
        assert self.max_steps is not None
        return self.max_steps

    def epoch_of(self, step: int) -> float:
        """Return how many epochs are done after ``step`` steps."""
        return step / self.steps_per_epoch

    def window(self, step: int) -> Rows:
        """Return the row numbers of optimizer step ``step`` (from 0), over all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = epoch_order(self.rows, seed=self.seed, epoch=epoch), epoch
        return self._order[position * self.global_batch : (position + 1) * self.global_batch]

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
