"""What instruction tuning minimises: the loss of responses, given their prompts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as functional
from torch import nn

from toolkit.data.batching import collate
from toolkit.data.pairs import TARGETS_AT_ONCE, PairTable
from toolkit.models.language import chosen_states, project_all
from toolkit.training.objectives import Batch
from toolkit.training.plan import Rows


class InstructionObjective(nn.Module):
    """Next-token cross entropy of responses and the end of text behind them, summed over tokens.

    Prompts are read and carry no loss (Taori et al. 2023, Stanford Alpaca).

    Args:
        model: ``GPT2LMHeadModel`` with its method applied.
        table: Token ids of all rows.
        pad_id: Fills short rows.
    """

    def __init__(self, model: nn.Module, *, table: PairTable, pad_id: int) -> None:
        super().__init__()
        self.model = model
        self._table, self._pad_id = table, pad_id

    def batch(self, rows: Rows, *, step: int) -> Batch:
        """Return ``input_ids`` and ``attention_mask`` (B, T), ``positions`` (P,) into B*T, ``labels`` (P,)."""
        used = rows if len(rows) else np.zeros(1, dtype=np.int64)
        batch = collate(self._table, None, used, pad_id=self._pad_id)
        column = np.arange(batch["input_ids"].shape[1])
        prompts, lengths = self._table.prompts[used, None], self._table.lengths_of(used)[:, None]
        row, place = np.nonzero((column >= prompts) & (column < (lengths if len(rows) else 0)))
        # A token is predicted from the state of the one before it.
        positions = torch.from_numpy(row * len(column) + place - 1)
        return {**batch, "positions": positions, "labels": batch["input_ids"].flatten()[positions + 1]}

    def weight(self, batch: Batch) -> float:
        """Return the number of predicted tokens."""
        return float(len(batch["labels"]))

    def tokens(self, batch: Batch) -> int:
        """Return the real tokens of a batch, those of prompts included."""
        return int(batch["attention_mask"].sum())

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the summed loss, a scalar."""
        states, labels = chosen_states(self.model, batch), batch["labels"]
        size = max(len(labels), 1) if torch.is_grad_enabled() else TARGETS_AT_ONCE
        pieces = zip(torch.split(states, size), torch.split(labels, size), strict=True)
        losses = [
            functional.cross_entropy(project_all(self.model, part).float(), wanted, reduction="sum")
            for part, wanted in pieces
        ]
        return torch.stack(losses).sum()
