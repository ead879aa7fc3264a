"""What training tells while it happens, and to whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from toolkit.runtime import MemoryUse


@dataclass(frozen=True)
class StepRecord:
    """What one line of metrics.jsonl says of training.

    Attributes:
        step: Optimizer steps done.
        epoch: Passes over the rows done.
        loss: Mean loss over the steps since the last line.
        learning_rate: Rate of this step.
        grad_norm: Norm of the gradient before clipping.
        tokens_per_second: Real tokens over the time of all steps so far.
        time: When the line was written, in Unix seconds.
        memory: Bytes held now.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    time: float
    memory: MemoryUse


class Observer(Protocol):
    """Hears of training while it happens."""

    def step(self, step: int, loss: float) -> None:
        """Hear a step and its mean loss."""

    def logged(self, record: StepRecord) -> None:
        """Hear a log line."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hear a validation result."""

    def warned(self, line: str) -> None:
        """Hear what the run does otherwise than the recipe says."""
