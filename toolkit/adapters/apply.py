"""Applies a method to a classifier, counts what trains, and moves that state in and out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from toolkit.adapters.as_lora import remember_start
from toolkit.adapters.configs import peft_config
from toolkit.adapters.freeze import freeze
from toolkit.adapters.methods import FIELD, target_modules, unmatched_targets
from toolkit.config.methods import AdapterMethod, LoraMethod, Method, TargetedMethod
from toolkit.errors import CheckpointError, Problem, RecipeError
from toolkit.families import Family
from toolkit.parameters import trained_parameters, trains
from toolkit.runtime import PEFT_ASKS, absent

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ParameterReport:
    """How many parameters a model has, and how many of them train.

    Attributes:
        total: Elements of all parameters; a 4-bit weight counts its real elements, not its packed bytes. The frozen
            copy of the head that peft keeps beside the trained one is not counted.
        trainable: Elements that get gradients, now or later in the run.
    """

    total: int
    trainable: int


def apply_method(
    model: PreTrainedModel,
    method: Method,
    *,
    family: Family,
    base_name: str,
    seed: int | None = None,
) -> nn.Module:
    """Make exactly the method's parameters trainable, all of them float32.

    Args:
        model: From `load_classifier`; changed in place.
        method: The recipe's `method` section.
        family: The architecture.
        base_name: `Base.name_or_path`, which the adapter's config will name.
        seed: Of the adapters' initial weights, drawn without touching the global random state; None: from that state.

    Returns:
        A `peft.PeftModel` for methods that leave an adapter, else the same model.

    Raises:
        RecipeError: Target modules that match nothing, or more blocks than there are.
        CapabilityError: The method would train quantised weights.
    """
    if not isinstance(method, AdapterMethod):
        plain: nn.Module = model
        freeze(plain, method, family=family)
        return plain
    if isinstance(method, TargetedMethod):
        module_names = [name for name, _ in model.named_modules()]
        unmatched = unmatched_targets(target_modules(method, family), module_names, family=family)
        if unmatched:
            right = f"candidates: {', '.join(family.linear)}"
            raise RecipeError(Problem("", FIELD, f"{name} matches no layer of this model", right) for name in unmatched)
    return _with_adapter(model, method, family=family, base_name=base_name, seed=seed)


def _with_adapter(
    model: PreTrainedModel, method: AdapterMethod, *, family: Family, base_name: str, seed: int | None
) -> nn.Module:
    # peft warns when the model's own name differs from the config's.
    model.name_or_path = base_name
    # peft draws on the CPU and moves the result.
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        blocks = len(list(model.get_submodule(family.blocks).children()))
        adapted = inject(model, peft_config(method, family, base_name=base_name, blocks=blocks, seed=seed or 0))
    variant = method.variant if isinstance(method, LoraMethod) else None
    for name, parameter in adapted.named_parameters():
        if variant == "lora_fa" and ".lora_A." in name:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if variant == "pissa":
        remember_start(adapted)
    return adapted


def inject(model: PreTrainedModel, config: PeftConfig) -> nn.Module:
    """Return peft's wrapper of a model, without the warnings that its own look at the model causes."""
    from peft import get_peft_model

    # peft would load bitsandbytes to see whether a layer is one of its.
    quantised = getattr(model, "is_quantized", False)
    spared = contextlib.nullcontext() if quantised else absent("bitsandbytes", *PEFT_ASKS)
    with warnings.catch_warnings(), spared:
        # peft 0.21 reads is_gradient_checkpointing, which transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        # Conv1D layers become Linear ones where they are quantised; peft then sets its flag right.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        # Of every layer norm: peft's list of layers with an input and an output width has none of them.
        warnings.filterwarnings("ignore", message="Unsupported layer type '.*LayerNorm'", category=UserWarning)
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def parameter_report(model: nn.Module) -> ParameterReport:
    """Count a model's parameters, each tensor once."""
    counted = [(parameter, _elements(parameter)) for name, parameter in model.named_parameters() if _is_own(name)]
    return ParameterReport(
        total=sum(count for _, count in counted),
        trainable=sum(count for parameter, count in counted if trains(parameter)),
    )


def _is_own(name: str) -> bool:
    return ".original_module." not in name


def _elements(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the live tensors that train, now or later, by parameter name; detached, sharing memory."""
    return {name: parameter.detach() for name, parameter in trained_parameters(model)}


def load_trainable_state(model: nn.Module, tensors: Mapping[str, torch.Tensor], *, where: str = "checkpoint") -> None:
    """Copy a `trainable_state` back into a model with the same method; all or nothing.

    Args:
        model: The model, with its method applied.
        tensors: Exactly the trainable tensors, by name.
        where: The file they come from, for the error lines.

    Raises:
        CheckpointError: Missing or extra names, other shapes or dtypes, or non-finite values; nothing was copied.
    """
    own = dict(trained_parameters(model))
    problems = [Problem(where, name, "the tensor is missing") for name in sorted(set(own) - set(tensors))]
    problems += [Problem(where, name, "an unexpected tensor") for name in sorted(set(tensors) - set(own))]
    for name in sorted(set(own) & set(tensors)):
        problem = _mismatch(tensors[name], own[name])
        problems += [Problem(where, name, *problem)] if problem else []
    if problems:
        raise CheckpointError(problems)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _mismatch(tensor: torch.Tensor, own: torch.Tensor) -> tuple[str, str] | None:
    if tensor.shape != own.shape:
        return f"shape {list(tensor.shape)}", f"{list(own.shape)}"
    if tensor.dtype != own.dtype:
        return f"dtype {tensor.dtype}", f"{own.dtype}"
    if not bool(torch.isfinite(tensor).all()):
        return "holds NaN or infinity", "finite weights"
    return None
