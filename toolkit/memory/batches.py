"""The largest micro-batches of a run, exactly: the order of every epoch is a pure function of the seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import TrainingSettings
from toolkit.data.shuffle import balanced_order, epoch_order, token_batches
from toolkit.memory.microbatch import MicroBatch
from toolkit.models.cpu_kernels import stepped

Lengths = NDArray[np.int64]


def largest_micro_batches(
    lengths: Lengths,
    training: TrainingSettings,
    *,
    target_share: float = 0.0,
    targets: Lengths | None = None,
    classes: int = 0,
    labels: NDArray[Any] | None = None,
) -> list[MicroBatch]:
    """Return the micro-batches with the most tokens, attention weights, rows and predicted tokens (often the same one).

    Rows count where a budget of tokens decides: those of one with many short texts have as many pooled tokens.

    Args:
        lengths: Tokens of each training row, int64, shape (rows,).
        training: Seed, epochs or steps, batch size and accumulation; one process.
        target_share: Share of the tokens that a language model predicts.
        targets: Tokens of each row that it predicts, int64, shape (rows,), where they are known.
        classes: Tokens its softmax runs over.
        labels: Label id of each training row; needed for balanced batches.
    """
    best: dict[str, tuple[int, Lengths]] = {}
    counted = {"tokens": lengths, "squares": lengths * lengths, "rows": np.ones_like(lengths)}
    counted |= {} if targets is None else {"targets": targets}
    for order, starts in _epochs(lengths, training, labels):
        for name, weights in counted.items():
            totals = np.add.reduceat(weights[order], starts)
            at = int(totals.argmax())
            if name not in best or totals[at] > best[name][0]:
                end = starts[at + 1] if at + 1 < len(starts) else len(order)
                best[name] = int(totals[at]), order[starts[at] : end]
    chosen = [rows for _, rows in best.values()]
    return _distinct(chosen, lengths, target_share=target_share, targets=targets, classes=classes)


def batch_kinds(lengths: Lengths, training: TrainingSettings, *, labels: NDArray[Any] | None = None) -> int:
    """Return how many micro-batches of the first epoch differ in their tokens."""
    order, starts = next(_epochs(lengths, training, labels))
    return len(np.unique(np.add.reduceat(lengths[order], starts)))


def largest_evaluation_batch(
    lengths: Lengths,
    *,
    batch_size: int,
    target_share: float = 0.0,
    targets: Lengths | None = None,
    classes: int = 0,
) -> list[MicroBatch]:
    """Return the first batch of an evaluation, which takes the longest rows together; none without rows."""
    if not len(lengths):
        return []
    longest = np.argsort(-lengths, kind="stable")[:batch_size]
    return _distinct([longest], lengths, target_share=target_share, targets=targets, classes=classes)


def training_counts(lengths: Lengths, training: TrainingSettings, *, labels: NDArray[Any] | None = None) -> set[int]:
    """Return the token counts of a run's micro-batches as oneDNN's kernels see them (``models.cpu_kernels``)."""
    totals = [np.add.reduceat(lengths[order], starts) for order, starts in _epochs(lengths, training, labels)]
    return _stepped(totals)


def training_row_counts(
    lengths: Lengths, training: TrainingSettings, *, labels: NDArray[Any] | None = None
) -> set[int]:
    """Return the same of row counts: what products of pooled tokens alone are made for."""
    return _stepped([np.diff(np.append(starts, len(order))) for order, starts in _epochs(lengths, training, labels)])


def evaluation_counts(lengths: Lengths, *, batch_size: int) -> set[int]:
    """Return the same of an evaluation, which takes rows of like length together."""
    ordered = np.sort(lengths)[::-1]
    return _stepped([np.add.reduceat(ordered, np.arange(0, len(ordered), batch_size))] if len(ordered) else [])


def largest_prefix_batch(lengths: Lengths, *, max_tokens: int) -> list[MicroBatch]:
    """Return the longest rows that one pass over the frozen blocks takes together."""
    longest = np.sort(lengths)[::-1]
    rows = max(1, min(len(longest), max_tokens // int(longest[0])))
    return _distinct([np.arange(rows)], longest, target_share=0.0, targets=None, classes=0)


def _epochs(
    lengths: Lengths, training: TrainingSettings, labels: NDArray[Any] | None
) -> Iterator[tuple[Lengths, Lengths]]:
    """Yield, for each epoch, the rows in the order they are seen and where the micro-batches begin."""
    if training.max_tokens_per_batch is not None:
        yield from _token_epochs(lengths, training)
        return
    # A window of batch_size * accumulation rows holds whole micro-batches, so they are consecutive in the epoch.
    rows, window = len(lengths), training.batch_size * training.gradient_accumulation_steps
    steps = -(-rows // window)
    total = training.max_steps if training.epochs is None else training.epochs * steps
    assert total is not None
    for epoch in range(-(-total // steps)):
        seen = min(rows, (total - epoch * steps) * window)
        if training.balanced_batches and labels is not None:
            order = balanced_order(labels, seed=training.seed, epoch=epoch)[:seen]
        else:
            order = epoch_order(rows, seed=training.seed, epoch=epoch)[:seen]
        yield order, np.arange(0, seen, training.batch_size)


def _stepped(totals: list[Lengths]) -> set[int]:
    return {stepped(int(total)) for epoch in totals for total in np.unique(epoch)}


def _token_epochs(lengths: Lengths, training: TrainingSettings) -> Iterator[tuple[Lengths, Lengths]]:
    assert training.max_tokens_per_batch is not None
    left, epoch = training.max_steps, 0
    while epoch < training.epochs if training.epochs is not None else left:
        batches = token_batches(lengths, max_tokens=training.max_tokens_per_batch, seed=training.seed, epoch=epoch)
        if left is not None:
            batches = batches[: left * training.gradient_accumulation_steps]
            left -= -(-len(batches) // training.gradient_accumulation_steps)
        yield np.concatenate(batches), np.cumsum([0, *(len(batch) for batch in batches[:-1])])
        epoch += 1


def _distinct(
    chosen: list[Lengths], lengths: Lengths, *, target_share: float, targets: Lengths | None, classes: int
) -> list[MicroBatch]:
    """Return the sizes of batches, given by their rows."""
    found = set()
    for rows in chosen:
        own = lengths[rows]
        predicted = round(target_share * int(own.sum())) if targets is None else int(targets[rows].sum())
        found.add(MicroBatch.of(own.tolist(), targets=predicted, classes=classes))
    return sorted(found, key=lambda batch: (batch.tokens, batch.targets))
