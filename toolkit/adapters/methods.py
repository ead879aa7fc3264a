"""Which layers of which blocks a method adapts, checked against the architecture."""

from __future__ import annotations

from collections.abc import Iterable

from toolkit.config.methods import Ia3Method, LayeredMethod, TargetedMethod
from toolkit.errors import Problem, RecipeError, nearest
from toolkit.families import Family

FIELD = "method.target_modules"


def target_modules(method: TargetedMethod, family: Family) -> list[str]:
    """Return the module-name suffixes that a method adapts, sorted.

    Raises:
        RecipeError: Names that no layer of the architecture has; the candidates are listed.
    """
    scales = isinstance(method, Ia3Method)
    if method.target_modules == "auto":
        return sorted(family.ia3_auto if scales else family.lora_auto)
    if method.target_modules == "all-linear":
        return sorted(family.linear)
    check_targets(method.target_modules, family=family)
    # IA3 scales inputs of one layer and outputs of the others, so that "c_proj" must be told apart.
    named = [layer for name in method.target_modules for layer in (layers_named(name, family) if scales else [name])]
    return sorted(set(named))


def layers_named(name: str, family: Family) -> list[str]:
    """Return the family's suffixes that a target names, by peft's rule; the name itself if it is longer than those."""
    return [layer for layer in family.linear if layer == name or layer.endswith(f".{name}")] or [name]


def check_targets(names: Iterable[str], *, family: Family, where: str = "") -> None:
    """Refuse target names whose last part is not a linear layer of a block.

    Args:
        names: Module names or dotted suffixes of them.
        family: The architecture.
        where: The recipe file, for the error line.

    Raises:
        RecipeError: One problem per name.
    """
    candidates = sorted({suffix.rpartition(".")[2] for suffix in family.linear} | set(family.linear))
    problems = []
    for name in names:
        if name.rpartition(".")[2] not in candidates:
            right = f"candidates: {', '.join(candidates)}"
            hint = nearest(name, candidates)
            problems.append(Problem(where, FIELD, f"{name} matches no layer", f"{hint} {right}".strip()))
    if problems:
        raise RecipeError(problems)


def unmatched_targets(names: Iterable[str], module_names: Iterable[str], *, family: Family) -> list[str]:
    """Return the target names that match no module of the blocks, by peft's rule: the name or a dotted suffix."""
    inside = [name for name in module_names if name.startswith(f"{family.blocks}.")]
    return [name for name in names if not any(module == name or module.endswith(f".{name}") for module in inside)]


def adapted_blocks(method: LayeredMethod, *, blocks: int) -> range:
    """Return the numbers of the blocks that get adapters, of ``blocks``.

    Raises:
        RecipeError: More blocks than there are.
    """
    if method.layers == "all":
        return range(blocks)
    count = int(method.layers.removeprefix("last_"))
    if count > blocks:
        wrong = f"{method.layers} of {blocks} blocks"
        raise RecipeError(Problem("", "method.layers", wrong, f"last_1 to last_{blocks}, or all"))
    return range(blocks - count, blocks)
