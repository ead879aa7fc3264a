"""predictions.csv holds every answer, whatever the labels are called, and a damaged one is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import OutputError
from toolkit.evaluation.decision import Decision
from toolkit.evaluation.predictions import predictions_of, read_predictions, write_predictions
from toolkit.inference.predictions import build_predictions

NAMES = ("ham", 'a "spam", really', "größer")
LOGITS = np.array([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0], [5.0, 0.0, 0.0]])
LABELS = np.array([0, 1, 0, 2])


@pytest.fixture
def written(tmp_path: Path) -> Path:
    found = predictions_of(LOGITS, LABELS, names=NAMES, baselines={"majority": np.zeros(4, dtype=np.int64)})
    path = tmp_path / "predictions.csv"
    write_predictions(path, found, row_numbers=np.array([3, 9, 11, 40]), names=NAMES)
    return path


def test_what_was_written_is_read(written: Path) -> None:
    found = read_predictions(written)
    assert found is not None
    assert found.rows == [("3", "ham"), ("9", NAMES[1]), ("11", "ham"), ("40", "größer")]
    assert found.right.tolist() == [True, True, False, False]
    assert found.baselines["majority"].tolist() == [True, False, True, False]
    assert written.read_text(encoding="utf-8").splitlines()[1] == "3,ham,ham,0.909443,ham"


def test_answers_are_decided_as_the_classifier_decides() -> None:
    """Temperature 2 makes the second label's probabilities of these rows 0.018, 0.38, 0.62 and 0.98."""
    logits, labels = np.array([[8.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 8.0]]), np.array([0, 1, 1, 1])
    decision = Decision(2.0, {"spam": 0.3})
    found = predictions_of(logits, labels, names=("ham", "spam"), decision=decision, baselines={})
    assert found.predicted.tolist() == [0, 1, 1, 1]
    assert found.probability == pytest.approx(1 / (1 + np.exp([-4, 0.5, -0.5, -4])))
    classified = build_predictions(
        ["a"] * 4, logits, problem_type="single_label_classification", names=("ham", "spam"), decision=decision
    )
    assert [one.label for one in classified] == [("ham", "spam")[label] for label in found.predicted]
    plain = predictions_of(logits, labels, names=("ham", "spam"), baselines={})
    assert plain.predicted.tolist() == [0, 0, 1, 1]


def test_a_run_may_have_kept_none(tmp_path: Path) -> None:
    assert read_predictions(tmp_path / "predictions.csv") is None


@pytest.mark.parametrize("content", [b"", b"row,label\n1,ham\n", b"row,label,predicted,probability\n1,ham\n", b"\xff"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "predictions.csv"
    path.write_bytes(content)
    with pytest.raises(OutputError):
        read_predictions(path)
