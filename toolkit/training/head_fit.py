"""A trainer that takes no steps: what trains is solved for at once, from all rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from toolkit.training.objectives import Objective
from toolkit.training.state import Progress
from toolkit.training.trainer import Trainer


class HeadFit(Trainer):
    """Like `Trainer`, for a method that is fitted in closed form or by a solver of its own.

    It keeps no checkpoint: a fit of seconds that depends on the rows alone is done again after a kill.

    Args:
        solve: Puts the fitted weights into the model, and returns the tokens it read.
        rest: As for `Trainer`.
    """

    def __init__(self, *, solve: Callable[[], int], **rest: Any) -> None:
        super().__init__(**rest)
        self._solve = solve

    def fit(self) -> Progress:
        """Solve, and judge the result on the validation rows.

        Raises:
            DivergedError: On a weight or validation loss that is not finite.
        """
        progress, started = self.progress, time.perf_counter()
        progress.tokens = self._solve()
        progress.train_seconds = progress.seconds = time.perf_counter() - started
        progress.step = 1
        if self._trained:  # Of zero_shot nothing is.
            self._check_weights(0)
        self._validate()
        return progress


def build_trainer(*, objective: Objective, **rest: Any) -> Trainer:
    """Return the trainer that an objective asks for; the arguments are those of `Trainer`."""
    solve = getattr(objective, "solve", None)
    if solve is None:
        return Trainer(objective=objective, **rest)
    return HeadFit(solve=solve, objective=objective, **rest)
