"""A model over many rows: batches of like length in, logits in the rows' own order out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    Batch = dict[str, torch.Tensor]

# Tokens whose hidden states are held together: 24 MiB at GPT-2's width.
WAVE_TOKENS = 8_192


def length_sorted_batches(
    lengths: NDArray[np.integer], *, batch_size: int, max_tokens: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """Yield row indices batch by batch, longest rows first.

    The longest batch comes first, so a batch that does not fit into memory fails at once and not at the end.

    Args:
        lengths: (N,), tokens of each row.
        batch_size: At most this many rows a batch.
        max_tokens: At most this many tokens a batch, padding included; a longer single row is its own batch.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").astype(np.int64)
    start = 0
    while start < len(order):
        size = batch_size
        if max_tokens is not None:
            size = max(1, min(size, max_tokens // max(int(lengths[order[start]]), 1)))
        yield order[start : start + size]
        start += size


def _waves(batches: Iterable[NDArray[np.int64]], lengths: NDArray[np.integer]) -> Iterator[list[NDArray[np.int64]]]:
    """Yield consecutive batches together, up to ``WAVE_TOKENS`` of them."""
    wave: list[NDArray[np.int64]] = []
    held = 0
    for rows in batches:
        tokens = int(lengths[rows].sum())
        if wave and held + tokens > WAVE_TOKENS:
            yield wave
            wave, held = [], 0
        wave.append(rows)
        held += tokens
    if wave:
        yield wave


def _in_halves(forward: Callable[[Batch], torch.Tensor], batch: Batch) -> torch.Tensor:
    """Return the logits (B, C) of a batch, computed in halves where the whole does not fit into memory."""
    import torch

    from toolkit.resident import return_freed_memory
    from toolkit.runtime import is_out_of_memory

    count = len(next(iter(batch.values())))
    try:
        return forward(batch)
    except (RuntimeError, MemoryError) as error:
        # States without padding do not fall into halves.
        if count == 1 or "states" in batch or not is_out_of_memory(error):
            raise
    return_freed_memory()
    halves = [
        {name: tensor[part] for name, tensor in batch.items()} for part in (slice(count // 2), slice(count // 2, None))
    ]
    return torch.cat([_in_halves(forward, half) for half in halves])


def predict_logits(
    forward: Callable[[Batch], torch.Tensor],
    lengths: NDArray[np.integer],
    *,
    collate: Callable[[NDArray[np.int64]], Batch],
    device: torch.device,
    batch_size: int = 32,
    max_tokens: int | None = None,
    wave: Callable[[list[Batch]], list[Batch]] | None = None,
) -> NDArray[np.float32]:
    """Return the logits (N, C) of N rows, in their order.

    The result depends on the batch size and the order of the rows only by rounding: rows do not see each other.

    Args:
        forward: Batch to logits (B, C); the model's mode (eval) is the caller's to set.
        lengths: (N,), tokens of each row.
        collate: Row indices (B,) to a padded batch.
        device: Where ``forward`` expects its batch.
        batch_size: At most this many rows a batch.
        max_tokens: At most this many tokens a batch, padding included.
        wave: Batches to what ``forward`` takes, for as many batches at once as hold ``WAVE_TOKENS``.

    Raises:
        ValueError: If there are no rows.
    """
    import torch

    if not len(lengths):
        raise ValueError("no rows to predict")
    logits: NDArray[np.float32] | None = None
    # Not inference_mode: bitsandbytes keeps tensors made here, and training could not save those for its backward pass.
    with torch.no_grad():
        chosen = length_sorted_batches(lengths, batch_size=batch_size, max_tokens=max_tokens)
        for together in [[rows] for rows in chosen] if wave is None else _waves(chosen, lengths):
            batches = [{name: tensor.to(device) for name, tensor in collate(rows).items()} for rows in together]
            for rows, batch in zip(together, batches if wave is None else wave(batches), strict=True):
                part = _in_halves(forward, batch).float().cpu().numpy()
                if logits is None:
                    logits = np.empty((len(lengths), part.shape[1]), dtype=np.float32)
                logits[rows] = part
    assert logits is not None
    return logits
