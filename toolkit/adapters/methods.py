"""Turns a recipe's LoRA section into a peft config, with the target modules checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from toolkit.config.schema import LoraMethod
from toolkit.errors import Problem, RecipeError, nearest
from toolkit.families import Family

if TYPE_CHECKING:
    from peft import LoraConfig

FIELD = "method.target_modules"


def target_modules(method: LoraMethod, family: Family) -> list[str]:
    """Return the module-name suffixes that LoRA adapts, sorted.

    Raises:
        RecipeError: Names that no layer of the architecture has; the candidates are listed.
    """
    if method.target_modules == "auto":
        return sorted(family.lora_auto)
    if method.target_modules == "all-linear":
        return sorted(family.linear)
    check_targets(method.target_modules, family=family)
    return sorted(set(method.target_modules))


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


def adapted_blocks(method: LoraMethod, *, blocks: int) -> range:
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


def peft_config(method: LoraMethod, family: Family, *, base_name: str, blocks: int) -> LoraConfig:
    """Return peft's config for a sequence classifier.

    Args:
        method: The recipe's `method` section.
        family: The architecture.
        base_name: Hub id or absolute folder that stock peft will load the base from.
        blocks: How many the base has.

    Raises:
        RecipeError: A target module that the architecture lacks, or more layers than the base has.
    """
    chosen = adapted_blocks(method, blocks=blocks)
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        base_model_name_or_path=base_name,
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=target_modules(method, family),
        # DistilBERT's head layers are plain Linear: without this a user's pattern could adapt and train them both.
        exclude_modules=list(family.head),
        modules_to_save=list(family.head),
        fan_in_fan_out=family.fan_in_fan_out,
        # Left out where all blocks are adapted, so that such an adapter's config stays as it was.
        **({} if method.layers == "all" else _layer_choice(chosen, family)),
    )


def _layer_choice(chosen: range, family: Family) -> dict[str, Any]:
    """Return peft's words for "these blocks": their numbers, and the name of the list that holds them."""
    return {"layers_to_transform": list(chosen), "layers_pattern": family.blocks.rpartition(".")[2]}
