"""Recipes run side by side through the real command: reused, resumed, failed, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from toolkit.cli import main

ROOT = Path(__file__).resolve().parents[2]
HEAD = "method: {name: head}\n"


@pytest.fixture
def compare(tmp_path: Path, capsys):
    def run(*words: str) -> tuple[dict, str]:
        capsys.readouterr()
        assert main(["compare", *words, "--output", str(tmp_path / "page"), "--json"]) == 0
        shown = capsys.readouterr()
        return json.loads(shown.out), shown.err

    return run


class Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.sources: list[str] = []

    def handle_data(self, data: str) -> None:
        self.found.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]


def check_page(folder: Path, found: dict) -> None:
    """The page stands alone, and says what the console says."""
    page = Words()
    page.feed((folder / "compare.html").read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.found).split())
    for sentence in found["verdict"]:
        assert " ".join(sentence.split()) in text
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert json.loads((folder / "compare.json").read_text()) == found


def test_recipes_are_run_once_compared_and_reused(write_recipe, compare, tmp_path, capsys):
    head, full, wrong = (
        write_recipe("head", HEAD),
        write_recipe("full", "method: {name: full}\n"),
        write_recipe("wrong"),
    )
    Path(wrong).write_text(Path(wrong).read_text().replace("messages.csv", "nowhere.csv"))
    found, said = compare(head, wrong, "--seeds", "2", "training.gemm=default")
    rows = {row["name"]: row for row in found["recipes"]}
    assert list(rows) == ["head", "wrong"]
    assert rows["wrong"]["measured"] is None
    assert "no such file" in rows["wrong"]["runs"][0]["failed"]
    assert "head: step 4: validation loss" in said
    assert [run["seed"] for run in rows["head"]["runs"]] == [123, 124]
    runs = [Path(run["folder"]) for run in rows["head"]["runs"]]
    records = [json.loads((run / "result.json").read_text()) for run in runs]
    assert [run["accuracy"] for run in rows["head"]["runs"]] == [r["metrics"]["test"]["accuracy"] for r in records]
    assert rows["head"]["measured"]["peak_bytes"] == max(r["memory"]["peak_bytes"] for r in records)
    # Both seeds were judged on the same rows.
    one, other = ([line.split(",")[:2] for line in (run / "predictions.csv").read_text().splitlines()] for run in runs)
    assert one == other

    again, _ = compare(full, head, "training.gemm=default")
    assert [run["reused"] for row in again["recipes"] for run in row["runs"]] == [False, True]
    cheap, dear = again["recipes"][1]["measured"], again["recipes"][0]["measured"]
    assert cheap["trainable"] < dear["trainable"]
    check_page(tmp_path / "page", again)
    assert main(["compare", head, full, "training.gemm=default", "--output", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert f"page: {tmp_path / 'page' / 'compare.html'}" in out
    assert again["enough"] in out


def test_a_killed_comparison_leaves_no_orphan_and_goes_on(write_recipe, compare, tmp_path):
    # Enough steps that the run is still under way when the first checkpoint is seen.
    recipe = write_recipe("head", "method: {name: full}\n", steps=3000)
    command = [sys.executable, "-m", "toolkit", "compare", recipe, "--output", str(tmp_path / "page")]
    parent = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoints = tmp_path / "runs" / "head" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")):
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.1)
    child = int((tmp_path / "runs" / "head" / ".lock").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline, "the run outlived the comparison"
        time.sleep(0.1)
    assert not (tmp_path / "runs" / "head" / "result.json").exists()
    terminated = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert terminated.stderr is not None
    for line in terminated.stderr:
        if "head: resuming after step" in line:
            break
    terminated.send_signal(signal.SIGTERM)
    terminated.communicate()
    assert terminated.returncode == 143
    holder = int((tmp_path / "runs" / "head" / ".lock").read_text())
    assert not Path(f"/proc/{holder}").exists()


def test_no_run_that_ends_well_is_an_error(write_recipe, tmp_path, capsys):
    recipe = write_recipe("bad")
    Path(recipe).write_text(Path(recipe).read_text().replace("messages.csv", "nowhere.csv"))
    assert main(["compare", recipe, "--output", str(tmp_path / "page")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("bad: exit code 2: ") for line in lines)
    assert not (tmp_path / "page" / "compare.html").exists()


def test_what_cannot_be_compared_is_refused_before_anything_runs(write_recipe, tmp_path, capsys):
    one = write_recipe("one", HEAD)
    two = write_recipe("two", HEAD + "objective: language_modeling\n")
    assert main(["compare", one, one, "output.overwrite=true", "training.epochs=none"]) == 2
    [line, *_] = capsys.readouterr().err.splitlines()
    assert "training.epochs" in line
    assert main(["compare", one, one, "output.overwrite=true"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any("output.overwrite: would throw away the finished runs" in line for line in lines)
    assert any(f"is the folder of {one} too (a folder for each recipe)" in line for line in lines)
    assert main(["compare", two]) == 2
    assert main(["compare", "a=b"]) == 2
    assert "RECIPE: overrides alone" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
