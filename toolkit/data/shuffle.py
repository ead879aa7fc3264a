"""Seeded permutations that stay the same across numpy versions and machines."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def permutation(n: int, *, seed: int, stream: int) -> NDArray[np.int64]:
    """Return a permutation of ``range(n)``, int64, shape (n,), a pure function of its arguments.

    Args:
        n: Length.
        seed: The user's seed, below 2**64.
        stream: Which of the independent permutations of that seed, below 2**64.
    """
    # Generator.permutation may change between numpy versions (NEP 19); a bit generator's raw stream may not.
    return np.argsort(np.random.Philox(key=[seed, stream]).random_raw(n), kind="stable")


def epoch_order(n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which an epoch visits the rows, int64, shape (n,); a pure function of its arguments.

    Args:
        n: Rows.
        seed: The recipe's training seed.
        epoch: Counted from 0.
    """
    return permutation(n, seed=seed, stream=epoch)
