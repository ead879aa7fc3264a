"""Writes an adapter as stock peft reads it, and loads one after proving that it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.adapters.apply import inject
from toolkit.adapters.check import CONFIG, WEIGHTS, read_adapter_config, read_adapter_tensors, tensor_problems
from toolkit.adapters.methods import unmatched_targets
from toolkit.durable import write_file_atomically
from toolkit.errors import AdapterError, Problem, ToolkitError
from toolkit.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, then read them back and compare.

    peft's own `save_pretrained` is not used: it asks the hub whether the vocabulary was changed, and lists the target
    modules in the random order of a set. Bytes depend on the adapter alone.

    Args:
        model: A `peft.PeftModel` of `apply_method`.
        folder: Made if it is missing; the two files in it are replaced one at a time.

    Raises:
        ToolkitError: The model has no adapter, its head is not trained, or the files read back differ.
    """
    from safetensors.torch import save

    tensors = _adapter_tensors(model)
    _prove_head(model, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    write_file_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_file_atomically(folder / CONFIG, json.dumps(_config_dict(model), indent=2, sort_keys=True).encode() + b"\n")
    written = read_adapter_tensors(folder)
    if written.keys() != tensors.keys() or not all(torch.equal(written[name], tensors[name]) for name in tensors):
        raise ToolkitError(f"{folder / WEIGHTS}: what was written is not what was trained")


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> nn.Module:
    """Put a saved adapter onto a freshly loaded base.

    Args:
        model: From `load_classifier`, the base the adapter was trained on; changed in place.
        folder: Holds adapter_config.json and adapter_model.safetensors.
        trainable: Whether its parameters get gradients.

    Returns:
        A `peft.PeftModel` in eval mode.

    Raises:
        AdapterError: An unknown kind of adapter, a pickle, or tensors that are missing, extra, misshapen, not floating
            point or not finite; every problem, one line each.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    family = FAMILIES[model.config.model_type]
    settings = read_adapter_config(folder, family=family)
    tensors = read_adapter_tensors(folder)
    module_names = [name for name, _ in model.named_modules()]
    unmatched = unmatched_targets(settings["target_modules"], module_names, family=family)
    if unmatched:
        wrong = f"{', '.join(unmatched)} matches no layer of the base"
        raise AdapterError(Problem(str(folder / CONFIG), "target_modules", wrong, ", ".join(family.linear)))
    model.name_or_path = settings["base_model_name_or_path"]
    with torch.random.fork_rng(devices=[]):
        adapted = inject(model, LoraConfig(**settings))
    _give_memory(adapted)
    problems = tensor_problems(tensors, _adapter_tensors(adapted), where=str(folder / WEIGHTS))
    if problems:
        raise AdapterError(problems)
    set_peft_model_state_dict(adapted, tensors)
    for parameter in adapted.parameters():
        parameter.requires_grad_(trainable and parameter.requires_grad)
    return adapted.eval()


def _give_memory(model: nn.Module) -> None:
    """Put adapters into memory that peft left without any, as is the layer they wrap while its block is on disk."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            parts = [getattr(layer, name) for name in layer.adapter_layer_names]
            for part in parts:
                if any(parameter.is_meta for parameter in part.parameters()):
                    part.to_empty(device="cpu")


def _adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter and the head by their names on disk; on the CPU, contiguous."""
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise ToolkitError(f"{type(model).__name__} has no adapter to save")
    state: Mapping[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: state[name].detach().cpu().contiguous() for name in sorted(state)}


def _prove_head(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse to save an adapter whose head would be lost, or is not the one that trained."""
    for path in FAMILIES[model.config.model_type].head:
        wrapper = model.get_base_model().get_submodule(path)
        for name, parameter in wrapper.modules_to_save["default"].named_parameters():
            saved = tensors.get(f"base_model.model.{path}.{name}")
            if saved is None or not torch.equal(saved, parameter.detach().cpu()):
                raise ToolkitError(f"the trained head {path}.{name} is not in the adapter")


def _config_dict(model: Any) -> dict[str, Any]:
    """Return the peft config as JSON values: sets sorted, no module named twice."""
    settings: dict[str, Any] = model.peft_config["default"].to_dict()
    for key, value in settings.items():
        if isinstance(value, set):
            settings[key] = sorted(value)
    # PeftModelForSequenceClassification appends its own two guesses, "classifier" and "score".
    head = FAMILIES[model.config.model_type].head
    settings["modules_to_save"] = [name for name in dict.fromkeys(settings["modules_to_save"]) if name in head]
    settings["inference_mode"] = True
    if not settings["base_model_name_or_path"]:
        raise ToolkitError("the adapter names no base model")
    return settings
