"""The weights of a merged classifier, one tensor at a time: base, as training saw it, plus the adapter's delta."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from toolkit.config.schema import QuantizationSettings
from toolkit.errors import ToolkitError
from toolkit.families import Family
from toolkit.models.headers import read_tensor_headers
from toolkit.models.quantize import quantization_roundtrip
from toolkit.models.tensors import body_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."


class FolderReader:
    """Reads single tensors out of a model folder, in whichever spelling and shards it stores them.

    Args:
        folder: Holds safetensors files.
        family: Its architecture.
    """

    def __init__(self, folder: pathlib.Path, family: Family) -> None:
        self._family = family
        self._stored = {
            body_name(name, family): (name, info.file) for name, info in read_tensor_headers(folder).items()
        }
        self._files: dict[pathlib.Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> FolderReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in float32 by the name that the classifier gives it.

        Raises:
            ToolkitError: If the folder has no such tensor.
        """
        try:
            stored, path = self._stored[body_name(name, self._family)]
        except KeyError:
            raise ToolkitError(f"{name}: not among the base's tensors") from None
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        tensor: torch.Tensor = self._files[path].get_tensor(stored)
        return tensor.float()


class MergedWeights:
    """Computes each tensor of base plus adapter when it is asked for.

    A LoRA layer computes ``W x + s B A x`` with s = alpha / r (Hu et al. 2021, arXiv:2106.09685, section 4.1), so
    ``W + s B A`` is the merged weight. On a quantised base W is what the layer stored, quantised and dequantised.

    Args:
        base: Reader of the base's folder.
        skeleton: The classifier on the meta device; the type of each layer decides how its weight is laid out.
        family: Its architecture.
        adapter: Tensors of adapter_model.safetensors: A (r, in), B (out, r), and the head.
        scaling: s.
        quantization: How training stored the frozen layers, or None.
    """

    def __init__(
        self,
        base: FolderReader,
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

    def read(self, name: str) -> torch.Tensor:
        """Return one merged tensor, float32; each adapter tensor is handed out once."""
        if name.startswith(tuple(f"{path}." for path in self._family.head)):
            return self._take(PREFIX + name).float()
        weight = self._base.read(name)
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or not _is_linear(layer := self._skeleton.get_submodule(path)):
            return weight
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
