"""Metrics of a classifier, computed from its logits; numpy alone, so they are cheap inside training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DivergedError

BOOTSTRAP_SAMPLES = 2000
CALIBRATION_BINS = 15

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


class LabelMetrics(TypedDict):
    """Figures of one label; a ratio of nothing is 0."""

    precision: float
    recall: float
    f1: float
    support: int


class ClassificationMetrics(TypedDict):
    """The full set, computed once at the end.

    Attributes:
        rows: Number of rows judged.
        loss: Mean cross-entropy in nats.
        accuracy: Share of rows classified right, 0 to 1.
        f1_macro: Mean F1 over the labels that occur in truth or prediction.
        mcc: Matthews correlation coefficient over all labels (Gorodkin 2004), -1 to 1.
        ece: Expected calibration error, 15 equal-width bins (Guo et al. 2017, arXiv:1706.04599).
        accuracy_interval: 95 % bootstrap interval of the accuracy, ``[low, high]``.
        per_label: Precision, recall, F1 and support of every label.
        confusion: Rows are true labels, columns predicted ones.
    """

    rows: int
    loss: float
    accuracy: float
    f1_macro: float
    mcc: float
    ece: float
    accuracy_interval: list[float]
    per_label: dict[str, LabelMetrics]
    confusion: list[list[int]]


def validation_metrics(logits: Floats, labels: Ints) -> dict[str, float]:
    """Return ``loss``, ``accuracy`` and ``f1_macro``: what is worth computing at every evaluation during training.

    Args:
        logits: (N, C), finite.
        labels: (N,), ids in [0, C).

    Raises:
        DivergedError: If a logit is not finite.
        ValueError: If the shapes or ids do not fit, or there are no rows.
    """
    _check(logits, labels)
    confusion = confusion_matrix(logits, labels)
    return {
        "loss": cross_entropy(logits, labels),
        "accuracy": float(np.trace(confusion) / len(labels)),
        "f1_macro": _f1_macro(confusion),
    }


def classification_metrics(
    logits: Floats, labels: Ints, *, names: Sequence[str], seed: int = 0
) -> ClassificationMetrics:
    """Return every figure of a classifier on one part of the data.

    Args:
        logits: (N, C), finite.
        labels: (N,), ids in [0, C).
        names: The C label names in id order.
        seed: Seed of the bootstrap.

    Raises:
        DivergedError: If a logit is not finite.
        ValueError: If the shapes or ids do not fit, or there are no rows.
    """
    cheap = validation_metrics(logits, labels)
    if len(names) != logits.shape[1]:
        raise ValueError(f"{len(names)} label names for {logits.shape[1]} logits")
    confusion = confusion_matrix(logits, labels)
    correct = int(np.trace(confusion))
    return {
        "rows": len(labels),
        "loss": cheap["loss"],
        "accuracy": cheap["accuracy"],
        "f1_macro": cheap["f1_macro"],
        "mcc": matthews_correlation(confusion),
        "ece": calibration_error(logits, labels),
        "accuracy_interval": accuracy_interval(correct, len(labels), seed=seed),
        "per_label": _per_label(confusion, names),
        "confusion": confusion.tolist(),
    }


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Return probabilities (N, C) of logits (N, C), in double precision."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    odds = np.exp(shifted)
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def cross_entropy(logits: Floats, labels: Ints) -> float:
    """Return the mean negative log-likelihood in nats of labels (N,) under logits (N, C)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(log_total - shifted[np.arange(len(labels)), labels]))


def confusion_matrix(logits: Floats, labels: Ints) -> NDArray[np.int64]:
    """Return counts (C, C): rows are true labels, columns the labels with the highest logit."""
    return _confusion(logits.argmax(axis=1), labels, classes=logits.shape[1])


def confusion_figures(predicted: Ints, labels: Ints, *, names: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, macro F1, MCC, figures of every label and confusion matrix of decisions already made.

    Args:
        predicted: (N,), ids in [0, C).
        labels: (N,), ids in [0, C).
        names: The C label names in id order.
    """
    confusion = _confusion(predicted, labels, classes=len(names))
    return {
        "accuracy": float(np.trace(confusion) / len(labels)),
        "f1_macro": _f1_macro(confusion),
        "mcc": matthews_correlation(confusion),
        "per_label": _per_label(confusion, names),
        "confusion": confusion.tolist(),
    }


def _confusion(predicted: Ints, labels: Ints, *, classes: int) -> NDArray[np.int64]:
    cells = labels.astype(np.int64) * classes + predicted
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def matthews_correlation(confusion: NDArray[np.int64]) -> float:
    """Return the multi-class Matthews correlation; 0 where it is undefined (one label only)."""
    counts = confusion.astype(np.float64)
    true, predicted, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    covariance = np.trace(counts) * total - true @ predicted
    spread = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def calibration_error(logits: Floats, labels: Ints) -> float:
    """Return the mean gap between confidence and accuracy over equal-width bins of confidence."""
    probabilities = softmax(logits)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def accuracy_interval(correct: int, rows: int, *, seed: int = 0) -> list[float]:
    """Return the 95 % percentile bootstrap interval of an accuracy.

    Resampling N rows of which a share p is right draws Binomial(N, p) right ones, so the bootstrap needs no loop.
    """
    # Resampling has no spread where every row is right (or wrong); the exact one-sided bound does.
    exact = 0.025 ** (1 / rows)
    if correct == rows:
        return [exact, 1.0]
    if correct == 0:
        return [0.0, 1.0 - exact]
    draws = np.random.default_rng(seed).binomial(rows, correct / rows, size=BOOTSTRAP_SAMPLES) / rows
    low, high = np.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)]


def _check(logits: Floats, labels: Ints) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} are not (N, C) and (N,)")
    if not len(labels):
        raise ValueError("no rows to judge")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"label ids {labels.min()}..{labels.max()} outside [0, {logits.shape[1]})")
    check_finite(logits)


def check_finite(logits: Floats) -> None:
    """Raise DivergedError where a logit of (N, C) is not finite."""
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise DivergedError(f"{len(bad)} of {len(logits)} rows have a logit that is not finite, row {bad[0]} first")


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _f1(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    return _ratio(2 * np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1))


def _f1_macro(confusion: NDArray[np.int64]) -> float:
    # A label that neither occurs nor is predicted has no F1; scikit-learn leaves it out of the mean too.
    seen = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    return float(_f1(confusion)[seen].mean())


def _per_label(confusion: NDArray[np.int64], names: Sequence[str]) -> dict[str, LabelMetrics]:
    hits, support = np.diag(confusion), confusion.sum(axis=1)
    precision, recall = _ratio(hits, confusion.sum(axis=0)), _ratio(hits, support)
    f1 = _f1(confusion)
    return {
        name: {
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "support": int(support[i]),
        }
        for i, name in enumerate(names)
    }
