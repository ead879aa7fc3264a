"""The loss of a row: cross entropy of one label or of several, weighted, smoothed or focal; squared error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as functional

from toolkit.config.schema import LossSettings, ProblemType

IGNORED = -100


def class_weights(
    wanted: Literal["balanced"] | Sequence[float] | None, labels: torch.Tensor, *, classes: int
) -> torch.Tensor | None:
    """Return a weight (classes,) for each label, or None where all weigh 1.

    ``balanced`` is rows / (classes * rows of the label), as scikit-learn's ``compute_class_weight`` has it: every label
    then weighs the same in total, and a row 1 on average. Where a row may have several labels, the weight is that of
    the rows with the label, and ``balanced`` is rows without / rows with it: both sides then weigh the same.

    Args:
        wanted: The recipe's ``training.loss.class_weights``.
        labels: (rows,) int64 of the training part, or (rows, classes) of 0 and 1.
        classes: How many labels there are.
    """
    if wanted is None:
        return None
    if wanted != "balanced":
        return torch.tensor(wanted, dtype=torch.float32)
    if labels.ndim == 2:
        having = labels.sum(dim=0, dtype=torch.int64)
        # Neither a label without rows nor one that all rows have has two sides to balance.
        sides = torch.where((having > 0) & (having < len(labels)), (len(labels) - having) / having.clamp(min=1), 1.0)
        return sides.float()
    # A label without rows is never weighed.
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return len(labels) / (classes * counts.float())


def row_weight(labels: torch.Tensor, weights: torch.Tensor | None) -> float:
    """Return what the rows of a batch weigh together; those of ``no_labels`` weigh nothing."""
    if labels.ndim == 2:
        return float(len(labels) - labels[:, 0].isnan().sum())
    real = labels[labels != IGNORED]
    return float(len(real)) if weights is None else float(weights.to(real.device)[real].sum())


def no_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return labels of the same shape that carry neither loss nor weight: -100, or no number."""
    return torch.full_like(labels, torch.nan if labels.is_floating_point() else IGNORED)


def target_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    problem_type: ProblemType,
    settings: LossSettings,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """Return the summed loss of a batch, a scalar; over ``row_weight`` it is the mean that torch's loss returns.

    Args:
        logits: (B, classes) float32.
        labels: (B,) int64 ids, or (B, classes) float32.
        problem_type: What the labels are.
        settings: The recipe's ``training.loss``.
        weights: From ``class_weights``.
    """
    if problem_type == "single_label_classification":
        return classification_loss(logits, labels, settings=settings, weights=weights)
    real = ~labels[:, 0].isnan()
    if problem_type == "regression":
        return (logits[real] - labels[real]).square().mean(dim=1).sum()
    return multi_label_loss(logits[real], labels[real], settings=settings, weights=weights)


def multi_label_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, settings: LossSettings, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return the binary cross entropy of a batch, averaged over labels and summed over rows.

    Smoothing moves each target towards 1/2. Focal loss scales a label's cross entropy by (1 - p) ** gamma, p being the
    probability of what is true of it (Lin et al. 2017, equation 4).

    Args:
        logits: (B, classes) float32.
        labels: (B, classes) float32 of 0 and 1.
        settings: The recipe's ``training.loss``.
        weights: From ``class_weights``; of the rows that have the label.
    """
    weights = None if weights is None else weights.to(logits.device)
    targets = labels * (1 - settings.label_smoothing) + settings.label_smoothing / 2
    losses = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
    if settings.focal_gamma > 0:
        wrong = torch.sigmoid(torch.where(labels > 0.5, -logits, logits))
        losses = losses * wrong.clamp(min=1e-12) ** settings.focal_gamma
    return losses.mean(dim=1).sum()


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
