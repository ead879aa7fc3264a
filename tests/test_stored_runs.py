"""Runs that earlier releases left behind are predicted with, merged and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from toolkit.cli import main
from toolkit.inference.predict import Classifier

STORED = Path(__file__).resolve().parent / "stored"
RUNS = sorted(path.parent for path in STORED.glob("*/*/recipe.yaml"))


@pytest.fixture(params=RUNS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def stored(request, tmp_path: Path, monkeypatch) -> Path:
    """A copy of a stored folder, worked in; the path that its artifact names is gone."""
    shutil.copytree(request.param, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def assert_scores(stored: Path, folder: str) -> None:
    expected = json.loads((stored / "expected.json").read_text())
    found = Classifier.load(folder).predict(expected["texts"])
    for prediction, scores in zip(found, expected["scores"], strict=True):
        # Another processor sums in another order.
        assert prediction.scores == pytest.approx(scores, abs=1e-4)


def test_a_stored_run_predicts_as_it_did(stored: Path):
    assert_scores(stored, "finished")
    assert main(["train", "recipe.yaml"]) == 0  # It is finished; its result is shown.


def test_a_stored_run_merges(stored: Path):
    assert main(["merge", "finished", "-o", "merged"]) == 0
    assert_scores(stored, "merged")


def test_a_stored_run_goes_on(stored: Path, capsys, monkeypatch):
    # The library that multiplied then: with oneDNN, batches have filler, and dropout's masks fall elsewhere.
    monkeypatch.setattr("toolkit.training.gemm.choose_gemm", lambda *_: "default")
    assert main(["train", "recipe.yaml", "output.dir=unfinished"]) == 0
    assert "resuming after step 4" in capsys.readouterr().err
    kind = "adapter" if (stored / "finished" / "adapter").exists() else "model"
    one, other = (load_file(next((stored / name / kind).glob("*.safetensors"))) for name in ("finished", "unfinished"))
    assert one.keys() == other.keys()
    for name in one:
        assert float((one[name] - other[name]).abs().max()) < 1e-3, name


def test_every_release_is_small_and_says_nothing_of_a_machine():
    assert RUNS
    for folder in RUNS:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 150_000
        for path in files:
            text = path.read_bytes()
            assert b"/home/" not in text
            assert str(Path.home()).encode() not in text
            assert str(RUNS[0].parents[2]).encode() not in text
