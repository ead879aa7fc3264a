"""The surest errors come first, and nothing that was right is listed."""

from __future__ import annotations

import numpy as np
import pytest

from toolkit.evaluation.decision import Decision
from toolkit.evaluation.mistakes import Mistake, confident_mistakes, worst_mistakes

NAMES = ("ham", "spam")


def test_surest_first() -> None:
    logits = np.array([[5.0, 0.0], [0.0, 1.0], [0.0, 3.0], [0.0, 9.0]])
    labels = np.array([0, 0, 0, 1])
    found = confident_mistakes(logits, labels, names=NAMES)
    assert [(m.row, m.label, m.predicted) for m in found] == [(2, "ham", "spam"), (1, "ham", "spam")]
    assert [m.probability for m in found] == pytest.approx([1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-1))])


def test_limit_and_ties_keep_row_order() -> None:
    logits = np.zeros((5, 2))
    logits[:, 1] = 1.0
    found = confident_mistakes(logits, np.zeros(5, dtype=np.int64), names=NAMES, limit=2)
    assert [m.row for m in found] == [0, 1]
    assert isinstance(found[0], Mistake)


def test_no_mistakes() -> None:
    assert confident_mistakes(np.array([[1.0, 0.0]]), np.array([0]), names=NAMES) == []


def test_of_several_labels_the_surest_wrong_decision_counts() -> None:
    logits = np.array([[4.0, -4.0], [2.0, 3.0], [-1.0, -5.0], [-9.0, -9.0]])
    labels = np.array([[1, 0], [1, 0], [1, 1], [0, 0]])
    found = worst_mistakes(logits, labels, problem_type="multi_label_classification", names=NAMES)
    assert [(m.row, m.label, m.predicted) for m in found] == [(2, "ham, spam", "none"), (1, "ham", "ham, spam")]
    assert found[0].probability == pytest.approx(1 / (1 + np.exp(-5)))


def test_a_tuned_threshold_decides_what_is_wrong() -> None:
    logits, labels = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), np.array([0, 1, 0])
    assert [m.row for m in confident_mistakes(logits, labels, names=NAMES)] == [1, 2]
    found = confident_mistakes(logits, labels, names=NAMES, decision=Decision(thresholds={"spam": 0.1}))
    # Rows 0 and 2 are called spam now, row 0 with a probability below 0.5.
    assert [(m.row, m.predicted) for m in found] == [(2, "spam"), (0, "spam")]
    assert [m.probability for m in found] == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(2))])


def test_several_labels_are_decided_at_their_own_thresholds() -> None:
    logits, labels = np.array([[0.0, -1.0], [3.0, 3.0]]), np.array([[1, 0], [1, 1]])
    decision = Decision(thresholds={"spam": 0.2})
    found = worst_mistakes(logits, labels, problem_type="multi_label_classification", names=NAMES, decision=decision)
    assert [(m.row, m.predicted) for m in found] == [(0, "ham, spam")]
    assert found[0].probability == pytest.approx(1 / (1 + np.exp(1)))
    assert worst_mistakes(logits, labels, problem_type="multi_label_classification", names=NAMES) == []


def test_numbers_are_listed_by_how_far_they_are_off() -> None:
    values, targets = np.array([[1.0], [2.5], [7.0]]), np.array([[1.0], [2.0], [4.0]])
    found = worst_mistakes(values, targets, problem_type="regression", names=("score",))
    assert [(m.row, m.label, m.predicted, m.probability) for m in found] == [(2, "4", "7", None), (1, "2", "2.5", None)]
