"""Metrics where a text may have several labels, by scikit-learn's definitions; numpy alone, as in ``metrics``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from toolkit.evaluation.metrics import CALIBRATION_BINS, Floats, accuracy_interval, check_finite

Bits = NDArray[np.integer]


class LabelFigures(TypedDict):
    """Figures of one label; a ratio of nothing is 0.

    Attributes:
        average_precision: Area under precision against recall, over all thresholds.
    """

    precision: float
    recall: float
    f1: float
    average_precision: float
    support: int


class MultiLabelMetrics(TypedDict):
    """The full set, computed once at the end; a label is given from a probability of 0.5 on.

    Attributes:
        rows: Number of rows judged.
        loss: Mean binary cross entropy over rows and labels, in nats.
        accuracy: Share of rows whose labels are all right (subset accuracy), 0 to 1.
        f1_micro: F1 over all decisions together.
        f1_macro: Mean F1 over labels.
        hamming_loss: Share of decisions that are wrong.
        mean_average_precision: Mean over the labels that occur.
        ece: Expected calibration error of the decisions, 15 equal-width bins of probability.
        accuracy_interval: 95 % bootstrap interval of the accuracy, ``[low, high]``.
        per_label: Figures of every label.
    """

    rows: int
    loss: float
    accuracy: float
    f1_micro: float
    f1_macro: float
    hamming_loss: float
    mean_average_precision: float
    ece: float
    accuracy_interval: list[float]
    per_label: dict[str, LabelFigures]


def sigmoid(logits: Floats) -> NDArray[np.float64]:
    """Return the probability of every label on its own, (N, C), in double precision."""
    # Half the angle: nothing overflows at either end.
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64))))


def binary_cross_entropy(logits: Floats, labels: Bits) -> float:
    """Return the mean loss in nats over rows and labels, both (N, C)."""
    exact = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, exact) - labels * exact))


def validation_figures(logits: Floats, labels: Bits) -> dict[str, float]:
    """Return ``loss``, ``accuracy``, ``f1_macro``, ``f1_micro`` and ``mean_average_precision``.

    Args:
        logits: (N, C), finite.
        labels: (N, C) of 0 and 1.

    Raises:
        DivergedError: If a logit is not finite.
        ValueError: If the shapes do not fit, or there are no rows.
    """
    _check(logits, labels)
    given = sigmoid(logits) >= 0.5
    return {"loss": binary_cross_entropy(logits, labels), **decided(given, labels), **_ranked(logits, labels)}


def decided(given: NDArray[np.bool_], labels: Bits) -> dict[str, float]:
    """Return ``accuracy``, ``f1_macro`` and ``f1_micro`` of decisions (N, C)."""
    hits, asked, there = _sums(given, labels)
    return {
        "accuracy": float((given == labels).all(axis=1).mean()),
        "f1_macro": float(_ratio(2 * hits, asked + there).mean()),
        "f1_micro": float(_ratio(2 * hits.sum(keepdims=True), (asked + there).sum(keepdims=True))[0]),
    }


def multi_label_metrics(logits: Floats, labels: Bits, *, names: Sequence[str], seed: int = 0) -> MultiLabelMetrics:
    """Return every figure of a classifier on one part of the data.

    Args:
        logits: (N, C), finite.
        labels: (N, C) of 0 and 1.
        names: The C label names in id order.
        seed: Seed of the bootstrap.

    Raises:
        DivergedError: If a logit is not finite.
        ValueError: If the shapes do not fit, or there are no rows.
    """
    cheap = validation_figures(logits, labels)
    given = sigmoid(logits) >= 0.5
    right = int((given == labels).all(axis=1).sum())
    return {
        "rows": len(labels),
        "loss": cheap["loss"],
        "accuracy": cheap["accuracy"],
        "f1_micro": cheap["f1_micro"],
        "f1_macro": cheap["f1_macro"],
        "hamming_loss": float((given != labels).mean()),
        "mean_average_precision": cheap["mean_average_precision"],
        "ece": decision_calibration(sigmoid(logits), labels),
        "accuracy_interval": accuracy_interval(right, len(labels), seed=seed),
        "per_label": per_label(given, logits, labels, names=names),
    }


def per_label(
    given: NDArray[np.bool_], scores: Floats, labels: Bits, *, names: Sequence[str]
) -> dict[str, LabelFigures]:
    """Return the figures of every label, from decisions, scores and truth, (N, C) each."""
    hits, asked, there = _sums(given, labels)
    precision, recall, f1 = _ratio(hits, asked), _ratio(hits, there), _ratio(2 * hits, asked + there)
    return {
        name: {
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "average_precision": average_precision(scores[:, i], labels[:, i]),
            "support": int(there[i]),
        }
        for i, name in enumerate(names)
    }


def average_precision(scores: NDArray[np.floating], labels: Bits) -> float:
    """Return the sum of precision over the gains of recall, from the highest score down; 0 without positives.

    Args:
        scores: (N,), higher for likelier.
        labels: (N,) of 0 and 1.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order], dtype=np.int64)
    # Rows of equal score are found together: only where the next score is lower is there a threshold.
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = hits[ends]
    if not found[-1]:
        return 0.0
    gains = np.diff(found, prepend=0) / found[-1]
    return float(np.sum(gains * found / (ends + 1)))


def decision_calibration(probabilities: Floats, labels: Bits) -> float:
    """Return the mean gap between probability and share of true labels over bins of probability, (N, C) both."""
    flat, truth = probabilities.ravel(), labels.ravel()
    bins = np.minimum((flat * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=truth - flat, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(flat))


def _ranked(logits: Floats, labels: Bits) -> dict[str, float]:
    there = np.flatnonzero(labels.any(axis=0))
    found = [average_precision(logits[:, index], labels[:, index]) for index in there]
    return {"mean_average_precision": float(np.mean(found)) if found else 0.0}


def _sums(given: NDArray[np.bool_], labels: Bits) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    truth = labels.astype(bool)
    return (given & truth).sum(axis=0), given.sum(axis=0), truth.sum(axis=0)


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _check(logits: Floats, labels: Bits) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} are not both (N, C)")
    if not len(labels):
        raise ValueError("no rows to judge")
    check_finite(logits)
