"""`evaluate` gives scikit-learn's figures for the predictions that `predict` gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score
from trained import LABELS, build_run

from toolkit.errors import AdapterError, DataError
from toolkit.inference.evaluate import evaluate
from toolkit.inference.predict import Classifier

PicoFolder = Callable[[str], Path]
ROWS = [("free prize", "spam"), ("see you", "ham"), ("NA", "größer"), ("dinner tonight", "ham"), ("call now", "spam")]


@pytest.fixture
def run(pico_cache: PicoFolder, tmp_path: Path) -> Path:
    return build_run(tmp_path / "run", pico_cache("gpt2"))


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("t\tl\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return str(path)


def test_figures_of_a_file(run: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.tsv", ROWS)
    found = evaluate(run, data, text_column="t", label_column="l", batch_size=2, device="cpu")
    predicted = [p.label for p in Classifier.load(run, device="cpu").predict([text for text, _ in ROWS])]
    truth = [label for _, label in ROWS]
    assert found["rows"] == 5
    assert found["accuracy"] == accuracy_score(truth, predicted)
    assert found["f1_macro"] == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))
    assert tuple(found["per_label"]) == LABELS


def test_token_ids(pico_cache: PicoFolder, tmp_path: Path) -> None:
    """The notebook's format: ids, 0 as padding, the label last. Its labels are numbers."""
    run = build_run(tmp_path / "run", pico_cache("gpt2"))
    np.save(tmp_path / "a.npy", np.array([[5, 6, 0, 0], [7, 8, 9, 1]]))
    with pytest.raises(DataError, match="label"):
        evaluate(run, str(tmp_path / "a.npy"), device="cpu")


def test_a_label_the_model_does_not_know(run: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.tsv", [*ROWS, ("x", "Spam")])
    with pytest.raises(DataError, match=r"a.tsv:7: .*'?Spam'?"):
        evaluate(run, data, text_column="t", label_column="l")


def test_a_missing_column_and_a_missing_model(run: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.tsv", ROWS)
    with pytest.raises(DataError, match="text_column"):
        evaluate(run, data, label_column="l")
    with pytest.raises(AdapterError, match="no such folder"):
        evaluate(tmp_path / "none", data)
