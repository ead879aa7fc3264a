"""Method zero_shot: the logits are those of the stock language model behind the prompt, for the labels' words."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pico import pico_cache
from safetensors.torch import load_file

from toolkit.cli import main
from toolkit.config.load import load_recipe
from toolkit.config.schema import Recipe
from toolkit.data.load import load_data
from toolkit.data.tokenize import load_tokenizer
from toolkit.errors import RecipeError
from toolkit.finetune import finetune, read_inputs
from toolkit.inference.predict import Classifier
from toolkit.models.base import resolve_base

__all__ = ["pico_cache"]

Write = Callable[..., Recipe]
PROMPT = 'Text: "{text}"\\n\\nIs it spam? Answer {words}:'
TEXTS = {"ham": "see you at home", "spam": "free prize award call"}


@pytest.fixture
def recipe(tmp_path: Path) -> Write:
    def write(*overrides: str) -> Recipe:
        lines = [f'{name},"{text} {i} {text * (i % 9)}"' for i in range(30) for name, text in TEXTS.items()]
        (tmp_path / "data.csv").write_text("label,text\n" + "\n".join(lines) + "\n")
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"model: {{base: gpt2-mini, max_length: 40}}\ndata: {{source: '{tmp_path / 'data.csv'}'}}\n"
            f'method: {{name: zero_shot, prompt: "{PROMPT}", words: {{ham: "no", spam: "yes"}}}}\n'.replace(
                f'"{PROMPT}"', json.dumps(PROMPT.replace("\\n", "\n"))
            )
            + f"output: {{dir: '{tmp_path / 'run'}'}}\ntraining: {{gemm: default}}\n"
        )
        return load_recipe(path, overrides)

    return write


def by_hand(settings: Recipe, texts: list[str], *, words: list[str]) -> np.ndarray:
    """Return what the stock language model gives the words behind each prompt, one text at a time."""
    base = resolve_base(settings.model).path
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = [tokenizer(f" {word}")["input_ids"] for word in words]
    assert all(len(one) == 1 for one in ids)
    before, behind = PROMPT.replace("\\n", "\n").replace("{words}", " or ".join(words)).split("{text}")
    rows = []
    for text in texts:
        around = [tokenizer(part)["input_ids"] for part in (before, text, behind)]
        around[1] = around[1][: 40 - len(around[0]) - len(around[2])]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(chain(*around))])).logits[0, -1]
        rows.append(logits[[one[0] for one in ids]].numpy())
    return np.stack(rows)


def test_the_exported_classifier_is_the_language_model(recipe: Write, tmp_path: Path) -> None:
    settings = recipe()
    data = load_data(settings.data)
    record = finetune(settings)
    assert data.test.texts is not None
    texts = data.test.texts.to_pylist()
    expected = by_hand(settings, texts, words=["no", "yes"])
    assert data.label_map is not None
    assert data.label_map.names == ("ham", "spam")

    # Stock transformers asks the question itself, and cuts the text and not the question.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(1)
    assert lengths.max() == 40
    assert lengths.min() < 40
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)

    ours = np.array([list(one.scores.values()) for one in Classifier.load(tmp_path / "run").predict(texts)])
    np.testing.assert_allclose(ours, torch.from_numpy(expected).softmax(-1).numpy(), atol=1e-5)
    right = (expected.argmax(1) == data.test.labels).mean()
    assert record["metrics"]["test"]["accuracy"] == pytest.approx(right)
    assert record["parameters"]["trainable"] == 0
    # The baselines read the texts without the question.
    assert record["metrics"]["baselines"]["tfidf_logistic_regression"]["accuracy"] == 1


def test_the_texts_are_read_alike_before_and_after(recipe: Write, tmp_path: Path) -> None:
    settings = recipe()
    data = load_data(settings.data)
    finetune(settings)
    ours = load_tokenizer(tmp_path / "run" / "model", kind="bpe")
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert data.train.texts is not None
    for text in [*data.train.texts.to_pylist()[:20], "", "<|endoftext|> ä", "a" * 500]:
        row = ours.encode([text], max_length=40).table[0].tolist()
        assert row == stock(text, truncation=True, max_length=40)["input_ids"]
        assert row[-3:] == stock("")["input_ids"][-3:]


def test_it_merges_and_says_what_it_is(recipe: Write, tmp_path: Path) -> None:
    record = finetune(recipe())
    assert (record["steps"], record["artifact"]["kind"]) == (1, "model")
    assert main(["merge", str(tmp_path / "run"), "-o", str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    weights = load_file(tmp_path / "half" / "model.safetensors")
    words = transformers.AutoTokenizer.from_pretrained(resolve_base(recipe().model).path)
    picked = weights["transformer.wte.weight"][[words(f" {word}")["input_ids"][0] for word in ("no", "yes")]]
    assert torch.equal(weights["score.weight"], picked)
    assert "zero-shot" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Nothing was trained" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_a_second_run_is_bit_equal_in_bf16_too(recipe: Write, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        one, other = (tmp_path / f"{precision}-{number}" for number in "ab")
        for run in (one, other):
            finetune(recipe(f"output.dir={run}", f"training.precision={precision}"))
        weights = [load_file(run / "model" / "model.safetensors") for run in (one, other, tmp_path / "fp32-a")]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
        assert all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["method.prompt=Is it spam?"], r"no single place for the text \(\{text\} once\)"),
        (["method.prompt='{text} {text}?'"], "no single place"),
        (["method.prompt='Spam? {text}'"], "ends with the text or a space"),
        (["method.prompt='{text} Spam? '"], "ends with the text or a space"),
        (["method.words={ham: no, egg: yes}"], "'egg' is no label of the data"),
        (["method.words={ham: unquestionably not, spam: yes}"], "'unquestionably not', for label 'ham', is"),
        (["method.words={ham: yes, spam: yes}"], "'yes' stands for more than one label"),
        (["model.max_length=12"], "method.prompt: the prompt takes .* tokens, and model.max_length is 12"),
        (["model.base=distilbert-mini"], "zero_shot asks a model that writes, and distilbert fills gaps"),
        (["model.head={hidden: [8]}"], "zero_shot writes the architecture's own head"),
        (["training.epochs=3"], "take no steps"),
        (["training.loss={focal_gamma: 2}"], "zero_shot minimises no loss"),
        (["data.problem_type=regression"], "give one label to a text"),
        (["quantization={bits: 8}"], "quantised weights cannot be trained"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    recipe: Write, tmp_path: Path, overrides: list[str], error: str
) -> None:
    with pytest.raises(RecipeError, match=error):
        read_inputs(recipe(*overrides))
    assert not (tmp_path / "run").exists()


def test_token_ids_are_refused(recipe: Write, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.stack([np.arange(1, 61), np.arange(60) % 2], axis=1))
    with pytest.raises(RecipeError, match="zero_shot puts a prompt around texts, and the data are token ids"):
        read_inputs(recipe(f"data.source={tmp_path / 'rows.npy'}", "method.words={}"))
