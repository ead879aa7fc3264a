"""The commands as a person runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pico import pico_cache

from toolkit.cli import main

__all__ = ["pico_cache"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def recipe(tmp_path: Path, pico_cache) -> Path:
    data = tmp_path / "messages.csv"
    rows = [("spam", f"win a free prize {i}") if i % 2 else ("ham", f"see you at {i}") for i in range(60)]
    data.write_text("label,text\n" + "".join(f"{label},{text}\n" for label, text in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{base: '{pico_cache('distilbert')}', max_length: 16}}\ndata: {{source: '{data}'}}\n"
        f"training: {{epochs: 2, learning_rate: 1e-2}}\noutput: {{dir: '{tmp_path / 'run'}'}}\n"
    )
    return path


def test_from_recipe_to_prediction(recipe, tmp_path, capsys):
    assert main(["validate", str(recipe)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{recipe}: valid"
    assert not (tmp_path / "run").exists()

    assert main(["train", str(recipe)]) == 0
    shown = capsys.readouterr()
    assert f"report:   {tmp_path / 'run' / 'report.html'}" in shown.out
    assert "validation loss" in shown.err

    assert main(["train", str(recipe)]) == 0
    again = capsys.readouterr()
    assert "is finished; output.overwrite=true starts anew" in again.err
    assert "report:" in again.out

    merged = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "run"), "--output", str(merged)]) == 0
    capsys.readouterr()

    for model in (tmp_path / "run", merged):
        assert main(["evaluate", str(model), "--data", str(tmp_path / "messages.csv"), "--json"]) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert metrics["rows"] == 60
        texts = tmp_path / "texts.txt"
        texts.write_text("win a free prize now\nsee you at home\n")
        assert main(["predict", str(model), str(texts)]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["text"] for line in lines] == ["win a free prize now", "see you at home"]
        assert set(lines[0]) == {"text", "label", "scores"}
        assert set(lines[0]["scores"]) == {"ham", "spam"}
        assert main(["predict", str(model), str(texts), "--precision", "bf16"]) == 0
        low = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert low[0]["scores"] == pytest.approx(lines[0]["scores"], abs=0.02)
        assert low[0]["scores"] != lines[0]["scores"]


def test_predict_gives_the_logits_of_stock_libraries(recipe, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert main(["train", str(recipe)]) == 0
    merged = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "run"), "-o", str(merged)]) == 0
    texts = ["win a free prize now", "see you at home"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "texts.txt")]) == 0
    ours = [json.loads(line)["scores"] for line in capsys.readouterr().out.splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    batch = AutoTokenizer.from_pretrained(merged)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        stock = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
    for scores, row in zip(ours, stock, strict=True):
        for index, probability in enumerate(row.tolist()):
            assert scores[model.config.id2label[index]] == pytest.approx(probability, abs=1e-5)


def test_validate_says_what_was_found(recipe, capsys):
    assert main(["validate", str(recipe), "data.balance=undersample"]) == 0
    out = capsys.readouterr().out
    assert "base: " in out
    assert "split: train 42, validation 6, test 12" in out


def test_schema_is_json(capsys):
    assert main(["schema"]) == 0
    assert "training" in json.loads(capsys.readouterr().out)["properties"]


def best_time(words: list[str], **environment: str) -> float:
    """Return the best of several starts in seconds: other work on the machine must not decide."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, check=False)
        times.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    return min(times)


@pytest.mark.parametrize(("words", "limit"), [(["--help"], 0.5), (["validate", "recipes/gpt2_head.yaml"], 1.0)])
def test_start_up(words, limit, tmp_path):
    # A machine that takes more than 0.15 s to import numpy and pydantic is slower, or busier, than the limits assume.
    slowness = max(1.0, best_time(["-c", "import numpy, pydantic.main"]) / 0.15)
    offline = {"HF_HUB_OFFLINE": "1", "TOOLKIT_OFFLINE": "1", "TOOLKIT_CACHE": str(tmp_path)}
    assert best_time(["-m", "toolkit", *words], **offline) < limit * slowness


@pytest.mark.parametrize("script", ["train.py", "merge.py"])
def test_scripts_are_the_commands(script):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"toolkit {script.removesuffix('.py')}" in done.stdout
