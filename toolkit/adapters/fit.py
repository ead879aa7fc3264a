"""Refuses a method that a base cannot take, before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.adapters.freeze import trained_blocks
from toolkit.adapters.methods import adapted_blocks, target_modules
from toolkit.config.methods import (
    FeaturesMethod,
    FittedMethod,
    FreezingMethod,
    LayeredMethod,
    Method,
    PrefixMethod,
    TargetedMethod,
    ZeroShotMethod,
)
from toolkit.errors import Problem, RecipeError
from toolkit.families import Family


def check_method(
    method: Method, family: Family, *, config: Mapping[str, Any], max_length: int, labels: int = 2
) -> None:
    """Hold a method against a base.

    Args:
        method: The recipe's `method` section.
        family: The base's architecture.
        config: Content of the base's config.json.
        max_length: Tokens of the longest text.
        labels: How many the classifier tells apart.

    Raises:
        RecipeError: Targets or blocks that the base lacks, a prefix where none can stand or for which there is no room,
            more labels than a fitted head has room for.
    """
    blocks = config[family.layers_key]
    if isinstance(method, TargetedMethod):
        target_modules(method, family)
    if isinstance(method, LayeredMethod):
        adapted_blocks(method, blocks=blocks)
    if isinstance(method, FreezingMethod):
        trained_blocks(method, blocks=blocks)
    if isinstance(method, FeaturesMethod) and method.classifier == "random_forest":
        return
    if isinstance(method, FittedMethod) and family.own_head:
        wrong = f"{method.name} writes the architecture's own head"
        raise RecipeError(Problem("", "model.head", wrong, "model.head: null, or method head"))
    if isinstance(method, ZeroShotMethod) and not family.takes_cache:
        wrong = f"zero_shot asks a model that writes, and {family.model_type} fills gaps"
        raise RecipeError(Problem("", "method.name", wrong, "a GPT-2 base, or method features"))
    if isinstance(method, FeaturesMethod) and len(family.head) == 2 and 2 * labels > config[family.width_key]:
        # The rectifier between the head's layers is passed by two units a label.
        wrong = f"{labels} labels need {2 * labels} units of a head of {config[family.width_key]}"
        raise RecipeError(Problem("", "method.name", wrong, "method head, or features on a wider base"))
    if isinstance(method, PrefixMethod):
        _check_prefix(method, family, room=config[family.positions_key] - max_length)


def _check_prefix(method: PrefixMethod, family: Family, *, room: int) -> None:
    if not family.takes_cache:
        wrong = f"prefix tunes keys and values that stand before a text, and {family.model_type} takes none"
        raise RecipeError(Problem("", "method.name", wrong, "prefix on GPT-2; lora, ia3 or ln_tuning here"))
    if method.num_virtual_tokens > room:
        wrong = f"{method.num_virtual_tokens} tokens before texts of model.max_length leave the model's positions"
        raise RecipeError(Problem("", "method.num_virtual_tokens", wrong, f"at most {room}, or a smaller max_length"))
