"""What each kind of adapter makes of a weight, written out, so that a merge needs neither peft nor the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from toolkit.errors import ToolkitError

Tensor = torch.Tensor
PREFIX = "base_model.model."


class Change(Protocol):
    """The arithmetic of one kind of adapter."""

    def tensors(self, path: str) -> list[str]:
        """Return the names on disk of what may belong to the module at ``path``."""

    def apply(self, leaf: str, base: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return a module's changed tensor.

        Args:
            leaf: ``weight`` or ``bias``.
            base: It, before, which may be changed in place; the weight of a linear layer is (out, in).
            own: Those of ``tensors`` that the adapter has, by the part of the name behind the path; not empty.
        """


class LoraChange:
    """``W + s B A`` (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    With DoRA's magnitudes m, ``m (W + s B A) / |W + s B A|``, norms over the inputs (Liu et al. 2024, arXiv:2402.09353,
    equation 5).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        rank = settings["r"]
        self._scaling = float(settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank))

    def tensors(self, path: str) -> list[str]:
        """Return the names of A (r, in), B (out, r) and the magnitudes (out,)."""
        return [f"{PREFIX}{path}.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")]

    def apply(self, leaf: str, base: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return a changed weight."""
        if leaf != "weight":
            return base
        # In place, thirty times as fast on a transposed weight as a sum of two layouts.
        changed = base.addmm_(own["lora_B.weight"], own["lora_A.weight"], alpha=self._scaling)
        magnitudes = own.get("lora_magnitude_vector")
        if magnitudes is None:
            return changed
        norms: Tensor = torch.linalg.norm(changed, dim=1)
        return changed * (magnitudes / norms)[:, None]


class VeraChange:
    """``W + b B d A`` with shared A and B, cut to the layer (Kopiczko et al. 2023, arXiv:2310.11454, equation 2)."""

    def __init__(self, shared: Callable[[str], Tensor]) -> None:
        self._down, self._up = shared("base_model.vera_A").float(), shared("base_model.vera_B").float()

    def tensors(self, path: str) -> list[str]:
        """Return the names of the vectors b (out,) and d (r,)."""
        return [f"{PREFIX}{path}.vera_lambda_{part}" for part in "bd"]

    def apply(self, leaf: str, base: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return a changed weight."""
        if leaf != "weight":
            return base
        rows, columns = base.shape
        up = own["vera_lambda_b"][:, None] * self._up[:rows]
        return base + up @ (own["vera_lambda_d"][:, None] * self._down[:, :columns])


class Ia3Change:
    """``l W`` and ``l bias`` for a scale (out, 1) of outputs, ``W l`` for one (1, in) of inputs.

    Liu et al. 2022, arXiv:2205.05638, section 3.3.
    """

    def tensors(self, path: str) -> list[str]:
        """Return the name of the scale."""
        return [f"{PREFIX}{path}.ia3_l"]

    def apply(self, leaf: str, base: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return a changed weight or bias."""
        scale = own["ia3_l"]
        if leaf == "weight":
            return base * scale
        return base * scale[:, 0] if scale.shape == (len(base), 1) else base


class NormChange:
    """Another weight and bias of a layer norm."""

    def tensors(self, path: str) -> list[str]:
        """Return the names of both."""
        return [f"{PREFIX}{path}.ln_tuning_layers.{leaf}" for leaf in ("weight", "bias")]

    def apply(self, leaf: str, base: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return the trained tensor."""
        return own[f"ln_tuning_layers.{leaf}"]


def change_of(settings: Mapping[str, Any], shared: Callable[[str], Tensor]) -> Change:
    """Return the arithmetic of an adapter.

    Args:
        settings: From ``adapters.check.read_adapter_config``.
        shared: Hands out a tensor that belongs to no single layer, by its name on disk.

    Raises:
        ToolkitError: If it has no merged form.
    """
    kind = settings["peft_type"]
    if kind == "LORA":
        return LoraChange(settings)
    if kind == "VERA":
        return VeraChange(shared)
    if kind == "IA3":
        return Ia3Change()
    if kind == "LN_TUNING":
        return NormChange()
    raise ToolkitError(f"an adapter of kind {kind} cannot be merged")
