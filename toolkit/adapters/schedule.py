"""Methods that change while they train: blocks that join (gradual), ranks that are cut (adalora)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from toolkit.adapters.freeze import trained_blocks
from toolkit.config.methods import AdaloraMethod, GradualMethod, Method
from toolkit.errors import CapabilityError, Problem
from toolkit.families import Family
from toolkit.parameters import rest

Tensors = dict[str, torch.Tensor]


class MethodSchedule:
    """What the trainer tells a method; most methods do nothing with it."""

    def before_step(self, *, epoch: int, stalls: int) -> None:
        """Hear which epoch (from 0) a step belongs to, and how many evaluations brought no better one."""

    def after_step(self, step: int) -> None:
        """Hear that step number ``step`` (from 1) was taken; its gradients still stand."""

    def state(self) -> Tensors:
        """Return what a resumed run needs beside the weights, by name."""
        return {}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back a ``state``."""


class GradualSchedule(MethodSchedule):
    """Wakes one block more at a time, from the last (Howard & Ruder 2018, section 3.3).

    How many are awake follows from the epoch, or from the evaluations so far: a resumed run needs no state.

    Args:
        model: The classifier, frozen by `adapters.freeze`.
        method: The recipe's `method` section.
        family: The architecture.
    """

    def __init__(self, model: nn.Module, method: GradualMethod, *, family: Family) -> None:
        blocks: list[Any] = list(model.get_submodule(family.blocks).children())
        self._sleeping = blocks[len(blocks) - trained_blocks(method, blocks=len(blocks)) :]
        self._norm = None if family.final_norm is None else model.get_submodule(family.final_norm)
        self._pace = method.epochs_per_block

    def before_step(self, *, epoch: int, stalls: int) -> None:
        """Wake the blocks whose turn has come; the norm behind the last block wakes with that."""
        due = stalls if self._pace == "plateau" else epoch // self._pace
        count = min(due, len(self._sleeping))
        awake = self._sleeping[len(self._sleeping) - count :]
        for module in (*awake, *((self._norm,) if count and self._norm is not None else ())):
            for parameter in module.parameters():
                rest(parameter, resting=False)


class AdaloraSchedule(MethodSchedule):
    """Lets peft cut ranks after each step: which, by smoothed sensitivities, and how many, by the step.

    Args:
        model: The `peft.PeftModel`.
        method: The recipe's `method` section.
        total_steps: Optimizer steps of the run.
    """

    def __init__(self, model: Any, method: AdaloraMethod, *, total_steps: int) -> None:
        self._tuner, self._config = model.base_model, model.peft_config["default"]
        self._config.total_step = total_steps
        self._config.tinit = int(method.start_ratio * total_steps)
        self._config.tfinal = int(method.final_ratio * total_steps)
        # Importance is measured in the steps before the last cut: with less than one there is nothing to cut by.
        self._cuts = total_steps - self._config.tfinal >= 2

    def after_step(self, step: int) -> None:
        """Update the importance of every singular value, and cut if it is time to."""
        if self._cuts:
            self._tuner.update_and_allocate(step)

    def state(self) -> Tensors:
        """Return the smoothed importances and, once ranks are fixed, which singular values are kept."""
        allocator = self._tuner.rankallocator
        found = {f"ipt.{name}": tensor for name, tensor in allocator.exp_avg_ipt.items()}
        found |= {f"unc.{name}": tensor for name, tensor in allocator.exp_avg_unc.items()}
        kept = self._config.rank_pattern or {}
        return found | {f"kept.{name}": torch.tensor(mask, dtype=torch.uint8) for name, mask in kept.items()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back a ``state``."""
        allocator = self._tuner.rankallocator
        # Frozen weights may lie elsewhere, or on disk.
        device = next(parameter.device for parameter in self._tuner.parameters() if parameter.requires_grad)
        parts: dict[str, dict[str, torch.Tensor]] = {"ipt": {}, "unc": {}, "kept": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = tensor.to(device)
        allocator.exp_avg_ipt, allocator.exp_avg_unc = parts["ipt"], parts["unc"]
        # peft starts all three where this one lacks a name; its values are written anew in every step.
        allocator.ipt = {name: torch.zeros_like(tensor) for name, tensor in parts["ipt"].items()}
        self._config.rank_pattern = {name: mask.bool().tolist() for name, mask in parts["kept"].items()} or None


def build_schedule(
    model: nn.Module, method: Method, *, family: Family, total_steps: int, processes: int
) -> MethodSchedule:
    """Return what a method does while it trains.

    Args:
        model: With its method applied.
        method: The recipe's `method` section.
        family: The architecture.
        total_steps: Optimizer steps of the run.
        processes: How many train together.

    Raises:
        CapabilityError: Gradual unfreezing in more than one process.
    """
    if isinstance(method, GradualMethod):
        if processes > 1:
            wrong = f"gradual in {processes} processes: their gradients are joined for a fixed set of parameters"
            raise CapabilityError(Problem("", "method.name", wrong, "one process, or method last_n"))
        return GradualSchedule(model, method, family=family)
    if isinstance(method, AdaloraMethod):
        return AdaloraSchedule(model, method, total_steps=total_steps)
    return MethodSchedule()


def orthogonality_penalty(model: nn.Module, weight: float) -> torch.Tensor:
    """Return AdaLoRA's penalty on singular vectors that are not orthogonal, a scalar.

    The mean over all P and Q of the Frobenius norm of P^T P - I and Q Q^T - I (Zhang et al. 2023, equation 4; the
    norm is not squared, as in peft).

    Args:
        model: The `peft.PeftModel`.
        weight: Of the penalty in the loss.
    """
    products = [
        parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    ]
    norms = [torch.linalg.norm(product - torch.eye(len(product), device=product.device)) for product in products]
    return weight * torch.stack(norms).mean()
