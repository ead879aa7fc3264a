"""Chooses which of a classifier's own parameters train: all, the head, or the last n blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.schema import FullMethod, HeadMethod, LastNMethod
from toolkit.errors import CapabilityError, Problem, RecipeError
from toolkit.families import Family

if TYPE_CHECKING:
    from torch import nn


def trained_prefixes(method: FullMethod | HeadMethod | LastNMethod, family: Family, *, blocks: int) -> tuple[str, ...]:
    """Return the module paths that train; the empty path is the whole model.

    Args:
        method: The recipe's `method` section.
        family: The architecture.
        blocks: How many blocks the model has.

    Raises:
        RecipeError: `n` is larger than the number of blocks.
    """
    if isinstance(method, FullMethod):
        return ("",)
    if isinstance(method, HeadMethod):
        return family.head
    if method.n > blocks:
        raise RecipeError(Problem("", "method.n", f"{method.n} of {blocks} blocks", f"1 to {blocks}"))
    last = tuple(f"{family.blocks}.{i}" for i in range(blocks - method.n, blocks))
    norm = (family.final_norm,) if family.final_norm is not None else ()
    return (*last, *norm, *family.head)


def freeze(model: nn.Module, method: FullMethod | HeadMethod | LastNMethod, *, family: Family) -> None:
    """Set `requires_grad` on exactly the method's parameters, and make those float32.

    Args:
        model: A classifier.
        method: The recipe's `method` section.
        family: The architecture.

    Raises:
        RecipeError: `n` is larger than the number of blocks.
        CapabilityError: A parameter to be trained is quantised.
    """
    blocks = len(list(model.get_submodule(family.blocks).children()))
    prefixes = trained_prefixes(method, family, blocks=blocks)
    trained = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if any(not prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
    ]
    for name, parameter in trained:
        if not parameter.is_floating_point():
            wrong = f"{method.name} trains {name}, which is quantised"
            raise CapabilityError(Problem("", "quantization", wrong, "method lora or head, or quantization: null"))
    model.requires_grad_(False)
    for _, parameter in trained:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
