"""A recipe and the lengths of its rows to the predicted peak, without torch: for planner and record alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from toolkit.config.schema import Recipe
from toolkit.data.pairs import TARGETS_AT_ONCE
from toolkit.memory.batches import (
    batch_kinds,
    evaluation_counts,
    largest_evaluation_batch,
    largest_micro_batches,
    largest_prefix_batch,
    training_counts,
    training_row_counts,
)
from toolkit.memory.estimate import Estimate, estimate
from toolkit.memory.framework import framework_bytes, onednn_bytes
from toolkit.memory.inputs import Inputs, Lengths
from toolkit.memory.microbatch import MicroBatch
from toolkit.memory.prefix_rule import (
    BATCH_TOKENS,
    CHUNK_TOKENS,
    can_stream,
    embedding_on_disk,
    frozen_in_low_precision,
    state_bytes,
    worth_keeping,
)
from toolkit.memory.shape import ModelShape, model_shape
from toolkit.training.gemm_choice import remembered_gemm

EVALUATION_BATCH = 32


def predict(recipe: Recipe, inputs: Inputs, *, device: str, found: int | None = None) -> Estimate:
    """Return the predicted peak of one process that trains a recipe.

    Args:
        recipe: All settings.
        inputs: Sizes of base and data.
        device: ``cpu`` or ``cuda``.
        found: Bytes that the process held before tokens and weights were there; None takes what is usual.
    """
    longest = recipe.model.max_length
    masked = inputs.base.family.tokenizer == "wordpiece"
    spoken = recipe.objective != "classification"
    share = (recipe.language_modeling.mask_probability if masked else 1.0) if spoken else 0.0
    vocabulary = int(inputs.base.config["vocab_size"])
    wanted = recipe.language_modeling.target_tokens if recipe.objective == "language_modeling" else None
    classes = min(wanted or vocabulary, vocabulary) if spoken else 0
    train, validation = (np.minimum(lengths, longest) for lengths in (inputs.train, inputs.validation))
    shape = model_shape(inputs.base.config, recipe, labels=inputs.labels)
    precision = recipe.training.precision
    low = device == "cuda" if precision == "auto" else precision != "fp32"
    gemm = recipe.training.gemm
    if gemm == "auto" and device == "cpu":
        # As a run will find it; before the first one of this machine it is a guess.
        gemm = remembered_gemm() or "default"
    prefix = _prefix(recipe, shape, train, device=device)
    framework = framework_bytes(recipe, device=device, found=found)
    pools = shape.objective == "classification" and shape.family.pools_one
    last_alone = pools and shape.frozen == shape.layers - 1
    # In float32 a last block alone is left to torch (``training.gemm.use_gemm``).
    fast = low or (gemm == "onednn" and not last_alone)
    if device == "cpu" and fast and shape.frozen < shape.layers:
        labels = inputs.train_labels
        framework += onednn_bytes(
            shape,
            trained=training_counts(train, recipe.training, labels=labels),
            evaluated=evaluation_counts(validation, batch_size=EVALUATION_BATCH),
            rows=training_row_counts(train, recipe.training, labels=labels) if pools else set(),
            alone=last_alone and bool(prefix),
            low_precision=low,
        )
    return estimate(
        shape,
        batches=largest_micro_batches(
            train,
            recipe.training,
            target_share=share,
            targets=inputs.train_targets,
            classes=classes,
            labels=inputs.train_labels,
        ),
        evaluation=[
            _in_pieces(batch, recipe)
            for batch in largest_evaluation_batch(
                validation,
                batch_size=EVALUATION_BATCH,
                target_share=share,
                targets=inputs.validation_targets,
                classes=classes,
            )
        ],
        training=recipe.training.model_copy(update={"gemm": gemm}),
        quantization=recipe.quantization,
        device=device,
        low_precision=low,
        kinds=batch_kinds(train, recipe.training, labels=inputs.train_labels),
        prefix=prefix,
        chunk_tokens=min(CHUNK_TOKENS, int(train.sum())),
        streamed=can_stream(recipe),
        embedding_on_disk=embedding_on_disk(recipe, device=device),
        low_frozen=frozen_in_low_precision(recipe, low_precision=low),
        framework=framework,
    )


def _in_pieces(batch: MicroBatch, recipe: Recipe) -> MicroBatch:
    """Return an evaluation's batch with as many predicted tokens as are held together."""
    if recipe.objective != "instruction":
        return batch
    return replace(batch, targets=min(batch.targets, TARGETS_AT_ONCE))


def _prefix(recipe: Recipe, shape: ModelShape, lengths: Lengths, *, device: str) -> list[MicroBatch]:
    """Return the largest pass over frozen blocks whose states are kept."""
    if not worth_keeping(recipe, blocks=shape.frozen, rows=len(lengths)):
        return []
    settings, pooled = recipe.training.prefix_cache, shape.frozen == shape.layers
    size = state_bytes(
        tokens=int(lengths.sum()), rows=len(lengths), width=shape.width, dtype=settings.dtype, pooled=pooled
    )
    if size > settings.max_gib * 2**30:
        return []
    return largest_prefix_batch(lengths, max_tokens=BATCH_TOKENS[device])
