"""Metrics of predicted numbers, by scikit-learn's and scipy's definitions; numpy alone, as in ``metrics``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from toolkit.evaluation.metrics import Floats, check_finite


class TargetFigures(TypedDict):
    """Figures of one target.

    Attributes:
        mse: Mean squared error.
        mae: Mean absolute error.
        r2: 1 - squared error / squared error of the mean; 0 where all rows have the same number.
        pearson: Correlation of numbers; 0 where one side does not vary.
        spearman: Correlation of ranks; 0 where one side does not vary.
    """

    mse: float
    mae: float
    r2: float
    pearson: float
    spearman: float


class RegressionMetrics(TargetFigures):
    """Figures of all targets, averaged over them; ``loss`` is the mean squared error."""

    rows: int
    loss: float
    per_target: dict[str, TargetFigures]


def validation_figures(values: Floats, targets: Floats) -> dict[str, float]:
    """Return ``loss`` (the mean squared error), ``mae``, ``r2``, ``pearson`` and ``spearman``, averaged over targets.

    Args:
        values: (N, K), what the model says; finite.
        targets: (N, K), what is true.

    Raises:
        DivergedError: If a value is not finite.
        ValueError: If the shapes do not fit, or there are no rows.
    """
    found = _mean(_per_target(values, targets))
    return {"loss": found["mse"], **{name: found[name] for name in ("mae", "r2", "pearson", "spearman")}}


def regression_metrics(values: Floats, targets: Floats, *, names: Sequence[str]) -> RegressionMetrics:
    """Return every figure of one part of the data.

    Args:
        values: (N, K), what the model says; finite.
        targets: (N, K), what is true.
        names: The K target names in id order.

    Raises:
        DivergedError: If a value is not finite.
        ValueError: If the shapes do not fit, or there are no rows.
    """
    found = _per_target(values, targets)
    mean = _mean(found)
    return {**mean, "rows": len(targets), "loss": mean["mse"], "per_target": dict(zip(names, found, strict=True))}


def _per_target(values: Floats, targets: Floats) -> list[TargetFigures]:
    if values.ndim != 2 or targets.shape != values.shape:
        raise ValueError(f"values {values.shape} and targets {targets.shape} are not both (N, K)")
    if not len(targets):
        raise ValueError("no rows to judge")
    check_finite(values)
    exact, truth = values.astype(np.float64), targets.astype(np.float64)
    return [_figures(exact[:, index], truth[:, index]) for index in range(exact.shape[1])]


def _figures(values: NDArray[np.float64], targets: NDArray[np.float64]) -> TargetFigures:
    errors = values - targets
    spread = float(np.sum((targets - targets.mean()) ** 2))
    lost = float(np.sum(errors**2))
    return {
        "mse": float(np.mean(errors**2)),
        "mae": float(np.mean(np.abs(errors))),
        "r2": 1 - lost / spread if spread > 0 else float(lost == 0),
        "pearson": _correlation(values, targets),
        "spearman": _correlation(ranks(values), ranks(targets)),
    }


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    a, b = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each value (N,), from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse])


def _mean(found: Sequence[TargetFigures]) -> TargetFigures:
    return {name: float(np.mean([one[name] for one in found])) for name in TargetFigures.__annotations__}  # type: ignore[literal-required, return-value]
