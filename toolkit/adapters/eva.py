"""EVA: A starts from the directions in which the inputs of its layer vary most over training texts.

Paischer et al. 2024, arXiv:2410.07170, equation 2: the first r right singular vectors of the inputs. All ranks stay r,
so that what is saved is plain LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Inputs of one layer that are looked at. 2,048 tokens of SMS texts are some 90 texts.
TOKENS = 2_048
# Columns beyond r, and passes, of the randomised decomposition (Halko et al. 2009, algorithm 4.4).
OVERSAMPLING = 8
PASSES = 4


def start_from_data(model: nn.Module, run: Callable[[], object], *, seed: int) -> None:
    """Replace every A by the directions of its layer's inputs; B stays zero, so that nothing else changes.

    Args:
        model: The `peft.PeftModel`, untrained.
        run: Runs one batch of real tokens through it.
        seed: Of the randomised decomposition.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    handles = [layer.register_forward_pre_hook(_start) for layer in layers]
    mode = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            run()
    finally:
        for handle in handles:
            handle.remove()
        model.train(mode)


def _start(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    states, weight = inputs[0].flatten(0, -2).float(), layer.lora_A["default"].weight
    directions = principal_directions(states, rank=len(weight))
    # Fewer inputs than the rank, as in a last block that sees one token a text, leave the rest as it was drawn.
    weight.data[: len(directions)] = directions.to(weight)


def principal_directions(states: torch.Tensor, *, rank: int) -> torch.Tensor:
    """Return the first right singular vectors (k, width) of ``states`` (N, width), k at most ``rank``.

    Each has the sign that makes its largest entry positive, so that it depends on the states alone.
    """
    columns = min(rank + OVERSAMPLING, *states.shape)
    _, _, right = torch.svd_lowrank(states, q=columns, niter=PASSES)
    found = right.T[: min(rank, columns)]
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    return found * largest.sign()
