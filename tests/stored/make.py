"""Stores a small run of this version, finished and unfinished, for the tests of later ones: ``make.py VERSION``.

A folder is written once per release and never again: that later versions read it is what it is for.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pico import build_pico  # noqa: E402

from toolkit.cli import main  # noqa: E402
from toolkit.inference.predict import Classifier  # noqa: E402

# Artifacts name their base by its absolute path; this one says nothing of a machine.
PLACE = Path("/tmp/stored-run")
SECTIONS = {"gpt2": "method: {name: lora, r: 2}\n", "distilbert": "method: {name: last_n}\n"}
TEXTS = [
    "free prize call now",
    "see you at the station",
    "you are a winner of a cash award",
    "call me when you are home",
]
RECIPE = (
    "model: {base: base, max_length: 24}\ndata: {source: data.csv}\n"
    "training: {max_steps: 6, batch_size: 4, gradient_accumulation_steps: 2, learning_rate: 1e-2}\n"
    "evaluation: {every: 3, metric: loss}\noutput: {dir: finished, save_every: 2, log_every: 1}\n"
)
WIDTHS = {"gpt2": 16, "distilbert": 8}
PICTURES = ("report.html", "*.png", ".lock", "README.md")


def make(version: str, family: str) -> None:
    target = HERE / version / family
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    os.chdir(PLACE)
    build_pico(PLACE / "base", family, width=WIDTHS[family])
    rows = [f"{'ham' if i % 2 else 'spam'},{TEXTS[2 * (i // 2 % 2) + i % 2]} {i}" for i in range(120)]
    (PLACE / "data.csv").write_text("label,text\n" + "\n".join(rows) + "\n")
    (PLACE / "recipe.yaml").write_text(RECIPE + SECTIONS[family])
    assert main(["train", "recipe.yaml"]) == 0
    scores = [prediction.scores for prediction in Classifier.load("finished").predict(TEXTS)]
    (PLACE / "expected.json").write_text(json.dumps({"texts": TEXTS, "scores": scores}, indent=1) + "\n")
    # What a kill after step 4 leaves: no result, no artifact, no last checkpoint.
    left = shutil.ignore_patterns("result.json", "adapter", "model", "step-6", *PICTURES)
    shutil.copytree("finished", "unfinished", ignore=left)
    shutil.rmtree(PLACE / "finished" / "checkpoints")
    shutil.copytree(PLACE, target, ignore=shutil.ignore_patterns(*PICTURES))
    shutil.rmtree(PLACE)


if __name__ == "__main__":
    for name in SECTIONS:
        make(sys.argv[1], name)
