"""The figures of any kind of labels: one label, several, or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import ProblemType
from toolkit.evaluation import metrics, multi_label, regression

Floats = NDArray[np.floating]


def validation_figures(logits: Floats, targets: NDArray[Any], *, problem_type: ProblemType) -> dict[str, float]:
    """Return what is worth computing at every evaluation during training; ``loss`` is always among it.

    Args:
        logits: (N, C), finite.
        targets: As ``data.targets`` has them for this kind.
        problem_type: What the targets are.

    Raises:
        DivergedError: If a logit is not finite.
        ValueError: If the shapes do not fit, or there are no rows.
    """
    if problem_type == "regression":
        return regression.validation_figures(logits, targets)
    if problem_type == "multi_label_classification":
        return multi_label.validation_figures(logits, targets)
    return metrics.validation_metrics(logits, targets)


def all_figures(
    logits: Floats, targets: NDArray[Any], *, problem_type: ProblemType, names: Sequence[str]
) -> Mapping[str, Any]:
    """Return every figure on one part of the data.

    Args:
        logits: (N, C), finite.
        targets: As ``data.targets`` has them for this kind.
        problem_type: What the targets are.
        names: The C names in id order.

    Raises:
        DivergedError: If a logit is not finite.
        ValueError: If the shapes do not fit, or there are no rows.
    """
    if problem_type == "regression":
        return regression.regression_metrics(logits, targets, names=names)
    if problem_type == "multi_label_classification":
        return multi_label.multi_label_metrics(logits, targets, names=names)
    return metrics.classification_metrics(logits, targets, names=names)


def probabilities(logits: Floats, *, problem_type: ProblemType) -> NDArray[np.float64]:
    """Return (N, C): a softmax over one label's rivals, a sigmoid of each label, or the numbers themselves."""
    if problem_type == "regression":
        return logits.astype(np.float64)
    return multi_label.sigmoid(logits) if problem_type == "multi_label_classification" else metrics.softmax(logits)
