"""Every figure against scikit-learn or torch, and the edges they leave open."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from toolkit.errors import DivergedError
from toolkit.evaluation.metrics import (
    accuracy_interval,
    calibration_error,
    classification_metrics,
    softmax,
    validation_metrics,
)


def sample(*, rows: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(0, 2, (rows, classes)).astype(np.float32)
    logits[np.arange(rows), labels] += 1.5
    return logits, labels


@pytest.mark.parametrize(("rows", "classes", "seed"), [(500, 2, 0), (333, 6, 1), (7, 3, 2), (1, 2, 3)])
def test_figures_equal_scikit_learn(rows: int, classes: int, seed: int) -> None:
    logits, labels = sample(rows=rows, classes=classes, seed=seed)
    names = [f"label {i}" for i in range(classes)]
    found = classification_metrics(logits, labels, names=names)
    predicted = logits.argmax(axis=1)
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, predicted, labels=range(classes), zero_division=0
    )
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(labels, predicted))
    assert found["f1_macro"] == pytest.approx(reference.f1_score(labels, predicted, average="macro", zero_division=0))
    if rows > 1:
        assert found["mcc"] == pytest.approx(reference.matthews_corrcoef(labels, predicted))
    assert found["confusion"] == reference.confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    for i, name in enumerate(names):
        row = found["per_label"][name]
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx([precision[i], recall[i], f1[i]])
        assert row["support"] == support[i]


def test_loss_equals_torch() -> None:
    logits, labels = sample(rows=200, classes=4, seed=5)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(labels)).item()
    assert validation_metrics(logits, labels)["loss"] == pytest.approx(expected, rel=1e-12)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, -1e4], [0.0, 2e4]], dtype=np.float32)
    found = validation_metrics(logits, np.array([0, 0]))
    assert found["loss"] == pytest.approx(1e4)
    assert np.isfinite(softmax(logits)).all()


def test_cheap_figures_are_the_full_ones() -> None:
    logits, labels = sample(rows=90, classes=3, seed=8)
    full = classification_metrics(logits, labels, names=["a", "b", "c"])
    cheap = validation_metrics(logits, labels)
    assert cheap == {"loss": full["loss"], "accuracy": full["accuracy"], "f1_macro": full["f1_macro"]}


def test_calibration_error_of_known_cases() -> None:
    sure = np.tile(np.array([[30.0, 0.0]]), (10, 1))
    assert calibration_error(sure, np.zeros(10, dtype=np.int64)) == pytest.approx(0, abs=1e-9)
    assert calibration_error(sure, np.array([0] * 6 + [1] * 4)) == pytest.approx(0.4, abs=1e-9)
    even = np.tile(np.log(np.array([[0.75, 0.25]])), (4, 1))
    assert calibration_error(even, np.array([0, 0, 0, 1])) == pytest.approx(0, abs=1e-9)


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(400):
        low, high = accuracy_interval(int(rng.binomial(300, 0.9)), 300, seed=trial)
        inside += low <= 0.9 <= high
    assert 0.91 <= inside / 400 <= 0.98


def test_interval_is_seeded_and_never_empty() -> None:
    assert accuracy_interval(90, 100, seed=4) == accuracy_interval(90, 100, seed=4)
    low, high = accuracy_interval(100, 100)
    assert 0.95 < low < 0.97
    assert high == 1.0
    assert accuracy_interval(0, 100) == pytest.approx([0.0, 1 - low])


def test_nothing_right_or_one_label_only_gives_numbers() -> None:
    found = classification_metrics(np.array([[0.0, 1.0]] * 3), np.zeros(3, dtype=np.int64), names=["a", "b"])
    assert (found["accuracy"], found["mcc"], found["f1_macro"]) == (0.0, 0.0, 0.0)


def test_not_finite_is_divergence() -> None:
    logits = np.array([[0.0, 1.0], [np.nan, 1.0], [np.inf, 0.0]])
    with pytest.raises(DivergedError, match=r"2 of 3 rows.*row 1 first"):
        validation_metrics(logits, np.array([0, 1, 0]))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, dtype=np.int64), "no rows"),
        (np.zeros((2, 2)), np.array([0, 2]), "outside"),
        (np.zeros((2, 2)), np.array([0, -1]), "outside"),
        (np.zeros((2, 2)), np.array([0]), "not \\(N, C\\)"),
        (np.zeros(2), np.array([0, 1]), "not \\(N, C\\)"),
    ],
)
def test_misfits_are_refused(logits: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validation_metrics(logits, labels)


def test_names_must_fit() -> None:
    with pytest.raises(ValueError, match="3 label names for 2"):
        classification_metrics(np.zeros((2, 2)), np.array([0, 1]), names=["a", "b", "c"])
