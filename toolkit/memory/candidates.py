"""Variants of a recipe that need less memory, and what they cost: time, arithmetic, or another result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from toolkit.config.methods import HeadMethod, LastNMethod, LoraMethod, Method, leaves_adapter
from toolkit.config.rules import broken_rules
from toolkit.config.schema import PrefixCacheSettings, QuantizationSettings, Recipe

# A micro-step costs as much as this many tokens more than it has. CPU: at GPT-2's width a token of 1 x 32 took x2.4
# one of 8 x 32, one of 8 short texts x1.13 that of 32. CUDA: small models are bound by launches; a guess, not measured.
OVERHEAD_TOKENS = {"cpu": 50, "cuda": 2_000}
# Measured on one CPU core at GPT-2's width; checkpointing on the whole model.
SLOWER_CHECKPOINTED = 1.30
# Of seven recipes, two runs each: 0.94 to 1.69, median 1.14 (benchmarks/allocator.py).
SLOWER_COMPACT = 1.15
SLOWER_BITS = {None: 1.0, 8: 1.3, 4: 1.6}
# bitsandbytes' 8-bit AdamW when every weight trains: a step of 256 tokens took x3.2 on a CPU core (CUDA: a guess).
SLOWER_OPTIMIZER = {"cpu": 3.2, "cuda": 1.1}


def with_training(recipe: Recipe, **settings: Any) -> Recipe:
    """Return the recipe with other training settings."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=settings)})


def candidates(recipe: Recipe, *, blocks: int, device: str) -> list[Recipe]:
    """Return the recipe's variants of the same effective batch.

    Args:
        recipe: As it was written.
        blocks: Of its base; none, all, or so many quarters of them are recomputed.
        device: ``cpu`` or ``cuda``; on CUDA activations may leave it.
    """
    training = recipe.training
    effective = training.batch_size * training.gradient_accumulation_steps
    sizes = [size for size in range(1, effective + 1) if effective % size == 0]
    if training.max_tokens_per_batch is not None:
        # A smaller token budget would be other batches, not the same ones in parts.
        sizes = [training.batch_size]
    optimizers = ["adamw", "adamw_8bit"] if training.optimizer == "adamw" else [training.optimizer]
    found = []
    quarters = sorted({quarter * blocks // 4 for quarter in (1, 2, 3)} - {0})
    offloads = (False, True) if device == "cuda" else (training.activation_offload,)
    allocators = sorted({training.allocator, "compact"} if device == "cpu" else {training.allocator})
    caches = _prefix_caches(recipe)
    for size, checkpointing, offload, optimizer, quantization, cache, allocator in itertools.product(
        sizes, (False, *quarters, True), offloads, optimizers, _quantizations(recipe), caches, allocators
    ):
        changed = with_training(
            recipe,
            batch_size=size,
            gradient_accumulation_steps=effective // size,
            gradient_checkpointing=checkpointing,
            activation_offload=offload,
            optimizer=optimizer,
            prefix_cache=cache,
            allocator=allocator,
        ).model_copy(update={"quantization": quantization})
        # Where auto is compact, saying so changes nothing.
        same = allocator != training.allocator == "auto" and with_training(changed, allocator="auto").training.compact
        if not same and not broken_rules(changed):
            found.append(changed)
    return found


def losses(recipe: Recipe, candidate: Recipe) -> int:
    """Return how many of a candidate's changes alter the arithmetic beyond rounding."""
    optimizer = candidate.training.optimizer != recipe.training.optimizer
    cached = candidate.training.prefix_cache != recipe.training.prefix_cache
    return optimizer + cached + (candidate.quantization != recipe.quantization)


def _prefix_caches(recipe: Recipe) -> list[PrefixCacheSettings]:
    """Return the recipe's cache, and where it is off and blocks are frozen, the same switched on."""
    current = recipe.training.prefix_cache
    freezes = recipe.method.name in ("head", "last_n") or (
        isinstance(recipe.method, LoraMethod) and recipe.method.layers != "all"
    )
    return [current, current.model_copy(update={"enabled": True})] if freezes and not current.enabled else [current]


def _quantizations(recipe: Recipe) -> list[QuantizationSettings | None]:
    current = recipe.quantization
    allowed = leaves_adapter(recipe.method) and not recipe.model.random_init
    found: list[QuantizationSettings | None] = [current]
    for bits in (8, 4) if allowed else ():
        if bits < (32 if current is None else current.bits):
            # The settings are strict about their literals.
            found.append(QuantizationSettings.model_validate({"bits": bits}))
    return found


def slowness(recipe: Recipe, *, mean_length: float, trained_share: float, blocks: int, device: str) -> float:
    """Return the estimated time of a token, 1 for one in an endless micro-batch of a plain recipe.

    Args:
        recipe: Its training and quantisation sections count, but for activation_offload, which was not measured.
        mean_length: Tokens of a text.
        trained_share: Trained elements over all.
        blocks: Of its base.
        device: ``cpu`` or ``cuda``.
    """
    training = recipe.training
    factor = 1 + OVERHEAD_TOKENS[device] / (training.batch_size * max(mean_length, 1.0))
    factor *= 1 + (SLOWER_CHECKPOINTED - 1) * training.recomputed_blocks(blocks) / blocks
    if device == "cpu" and training.compact:
        factor *= SLOWER_COMPACT
    factor *= 1 + (SLOWER_OPTIMIZER[device] - 1) * trained_share * ("8bit" in training.optimizer)
    return factor * SLOWER_BITS[recipe.quantization.bits if recipe.quantization else None]


def alternatives(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield other methods and shorter texts: what changes the result, and so is only advised."""
    methods: list[tuple[str, Method]] = [
        ("method.name=lora", LoraMethod()),
        ("method.name=last_n method.n=1", LastNMethod(name="last_n", n=1)),
        ("method.name=head", HeadMethod(name="head")),
    ]
    order = ["full", "lora", "last_n", "head"]
    # Other methods stand where they need as much memory.
    like = {"gradual": "full", "head": "head", "last_n": "last_n", "full": "full"}.get(recipe.method.name, "lora")
    for text, method in methods:
        smaller = order.index(method.name) > order.index(like)
        other = recipe.model_copy(update={"method": method})
        if smaller and (method.name == "lora" or recipe.quantization is None) and not broken_rules(other):
            yield text, other
    length = recipe.model.max_length // 2
    while length >= 16:
        model = recipe.model.model_copy(update={"max_length": length})
        yield f"model.max_length={length}", recipe.model_copy(update={"model": model})
        length //= 2
