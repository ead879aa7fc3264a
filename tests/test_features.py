"""Method features: stock transformers computes the very logits of scikit-learn's logistic regression."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pico import pico_cache
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from toolkit.cli import main
from toolkit.config.load import load_recipe
from toolkit.config.methods import FeaturesMethod
from toolkit.config.schema import LossSettings
from toolkit.data.load import load_data
from toolkit.errors import RecipeError
from toolkit.families import FAMILIES
from toolkit.finetune import finetune
from toolkit.inference.predict import Classifier
from toolkit.tasks.features import Linear, fit_linear, write_head

__all__ = ["pico_cache"]

WORDS = {"ham": "see you at home", "spam": "free prize award call", "news": "dinner tonight on a call"}


@pytest.fixture
def recipe(tmp_path: Path, pico_cache):
    def write(family: str, labels: int = 2, *overrides: str):
        names = list(WORDS)[:labels]
        lines = [
            f"{names[i % labels]},{WORDS[names[i % labels]]} {i} {WORDS[names[i * 7 % labels]]}" for i in range(90)
        ]
        (tmp_path / "data.csv").write_text("label,text\n" + "\n".join(lines) + "\n")
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"model: {{base: '{pico_cache(family)}', max_length: 24}}\ndata: {{source: '{tmp_path / 'data.csv'}'}}\n"
            f"method: {{name: features, C: 0.5}}\noutput: {{dir: '{tmp_path / 'run'}'}}\n"
            "training: {gemm: default, prefix_cache: {dtype: fp32}}\n"
        )
        return load_recipe(path, overrides)

    return write


def stock_features(base: Path, part, family: str) -> np.ndarray:
    """Return the pooled states that stock transformers gives one text at a time: nothing is padded."""
    body = transformers.AutoModel.from_pretrained(base).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    states = []
    for text in part.texts.to_pylist():
        with torch.no_grad():
            ids = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
            hidden = body(input_ids=ids).last_hidden_state[0]
        states.append(hidden[-1 if family == "gpt2" else 0].numpy())
    return np.stack(states).astype(np.float64)


@pytest.mark.parametrize(("family", "labels"), [("gpt2", 2), ("gpt2", 3), ("distilbert", 2), ("distilbert", 3)])
def test_the_exported_model_is_the_regression(recipe, pico_cache, tmp_path, family, labels):
    settings = recipe(family, labels)
    data = load_data(settings.data)
    train, test = (stock_features(pico_cache(family), part, family) for part in (data.train, data.test))
    bias = family == "distilbert"
    scaler = StandardScaler(with_mean=bias).fit(train)
    plain = LogisticRegression(C=0.5, fit_intercept=bias, max_iter=5_000).fit(
        scaler.transform(train), data.train.labels
    )
    expected = plain.predict_proba(scaler.transform(test))

    record = finetune(settings)
    texts = data.test.texts.to_pylist()
    ours = np.array([list(one.scores.values()) for one in Classifier.load(tmp_path / "run").predict(texts)])
    np.testing.assert_allclose(ours, expected, atol=2e-3)
    assert record["metrics"]["test"]["accuracy"] == pytest.approx((expected.argmax(1) == data.test.labels).mean())
    assert record["metrics"]["test"]["accuracy"] > 0.8

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    np.testing.assert_allclose(logits.softmax(-1).numpy(), ours, atol=1e-5)
    # The frozen base is the base.
    before, after = (
        load_file(pico_cache(family) / "model.safetensors"),
        load_file(tmp_path / "run/model/model.safetensors"),
    )
    shared = [name for name in before if name in after]
    assert len(shared) > 10
    assert all(torch.equal(before[name], after[name]) for name in shared)


def test_rectified_logits_lose_no_bit():
    """relu(x) - relu(-x) is x, and the products of a negated matrix are the negated products."""
    config = transformers.DistilBertConfig(dim=16, hidden_dim=16, n_layers=1, n_heads=1, vocab_size=9, num_labels=5)
    model = transformers.DistilBertForSequenceClassification(config).eval()
    chance = np.random.default_rng(0)
    linear = Linear(chance.normal(size=(5, 16)), chance.normal(size=5))
    write_head(model, linear, FAMILIES["distilbert"])
    pooled = torch.from_numpy(chance.normal(size=(64, 16))).float()
    with torch.no_grad():
        ours = model.classifier(torch.relu(model.pre_classifier(pooled)))
        plain = pooled @ torch.from_numpy(linear.weight).float().T + torch.from_numpy(linear.bias).float()
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def test_a_second_run_is_bit_equal_and_the_report_says_what_it_is(recipe, tmp_path, capsys):
    finetune(recipe("distilbert"))
    finetune(recipe("distilbert", 2, f"output.dir={tmp_path / 'again'}"))
    one, other = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (record["steps"], record["memory"]["predicted_bytes"]) == (1, None)
    assert record["best"]["step"] == 1
    assert "logistic regression on its features" in (tmp_path / "run" / "README.md").read_text()
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["balanced", [1.0, 20.0]])
@pytest.mark.parametrize("bias", [True, False])
def test_class_weights_are_those_of_scikit_learn(weights, bias):
    chance = np.random.default_rng(1)
    labels = (np.arange(200) % 5 == 0).astype(np.int64)
    features = (chance.normal(size=(200, 6)) + labels[:, None] * 0.5 + 1).astype(np.float32)
    method, loss = FeaturesMethod(name="features"), LossSettings(class_weights=weights)
    found = fit_linear(features, labels, method, classes=2, loss=loss, bias=bias)
    scaler = StandardScaler(with_mean=bias).fit(features.astype(np.float64))
    named = weights if weights == "balanced" else dict(enumerate(weights))
    plain = LogisticRegression(class_weight=named, fit_intercept=bias)
    plain.fit(scaler.transform(features.astype(np.float64)), labels)
    expected = plain.decision_function(scaler.transform(features.astype(np.float64)))
    logits = features @ found.weight.T + found.bias
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], expected, atol=1e-3)
    unweighed = fit_linear(features, labels, method, classes=2, loss=LossSettings(), bias=bias)
    assert not np.allclose(unweighed.weight, found.weight, atol=1e-2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.loss.focal_gamma=2.0", "class weights count alone"),
        ("training.epochs=3", "take no steps"),
        ("data.problem_type=regression", "give one label to a text"),
        ("quantization={bits: 4}", "quantised weights cannot be trained"),
    ],
)
def test_what_cannot_be_is_refused_by_the_recipe(recipe, override, said):
    with pytest.raises(RecipeError, match=said):
        recipe("gpt2", 2, override)


def test_the_plan_does_not_guess(recipe, tmp_path, capsys):
    recipe("gpt2")
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 2
    assert "method.name: scikit-learn fits features" in capsys.readouterr().err


def test_a_head_of_another_form_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"model\.head: features writes the architecture's own head"):
        finetune(recipe("gpt2", 2, "model.head={pooling: mean}"))


def test_more_labels_than_the_head_can_hold_are_refused(recipe, tmp_path):
    settings = recipe("distilbert")
    lines = [f"label {i % 33},text {i} of label {i % 33}" for i in range(330)]
    (tmp_path / "data.csv").write_text("label,text\n" + "\n".join(lines) + "\n")
    with pytest.raises(RecipeError, match="33 labels need 66 units of a head of 64"):
        finetune(settings)
    assert not (tmp_path / "run").exists()
