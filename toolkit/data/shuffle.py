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


def balanced_order(labels: NDArray[np.integer], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return as many row numbers as there are rows, int64 (rows,); neighbours hold the labels in equal shares.

    Places come in blocks of every label once, each block in an order of its own. A label's rows take turns, each turn
    in an order of its own, on through the epochs. A pure function of its arguments.

    Args:
        labels: Label id of each row, shape (rows,).
        seed: The recipe's training seed.
        epoch: Counted from 0.
    """
    names, codes = np.unique(labels, return_inverse=True)
    blocks = -(-len(labels) // max(len(names), 1))
    drawn = np.random.Philox(key=[seed, (2 << 32) + epoch]).random_raw(blocks * len(names))
    wanted = np.argsort(drawn.reshape(blocks, len(names)), axis=1, kind="stable").reshape(-1)[: len(labels)]
    order = np.empty(len(labels), dtype=np.int64)
    for code in range(len(names)):
        places, mine = np.flatnonzero(wanted == code), np.flatnonzero(codes == code)
        turns, within = np.divmod(epoch * blocks + np.arange(len(places)), len(mine))
        for turn in np.unique(turns):
            shuffled = permutation(len(mine), seed=seed, stream=(3 << 32) + (code << 40) + int(turn))
            now = turns == turn
            order[places[now]] = mine[shuffled[within[now]]]
    return order


def token_batches(
    lengths: NDArray[np.int64], *, max_tokens: int, seed: int, epoch: int, pool: int = 64
) -> list[NDArray[np.int64]]:
    """Return an epoch's batches of rows of like length, in random order; a pure function of its arguments.

    The shuffled rows are sorted by length within pools of ``pool`` batches, so that a batch is random but for its
    length: 1.01 padded positions stand for a real token of short messages (2.3 in random batches of 8).

    Args:
        lengths: Tokens of each row, int64, shape (rows,).
        max_tokens: Rows times the longest row of a batch is at most this; a longer row is a batch of its own.
        seed: The recipe's training seed.
        epoch: Counted from 0.
        pool: Batches that are sorted together.
    """
    order = epoch_order(len(lengths), seed=seed, epoch=epoch)
    pools = np.cumsum(lengths[order]) // (pool * max_tokens)
    order = order[np.argsort(pools * (lengths.max(initial=0) + 1) + lengths[order], kind="stable")]
    cuts, longest = [0], 0
    for place, length in enumerate(map(int, lengths[order])):
        longest = max(longest, length)
        if (place - cuts[-1] + 1) * longest > max_tokens and place > cuts[-1]:
            cuts.append(place)
            longest = length
    batches = np.split(order, cuts[1:])
    return [batches[number] for number in permutation(len(batches), seed=seed, stream=(1 << 32) + epoch)]
