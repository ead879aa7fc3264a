"""Chooses which of a classifier's own parameters train: all, biases, the head, the last blocks or one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.methods import (
    BiasMethod,
    FittedMethod,
    FreezingMethod,
    FullMethod,
    GradualMethod,
    HeadMethod,
    ZeroShotMethod,
)
from toolkit.errors import CapabilityError, Problem, RecipeError
from toolkit.families import Family
from toolkit.parameters import rest

if TYPE_CHECKING:
    from torch import nn


def trained_prefixes(method: FreezingMethod, family: Family, *, blocks: int) -> tuple[str, ...]:
    """Return the module paths that train, now or later; the empty path is the whole model.

    Args:
        method: The recipe's `method` section.
        family: The architecture.
        blocks: How many blocks the model has.

    Raises:
        RecipeError: More blocks than there are.
    """
    if isinstance(method, FullMethod | BiasMethod):
        return ("",)
    if isinstance(method, ZeroShotMethod):
        return ()
    count = trained_blocks(method, blocks=blocks)
    if count == 0:
        return family.head
    last = tuple(f"{family.blocks}.{i}" for i in range(blocks - count, blocks))
    norm = (family.final_norm,) if family.final_norm is not None else ()
    return (*last, *norm, *family.head)


def trained_blocks(method: FreezingMethod, *, blocks: int) -> int:
    """Return how many blocks, from the last, train in the end, of ``blocks``.

    Raises:
        RecipeError: More than there are.
    """
    if isinstance(method, HeadMethod | FittedMethod):
        return 0
    if isinstance(method, FullMethod | BiasMethod):
        return blocks
    field, count = ("blocks", method.blocks) if isinstance(method, GradualMethod) else ("n", method.n)
    if count == "all":
        return blocks
    if count > blocks:
        raise RecipeError(
            Problem("", f"method.{field}", f"{count} blocks, but the base has {blocks}", f"1 to {blocks}")
        )
    return count


def freeze(model: nn.Module, method: FreezingMethod, *, family: Family) -> None:
    """Set `requires_grad` on exactly the method's parameters, and make those float32.

    Of gradual unfreezing, the head trains and the blocks rest (`toolkit.parameters`).

    Args:
        model: A classifier.
        method: The recipe's `method` section.
        family: The architecture.

    Raises:
        RecipeError: More blocks than there are.
        CapabilityError: A parameter to be trained is quantised.
    """
    blocks = len(list(model.get_submodule(family.blocks).children()))
    prefixes = trained_prefixes(method, family, blocks=blocks)
    trained = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if any(not prefix or name.startswith(f"{prefix}.") for prefix in prefixes) and _is_chosen(name, method, family)
    ]
    for name, parameter in trained:
        if not parameter.is_floating_point():
            wrong = f"{method.name} trains {name}, which is quantised"
            raise CapabilityError(Problem("", "quantization", wrong, "method lora or head, or quantization: null"))
    model.requires_grad_(False)
    for name, parameter in trained:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
        if isinstance(method, GradualMethod) and not _is_head(name, family):
            rest(parameter, resting=True)


def _is_chosen(name: str, method: FreezingMethod, family: Family) -> bool:
    return not isinstance(method, BiasMethod) or name.endswith(".bias") or _is_head(name, family)


def _is_head(name: str, family: Family) -> bool:
    return name.startswith(tuple(f"{path}." for path in family.head))
