"""Writes an adapter as stock peft reads it, and loads one after proving that it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.adapters.apply import inject
from toolkit.adapters.as_lora import as_lora
from toolkit.adapters.check import (
    CONFIG,
    WEIGHTS,
    config_class,
    read_adapter_config,
    read_adapter_tensors,
    tensor_problems,
)
from toolkit.adapters.kinds import FROM_BASE, task_name
from toolkit.adapters.methods import unmatched_targets
from toolkit.durable import write_file_atomically
from toolkit.errors import AdapterError, Problem, ToolkitError
from toolkit.families import Family, family_of_model

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

    own = _adapter_tensors(model)
    _prove_head(model, own)
    tensors, settings = as_lora(model, own, _config_dict(model))
    folder.mkdir(parents=True, exist_ok=True)
    write_file_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_file_atomically(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True).encode() + b"\n")
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
    from peft import set_peft_model_state_dict

    family = family_of_model(model)
    settings = read_adapter_config(folder, family=family)
    tensors = read_adapter_tensors(folder)
    _check_targets(model, settings, family=family, where=str(folder / CONFIG))
    model.name_or_path = settings["base_model_name_or_path"]
    with torch.random.fork_rng(devices=[]):
        kind = settings.pop("peft_type")
        adapted = inject(model, config_class(kind)(**settings))
    _give_memory(adapted)
    _check_sizes(adapted, folder)
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
                    # What ``to_empty`` does, for which torch would import sympy.
                    part._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


def _check_targets(model: nn.Module, settings: Mapping[str, Any], *, family: Family, where: str) -> None:
    if settings["peft_type"] not in ("LORA", "VERA", "IA3"):
        return
    module_names = [name for name, _ in model.named_modules()]
    unmatched = unmatched_targets(settings["target_modules"], module_names, family=family)
    if unmatched:
        wrong = f"{', '.join(unmatched)} matches no layer of the base"
        raise AdapterError(Problem(where, "target_modules", wrong, ", ".join(family.linear)))


def _check_sizes(model: nn.Module, folder: Path) -> None:
    """Hold a prefix's idea of the base's sizes, by which stock peft would cut it, against the base."""
    config: Any = model.peft_config["default"]  # type: ignore[index]
    if not config.is_prompt_learning:
        return
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    problems = [
        Problem(str(folder / CONFIG), key, f"{found[key]!r}", f"{getattr(config, key)!r} by the base")
        for key in FROM_BASE
        if found.get(key) is not None and found[key] != getattr(config, key)
    ]
    if problems:
        raise AdapterError(problems)


def _adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter and the head by their names on disk; on the CPU, contiguous."""
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise ToolkitError(f"{type(model).__name__} has no adapter to save")
    config: Any = model.peft_config["default"]
    cut = getattr(config, "rank_pattern", None)
    try:
        # peft would leave out what AdaLoRA has cut, down to tensors without an element; as_lora keeps it as zeros.
        config.rank_pattern = {}
        state: Mapping[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    finally:
        config.rank_pattern = cut
    return {name: state[name].detach().cpu().contiguous() for name in sorted(state)}


def _prove_head(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse to save an adapter whose head would be lost, or is not the one that trained."""
    # A prefix leaves the model as it is; the other adapters put a tuner around it.
    inside = "base_model" if model.active_peft_config.is_prompt_learning else "base_model.model"
    for path in family_of_model(model.get_base_model()).head:
        wrapper = model.get_base_model().get_submodule(path)
        for name, parameter in wrapper.modules_to_save["default"].named_parameters():
            saved = tensors.get(f"{inside}.{path}.{name}")
            if saved is None or not torch.equal(saved, parameter.detach().cpu()):
                raise ToolkitError(f"the trained head {path}.{name} is not in the adapter")


def _config_dict(model: Any) -> dict[str, Any]:
    """Return the peft config as JSON values: sets sorted, no module named twice."""
    settings: dict[str, Any] = model.peft_config["default"].to_dict()
    for key, value in settings.items():
        if isinstance(value, set):
            settings[key] = sorted(value)
    # PeftModelForSequenceClassification appends its own two guesses, "classifier" and "score".
    family = family_of_model(model.get_base_model())
    settings["task_type"] = task_name(family)
    kept = [name for name in dict.fromkeys(settings["modules_to_save"] or ()) if name in family.head]
    settings["modules_to_save"] = kept or None
    settings["inference_mode"] = True
    if not settings["base_model_name_or_path"]:
        raise ToolkitError("the adapter names no base model")
    return settings
