"""What is minimised: a batch of rows to the sum of its losses and the weight they carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as functional
from torch import nn

from toolkit.config.schema import LossSettings, ProblemType
from toolkit.data.batching import collate
from toolkit.data.targets import Targets
from toolkit.data.tokens import TokenTable
from toolkit.models.forward import classify, rest_frozen_blocks
from toolkit.models.language import language_model_hidden, project_tokens
from toolkit.training.loss import class_weights, no_labels, row_weight, target_loss
from toolkit.training.plan import Rows

Batch = dict[str, torch.Tensor]


class Objective(Protocol):
    """A module whose ``forward(batch)`` returns a summed loss, so that DDP and FSDP can wrap it."""

    model: nn.Module

    def batch(self, rows: Rows, *, step: int) -> Batch:
        """Return the tensors of ``rows`` on the CPU; empty ``rows`` give a batch of weight 0."""

    def weight(self, batch: Batch) -> float:
        """Return what the losses that ``forward`` sums weigh together: rows by their labels, or predicted tokens."""

    def tokens(self, batch: Batch) -> int:
        """Return the real tokens of a batch."""


class RowCache(Protocol):
    """States of the first blocks, kept by row (``memory.prefix_cache.PrefixCache``)."""

    @property
    def blocks(self) -> int:
        """Blocks that the states have behind them."""

    def batch(self, rows: Rows, labels: Targets | None = None) -> Batch:
        """Return ``states``, ``lengths`` (B,) and ``labels``."""


class ClassificationObjective(nn.Module):
    """The loss of the pooled token's logits, summed over rows (``training.loss``).

    The frozen blocks below the first one that trains run as in evaluation, without dropout: their states are then the
    same in every epoch, and can be kept.

    Args:
        model: A classifier with its method applied.
        table: Token ids of all rows.
        labels: Of all rows (``data.targets``).
        pad_id: Fills short rows.
        cache: What the frozen blocks make of the rows; None runs them.
        loss: The recipe's ``training.loss``; None: the plain one.
        problem_type: What the labels are.
        classes: How many labels there are; needed for balanced weights.
        penalty: Added to the mean loss, a scalar; None adds nothing.

    Attributes:
        solve: Instead of training, puts the best weights into the model and returns the tokens read; None: trains.
    """

    solve: Callable[[], int] | None = None

    def __init__(
        self,
        model: nn.Module,
        *,
        table: TokenTable,
        labels: Targets,
        pad_id: int,
        cache: RowCache | None = None,
        loss: LossSettings | None = None,
        problem_type: ProblemType = "single_label_classification",
        classes: int = 0,
        penalty: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._table, self._labels, self._pad_id, self._cache = table, labels, pad_id, cache
        self._penalty, self._loss, self._problem_type = penalty, loss or LossSettings(), problem_type
        self._weights = class_weights(self._loss.class_weights, torch.from_numpy(labels), classes=classes)

    def train(self, mode: bool = True) -> ClassificationObjective:
        """Set training mode, but for what is frozen below the first trained block."""
        super().train(mode)
        rest_frozen_blocks(self.model)
        return self

    def batch(self, rows: Rows, *, step: int) -> Batch:
        """Return ``labels``, and ``input_ids`` and ``attention_mask`` (B, T) or ``states`` and ``lengths``."""
        used = rows if len(rows) else np.zeros(1, dtype=np.int64)
        if self._cache is not None:
            batch = self._cache.batch(used, self._labels)
        else:
            batch = collate(self._table, self._labels, used, pad_id=self._pad_id)
        return batch if len(rows) else {**batch, "labels": no_labels(batch["labels"])}

    def weight(self, batch: Batch) -> float:
        """Return what the rows with a label weigh: their number, or the sum of their labels' weights."""
        return row_weight(batch["labels"], self._weights)

    def tokens(self, batch: Batch) -> int:
        """Return the real tokens of a batch, those that a cache stands for included."""
        return int((batch["lengths"] if "lengths" in batch else batch["attention_mask"]).sum())

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the summed loss, a scalar."""
        logits = classify(self.model, batch, blocks=0 if self._cache is None else self._cache.blocks)
        loss = target_loss(
            logits.float(),
            batch["labels"],
            problem_type=self._problem_type,
            settings=self._loss,
            weights=self._weights,
        )
        # The sum is divided by the rows of all micro-batches: with each row goes its share of the penalty.
        return loss if self._penalty is None else loss + self.weight(batch) * self._penalty()


class LanguageModelingObjective(nn.Module):
    """Next-token (GPT-2) or masked-token (DistilBERT; Devlin et al. 2019) cross entropy, summed over tokens.

    The softmax runs over ``targets`` alone (``frequent_tokens`` of the training part); positions with another target
    carry no loss. At small widths the softmax is most of the work.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        table: TokenTable,
        targets: torch.Tensor,
        mask_probability: float,
        mask_id: int | None,
        special_ids: tuple[int, ...],
        pad_id: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self._table, self._mask_probability, self._mask_id = table, mask_probability, mask_id
        self._pad_id, self._seed = pad_id, seed
        vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self._special = torch.tensor(special_ids, dtype=torch.int64)
        self._targets = targets
        self._class_of = torch.full((vocabulary,), -100)
        self._class_of[self._targets] = torch.arange(len(self._targets))
        self._vocabulary = vocabulary

    def batch(self, rows: Rows, *, step: int) -> Batch:
        """Return ``input_ids`` and ``attention_mask`` (B, T), ``positions`` (P,) into B*T, ``labels`` (P,)."""
        empty = len(rows) == 0
        used = np.zeros(1, dtype=np.int64) if empty else rows
        batch = collate(self._table, None, used, pad_id=self._pad_id)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        if self._mask_id is None:
            targets, chosen = ids[:, 1:], mask[:, 1:]
            chosen = functional.pad(chosen, (0, 1))
            targets = functional.pad(targets, (0, 1))
        else:
            targets = ids
            ids, chosen = self._mask(ids, mask, step=step, first=int(used[0]))
        labels = self._class_of[targets]
        chosen = chosen & (labels >= 0) & (not empty)
        positions = chosen.flatten().nonzero().squeeze(1)
        return {**batch, "input_ids": ids, "positions": positions, "labels": labels.flatten()[positions]}

    def _mask(
        self, ids: torch.Tensor, real: torch.Tensor, *, step: int, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose and replace tokens: 80 % by the mask, 10 % by a random token, 10 % kept (Devlin et al. 2019)."""
        # Drawn from the step and the first row, never from a running generator: a resumed run masks the same tokens.
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + step) * 1_000_003 + first)
        eligible = real & ~torch.isin(ids, self._special)
        chosen = eligible & (torch.rand(ids.shape, generator=generator) < self._mask_probability)
        fate = torch.rand(ids.shape, generator=generator)
        noise = torch.randint(self._vocabulary, ids.shape, generator=generator)
        masked = torch.where(chosen & (fate < 0.8), torch.tensor(self._mask_id), ids)
        return torch.where(chosen & (fate >= 0.9), noise, masked), chosen

    def weight(self, batch: Batch) -> float:
        """Return the number of predicted tokens."""
        return float(len(batch["labels"]))

    def tokens(self, batch: Batch) -> int:
        """Return the real tokens of a batch."""
        return int(batch["attention_mask"].sum())

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the summed loss, a scalar."""
        hidden = language_model_hidden(self.model, batch)
        chosen = hidden.reshape(-1, hidden.shape[-1])[batch["positions"]]
        logits = project_tokens(self.model, chosen, self._targets.to(chosen.device))
        return functional.cross_entropy(logits.float(), batch["labels"], reduction="sum")


def frequent_tokens(table: TokenTable, *, vocabulary: int, count: int | None) -> torch.Tensor:
    """Return the ids, ascending, of the ``count`` most frequent tokens of ``table``; all ids for None."""
    if count is None or count >= vocabulary:
        return torch.arange(vocabulary)
    counts = np.bincount(table.ids, minlength=vocabulary)
    # Stable, so that ties fall the same way everywhere.
    chosen = np.argsort(-counts, kind="stable")[:count]
    return torch.from_numpy(np.sort(chosen))


def mean_loss(objective: Any, batches: list[Batch], *, prepare: Callable[[Batch], Batch]) -> float:
    """Return the mean loss over ``batches`` without gradients."""
    total, weight = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            total += float(objective(prepare(batch)))
            weight += objective.weight(batch)
    return total / max(weight, 1.0)
