"""The errors worth reading: wrong predictions the model was surest of, and numbers furthest off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import ProblemType
from toolkit.evaluation.decision import PLAIN, Decision


@dataclass(frozen=True)
class Mistake:
    """One wrong prediction.

    Attributes:
        row: Index into the rows that were judged.
        label: The true label, labels or numbers, in words.
        predicted: The same of the prediction.
        probability: Probability the model gave its (surest) wrong prediction, 0 to 1; None for numbers.
    """

    row: int
    label: str
    predicted: str
    probability: float | None


def worst_mistakes(
    logits: NDArray[np.floating],
    targets: NDArray[Any],
    *,
    problem_type: ProblemType,
    names: Sequence[str],
    decision: Decision = PLAIN,
    limit: int = 20,
) -> list[Mistake]:
    """Return the wrong predictions with the highest probability, surest first, or the numbers furthest off.

    Args:
        logits: (N, C), finite.
        targets: As ``data.targets`` has them for this kind.
        problem_type: What the targets are.
        names: The C names in id order.
        decision: What was fitted on validation.
        limit: At most this many.
    """
    if problem_type == "regression":
        return _furthest(logits, targets, names=names, limit=limit)
    if problem_type == "multi_label_classification":
        return _confident_sets(logits, targets, names=names, decision=decision, limit=limit)
    return confident_mistakes(logits, targets, names=names, decision=decision, limit=limit)


def confident_mistakes(
    logits: NDArray[np.floating],
    labels: NDArray[np.integer],
    *,
    names: Sequence[str],
    decision: Decision = PLAIN,
    limit: int = 20,
) -> list[Mistake]:
    """Return the wrong predictions with the highest probability, surest first.

    Args:
        logits: (N, C).
        labels: (N,), ids in [0, C).
        names: The C label names.
        decision: What was fitted on validation.
        limit: At most this many.
    """
    probabilities = decision.probabilities(logits, problem_type="single_label_classification")
    predicted = decision.chosen(probabilities, names=names)
    confidence = probabilities[np.arange(len(predicted)), predicted]
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-confidence[wrong], kind="stable")][:limit]
    return [Mistake(int(i), names[labels[i]], names[predicted[i]], float(confidence[i])) for i in order]


def _confident_sets(
    logits: NDArray[np.floating],
    labels: NDArray[np.integer],
    *,
    names: Sequence[str],
    decision: Decision,
    limit: int,
) -> list[Mistake]:
    probabilities = decision.probabilities(logits, problem_type="multi_label_classification")
    truth, given = labels.astype(bool), decision.given(probabilities, names=names)
    # How sure each decision was, for or against its label; right ones do not count.
    sure = np.where(given == truth, 0.0, np.where(given, probabilities, 1 - probabilities)).max(axis=1)
    wrong = np.flatnonzero((given != truth).any(axis=1))
    order = wrong[np.argsort(-sure[wrong], kind="stable")][:limit]

    def spelt(row: NDArray[np.bool_]) -> str:
        return ", ".join(name for name, there in zip(names, row, strict=True) if there) or "none"

    return [Mistake(int(i), spelt(truth[i]), spelt(given[i]), float(sure[i])) for i in order]


def _furthest(
    values: NDArray[np.floating], targets: NDArray[np.floating], *, names: Sequence[str], limit: int
) -> list[Mistake]:
    errors = np.abs(values - targets).mean(axis=1)
    order = np.argsort(-errors, kind="stable")[:limit]

    def spelt(row: NDArray[np.floating]) -> str:
        if len(names) == 1:
            return f"{row[0]:.4g}"
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(names, row, strict=True))

    return [Mistake(int(i), spelt(targets[i]), spelt(values[i]), None) for i in order if errors[i] > 0]
