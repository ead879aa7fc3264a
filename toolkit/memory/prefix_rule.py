"""When the states of frozen blocks are kept, and how large they are; without torch, for the planner."""

from __future__ import annotations

from toolkit.config.schema import Recipe

BYTES = {"fp16": 2, "fp32": 4}
# Tokens of one forward pass over the frozen blocks: as fast as any on a CPU core (512: a twentieth slower), 25 MiB of
# activations at GPT-2's width.
BATCH_TOKENS = {"cpu": 1_024, "cuda": 16_384}
# What is computed, checked and continued at a time; the states of a chunk are in memory together.
CHUNK_TOKENS = 8_192


def worth_keeping(recipe: Recipe, *, blocks: int, rows: int) -> bool:
    """Return whether a run keeps the states of its frozen blocks, if there is room.

    States that are seen once cost no more than running the blocks in each step, and these can stay on disk.

    Args:
        recipe: It may switch the cache off; rows that are seen less than once are not kept, nor those that are seen
            once where the blocks have to be in memory.
        blocks: Frozen blocks.
        rows: Training rows.
    """
    training = recipe.training
    if not training.prefix_cache.enabled or blocks == 0:
        return False
    if recipe.method.name == "features":
        # The next fit on the same texts finds them.
        return True
    if recipe.method.name == "zero_shot":
        return False
    steps = (training.max_steps or 0) * training.batch_size * training.gradient_accumulation_steps
    seen = steps if training.epochs is None else training.epochs * rows
    return seen > rows or (seen == rows and can_stream(recipe))


def can_stream(recipe: Recipe) -> bool:
    """Return whether frozen weights may stay in the base's files: these hold the very weights that the run needs."""
    return recipe.quantization is None and not recipe.model.random_init


def embedding_on_disk(recipe: Recipe, *, device: str) -> bool:
    """Return whether a step reads the rows of the token embedding from the base's files.

    300 distinct tokens of GPT-2 take a millisecond from the page cache; a CUDA device would wait for them.
    """
    trains = recipe.method.name == "full" or recipe.objective != "classification"
    # A prefix stands in the stock forward, which looks its tokens up itself.
    looked_up = not trains and recipe.method.name != "prefix"
    return not recipe.model.random_init and device == "cpu" and looked_up


def frozen_in_low_precision(recipe: Recipe, *, low_precision: bool, processes: int = 1) -> bool:
    """Return whether frozen linear weights lie in memory in the dtype that autocast multiplies in (``models.frozen``).

    DoRA's norms and PiSSA's start read the weights themselves. A prefix stands in the stock forward. Nothing is frozen
    for good where everything trains in the end.
    """
    method = recipe.method
    reads = method.name == "lora" and method.variant in ("dora", "pissa")
    possible = can_stream(recipe) and recipe.objective == "classification" and processes == 1
    return low_precision and possible and not reads and method.name not in ("full", "gradual", "prefix")


def state_bytes(*, tokens: int, rows: int, width: int, dtype: str, pooled: bool) -> int:
    """Return the size of the states: one a token, or one a row if no block is left (``pooled``)."""
    return (rows if pooled else tokens) * width * BYTES[dtype]
