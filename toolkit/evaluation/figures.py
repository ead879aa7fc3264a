"""The figures of any kind of labels: one label, several, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import ProblemType
from toolkit.evaluation import metrics, multi_label, regression
from toolkit.evaluation.decision import PLAIN, Decision

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
    logits: Floats,
    targets: NDArray[Any],
    *,
    problem_type: ProblemType,
    names: Sequence[str],
    decision: Decision = PLAIN,
) -> dict[str, Any]:
    """Return every figure on one part of the data; what a decision changes stands beside the plain figures.

    Args:
        logits: (N, C), finite.
        targets: As ``data.targets`` has them for this kind.
        problem_type: What the targets are.
        names: The C names in id order.
        decision: What was fitted on validation.

    Raises:
        DivergedError: If a logit is not finite.
        ValueError: If the shapes do not fit, or there are no rows.
    """
    if problem_type == "regression":
        return dict(regression.regression_metrics(logits, targets, names=names))
    beside = decision.figures(logits, targets, problem_type=problem_type, names=names)
    if problem_type == "multi_label_classification":
        return {**multi_label.multi_label_metrics(logits, targets, names=names), **beside}
    return {**metrics.classification_metrics(logits, targets, names=names), **beside}
