"""The weights of a merged classifier, one tensor at a time: base, as training saw it, plus the adapter's delta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.config.schema import QuantizationSettings
from toolkit.errors import ToolkitError
from toolkit.export.changes import PREFIX, change_of
from toolkit.export.stream import Content
from toolkit.families import Family
from toolkit.models.quantize import quantization_roundtrip
from toolkit.models.stored import StoredTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MergedWeights:
    """Computes each tensor of base plus adapter when it is asked for.

    ``changes`` has the arithmetic. On a quantised base W is what the layer stored, quantised and dequantised.

    Args:
        base: Tensors of the base.
        skeleton: The classifier on the meta device; the type of each layer decides how its weight is laid out.
        family: Its architecture.
        adapter: Tensors of adapter_model.safetensors, and the head.
        settings: From ``adapters.check.read_adapter_config``.
        quantization: How training stored the frozen layers, or None.
    """

    def __init__(
        self,
        base: StoredTensors,
        skeleton: PreTrainedModel,
        *,
        family: Family,
        adapter: Mapping[str, torch.Tensor],
        settings: Mapping[str, Any],
        quantization: QuantizationSettings | None,
    ) -> None:
        self._base, self._skeleton, self._family = base, skeleton, family
        self._adapter, self._unused = adapter, set(adapter)
        self._quantization = quantization
        self._change = change_of(settings, self._take)
        self._changed: set[str] = set()

    @property
    def adapted(self) -> int:
        """Modules that were changed so far."""
        return len(self._changed)

    def read(self, name: str) -> Content:
        """Return one merged tensor in float32, or an untouched one in pieces as it is stored."""
        if name.startswith(tuple(f"{path}." for path in self._family.head)):
            return self._take(PREFIX + name).float()
        path, _, leaf = name.rpartition(".")
        layer = self._skeleton.get_submodule(path)
        linear = leaf == "weight" and _is_linear(layer)
        quantization = self._quantization if linear and path.startswith(f"{self._family.blocks}.") else None
        if quantization is None and not self._own(path):
            # With LoRA on c_attn three quarters of the base: as they lie in it.
            return self._base.pieces(name)
        base = self._base.read(name)
        # (out, in), whichever way round the layer stores it. By its type: a square weight has no telling shape.
        turned = linear and _is_conv1d(layer)
        matrix = base.T if turned else base
        if quantization is not None:
            matrix = quantization_roundtrip(matrix.contiguous(), quantization)
        matrix = self._changed_by(path, leaf, matrix)
        return matrix.T if turned else matrix

    def check_all_used(self) -> None:
        """Prove that no trained tensor was left behind.

        Raises:
            ToolkitError: Naming those that no layer took.
        """
        if self._unused:
            raise ToolkitError(f"trained tensors that no layer of the model takes: {', '.join(sorted(self._unused))}")

    def _changed_by(self, path: str, leaf: str, base: torch.Tensor) -> torch.Tensor:
        names = self._own(path)
        if not names:
            return base
        self._changed.add(path)
        own = {name.removeprefix(f"{PREFIX}{path}."): self._take(name).float() for name in names}
        return self._change.apply(leaf, base, own)

    def _own(self, path: str) -> list[str]:
        """Return the adapter's tensors that belong to a module."""
        return [name for name in self._change.tensors(path) if name in self._adapter]

    def _take(self, name: str) -> torch.Tensor:
        if name not in self._adapter:
            raise ToolkitError(f"{name}: not in the adapter")
        self._unused.discard(name)
        return self._adapter[name]


def _is_conv1d(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or _is_conv1d(layer)
