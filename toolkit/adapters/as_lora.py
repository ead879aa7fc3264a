"""Writes adapters that only training needs to know apart as plain LoRA, which every version of peft loads.

PiSSA changes the base: W becomes W - s B0 A0, and s B A is added to that (Meng et al. 2024, arXiv:2404.02948, section
3). On the untouched base the same is s (B A - B0 A0): a LoRA adapter of twice the rank. AdaLoRA's s P diag(L) Q (Zhang
et al. 2023, arXiv:2303.10512, equation 3) is a LoRA adapter with A = Q and B = s P diag(L).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


def remember_start(model: nn.Module) -> None:
    """Keep PiSSA's first A and B; a run that is resumed computes the very same from the base."""
    own: Any = model
    own.pissa_start = {
        name: (layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone())
        for name, layer in _adapted(model)
    }


def as_lora(model: nn.Module, tensors: Tensors, settings: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Return an adapter's tensors and peft settings as they are written.

    Args:
        model: The live `peft.PeftModel`.
        tensors: Its adapter and head by their names on disk.
        settings: Its peft config.

    Returns:
        The same where peft's own form is plain LoRA or cannot be.
    """
    if hasattr(model, "pissa_start"):
        return _pissa(model, tensors, settings)
    return _adalora(model, tensors, settings) if settings["peft_type"] == "ADALORA" else (tensors, settings)


def _pissa(model: Any, tensors: Tensors, settings: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    changed = dict(tensors)
    for name, (first_a, first_b) in model.pissa_start.items():
        down, up = (f"{name}.lora_{half}.weight" for half in "AB")
        changed[down] = torch.cat([tensors[down], first_a.cpu()])
        changed[up] = torch.cat([tensors[up], -first_b.cpu()], dim=1)
    doubled = {key: 2 * settings[key] for key in ("r", "lora_alpha")}
    return changed, settings | doubled | {"init_lora_weights": True}


def _adalora(model: nn.Module, tensors: Tensors, settings: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    from peft import LoraConfig

    changed = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    for name, layer in _adapted(model):
        a, e, b = (parts["default"].detach().cpu() for parts in (layer.lora_A, layer.lora_E, layer.lora_B))
        scale = float(layer.scaling["default"]) / (float(layer.ranknum["default"]) + 1e-5)
        changed[f"{name}.lora_A.weight"] = a.contiguous()
        changed[f"{name}.lora_B.weight"] = (scale * b * e.T).contiguous()
    shared = {key: settings[key] for key in LoraConfig().to_dict() if key in settings}
    rank = settings["init_r"]
    return changed, shared | {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": {}}


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that carry an adapter, by the name on disk."""
    return ((name, layer) for name, layer in model.named_modules() if hasattr(layer, "lora_A"))
