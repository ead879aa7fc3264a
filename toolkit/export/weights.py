"""The weights of a merged classifier, one tensor at a time: base, as training saw it, plus the adapter's delta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.config.schema import QuantizationSettings
from toolkit.errors import ToolkitError
from toolkit.export.stream import Content
from toolkit.families import Family
from toolkit.models.quantize import quantization_roundtrip
from toolkit.models.stored import StoredTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."


class MergedWeights:
    """Computes each tensor of base plus adapter when it is asked for.

    A LoRA layer computes ``W x + s B A x`` with s = alpha / r (Hu et al. 2021, arXiv:2106.09685, section 4.1), so
    ``W + s B A`` is the merged weight. On a quantised base W is what the layer stored, quantised and dequantised.

    Args:
        base: Tensors of the base.
        skeleton: The classifier on the meta device; the type of each layer decides how its weight is laid out.
        family: Its architecture.
        adapter: Tensors of adapter_model.safetensors: A (r, in), B (out, r), and the head.
        scaling: s.
        quantization: How training stored the frozen layers, or None.
    """

    def __init__(
        self,
        base: StoredTensors,
        skeleton: PreTrainedModel,
        *,
        family: Family,
        adapter: Mapping[str, torch.Tensor],
        scaling: float,
        quantization: QuantizationSettings | None,
    ) -> None:
        self._base, self._skeleton, self._family = base, skeleton, family
        self._unused = dict(adapter)
        self._scaling, self._quantization = scaling, quantization
        self.adapted = 0

    def read(self, name: str) -> Content:
        """Return one merged tensor, float32, whole or in pieces; each adapter tensor is handed out once."""
        if name.startswith(tuple(f"{path}." for path in self._family.head)):
            return self._take(PREFIX + name).float()
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or not _is_linear(layer := self._skeleton.get_submodule(path)):
            return self._base.pieces(name)
        weight = self._base.read(name)
        # (out, in), whichever way round the layer stores it. By its type: a square weight has no telling shape.
        turned = _is_conv1d(layer)
        matrix = weight.T if turned else weight
        if self._quantization is not None and path.startswith(f"{self._family.blocks}."):
            matrix = quantization_roundtrip(matrix.contiguous(), self._quantization)
        if f"{PREFIX}{path}.lora_A.weight" in self._unused:
            matrix = matrix + self._delta(path)
        return matrix.T if turned else matrix

    def check_all_used(self) -> None:
        """Prove that no trained tensor was left behind.

        Raises:
            ToolkitError: Naming those that no layer took.
        """
        if self._unused:
            raise ToolkitError(f"trained tensors that no layer of the model takes: {', '.join(sorted(self._unused))}")

    def _delta(self, path: str) -> torch.Tensor:
        down, up = (self._take(f"{PREFIX}{path}.lora_{half}.weight").float() for half in "AB")
        self.adapted += 1
        return self._scaling * (up @ down)

    def _take(self, name: str) -> torch.Tensor:
        if name not in self._unused:
            raise ToolkitError(f"{name}: not in the adapter")
        return self._unused.pop(name)


def lora_scaling(settings: Mapping[str, Any]) -> float:
    """Return s of an adapter's settings: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    rank = settings["r"]
    return float(settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _is_conv1d(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or _is_conv1d(layer)
