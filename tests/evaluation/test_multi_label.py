"""Figures of several labels and of numbers are those of scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as reference

from toolkit.errors import DivergedError
from toolkit.evaluation.decision import Decision
from toolkit.evaluation.figures import all_figures, validation_figures

NAMES = ("a", "b", "c", "d")
SEVERAL, NUMBERS = "multi_label_classification", "regression"


def several(rows: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Logits with many ties, and labels that lean towards them."""
    chance = np.random.default_rng(3)
    logits = np.round(chance.normal(size=(rows, 4)) * 2, 1).astype(np.float32)
    labels = (logits + chance.normal(size=(rows, 4)) * 2 > [1.0, 0.0, 2.0, -1.0]).astype(np.uint8)
    return logits, labels


def test_several_labels() -> None:
    logits, labels = several()
    found = all_figures(logits, labels, problem_type=SEVERAL, names=NAMES)
    p = expit(logits.astype(np.float64))
    given = p >= 0.5
    assert found["rows"] == 300
    assert found["loss"] == pytest.approx(np.mean([reference.log_loss(labels[:, i], p[:, i]) for i in range(4)]))
    assert found["accuracy"] == reference.accuracy_score(labels, given)
    assert found["hamming_loss"] == pytest.approx(reference.hamming_loss(labels, given))
    for average in ("micro", "macro"):
        assert found[f"f1_{average}"] == pytest.approx(reference.f1_score(labels, given, average=average))
    assert found["mean_average_precision"] == pytest.approx(reference.average_precision_score(labels, logits))
    precision, recall, f1, support = reference.precision_recall_fscore_support(labels, given)
    for i, name in enumerate(NAMES):
        row = found["per_label"][name]
        ranked = reference.average_precision_score(labels[:, i], logits[:, i])
        assert [row["precision"], row["recall"], row["f1"], row["average_precision"]] == pytest.approx(
            [precision[i], recall[i], f1[i], ranked]
        )
        assert row["support"] == support[i]
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] < high
    cheap = validation_figures(logits, labels, problem_type=SEVERAL)
    assert cheap == {name: found[name] for name in cheap}
    assert {"loss", "accuracy", "f1_macro", "f1_micro", "mean_average_precision"} == set(cheap)
    np.testing.assert_allclose(Decision().probabilities(logits, problem_type=SEVERAL), p)


def test_the_calibration_error_of_decisions_by_a_plain_loop() -> None:
    logits, labels = several()
    flat, truth = expit(logits.astype(np.float64)).ravel(), labels.ravel()
    gaps = 0.0
    for low in range(15):
        inside = (flat * 15).astype(int).clip(max=14) == low
        gaps += inside.sum() * abs(truth[inside].mean() - flat[inside].mean()) if inside.any() else 0
    found = all_figures(logits, labels, problem_type=SEVERAL, names=NAMES)
    assert found["ece"] == pytest.approx(gaps / len(flat))


def test_a_label_that_nobody_has_counts_as_nothing() -> None:
    logits, labels = several(20)
    labels[:, 1] = 0
    found = all_figures(logits, labels, problem_type=SEVERAL, names=NAMES)
    with_rows = [0, 2, 3]
    assert found["mean_average_precision"] == pytest.approx(
        reference.average_precision_score(labels[:, with_rows], logits[:, with_rows])
    )
    assert found["f1_macro"] == pytest.approx(
        reference.f1_score(labels, expit(logits) >= 0.5, average="macro", zero_division=0)
    )
    assert found["per_label"]["b"]["average_precision"] == 0


def test_numbers() -> None:
    chance = np.random.default_rng(5)
    targets = np.round(chance.normal(size=(200, 2)) * 3, 0)
    values = (targets + chance.normal(size=(200, 2))).round(1)
    found = all_figures(values, targets, problem_type=NUMBERS, names=("x", "y"))
    assert found["loss"] == found["mse"] == pytest.approx(reference.mean_squared_error(targets, values))
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(targets, values))
    assert found["r2"] == pytest.approx(reference.r2_score(targets, values))
    for i, name in enumerate(("x", "y")):
        row = found["per_target"][name]
        expected = [pearsonr(values[:, i], targets[:, i])[0], spearmanr(values[:, i], targets[:, i])[0]]
        assert [row["pearson"], row["spearman"]] == pytest.approx(expected)
        assert row["r2"] == pytest.approx(reference.r2_score(targets[:, i], values[:, i]))
    cheap = validation_figures(values, targets, problem_type=NUMBERS)
    assert cheap == {name: found[name] for name in cheap}


def test_numbers_that_do_not_vary() -> None:
    found = all_figures(np.array([[1.0], [2.0]]), np.array([[3.0], [3.0]]), problem_type=NUMBERS, names=("x",))
    assert (found["r2"], found["pearson"], found["spearman"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("kind", [SEVERAL, NUMBERS])
def test_what_cannot_be_judged(kind: str) -> None:
    logits = np.array([[1.0, np.nan]])
    with pytest.raises(DivergedError, match="1 of 1 rows"):
        validation_figures(logits, np.zeros((1, 2)), problem_type=kind)
    with pytest.raises(ValueError, match="not both"):
        validation_figures(logits, np.zeros(1), problem_type=kind)
    with pytest.raises(ValueError, match="no rows"):
        validation_figures(np.zeros((0, 2)), np.zeros((0, 2)), problem_type=kind)
