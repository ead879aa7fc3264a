"""A head of the toolkit's own through the command line: planned, trained, predicted with, merged, evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pico import PicoFolder, pico_cache

from toolkit.cache import cache_folder
from toolkit.cli import main
from toolkit.inference.predict import Classifier

__all__ = ["pico_cache"]
TEXTS = ["a free prize for you", "see you at dinner"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [f"{'ham' if i % 2 else 'spam'},{TEXTS[i % 2]} {i} {'more ' * (i % 5)}" for i in range(60)]
    (tmp_path / "data.csv").write_text("label,text\n" + "\n".join(rows) + "\n")
    return tmp_path / "data.csv"


def write_recipe(folder: Path, base: Path, data: Path, *, head: str, **sections: str) -> Path:
    lines = {
        "model": f"{{base: {base}, max_length: 16, head: {head}}}",
        "data": f"{{source: {data}}}",
        "training": "{epochs: 3, learning_rate: 1e-2}",
        "evaluation": "{baselines: false}",
        "output": f"{{dir: {folder / 'run'}}}",
    } | sections
    (folder / "recipe.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("family", "method", "head"),
    [
        ("gpt2", "{name: lora, target_modules: all-linear}", "{pooling: mean, dropout: 0.2}"),
        ("distilbert", "{name: head}", "{pooling: max, hidden: [24, 12], activation: gelu}"),
    ],
)
def test_from_recipe_to_merged_model(
    pico_cache: PicoFolder, tmp_path: Path, data: Path, capsys: Any, family: str, method: str, head: str
) -> None:
    training = "{epochs: 12, learning_rate: 2e-2}"
    recipe = write_recipe(tmp_path, pico_cache(family), data, head=head, method=method, training=training)
    run = tmp_path / "run"
    assert main(["validate", str(recipe)]) == 0
    assert "Stock transformers has none such" in capsys.readouterr().out
    assert main(["plan", str(recipe), "--json"]) == 0
    said = capsys.readouterr().out
    plan = json.loads(said[said.index("{") :])
    assert main(["train", str(recipe)]) == 0
    said = capsys.readouterr()
    assert "head:     the classification head is the toolkit's own" in said.out
    assert "refuse to load" in said.err
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"]["test"]["accuracy"] == 1.0
    assert result["artifact"]["head"]["pooling"] in head
    card = (run / "README.md").read_text()
    assert "library_name: classifier-toolkit" in card
    assert "peft refuse to load it" in card
    assert "Classifier.load" in card
    assert "AutoModel" not in card
    assert "The head is " in card
    assert "The head is " in (run / "report.html").read_text()
    # The framework's share is what this process holds after all the tests before.
    planned, predicted = ({**parts, "framework": 0} for parts in (plan["breakdown"], result["memory"]["predicted"]))
    assert planned == pytest.approx(predicted, rel=1e-6)
    live = Classifier.load(run, device="cpu").logits(TEXTS)
    assert main(["merge", str(run), "-o", str(tmp_path / "merged")]) == 0
    assert "the toolkit's own" in capsys.readouterr().out
    assert np.abs(Classifier.load(tmp_path / "merged", device="cpu").logits(TEXTS) - live).max() < 1e-4
    assert main(["evaluate", str(tmp_path / "merged"), "--data", str(data)]) == 0
    assert "accuracy 1.0000" in capsys.readouterr().out
    # A merged model is a base, with its head.
    again = write_recipe(tmp_path, tmp_path / "merged", data, head="null", method="{name: lora}")
    assert main(["train", str(again), f"output.dir={tmp_path / 'again'}", "training.epochs=1"]) == 0
    assert json.loads((tmp_path / "again" / "result.json").read_text())["metrics"]["test"]["accuracy"] == 1.0
    assert main(["merge", str(tmp_path / "again"), "-o", str(tmp_path / "twice")]) == 0
    found = Classifier.load(tmp_path / "twice", device="cpu").logits(TEXTS)
    assert np.abs(found - Classifier.load(tmp_path / "again", device="cpu").logits(TEXTS)).max() < 1e-4


def test_pooled_states_are_kept_apart_by_their_pooling(pico_cache: PicoFolder, tmp_path: Path, data: Path) -> None:
    found = {}
    kept = cache_folder() / "prefix"
    for head in ("null", "{}", "{pooling: mean}", "{pooling: mean, hidden: [24]}", "{pooling: max}"):
        before = set(kept.iterdir()) if kept.is_dir() else set()
        recipe = write_recipe(tmp_path, pico_cache("gpt2"), data, head=head, method="{name: head}")
        assert main(["train", str(recipe), "output.overwrite=true"]) == 0
        found[head] = len(set(kept.iterdir()) - before)
    # Training and validation rows, and those that are judged; what another run of the same pooling left is found.
    assert list(found.values())[1:] == [0, 4, 0, 4]


def test_random_weights_with_an_adapter_leave_a_model_with_its_head(
    pico_cache: PicoFolder, tmp_path: Path, data: Path
) -> None:
    recipe = write_recipe(tmp_path, pico_cache("gpt2"), data, head="{pooling: mean, hidden: [8]}")
    assert main(["train", str(recipe), "model.random_init=true", "training.epochs=1"]) == 0
    assert (run := tmp_path / "run" / "model").is_dir()
    assert np.isfinite(Classifier.load(run, device="cpu").logits(TEXTS)).all()


@pytest.mark.parametrize(
    ("head", "more", "line"),
    [
        ("{pooling: sum}", [], "recipe.yaml:1:"),
        ("{hidden: 24}", [], "model.head.hidden: "),
        ("{hidden: [0]}", [], "model.head.hidden[0]: "),
        ("{hidden: [16385]}", [], "model.head.hidden[0]: "),
        ("{hidden: [8, 8, 8, 8, 8, 8, 8, 8, 8]}", [], "(a list of at most 8)"),
        ("{dropout: 1.0}", [], "model.head.dropout: "),
        ("{activation: swish}", [], "model.head.activation: "),
        ("{layers: [24]}", [], "model.head.layers: "),
        ("{pooling: mean}", ["objective=language_modeling"], "model.head: a language model classifies nothing"),
    ],
)
def test_a_wrong_head_gets_its_line(
    pico_cache: PicoFolder, tmp_path: Path, data: Path, capsys: Any, head: str, more: list[str], line: str
) -> None:
    recipe = write_recipe(tmp_path, pico_cache("gpt2"), data, head=head)
    assert main(["train", str(recipe), *more]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert line in said
    assert not (tmp_path / "run").exists()


def test_the_first_token_of_gpt2_is_warned_of(pico_cache: PicoFolder, tmp_path: Path, data: Path, capsys: Any) -> None:
    recipe = write_recipe(tmp_path, pico_cache("gpt2"), data, head="{pooling: first}")
    assert main(["validate", str(recipe)]) == 0
    assert "the first token of GPT-2 has seen no other" in capsys.readouterr().out
    assert main(["validate", str(recipe), f"model.base={pico_cache('distilbert')}"]) == 0
    assert "has seen no other" not in capsys.readouterr().out
