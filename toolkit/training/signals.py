"""SIGINT and SIGTERM as a question that training asks after each step, so that all processes stop at the same one."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Remembers a signal while it is entered; the handlers from before come back when it is left.

    Args:
        accelerator: The processes that stop together.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        self._previous = {number: signal.signal(number, self._remember) for number in STOPPING}

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def received(self) -> int | None:
        """Return the signal that any process received."""
        number = self._number
        if self._accelerator.num_processes > 1:
            tensor = torch.tensor([float(number)], device=self._accelerator.device)
            number = int(self._accelerator.gather(tensor).max())
        return number or None
