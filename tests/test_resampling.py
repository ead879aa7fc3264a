"""One recipe over folds and over training sizes: ordinary runs, their figures put together, taken up again."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from pico import pico_cache

from toolkit.cli import main
from toolkit.resampling import cross_validate, learning_curve

__all__ = ["pico_cache"]


@pytest.fixture
def recipe(tmp_path: Path, pico_cache: Any) -> str:
    """A recipe of three steps on 60 messages."""
    data = tmp_path / "messages.csv"
    words = {"ham": "see you tonight", "spam": "free prize call now"}
    rows = [f"{words[label]} {i},{label}" for i, label in enumerate(["ham", "spam"] * 30)]
    data.write_text("text,label\n" + "\n".join(rows) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{base: '{pico_cache('gpt2')}', max_length: 16}}\ndata: {{source: '{data}'}}\n"
        "method: {name: head}\ntraining: {max_steps: 3, batch_size: 8, balanced_batches: true, learning_rate: 1e-2}\n"
        f"output: {{dir: '{tmp_path / 'run'}'}}\n"
    )
    return str(path)


def test_folds_are_tested_once_each_and_a_lost_one_is_run_again(recipe: str, tmp_path: Path) -> None:
    found, folder = cross_validate(recipe, ["evaluation.baselines=false"], folds=3)
    assert folder == tmp_path / "run-folds"
    assert json.loads((folder / "folds.json").read_text()) == found
    records = [json.loads((folder / f"fold-{fold}" / "result.json").read_text()) for fold in (1, 2, 3)]
    tested = [json.loads((folder / f"fold-{fold}" / "split.json").read_text())["parts"]["test"] for fold in (1, 2, 3)]
    assert sorted(row for rows in tested for row in rows) == list(range(60))
    accuracies = [record["metrics"]["test"]["accuracy"] for record in records]
    assert found["mean"]["accuracy"] == pytest.approx(statistics.fmean(accuracies))
    assert found["deviation"]["accuracy"] == pytest.approx(statistics.stdev(accuracies))
    assert "rows" not in found["mean"]
    before = {fold: (folder / f"fold-{fold}" / "result.json").stat().st_mtime_ns for fold in (1, 3)}
    shutil.rmtree(folder / "fold-2")
    again, _ = cross_validate(recipe, ["evaluation.baselines=false"], folds=3)
    assert again == found
    assert before == {fold: (folder / f"fold-{fold}" / "result.json").stat().st_mtime_ns for fold in (1, 3)}


def test_a_learning_curve_has_a_point_for_each_size(recipe: str, tmp_path: Path, capsys: Any) -> None:
    found, folder = learning_curve(recipe, sizes=[42, 10])
    assert [run["rows"] for run in found["runs"]] == [10, 42]
    assert [run["parts"] for run in found["runs"]] == [
        {"train": size, "validation": 6, "test": 12} for size in (10, 42)
    ]
    assert {"majority", "tfidf_logistic_regression"} == set(found["runs"][0]["baselines"])
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert main(["resample", recipe, "--train-rows", "10", "--train-rows", "42"]) == 0
    shown = capsys.readouterr().out
    assert "rows-10" in shown
    assert str(folder) in shown.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --folds, or --train-rows"),
        (["--folds", "3", "--train-rows", "10"], "give --folds, or --train-rows"),
        (["--folds", "1"], "--folds"),
        (["--folds", "3", "data.split.time_column=when"], "data.split.folds: folds take turns"),
        (["--folds", "3", "training.epochs=0"], "training.epochs: 0 is not allowed"),
    ],
)
def test_what_cannot_be_resampled(recipe: str, tmp_path: Path, capsys: Any, words: list[str], said: str) -> None:
    assert main(["resample", recipe, *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("run*"))
