"""Temperature and thresholds against scipy, scikit-learn and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax
from sklearn import metrics as reference

from toolkit.config.schema import EvaluationSettings, PrecisionTarget
from toolkit.evaluation.decision import Decision, fit_decision, fit_temperature, tune_threshold
from toolkit.evaluation.figures import all_figures

SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"


def drawn(rows: int = 400, labels: int = 3, too_sure: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are as sure as they are right, times something."""
    chance = np.random.default_rng(8)
    logits = chance.normal(size=(rows, labels)) * 1.5
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = np.array([chance.choice(labels, p=row) for row in odds])
    return (logits * too_sure).astype(np.float32), truth


def sets(too_sure: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(9)
    logits = chance.normal(size=(400, 3)) * 1.5 - 0.5
    truth = (chance.random((400, 3)) < expit(logits)).astype(np.uint8)
    return (logits * too_sure).astype(np.float32), truth


def test_the_temperature_is_the_one_scipy_finds() -> None:
    logits, truth = drawn()
    exact = logits.astype(np.float64)

    def loss(temperature: float) -> float:
        return float(-log_softmax(exact / temperature, axis=1)[np.arange(400), truth].mean())

    best = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-8}).x
    assert fit_temperature(logits, truth) == pytest.approx(best, rel=1e-4)
    assert best == pytest.approx(3, rel=0.2)


def test_the_temperature_of_several_labels() -> None:
    logits, truth = sets()
    p = logits.astype(np.float64)

    def loss(temperature: float) -> float:
        return float(np.mean(np.logaddexp(0, p / temperature) - truth * p / temperature))

    best = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-8}).x
    assert fit_temperature(logits, truth) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("kind", [SINGLE, SEVERAL])
def test_calibration_lowers_the_error_and_changes_no_plain_figure(kind: str) -> None:
    logits, truth = drawn() if kind == SINGLE else sets()
    settings = EvaluationSettings(calibrate=True)
    decision, warnings = fit_decision(
        logits[:200], truth[:200], settings=settings, problem_type=kind, names=("a", "b", "c")
    )
    assert warnings == []
    held_out = logits[200:], truth[200:]
    plain = all_figures(*held_out, problem_type=kind, names=("a", "b", "c"))
    found = all_figures(*held_out, problem_type=kind, names=("a", "b", "c"), decision=decision)
    assert {name: found[name] for name in plain} == plain
    assert found.keys() - plain.keys() == {"calibrated"}
    assert found["calibrated"]["ece"] < plain["ece"] / 2
    assert found["calibrated"]["loss"] < plain["loss"]
    again = all_figures(held_out[0] / decision.temperature, held_out[1], problem_type=kind, names=("a", "b", "c"))
    assert found["calibrated"]["ece"] == pytest.approx(again["ece"], abs=1e-6)


def test_rows_that_are_all_right_do_not_send_the_temperature_to_nothing() -> None:
    assert fit_temperature(np.array([[1.0, -1.0]] * 5), np.zeros(5, dtype=np.int64)) == pytest.approx(1 / 20)


@pytest.mark.parametrize("seed", range(4))
def test_no_threshold_has_a_better_f1(seed: int) -> None:
    chance = np.random.default_rng(seed)
    scores = chance.random(60).round(1 if seed % 2 else 6)
    truth = chance.random(60) < scores * 0.6
    threshold, reached = tune_threshold(scores, truth, precision=None)
    assert reached
    everywhere = [reference.f1_score(truth, scores >= t, zero_division=0) for t in np.linspace(0, 1, 2001)]
    assert reference.f1_score(truth, scores >= threshold) == pytest.approx(max(everywhere))
    # Halfway between two scores: no rounding of a probability changes a decision.
    assert np.abs(scores - threshold).min() > 1e-7


def test_of_the_thresholds_precise_enough_the_one_that_finds_most() -> None:
    chance = np.random.default_rng(1)
    scores = chance.random(300)
    truth = chance.random(300) < scores
    threshold, reached = tune_threshold(scores, truth, precision=0.9)
    assert reached
    assert reference.precision_score(truth, scores >= threshold) >= 0.9
    precision, recall, _ = reference.precision_recall_curve(truth, scores)
    assert reference.recall_score(truth, scores >= threshold) == pytest.approx(recall[precision >= 0.9].max())


def test_wishes_that_validation_cannot_meet() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    truth = np.array([False, True, True, False])
    threshold, reached = tune_threshold(scores, truth, precision=0.95)
    assert (threshold, reached) == (pytest.approx(0.65), False)
    assert tune_threshold(scores, np.zeros(4, dtype=bool), precision=None) == (0.5, False)
    logits = np.array([[0.0, 1.0], [0.0, 2.0]])
    settings = EvaluationSettings(threshold=PrecisionTarget(precision=0.95))
    decision, warnings = fit_decision(
        logits, np.array([0, 0]), settings=settings, problem_type=SINGLE, names=("ham", "spam")
    )
    assert decision.thresholds == {"spam": 0.5}
    assert warnings == ["validation has not a precision of 0.95 for label spam: its threshold is 0.5"]


def test_figures_at_thresholds_are_those_of_scikit_learn() -> None:
    logits, truth = drawn(labels=2)
    settings = EvaluationSettings(threshold="f1", calibrate=True)
    names = ("ham", "spam")
    decision, _ = fit_decision(logits, truth, settings=settings, problem_type=SINGLE, names=names)
    tuned = all_figures(logits, truth, problem_type=SINGLE, names=names, decision=decision)["tuned"]
    p = expit((logits[:, 1].astype(np.float64) - logits[:, 0]) / decision.temperature)
    given = (p >= decision.thresholds["spam"]).astype(int)
    assert tuned["accuracy"] == reference.accuracy_score(truth, given)
    assert tuned["f1_macro"] == pytest.approx(reference.f1_score(truth, given, average="macro"))
    assert tuned["mcc"] == pytest.approx(reference.matthews_corrcoef(truth, given))
    assert tuned["confusion"] == reference.confusion_matrix(truth, given).tolist()
    several, bits = sets()
    decision, _ = fit_decision(several, bits, settings=settings, problem_type=SEVERAL, names=("a", "b", "c"))
    tuned = all_figures(several, bits, problem_type=SEVERAL, names=("a", "b", "c"), decision=decision)["tuned"]
    cuts = [decision.thresholds[name] for name in "abc"]
    both = expit(several.astype(np.float64) / decision.temperature) >= cuts
    assert tuned["f1_macro"] == pytest.approx(reference.f1_score(bits, both, average="macro"))
    assert tuned["f1_micro"] == pytest.approx(reference.f1_score(bits, both, average="micro"))
    plain = reference.f1_score(bits, several >= 0, average="macro")
    assert tuned["f1_macro"] >= plain


def test_without_wishes_nothing_is_fitted() -> None:
    logits, truth = drawn(labels=2)
    found = fit_decision(logits, truth, settings=EvaluationSettings(), problem_type=SINGLE, names=("a", "b"))
    assert found == (Decision(), [])
    assert found[0].describe() == ""
    assert found[0].chosen(found[0].probabilities(logits, problem_type=SINGLE), names=("a", "b")).tolist() == (
        logits.argmax(axis=1).tolist()
    )
