"""Heads that stock transformers cannot express: hidden layers, and the mean or maximum over all tokens of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

from toolkit.families import OWN_HEAD, Pooling, family_of
from toolkit.models.packing import Packing

Tensor = torch.Tensor
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
}


class ClassificationHead(nn.Module):
    """Linear layers from a pooled state to logits: hidden ones, each with activation and dropout, then one for labels.

    Without a hidden layer, dropout acts on the pooled state.

    Args:
        settings: ``hidden``, ``activation`` and ``dropout``, as a config.json holds them under ``OWN_HEAD``.
        width: Of the pooled state.
        labels: Classes.
    """

    def __init__(self, settings: Mapping[str, Any], *, width: int, labels: int) -> None:
        super().__init__()
        widths = [width, *settings["hidden"]]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.out_proj = nn.Linear(widths[-1], labels)
        self.dropout = nn.Dropout(settings["dropout"])
        self._activation = ACTIVATIONS[settings["activation"]]

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the logits (B, labels) of pooled states (B, width)."""
        hidden = pooled.to(self.out_proj.weight.dtype)
        for layer in self.hidden:
            hidden = self.dropout(self._activation(layer(hidden)))
        logits: Tensor = self.out_proj(hidden if len(self.hidden) else self.dropout(hidden))
        return logits


class NoStockHead(nn.Module):
    """An empty tensor under the stock head's name.

    Stock transformers and peft, told to load the files as a stock classifier, would draw a head at random and say so in
    a warning at most. At an empty weight they stop.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0))


def give_own_head(model: nn.Module, config: Any) -> None:
    """Put the head that a config describes, if it describes one, in the place of a classifier's stock head."""
    settings = getattr(config, OWN_HEAD, None)
    if settings is None:
        return
    stock = [name for name in ("pre_classifier", "classifier", "score", "dropout") if hasattr(model, name)]
    for name in stock:
        delattr(model, name)
    head = ClassificationHead(settings, width=config.hidden_size, labels=config.num_labels)
    setattr(model, OWN_HEAD, head)
    setattr(model, family_of(config).head[-1], NoStockHead())


def pool_packed(hidden: Tensor, packing: Packing, *, pooling: Pooling) -> Tensor:
    """Return (B, width) of hidden states (N, width), rows in order of length."""
    if pooling in ("last", "first"):
        return hidden.index_select(0, packing.pooled)
    runs = torch.split(hidden, [*(rows * length for rows, length in packing.runs), packing.filler])[:-1]
    shaped = [run.view(rows, length, -1) for run, (rows, length) in zip(runs, packing.runs, strict=True)]
    return torch.cat([run.mean(1) if pooling == "mean" else run.amax(1) for run in shaped])


def pool_padded(hidden: Tensor, attention_mask: Tensor | None, *, pooling: Pooling) -> Tensor:
    """Return (B, width) of padded hidden states (B, T, width); a row without real tokens counts as its first one.

    Args:
        hidden: Padded anywhere.
        attention_mask: (B, T), 1 for real tokens; None means that all are real.
        pooling: What of the real tokens is taken.
    """
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], device=hidden.device)
    real = attention_mask != 0
    rows, places = torch.arange(len(hidden), device=hidden.device), torch.arange(real.shape[1], device=hidden.device)
    if pooling == "last":
        return hidden[rows, (places * real).argmax(dim=-1)]
    if pooling == "first":
        return hidden[rows, real.int().argmax(dim=-1)]
    real = torch.cat([real[:, :1] | ~real.any(1, keepdim=True), real[:, 1:]], dim=1)[..., None]
    if pooling == "max":
        return hidden.masked_fill(~real, float("-inf")).amax(1)
    return (hidden * real).sum(1) / real.sum(1)
