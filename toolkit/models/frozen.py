"""Frozen linear weights in the dtype that autocast multiplies in; for the final figures they are read in float32.

Autocast rounds a float32 weight that does not train anew in every forward pass, and keeps the rounded copy until the
backward pass has read it: six bytes an element. Rounded once, as it is read from the base's files, it takes two and
gives the same bits (two CPU cores, LoRA on GPT-2, 8 short texts: 257 -> 179 ms a step).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from toolkit.families import Family
from toolkit.models.stored import StoredTensors
from toolkit.models.streamed import StreamedBlocks
from toolkit.parameters import trains

# What autocast multiplies in, by the names of accelerate.
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenWeights:
    """The weights of linear layers in the blocks of a classifier, read once it is known which of them train.

    Until ``load`` they have a shape and no memory of their own: a method that asks for their values cannot be applied.

    Args:
        model: The classifier, on the meta device; blocks that are streamed stay so.
        stored: Where its weights lie.
        family: The architecture.
        device: Where they are put.
    """

    def __init__(self, model: Any, stored: StoredTensors, *, family: Family, device: torch.device) -> None:
        self._stored, self._family, self._device = stored, family, device
        blocks = list(model.get_submodule(family.blocks).named_children())
        self.names = {
            f"{family.blocks}.{number}.{name}.weight"
            for number, block in blocks[0 if model.streamed is None else model.streamed.count :]
            for name, layer in block.named_modules()
            if type(layer) in (nn.Linear, Conv1D)
        }

    def stand_in(self, name: str) -> torch.Tensor:
        """Return zeros of a weight's shape that take the memory of one."""
        return torch.zeros((), device=self._device).expand(self._stored.shape(name))

    def load(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Read the weights, now that the method has been applied: those that train in float32, others in ``dtype``."""
        for layer, name, weight in self._weights(model):
            value = torch.empty(weight.shape, dtype=torch.float32 if trains(weight) else dtype, device=self._device)
            self._stored.read_into(name, value)
            layer.weight = nn.Parameter(value, requires_grad=weight.requires_grad)

    def leave(self, model: Any) -> None:
        """Leave frozen weights in the base's files, whole: from now on each block is read when it runs."""
        for layer, _, weight in self._weights(model):
            if not trains(weight):
                layer.weight = nn.Parameter(torch.empty(weight.shape, device="meta"), requires_grad=False)
        blocks = len(list(model.get_submodule(self._family.blocks).children()))
        model.streamed = StreamedBlocks(model, self._stored, family=self._family, count=blocks, device=self._device)
        model.frozen = None

    def _weights(self, model: nn.Module) -> Iterator[tuple[Any, str, nn.Parameter]]:
        """Yield each layer, its weight's name in the files, and the weight."""
        for path, layer in list(model.named_modules()):
            # An adapter wraps the layer whose weight this is.
            name = f"{path.replace('.base_layer', '')}.weight"
            if name in self.names and type(layer) in (nn.Linear, Conv1D):
                yield layer, name, layer.weight
