"""What a run does when a step does not fit: without oneDNN's kernels, in smaller pieces, then with recomputation."""

from __future__ import annotations

import numpy as np
from torch import nn

from toolkit.config.schema import TrainingSettings
from toolkit.errors import OutOfMemoryError
from toolkit.models.forward import checkpoint_activations, unwrapped
from toolkit.training.gemm import use_gemm
from toolkit.training.plan import Rows
from toolkit.training.state import Progress


def split_rows(micro_batches: list[Rows], pieces: int) -> list[Rows]:
    """Return micro-batches cut into ``pieces`` of about equal size; the optimizer step sees the same rows."""
    if pieces == 1:
        return micro_batches
    return [part for rows in micro_batches for part in np.array_split(rows, min(pieces, max(len(rows), 1)))]


def go_smaller(progress: Progress, model: nn.Module, training: TrainingSettings, *, rows: int) -> bool:
    """Change what the next attempt of a step needs; return whether there is anything left to change.

    Args:
        progress: Its ``without_onednn``, ``pieces`` and ``recomputing`` are changed.
        model: Multiplies by torch's own library from the first time on; checkpoints its activations, once
            micro-batches are single rows.
        training: Whether it does so already.
        rows: Of the largest micro-batch as the recipe wants it.
    """
    if not progress.without_onednn and multiplies_by_onednn(model, training):
        # It wants memory for a kernel of every size that it meets: smaller pieces alone may never fit.
        progress.without_onednn = True
        use_gemm(model, "default")
        return True
    if progress.pieces < rows:
        progress.pieces = min(2 * progress.pieces, rows)
        return True
    # Recomputed blocks would lose a prefix, which is handed to them as a cache.
    if training.gradient_checkpointing is True or progress.recomputing or hasattr(model, "prompt_encoder"):
        return False
    progress.recomputing = True
    checkpoint_activations(model)
    return True


def multiplies_by_onednn(model: nn.Module, training: TrainingSettings) -> bool:
    """Return whether a model's fp32 products could be made without oneDNN; those of bf16 know no other library."""
    return getattr(unwrapped(model), "onednn", False) is True and training.precision in ("auto", "fp32")


def go_on_smaller(progress: Progress, model: nn.Module) -> None:
    """Change a model that was built anew as ``go_smaller`` changed the one of the run before."""
    if progress.without_onednn:
        use_gemm(model, "default")
    if progress.recomputing:
        checkpoint_activations(model)


def recipe_lines(training: TrainingSettings, progress: Progress) -> list[str]:
    """Return the settings that would have done from the start what shortage made the run do."""
    lines = ["training.gemm=default"] if progress.without_onednn else []
    if progress.pieces > 1:
        by_tokens = training.max_tokens_per_batch
        name, size = ("batch_size", training.batch_size) if by_tokens is None else ("max_tokens_per_batch", by_tokens)
        smaller = -(-size // progress.pieces)
        steps = training.gradient_accumulation_steps * -(-size // smaller)
        lines += [f"training.{name}={smaller}", f"training.gradient_accumulation_steps={steps}"]
    return [*lines, "training.gradient_checkpointing=true"] if progress.recomputing else lines


def describe(training: TrainingSettings, progress: Progress) -> str:
    """Return the line that is printed when a step is taken again."""
    lines = " ".join(recipe_lines(training, progress))
    return f"warning: step {progress.step + 1} did not fit into memory; it is taken again as if with {lines}"


def advice(training: TrainingSettings, progress: Progress, last_good: str) -> str:
    """Return the line of a step that cannot be taken again, which names the settings to change."""
    smaller = training.batch_size > 1 or training.max_tokens_per_batch is not None
    if training.optimizer_in_backward:
        # It takes no second micro-step: a smaller batch is another training.
        recomputes = training.gradient_checkpointing is True
        saves = "a smaller model.max_length" if recomputes else "training.gradient_checkpointing=true"
        return f"out of memory at step {progress.step + 1} (try {saves} or a smaller batch; {last_good})"
    lines = recipe_lines(training, Progress(pieces=2) if smaller else Progress(recomputing=True))
    keeps = " keeps the effective batch" if smaller else ""
    return f"out of memory at step {progress.step + 1} (try {' '.join(lines)}{keeps}; {last_good})"


def nothing_left(progress: Progress, last_good: str) -> OutOfMemoryError:
    """Return the error of a step that does not fit in its smallest form."""
    recomputed = " and with activations recomputed" if progress.recomputing else ""
    return OutOfMemoryError(
        f"out of memory at step {progress.step + 1}, one row at a time{recomputed} "
        f"(try a smaller model.max_length, method.name=lora or quantization.bits=4; {last_good})"
    )
