"""What a classifier says of a text: one label, several, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import ProblemType
from toolkit.evaluation.figures import probabilities


@dataclass(frozen=True)
class Prediction:
    """One label.

    Attributes:
        text: The text, as given.
        label: The likeliest label.
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
        labels: Those whose probability is 0.5 or more, in id order.
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
    texts: Sequence[str], logits: NDArray[np.floating], *, problem_type: ProblemType, names: Sequence[str]
) -> list[AnyPrediction]:
    """Return what the logits say of each text.

    Args:
        texts: N texts.
        logits: (N, C).
        problem_type: What the labels are.
        names: The C names in id order.
    """
    found = probabilities(logits, problem_type=problem_type)
    return [_build(text, row, problem_type, names) for text, row in zip(texts, found, strict=True)]


def _build(text: str, row: NDArray[np.float64], problem_type: ProblemType, names: Sequence[str]) -> AnyPrediction:
    scores = {name: float(value) for name, value in zip(names, row, strict=True)}
    if problem_type == "regression":
        return NumbersPrediction(text=text, values=scores)
    if problem_type == "multi_label_classification":
        return LabelsPrediction(text=text, labels=[name for name, p in scores.items() if p >= 0.5], scores=scores)
    return Prediction(text=text, label=names[int(row.argmax())], scores=scores)
