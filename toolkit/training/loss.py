"""The loss of a classified row: cross entropy, weighted by label, smoothed or focal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as functional

from toolkit.config.schema import LossSettings

IGNORED = -100


def class_weights(
    wanted: Literal["balanced"] | Sequence[float] | None, labels: torch.Tensor, *, classes: int
) -> torch.Tensor | None:
    """Return a weight (classes,) for each label, or None where all weigh 1.

    ``balanced`` is rows / (classes * rows of the label), as scikit-learn's ``compute_class_weight`` has it: every label
    then weighs the same in total, and a row 1 on average.

    Args:
        wanted: The recipe's ``training.loss.class_weights``.
        labels: (rows,) int64 of the training part.
        classes: How many labels there are.
    """
    if wanted is None:
        return None
    if wanted != "balanced":
        return torch.tensor(wanted, dtype=torch.float32)
    # A label without rows is never weighed.
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return len(labels) / (classes * counts.float())


def row_weight(labels: torch.Tensor, weights: torch.Tensor | None) -> float:
    """Return what the rows of a batch weigh together; those labelled -100 weigh nothing."""
    real = labels[labels != IGNORED]
    return float(len(real)) if weights is None else float(weights.to(real.device)[real].sum())


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, settings: LossSettings, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return the summed loss of a batch, a scalar; over ``row_weight`` it is the mean that torch's loss returns.

    Focal loss scales a row's cross entropy by (1 - p) ** gamma, p being the probability of its label (Lin et al. 2017,
    arXiv:1708.02002, equation 5).

    Args:
        logits: (B, classes) float32.
        labels: (B,) int64; rows with -100 carry no loss.
        settings: The recipe's ``training.loss``.
        weights: From ``class_weights``.
    """
    weights = None if weights is None else weights.to(logits.device)
    if settings.focal_gamma == 0:
        return functional.cross_entropy(
            logits,
            labels,
            weight=weights,
            label_smoothing=settings.label_smoothing,
            reduction="sum",
            ignore_index=IGNORED,
        )
    plain = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    # The probability of the label is exp(-loss); expm1 keeps 1 - p exact where the model is sure. At 0 a power below 1
    # has no slope, and nothing is left to learn.
    focal = (-torch.expm1(-plain)).clamp(min=1e-12) ** settings.focal_gamma * plain
    if weights is not None:
        focal = focal * weights[labels.clamp(min=0)]
    return focal.sum()
