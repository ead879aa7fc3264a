"""The errors worth reading: wrong predictions the model was surest of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.evaluation.metrics import softmax


@dataclass(frozen=True)
class Mistake:
    """One wrong prediction.

    Attributes:
        row: Index into the rows that were judged.
        label: Id of the true label.
        predicted: Id of the predicted label.
        probability: Probability the model gave its wrong prediction, 0 to 1.
    """

    row: int
    label: int
    predicted: int
    probability: float


def confident_mistakes(logits: NDArray[np.floating], labels: NDArray[np.integer], *, limit: int = 20) -> list[Mistake]:
    """Return the wrong predictions with the highest probability, surest first.

    Args:
        logits: (N, C).
        labels: (N,), ids in [0, C).
        limit: At most this many.
    """
    probabilities = softmax(logits)
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-confidence[wrong], kind="stable")][:limit]
    return [Mistake(int(i), int(labels[i]), int(predicted[i]), float(confidence[i])) for i in order]
