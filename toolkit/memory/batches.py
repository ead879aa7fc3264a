"""The largest micro-batches of a run, exactly: the order of every epoch is a pure function of the seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import TrainingSettings
from toolkit.data.shuffle import epoch_order
from toolkit.memory.microbatch import MicroBatch

Lengths = NDArray[np.int64]


def largest_micro_batches(
    lengths: Lengths, training: TrainingSettings, *, target_share: float = 0.0, classes: int = 0
) -> list[MicroBatch]:
    """Return the micro-batch with the most tokens and the one with the most attention weights (often the same).

    Args:
        lengths: Tokens of each training row, int64, shape (rows,).
        training: Seed, epochs or steps, batch size and accumulation; one process.
        target_share: Share of the tokens that a language model predicts.
        classes: Tokens its softmax runs over.
    """
    size = training.batch_size
    best: dict[str, tuple[int, Lengths]] = {}
    for order in _epochs(len(lengths), training):
        starts = np.arange(0, len(order), size)
        for name, weights in (("tokens", lengths), ("squares", lengths * lengths)):
            totals = np.add.reduceat(weights[order], starts)
            at = int(totals.argmax())
            if name not in best or totals[at] > best[name][0]:
                best[name] = int(totals[at]), lengths[order[starts[at] : starts[at] + size]]
    return _distinct([chosen for _, chosen in best.values()], target_share=target_share, classes=classes)


def largest_evaluation_batch(
    lengths: Lengths, *, batch_size: int, target_share: float = 0.0, classes: int = 0
) -> list[MicroBatch]:
    """Return the first batch of an evaluation, which takes the longest rows together; none without rows."""
    if not len(lengths):
        return []
    return _distinct([np.sort(lengths)[::-1][:batch_size]], target_share=target_share, classes=classes)


def _epochs(rows: int, training: TrainingSettings) -> list[NDArray[np.int64]]:
    """Return the rows in the order they are seen, an array an epoch.

    A window of ``batch_size * accumulation`` rows holds whole micro-batches, so they are consecutive in the epoch.
    """
    window = training.batch_size * training.gradient_accumulation_steps
    steps = -(-rows // window)
    total = training.max_steps if training.epochs is None else training.epochs * steps
    assert total is not None
    epochs = []
    for epoch in range(-(-total // steps)):
        seen = min(rows, (total - epoch * steps) * window)
        epochs.append(epoch_order(rows, seed=training.seed, epoch=epoch)[:seen])
    return epochs


def _distinct(chosen: list[Lengths], *, target_share: float, classes: int) -> list[MicroBatch]:
    return sorted(
        {MicroBatch.of(row.tolist(), targets=round(target_share * int(row.sum())), classes=classes) for row in chosen},
        key=lambda batch: batch.tokens,
    )
