"""From token tables to what a model takes: the order of an epoch, padded batches, blocks of running text."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from toolkit.data.shuffle import epoch_order as epoch_order
from toolkit.data.targets import Targets
from toolkit.data.tokens import TokenTable, gather


def collate(
    table: TokenTable, labels: Targets | None, rows: NDArray[np.int64], *, pad_id: int
) -> dict[str, torch.Tensor]:
    """Return a batch, padded on the right to its longest row.

    Args:
        table: All rows.
        labels: Of all rows (``data.targets``); None leaves them out.
        rows: Which rows, int64, shape (B,).
        pad_id: Fills short rows.

    Returns:
        ``input_ids`` and ``attention_mask``, int64, shape (B, T), and ``labels`` of ``target_tensor``.
    """
    lengths = table.lengths_of(rows)
    real = np.arange(lengths.max(initial=0)) < lengths[:, None]
    ids = np.full(real.shape, pad_id, dtype=np.int64)
    # Row-major order of the mask is the order in which the rows lie one after another.
    ids[real] = gather(table.ids, table.offsets[:-1][rows], lengths).ids
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(real.astype(np.int64))}
    if labels is not None:
        batch["labels"] = target_tensor(labels, rows)
    return batch


def target_tensor(labels: Targets, rows: NDArray[np.int64]) -> torch.Tensor:
    """Return label ids int64 (B,), or label sets and numbers float32 (B, targets)."""
    kind = np.int64 if labels.ndim == 1 else np.float32
    return torch.from_numpy(np.asarray(labels[rows], dtype=kind))


def lm_blocks(
    table: TokenTable, *, block_length: int, eos_id: int | None = None, frame: tuple[int, int] | None = None
) -> TokenTable:
    """Return running text cut into blocks, for language modelling; what does not fill a last block is its own block.

    Args:
        table: Rows of texts, not truncated.
        block_length: Tokens of a block.
        eos_id: Causal models: put behind every text.
        frame: Masked models: ids of [CLS] and [SEP]; taken off every text and put around every block.
    """
    if frame is None:
        stream = table.ids if eos_id is None else np.insert(table.ids, table.offsets[1:], eos_id)
        return TokenTable.from_lengths(stream, _block_lengths(len(stream), block_length))
    inner = gather(table.ids, table.offsets[:-1] + 1, np.maximum(table.lengths - 2, 0)).ids
    lengths = _block_lengths(len(inner), block_length - 2)
    ends = np.cumsum(lengths)
    ids = np.insert(inner, np.concatenate([ends - lengths, ends]), 0)
    blocks = TokenTable.from_lengths(ids, lengths + 2)
    ids[blocks.offsets[:-1]] = frame[0]
    ids[blocks.offsets[1:] - 1] = frame[1]
    return blocks


def _block_lengths(total: int, block_length: int) -> NDArray[np.int64]:
    full, rest = divmod(total, block_length)
    return np.array([block_length] * full + [rest] * bool(rest), dtype=np.int64)
