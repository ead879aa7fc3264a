"""Two classifiers on the same rows: is one better, and by how much?"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from toolkit.evaluation.metrics import BOOTSTRAP_SAMPLES

Right = NDArray[np.bool_]


class Paired(TypedDict):
    """A classifier beside another one.

    Attributes:
        only_one: Rows that the first alone has right.
        only_other: Rows that the other alone has right.
        p_value: Of McNemar's exact test: how likely so uneven a pair of counts is where both are equally good.
        difference: Accuracy of the first less that of the other.
        interval: 95 % bootstrap interval of the difference, ``[low, high]``.
    """

    only_one: int
    only_other: int
    p_value: float
    difference: float
    interval: list[float]


def compare_answers(one: Right, other: Right, *, seed: int = 0) -> Paired:
    """Compare two classifiers row by row.

    Args:
        one: (N,), whether the first has each row right.
        other: (N,), the same of the other on the same rows.
        seed: Of the bootstrap.

    Raises:
        ValueError: If the shapes differ, or there are no rows.
    """
    if one.shape != other.shape or not len(one):
        raise ValueError(f"answers {one.shape} and {other.shape} are not of the same rows")
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    return {
        "only_one": only_one,
        "only_other": only_other,
        "p_value": mcnemar(only_one, only_other),
        "difference": (only_one - only_other) / len(one),
        "interval": difference_interval(only_one, only_other, len(one), seed=seed),
    }


def mcnemar(only_one: int, only_other: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947, doi 10.1007/BF02295996).

    Rows that both have right, or both wrong, say nothing; where both are equally good, each of the others falls to
    either side like a coin.
    """
    from scipy.stats import binomtest

    uneven = only_one + only_other
    return float(binomtest(only_one, uneven, 0.5).pvalue) if uneven else 1.0


def difference_interval(only_one: int, only_other: int, rows: int, *, seed: int = 0) -> list[float]:
    """Return the 95 % percentile bootstrap interval of a difference of accuracies on the same rows.

    Resampling N rows draws the two counts from a multinomial distribution, so the bootstrap needs no loop.
    """
    if only_one + only_other == 0:
        # Resampling has no spread where the two never differ; the exact bound of a count of 0 does.
        bound = 1.0 - 0.025 ** (1 / rows)
        return [-bound, bound]
    shares = [only_one / rows, only_other / rows, (rows - only_one - only_other) / rows]
    drawn = np.random.default_rng(seed).multinomial(rows, shares, size=BOOTSTRAP_SAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / rows, [0.025, 0.975])
    return [float(low), float(high)]
