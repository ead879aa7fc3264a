"""Heads that stock transformers cannot express: hidden layers, random forests, the mean or maximum over all tokens."""

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


class RandomForest(nn.Module):
    """Trees from a pooled state to logits: the logarithms of the trees' mean probabilities.

    All trees are complete: node n has the children 2n + 1 and 2n + 2, so that the shapes follow from the settings. A
    leaf above the lowest level stands there as often as there are ways down from it.

    Args:
        settings: ``n_estimators`` and ``max_depth``, as a config.json holds them under ``OWN_HEAD``.
        width: Of the pooled state.
        labels: Classes.

    Attributes:
        feature: (trees, nodes), which element of the state is asked; whole numbers, exact in float32.
        threshold: (trees, nodes), above which a state goes to the second child.
        probability: (trees, nodes + 1, labels), of each leaf.
    """

    def __init__(self, settings: Mapping[str, Any], *, width: int, labels: int) -> None:
        super().__init__()
        trees, self.depth = settings["n_estimators"], settings["max_depth"]
        nodes = 2**self.depth - 1
        self.feature = nn.Parameter(torch.zeros(trees, nodes))
        self.threshold = nn.Parameter(torch.zeros(trees, nodes))
        self.probability = nn.Parameter(torch.zeros(trees, nodes + 1, labels))

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the logits (B, labels) of pooled states (B, width)."""
        trees, nodes = self.feature.shape
        every = torch.arange(trees, device=pooled.device)
        node = torch.zeros(len(pooled), trees, dtype=torch.long, device=pooled.device)
        for _ in range(self.depth):
            asked = pooled.to(self.threshold.dtype).gather(1, self.feature[every, node].long())
            node = 2 * node + 1 + (asked > self.threshold[every, node])
        mean = self.probability[every, node - nodes].mean(dim=1)
        # No tree has seen a label there: its probability is below what float32 tells apart from 0 beside the others'.
        return mean.clamp(min=torch.finfo(mean.dtype).eps).log()


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
    kind = RandomForest if is_forest(config) else ClassificationHead
    head = kind(settings, width=config.hidden_size, labels=config.num_labels)
    setattr(model, OWN_HEAD, head)
    setattr(model, family_of(config).head[-1], NoStockHead())


def is_forest(config: Any) -> bool:
    """Return whether the head that a config describes is a random forest."""
    return "n_estimators" in (getattr(config, OWN_HEAD, None) or {})


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
