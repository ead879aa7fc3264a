"""Who hears of a run while it happens: the terminal, a notebook, or nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Listener(Protocol):
    """Hears of decisions, steps and evaluations."""

    def say(self, text: str) -> None:
        """Hear one line of text."""

    def advance(self, what: str, *, done: int, total: int) -> None:
        """Hear how far long work before or after training is."""

    def begin(self, *, total: int, done: int) -> None:
        """Hear that training starts at step ``done`` of ``total``."""

    def step(self, step: int, loss: float) -> None:
        """Hear a step and its mean loss."""

    def logged(self, *, tokens_per_second: float, memory_bytes: int) -> None:
        """Hear the speed and the memory held."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hear a validation result."""

    def end(self) -> None:
        """Hear that training ended, in whatever way."""


class Silent:
    """Hears and says nothing."""

    def say(self, text: str) -> None:
        """Ignore a line."""

    def advance(self, what: str, *, done: int, total: int) -> None:
        """Ignore progress."""

    def begin(self, *, total: int, done: int) -> None:
        """Ignore the start."""

    def step(self, step: int, loss: float) -> None:
        """Ignore a step."""

    def logged(self, *, tokens_per_second: float, memory_bytes: int) -> None:
        """Ignore speed and memory."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Ignore an evaluation."""

    def end(self) -> None:
        """Ignore the end."""


SILENT: Listener = Silent()
