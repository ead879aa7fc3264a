"""The surest errors come first, and nothing that was right is listed."""

from __future__ import annotations

import numpy as np

from toolkit.evaluation.mistakes import Mistake, confident_mistakes


def test_surest_first() -> None:
    logits = np.array([[5.0, 0.0], [0.0, 1.0], [0.0, 3.0], [0.0, 9.0]])
    labels = np.array([0, 0, 0, 1])
    found = confident_mistakes(logits, labels)
    assert [(m.row, m.label, m.predicted) for m in found] == [(2, 0, 1), (1, 0, 1)]
    assert found[0].probability > found[1].probability > 0.5


def test_limit_and_ties_keep_row_order() -> None:
    logits = np.zeros((5, 2))
    logits[:, 1] = 1.0
    found = confident_mistakes(logits, np.zeros(5, dtype=np.int64), limit=2)
    assert [m.row for m in found] == [0, 1]
    assert isinstance(found[0], Mistake)


def test_no_mistakes() -> None:
    assert confident_mistakes(np.array([[1.0, 0.0]]), np.array([0])) == []
