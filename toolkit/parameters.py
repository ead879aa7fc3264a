"""Which parameters of a model train: now, or later in the run.

Gradual unfreezing lets blocks rest until their turn. They get no gradient until then, but they belong to what a
checkpoint holds, what the optimizer steps, and what no cache may take for fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def rest(parameter: nn.Parameter, *, resting: bool) -> None:
    """Let a parameter that trains wait for its turn, or end the wait."""
    parameter.requires_grad_(not resting)
    parameter.rests = resting  # type: ignore[attr-defined]


def trains(parameter: nn.Parameter) -> bool:
    """Return whether a parameter gets gradients, now or later in the run."""
    return parameter.requires_grad or getattr(parameter, "rests", False)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the parameters that train, now or later, by name."""
    return ((name, parameter) for name, parameter in model.named_parameters() if trains(parameter))
