"""What a classifier says of a text: one label, several, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import ProblemType
from toolkit.evaluation.decision import Decision


@dataclass(frozen=True)
class Prediction:
    """One label.

    Attributes:
        text: The text, as given.
        label: The likeliest label; of two labels with a tuned threshold, what that says.
        scores: Probability of every label, in id order; they add up to 1.
    """

    text: str
    label: str
    scores: dict[str, float]


@dataclass(frozen=True)
class LabelsPrediction:
    """Any number of labels.

    Attributes:
        text: The text, as given.
        labels: Those whose probability reaches their threshold, 0.5 unless it was tuned, in id order.
        scores: Probability of every label, each on its own, in id order.
    """

    text: str
    labels: list[str]
    scores: dict[str, float]


@dataclass(frozen=True)
class NumbersPrediction:
    """Numbers.

    Attributes:
        text: The text, as given.
        values: The number of every target, in id order.
    """

    text: str
    values: dict[str, float]


AnyPrediction = Prediction | LabelsPrediction | NumbersPrediction


def build_predictions(
    texts: Sequence[str],
    logits: NDArray[np.floating],
    *,
    problem_type: ProblemType,
    names: Sequence[str],
    decision: Decision,
) -> list[AnyPrediction]:
    """Return what the logits say of each text.

    Args:
        texts: N texts.
        logits: (N, C).
        problem_type: What the labels are.
        names: The C names in id order.
        decision: What was fitted on validation.
    """
    found = decision.probabilities(logits, problem_type=problem_type)
    scores = [dict(zip(names, row, strict=True)) for row in found.tolist()]
    if problem_type == "regression":
        return [NumbersPrediction(text, values) for text, values in zip(texts, scores, strict=True)]
    if problem_type == "multi_label_classification":
        given = [
            [name for name, there in zip(names, row, strict=True) if there]
            for row in decision.given(found, names=names)
        ]
        return [LabelsPrediction(*one) for one in zip(texts, given, scores, strict=True)]
    chosen = [names[index] for index in decision.chosen(found, names=names)]
    return [Prediction(*one) for one in zip(texts, chosen, scores, strict=True)]
