"""Everything a run needs to go on bit-equal: weights that train, optimizer, random state, progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from toolkit.adapters.apply import load_trainable_state, trainable_state
from toolkit.adapters.schedule import MethodSchedule
from toolkit.training.checkpoint import Checkpoint

Tensors = dict[str, dict[str, torch.Tensor]]


@dataclass
class Progress:
    """Where training stands, as JSON.

    Attributes:
        step: Optimizer steps done.
        stalls: Evaluations so far that were not the best.
        best_step: Step of the best evaluation, or None.
        best_value: Metric value there.
        best_loss: Validation loss there; breaks ties of the metric.
        stale: Evaluations since the best one.
        stopped_early: Whether patience ran out.
        tokens: Real tokens trained on.
        seconds: Time spent in steps, evaluations and saves.
        train_seconds: Time spent in steps alone.
        pending_loss: Sum of the step losses since the last log line.
        pending_steps: Number of those steps.
        evaluated: Evaluation results so far, by step.
        pieces: Into how many each micro-batch is cut, since memory ran short (``training.shortage``).
        recomputing: Whether activations are recomputed for the same reason.
        without_onednn: Whether oneDNN, which keeps kernels, multiplies no more for the same reason.
    """

    step: int = 0
    stalls: int = 0
    best_step: int | None = None
    best_value: float | None = None
    best_loss: float | None = None
    stale: int = 0
    stopped_early: bool = False
    tokens: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    pending_loss: float = 0.0
    pending_steps: int = 0
    evaluated: dict[str, dict[str, float]] = field(default_factory=dict)
    pieces: int = 1
    recomputing: bool = False
    without_onednn: bool = False


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    progress: Progress,
    schedule: MethodSchedule,
) -> tuple[Tensors, dict[str, Any]]:
    """Return a checkpoint's tensors and its JSON state."""
    moments, scalars = _optimizer_state(optimizer)
    tensors = {"trainable": trainable_state(model), "optimizer": moments, "random": _random_state(accelerator)}
    if method := schedule.state():
        tensors["method"] = method
    state = {"progress": asdict(progress), "optimizer": scalars, "processes": accelerator.num_processes}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    return tensors, state


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    schedule: MethodSchedule,
) -> Progress:
    """Put a checkpoint back and return where training stood."""
    load_trainable_state(model, checkpoint.tensors["trainable"])
    schedule.load_state(checkpoint.tensors.get("method", {}))
    _load_optimizer(optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
    # With another number of processes the run goes on, but its dropout masks are new ones.
    if checkpoint.state["processes"] == accelerator.num_processes:
        _load_random_state(checkpoint.tensors["random"], accelerator)
    if accelerator.scaler is not None and "scaler" in checkpoint.state:
        accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    return Progress(**checkpoint.state["progress"])


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        # bitsandbytes puts what is quantised into a dictionary of its own, and takes it back with or without one.
        inner = {key: value for found in entries.values() if isinstance(found, dict) for key, value in found.items()}
        plain = {key: value for key, value in entries.items() if not isinstance(value, dict)}
        for key, value in (plain | inner).items():
            name = f"{index}.{key}"
            if isinstance(value, torch.Tensor):
                # All parameters share the 256 values of an 8-bit code, which a file may not.
                tensors[name] = value.clone() if key.startswith("qmap") else value
            else:
                scalars[name] = value
    return tensors, scalars


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *scalars.items()):
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_state(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Return the generators of all processes, a row each."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return {name: accelerator.gather(state.unsqueeze(0).to(accelerator.device)).cpu() for name, state in states.items()}


def _load_random_state(states: Mapping[str, torch.Tensor], accelerator: Accelerator) -> None:
    torch.set_rng_state(states["cpu"][accelerator.process_index])
    if "cuda" in states and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][accelerator.process_index], accelerator.device)
