"""A random forest as a head: scikit-learn's own probabilities, in safetensors, through every command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pico import PicoFolder, pico_cache
from safetensors.torch import load_file
from sklearn.ensemble import RandomForestClassifier

from toolkit.cli import main
from toolkit.config.load import load_recipe
from toolkit.config.methods import FeaturesMethod
from toolkit.config.schema import LossSettings
from toolkit.data.load import load_data
from toolkit.errors import DataError, RecipeError
from toolkit.finetune import finetune
from toolkit.inference.predict import Classifier
from toolkit.models.base import EMBEDDED
from toolkit.models.classification_head import RandomForest
from toolkit.tasks.features import fit_forest

__all__ = ["pico_cache"]

WORDS = {"ham": "see you at home", "spam": "free prize award call", "news": "dinner tonight on a call"}
FOREST = "method={name: features, classifier: random_forest, n_estimators: 20, max_depth: 4}"
TEXTS = ["a free prize award", "see you at home", "dinner tonight", ""]


@pytest.fixture
def recipe(tmp_path: Path, pico_cache: PicoFolder) -> Any:
    def write(family: str, *overrides: str, labels: int = 3) -> Any:
        names = list(WORDS)[:labels]
        lines = [
            f"{names[i % labels]},{WORDS[names[i % labels]]} {i} {WORDS[names[i * 7 % labels]]}" for i in range(90)
        ]
        (tmp_path / "data.csv").write_text("label,text\n" + "\n".join(lines) + "\n")
        (tmp_path / "recipe.yaml").write_text(
            f"model: {{base: '{pico_cache(family)}', max_length: 24}}\ndata: {{source: '{tmp_path / 'data.csv'}'}}\n"
            f"training: {{gemm: default}}\noutput: {{dir: '{tmp_path / 'run'}'}}\n"
        )
        return load_recipe(tmp_path / "recipe.yaml", [FOREST, *overrides])

    return write


def head_of(features: np.ndarray, labels: np.ndarray, method: FeaturesMethod, **more: Any) -> RandomForest:
    """Return the module with the trees that are fitted."""
    classes = int(labels.max()) + 1
    forest = fit_forest(features, labels, method, classes=classes, **({"loss": LossSettings(), "seed": 3} | more))
    head = RandomForest(method.model_dump(), width=features.shape[1], labels=classes)
    head.load_state_dict({name: torch.from_numpy(part).float() for name, part in vars(forest).items()})
    return head


def stock_features(folder: Path, texts: list[str]) -> np.ndarray:
    """Return the pooled states that stock transformers gives one text at a time: nothing is padded."""
    body = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    last = body.config.model_type == "gpt2"
    states = []
    for text in texts:
        with torch.no_grad():
            ids = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
            states.append(body(input_ids=ids).last_hidden_state[0][-1 if last else 0].numpy())
    return np.stack(states)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"max_depth": 12, "n_estimators": 50}, None),
        ({"max_depth": 5, "min_samples_leaf": 4, "n_estimators": 30}, "balanced"),
        ({"max_depth": 1, "n_estimators": 1}, [1.0, 9.0, 1.0]),
    ],
)
def test_the_probabilities_are_those_of_scikit_learn(settings: dict[str, int], weights: Any) -> None:
    """On the features of real texts, and on states that lie on a threshold or the next float beside it."""
    texts = [f"{WORDS[name]} {i} {WORDS[list(WORDS)[i % 2]]}" for i in range(60) for name in WORDS]
    labels = np.arange(len(texts)) % 3
    labels[::11] = 1
    features = stock_features(EMBEDDED / "distilbert-mini", texts)
    train, test = features[:120], features[120:]
    method = FeaturesMethod(name="features", classifier="random_forest", **settings)
    plain = RandomForestClassifier(
        **settings, class_weight=dict(enumerate(weights)) if isinstance(weights, list) else weights, random_state=3
    ).fit(train, labels[:120])
    head = head_of(train, labels[:120], method, loss=LossSettings(class_weights=weights))
    edges = []
    for tree in plain.estimators_:
        for feature, threshold in zip(tree.tree_.feature, tree.tree_.threshold, strict=True):
            for state in (threshold, np.nextafter(np.float32(threshold), np.float32([-np.inf, np.inf]))):
                for value in np.atleast_1d(state):
                    edge = test[len(edges) % len(test)].copy()
                    edge[max(feature, 0)] = value
                    edges.append(edge)
    for states in (train, test, np.stack(edges[:3000])):
        with torch.no_grad():
            found = head(torch.from_numpy(states)).softmax(-1).numpy()
        # A single state that went the other way would move its row by a leaf's probability over the trees.
        np.testing.assert_allclose(found, plain.predict_proba(states), rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_from_recipe_to_merged_model(
    recipe: Any, pico_cache: PicoFolder, tmp_path: Path, capsys: Any, family: str
) -> None:
    settings, run = recipe(family), tmp_path / "run"
    data = load_data(settings.data)
    assert main(["train", str(tmp_path / "recipe.yaml"), FOREST]) == 0
    assert "refuse to load" in capsys.readouterr().err
    record = json.loads((run / "result.json").read_text())
    assert record["artifact"]["head"] == {
        "pooling": "last" if family == "gpt2" else "first", "n_estimators": 20, "max_depth": 4
    }  # fmt: skip
    stored = load_file(run / "model" / "model.safetensors")
    trees = {name: stored[f"classification_head.{name}"].numpy() for name in ("feature", "threshold", "probability")}
    assert sum(part.nbytes for part in trees.values()) < 4 * 20 * 2**4 * (2 + 3)
    # The naive walk, one node after another, over the states that stock transformers gives.
    texts = data.test.texts.to_pylist()
    states, expected = stock_features(pico_cache(family), texts), np.zeros((len(texts), 3))
    for row, state in enumerate(states):
        for tree in range(20):
            node = 0
            while node < 15:
                right = state[int(trees["feature"][tree, node])] > trees["threshold"][tree, node]
                node = 2 * node + (2 if right else 1)
            expected[row] += trees["probability"][tree, node - 15] / 20
    live = Classifier.load(run)
    found = np.array([list(one.scores.values()) for one in live.predict(texts)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    test = record["metrics"]["test"]
    assert test["accuracy"] == pytest.approx((expected.argmax(1) == data.test.labels).mean())
    assert test["accuracy"] > 0.7
    # Merged: the same model again, told so by the states that its trees are asked about.
    assert main(["merge", str(run), "-o", str(tmp_path / "merged")]) == 0
    assert "pooled states of 9 texts" in capsys.readouterr().out
    assert np.array_equal(Classifier.load(tmp_path / "merged").logits(TEXTS), live.logits(TEXTS))
    assert main(["evaluate", str(tmp_path / "merged"), "--data", str(tmp_path / "data.csv")]) == 0
    assert main(["merge", str(run), "-o", str(tmp_path / "half"), "--dtype", "bf16"]) == 2
    assert "bf16 rounds the numbers of a random forest's features (fp32)" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()
    for folder in (run / "model", tmp_path / "merged"):
        with pytest.raises(ValueError, match="toolkit_"):
            transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    card, page = (run / "README.md").read_text(), (run / "report.html").read_text()
    for text in (card, page):
        assert "random forest on its features became the classification head" in text
        assert "a random forest of 20 trees of depth 4, on the" in text
    assert "Classifier.load" in card


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_a_run_begun_again_is_bit_equal(recipe: Any, tmp_path: Path, family: str) -> None:
    """It keeps no checkpoint: killed behind the fit, or before it, it fits the same trees again."""
    import shutil

    finetune(recipe(family, "data.balance=undersample"))
    run = tmp_path / "run"
    first = load_file(run / "model" / "model.safetensors")
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    finetune(recipe(family, "data.balance=undersample"))
    again = load_file(run / "model" / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    finetune(recipe(family, "data.balance=undersample", "training.seed=5", f"output.dir={tmp_path / 'other'}"))
    other = load_file(tmp_path / "other" / "model" / "model.safetensors")
    assert not torch.equal(first["classification_head.feature"], other["classification_head.feature"])


def test_other_pooling_and_a_decision(recipe: Any, tmp_path: Path) -> None:
    """The forest sees what `model.head.pooling` takes of a text; threshold and temperature are fitted on its logits."""
    more = ("evaluation.threshold=f1", "evaluation.calibrate=true", "model.head={pooling: mean}")
    record = finetune(recipe("gpt2", *more, labels=2))
    assert record["artifact"]["head"]["pooling"] == "mean"
    assert record["metrics"]["test"]["tuned"]["thresholds"].keys() == {"spam"}
    assert np.isfinite(Classifier.load(tmp_path / "run").logits(TEXTS)).all()
    finetune(recipe("gpt2", f"output.dir={tmp_path / 'last'}", labels=2))
    mean, last = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "last"))
    assert not torch.equal(mean["classification_head.threshold"], last["classification_head.threshold"])


def test_nothing_is_unpickled(recipe: Any, tmp_path: Path) -> None:
    heard: list[str] = []
    listening = True
    sys.addaudithook(lambda event, _: heard.append(event) if listening and event.startswith("pickle.") else None)
    finetune(recipe("distilbert", "evaluation.baselines=false"))
    Classifier.load(tmp_path / "run").predict(TEXTS)
    listening = False
    assert heard == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.C=0.5", "method.C: a random forest has no weights to penalise"),
        ("method={name: features, max_depth: 3}", "method.max_depth: logistic regression has no trees"),
        ("method={name: features, n_estimators: 3}", "method.n_estimators: logistic regression has no trees"),
        ("method.max_depth=13", "method.max_depth"),
        ("method.n_estimators=1001", "method.n_estimators"),
        ("model.head={hidden: [8]}", "no layers and no dropout"),
        ("model.head={dropout: 0.5}", "no layers and no dropout"),
        ("training.loss.label_smoothing=0.1", "class weights count alone"),
        ("data.problem_type=multi_label_classification", "give one label to a text"),
        ("quantization={bits: 4}", "quantised weights cannot be trained"),
    ],
)
def test_what_cannot_be_is_refused_by_the_recipe(recipe: Any, override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe("gpt2", override)


def test_a_label_without_rows_is_refused() -> None:
    method = FeaturesMethod(name="features", classifier="random_forest")
    with pytest.raises(DataError, match="1 of 3 labels have no training row"):
        fit_forest(
            np.ones((4, 2), dtype=np.float32), np.array([0, 1, 1, 0]), method, classes=3, loss=LossSettings(), seed=0
        )


@pytest.mark.parametrize("method", ["{name: lora}", "{name: features, classifier: random_forest}", "{name: features}"])
def test_a_forest_is_no_base_to_train_on(recipe: Any, tmp_path: Path, capsys: Any, method: str) -> None:
    finetune(recipe("gpt2", "evaluation.baselines=false"))
    base = [f"model.base={tmp_path / 'run'}", f"output.dir={tmp_path / 'again'}", f"method={method}"]
    for command in ("train", "plan"):
        assert main([command, str(tmp_path / "recipe.yaml"), *base]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert "model.base: has a head of the toolkit's own" in said or "scikit-learn fits features" in said
    assert not (tmp_path / "again").exists()
