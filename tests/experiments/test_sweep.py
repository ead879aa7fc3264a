"""A sweep finds the better values, cuts poor trials short, and ends the same after a kill."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toolkit.cli import main
from toolkit.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
METRIC = "evaluation.metric=loss"


@pytest.fixture
def space(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def sweep(capsys):
    def run(*words: str) -> dict:
        capsys.readouterr()
        assert main(["sweep", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def validation_losses(trial: dict) -> dict[int, float]:
    lines = map(json.loads, (Path(trial["folder"]) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["validation"]["loss"] for line in lines if "validation" in line}


def test_the_best_values_are_found_and_poor_trials_cut_short(write_recipe, space, sweep, tmp_path, capsys):
    recipe = write_recipe("full", "method: {name: full}\n", steps=16)
    values = space("training.learning_rate: [2e-3, 1e-9]\ntraining.batch_size: [4, 8]\n")
    found = sweep(recipe, values, METRIC, "--trials", "9", "--output", str(tmp_path / "study"))
    trials = found["trials"]
    assert [trial["number"] for trial in trials] == list(range(9))
    whole = [trial for trial in trials if trial["state"] == "complete"]
    assert found["best"] == min(whole, key=lambda trial: trial["value"])["number"]
    assert "training.learning_rate=0.002" in trials[found["best"]]["overrides"]
    cut = [trial for trial in trials if trial["state"] == "pruned"]
    assert cut
    for trial in cut:
        assert not (Path(trial["folder"]) / "result.json").exists()
        own = validation_losses(trial)
        step = max(own)
        before = [validation_losses(one)[step] for one in whole if one["number"] < trial["number"]]
        assert len(before) >= 4
        assert min(own.values()) > statistics.median(before)
    for trial in whole:
        record = json.loads((Path(trial["folder"]) / "result.json").read_text())
        assert record["best"] == {"step": record["best"]["step"], "metric": "loss", "value": trial["value"]}
    chosen = load_recipe(found["recipe"])
    assert chosen == load_recipe(recipe, [METRIC, *trials[found["best"]]["overrides"]])

    # What is there is not tried again, and other values are another sweep.
    assert sweep(recipe, values, METRIC, "--trials", "9", "--output", str(tmp_path / "study")) == found
    space("training.learning_rate: [2e-3, 1e-8]\n")
    assert main(["sweep", recipe, values, METRIC, "--output", str(tmp_path / "study")]) == 2
    assert "holds a sweep of another space" in capsys.readouterr().err


def test_a_killed_sweep_ends_as_if_it_had_not_been(write_recipe, space, sweep, tmp_path):
    recipe = write_recipe("full", "method: {name: full}\n", steps=24)
    values = space(
        "training.learning_rate: {low: 1e-4, high: 1e-2, log: true}\ntraining.batch_size: {low: 4, high: 8}\n"
    )
    words = [recipe, values, METRIC, "--trials", "3", "--output"]
    command = [sys.executable, "-m", "toolkit", "sweep", *words, str(tmp_path / "killed")]
    running = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "trial-1" / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    goes_on = sweep(*words, str(tmp_path / "killed"))
    whole = sweep(*words, str(tmp_path / "whole"))
    for one, other in zip(goes_on["trials"], whole["trials"], strict=True):
        assert {**one, "folder": ""} == {**other, "folder": ""}
    assert goes_on["best"] == whole["best"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("training.learning_rat: [1e-3, 1e-2]\n", r"space.yaml:1:.*: training.learning_rat: unknown key"),
        ("training.learning_rate: [1e-3, -1]\n", r"space.yaml:1:.*: training.learning_rate: -1 is not allowed"),
        ("training.learning_rate: [1e-3]\n", r"space.yaml:1:.*: training.learning_rate: fewer than two"),
        ("training.epochs: {low: 5, high: 2}\n", r"space.yaml:1:.*: training.epochs: low is not below high"),
        ("training.epochs: {low: 0, high: 2, log: true}\n", r"space.yaml:1:.*: training.epochs: log: true needs"),
        ("training.epochs: 3\n", r"space.yaml:1:.*: training.epochs: neither a list nor a range"),
        ("output.dir: [a, b]\n", r"space.yaml:1:.*: output.dir: where a run is kept"),
        ("- 1\n", r"space.yaml: names no field"),
    ],
)
def test_a_wrong_space_is_refused_in_a_line(write_recipe, space, tmp_path, capsys, text, line):
    import re

    assert main(["sweep", write_recipe("head"), space(text)]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert re.search(line, said), said
    assert not (tmp_path / "runs").exists()


def test_the_space_beside_the_recipes_fits_them():
    from toolkit.experiments.space import read_space

    found = read_space(str(ROOT / "recipes/sweep/lora.yaml"), recipe=str(ROOT / "recipes/gpt2_lora.yaml"), overrides=())
    assert [one.path for one in found][:2] == ["training.learning_rate", "method.r"]
