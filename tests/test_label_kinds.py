"""Several labels a text, and numbers, the whole way: trained, resumed, merged, predicted, read by stock libraries."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import pico_cache
from safetensors.torch import load_file

from toolkit.cli import main
from toolkit.config.load import load_recipe
from toolkit.data.pairs import load_rows
from toolkit.errors import RecipeError
from toolkit.evaluation.decision import Decision
from toolkit.evaluation.figures import all_figures
from toolkit.export.merge import merge_adapter
from toolkit.finetune import finetune
from toolkit.inference.evaluate import evaluate
from toolkit.inference.predict import Classifier

__all__ = ["pico_cache"]

SEVERAL, NUMBERS = "multi_label_classification", "regression"
WORDS = {"prize": "free prize", "dinner": "dinner tonight", "call": "call now"}
TEXTS = ["free prize call now", "see you"]


def rows() -> list[tuple[str, list[str]]]:
    """Texts that say in words which labels they have."""
    found = []
    for i in range(80):
        labels = [name for bit, name in enumerate(WORDS) if i >> bit & 1]
        words = ["hey", "you", "see", "we", "are"][i % 5 : i % 5 + 1 + i % 2] + [WORDS[name] for name in labels]
        found.append((f"{' '.join(words)} {i}", labels))
    return found


@pytest.fixture
def recipe_of(tmp_path: Path, pico_cache: Any) -> Any:
    """Return a resolved recipe of a few steps on a pico model, for a kind of labels."""

    def resolved(kind: str, family: str, run: str, *more: str) -> Any:
        data = tmp_path / "data.jsonl"
        if not data.exists():
            lines = [
                {"text": text, "labels": labels, "score": len(labels), **{name: int(name in labels) for name in WORDS}}
                for text, labels in rows()
            ]
            data.write_text("\n".join(map(json.dumps, lines)))
        column = "labels" if kind == SEVERAL else "score"
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"model: {{base: '{pico_cache(family)}', max_length: 32}}\n"
            f"data: {{source: '{data}', problem_type: {kind}, label_column: {column}}}\n"
            "method: {name: lora, r: 4, lora_dropout: 0.0, target_modules: all-linear}\n"
            "training: {max_steps: 60, batch_size: 8, learning_rate: 1e-2}\n"
            "evaluation: {every: 20}\noutput: {save_every: 20, keep: 5, log_every: 5}\n"
        )
        return load_recipe(path, [f"output.dir={tmp_path / run}", *more])

    return resolved


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("kind", [SEVERAL, NUMBERS])
def test_it_learns_and_what_it_leaves_says_what_it_is(recipe_of, tmp_path, kind, family):
    much = ("method={name: full}", "training.learning_rate=3e-3", "training.max_steps=120")
    record = finetune(recipe_of(kind, family, "run", *much))
    run, test = tmp_path / "run", record["metrics"]["test"]
    assert record["problem_type"] == kind
    beside = record["metrics"]["baselines"]
    if kind == SEVERAL:
        assert test["f1_macro"] > beside["majority"]["f1_macro"] + 0.2
        assert test["mean_average_precision"] > 0.8
        assert beside["tfidf_logistic_regression"]["f1_micro"] > 0.5
    else:
        assert test["mae"] < 0.7 * beside["mean"]["mae"]
        assert beside["tfidf_ridge"]["mae"] < beside["mean"]["mae"]
        assert test["loss"] == test["mse"]
    page, card = (run / "report.html").read_text(), (run / "README.md").read_text()
    assert not (run / "confusion.png").exists()
    assert "error" in page
    wanted = {SEVERAL: ("Mean average precision", "micro F1"), NUMBERS: ("Mean absolute error", "| score | **")}[kind]
    assert wanted[0] in page
    assert wanted[1] in card


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("kind", [SEVERAL, NUMBERS])
def test_a_merged_model_answers_alike_in_stock_transformers(recipe_of, tmp_path, kind, family):
    run = tmp_path / "run"
    finetune(recipe_of(kind, family, "run", "training.max_steps=6", "evaluation.baselines=false"))
    report = merge_adapter(run, tmp_path / "merged")
    assert report.parity.max_abs < 1e-4
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["problem_type"] == kind
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    live, merged = Classifier.load(run), Classifier.load(tmp_path / "merged")
    logits = live.logits(TEXTS)
    np.testing.assert_allclose(merged.logits(TEXTS), logits, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        found = stock(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    np.testing.assert_allclose(found, logits, atol=1e-4)
    answers = pipeline("text-classification", model=stock, tokenizer=tokenizer, top_k=None)(TEXTS)
    expected = Decision().probabilities(logits, problem_type=kind)
    names = ["call", "dinner", "prize"] if kind == SEVERAL else ["score"]
    for answer, row, prediction in zip(answers, expected, live.predict(TEXTS), strict=True):
        by_name = {one["label"]: one["score"] for one in answer}
        assert by_name == pytest.approx(dict(zip(names, row, strict=True)), abs=1e-4)
        own = prediction.scores if kind == SEVERAL else prediction.values
        assert own == pytest.approx(by_name, abs=1e-4)
        if kind == SEVERAL:
            assert set(prediction.labels) == {name for name, p in by_name.items() if p >= 0.5}


def test_a_file_is_judged_by_list_or_by_columns(recipe_of, tmp_path, capsys):
    finetune(recipe_of(SEVERAL, "gpt2", "run", "training.max_steps=4"))
    data = str(tmp_path / "data.jsonl")
    by_list = evaluate(tmp_path / "run", data, label_column="labels")
    assert by_list == evaluate(tmp_path / "run", data)
    assert by_list["rows"] == 80
    assert main(["evaluate", str(tmp_path / "run"), "--data", data]) == 0
    shown = capsys.readouterr().out
    assert "average_precision" in shown
    assert "dinner" in shown
    texts = tmp_path / "texts.txt"
    texts.write_text("see you\n")
    assert main(["predict", str(tmp_path / "run"), str(texts)]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"text", "labels", "scores"}
    assert main(["evaluate", str(tmp_path / "run"), "--data", data, "--label-column", "none"]) == 2
    assert "no column 'none'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [SEVERAL, NUMBERS])
def test_token_ids_with_several_columns_behind_them(recipe_of, tmp_path, kind):
    """Rows of an .npy file train as the same rows of texts do, to the last bit, and are judged alike."""
    finetune(recipe_of(kind, "distilbert", "texts", f"data.label_columns={[*WORDS]}", "data.duplicates=allow"))
    texts = Classifier.load(tmp_path / "texts")
    table = texts._tokenizer.encode([text for text, _ in rows()], max_length=32).table
    array = np.zeros((len(table), 32 + len(WORDS)), dtype=np.int32)
    for row, (ids, (_, labels)) in enumerate(zip(table, rows(), strict=True)):
        array[row, : len(ids)] = ids
        array[row, 32:] = [name in labels for name in WORDS]
    np.save(tmp_path / "ids.npy", array)
    source = f"data={{source: '{tmp_path / 'ids.npy'}', problem_type: {kind}, label_columns: {[*WORDS]}}}"
    record = finetune(recipe_of(kind, "distilbert", "ids", source, "data.duplicates=allow"))
    assert_same_weights(tmp_path / "texts" / "adapter", tmp_path / "ids" / "adapter")
    judged = evaluate(tmp_path / "ids", str(tmp_path / "ids.npy"))
    assert judged == evaluate(tmp_path / "texts", str(tmp_path / "data.jsonl"))
    assert judged["rows"] == len(array) > record["metrics"]["test"]["rows"]


@pytest.mark.parametrize("kind", [SEVERAL, NUMBERS])
def test_it_goes_on_bit_equal_with_kept_states(recipe_of, tmp_path, kind):
    """Stopped after 20 of 60 steps."""
    head = ("method={name: last_n, n: 1}",)
    finetune(recipe_of(kind, "distilbert", "plain", *head))
    finetune(recipe_of(kind, "distilbert", "stopped", *head))
    stop_at_first_checkpoint(tmp_path / "stopped")
    finetune(recipe_of(kind, "distilbert", "stopped", *head))
    assert_same_weights(tmp_path / "plain" / "model", tmp_path / "stopped" / "model")


def stop_at_first_checkpoint(run: Path) -> None:
    """Take away what came behind it: the record, the later checkpoints, what was exported."""
    for gone in ("result.json", "report.html"):
        (run / gone).unlink()
    steps = sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    for later in [*steps[1:], *(run / kind for kind in ("adapter", "model") if (run / kind).is_dir())]:
        shutil.rmtree(later)


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare two folders' only weight files bit by bit."""
    held, found = (load_file(next(folder.glob("*.safetensors"))) for folder in (one, other))
    assert held.keys() == found.keys()
    assert all(torch.equal(held[name], found[name]) for name in held)


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ("{name: lora, r: 4, target_modules: all-linear}", "{pooling: mean, hidden: [24], activation: tanh}"),
        ("{name: last_n, n: 1}", "{pooling: max, dropout: 0.2}"),
        ("{name: head}", "{pooling: mean, hidden: [24, 12], activation: gelu}"),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("kind", [SEVERAL, NUMBERS])
def test_a_head_of_its_own_the_whole_way(recipe_of, tmp_path, kind, family, method, head):
    """Trained, resumed bit-equal, saved, loaded, merged and trained on again, whatever it answers with."""
    more = (f"method={method}", f"model.head={head}", "model.max_length=16")
    record = finetune(recipe_of(kind, family, "run", *more))
    run, artifact = tmp_path / "run", record["artifact"]["kind"]
    assert record["artifact"]["head"]["pooling"] in head
    losses = [
        line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]
    assert losses[-1] < losses[0]
    finetune(recipe_of(kind, family, "stopped", *more))
    stop_at_first_checkpoint(tmp_path / "stopped")
    finetune(recipe_of(kind, family, "stopped", *more))
    assert_same_weights(run / artifact, tmp_path / "stopped" / artifact)
    live = Classifier.load(run)
    logits = live.logits(TEXTS)
    assert np.array_equal(Classifier.load(tmp_path / "stopped").logits(TEXTS), logits)
    merge_adapter(run, tmp_path / "merged")
    merged = Classifier.load(tmp_path / "merged")
    np.testing.assert_allclose(merged.logits(TEXTS), logits, atol=1e-4)
    for prediction, row in zip(merged.predict(TEXTS), Decision().probabilities(logits, problem_type=kind), strict=True):
        own = prediction.scores if kind == SEVERAL else prediction.values
        assert list(own.values()) == pytest.approx(row, abs=1e-4)
    # What the run judged, judged anew from its files.
    data = load_rows(recipe_of(kind, family, "run", *more).data, objective="classification")
    again = all_figures(
        live.logits(data.test.texts.to_pylist()), data.test.labels, problem_type=kind, names=live.labels
    )
    assert again["loss"] == pytest.approx(record["metrics"]["test"]["loss"], rel=1e-5)
    # As a base for the same labels it goes on from its head.
    base = (
        f"model.base={tmp_path / 'merged'}",
        "method={name: head}",
        "training.max_steps=1",
        "training.learning_rate=1e-9",
    )
    finetune(recipe_of(kind, family, "again", *base))
    np.testing.assert_allclose(Classifier.load(tmp_path / "again").logits(TEXTS), logits, atol=1e-3)


@pytest.mark.parametrize("kind", [SEVERAL, "single_label_classification"])
def test_a_decision_fitted_on_validation_is_kept_and_applied(recipe_of, tmp_path, kind, capsys):
    """It stands in the manifest, in a merged config, in report and card; predict applies it, logits stay the same."""
    table = tmp_path / "two.csv"
    table.write_text("text,label\n" + "".join(f"{text},{'ham' if labels else 'spam'}\n" for text, labels in rows()))
    wanted = ["evaluation.calibrate=true", "evaluation.threshold=f1", "evaluation.baselines=false"]
    if kind != SEVERAL:
        wanted += [f"data={{source: '{table}'}}", "evaluation.threshold={precision: 0.9}"]
        # Few steps: the threshold then has something to decide.
        wanted += ["training.max_steps=12"]
    record = finetune(recipe_of(SEVERAL, "gpt2", "run", *wanted))
    run, test = tmp_path / "run", record["metrics"]["test"]
    manifest = json.loads((run / "adapter" / "manifest.json").read_text())
    assert manifest["temperature"] == test["calibrated"]["temperature"] != 1
    assert manifest["thresholds"] == test["tuned"]["thresholds"]
    assert set(manifest["thresholds"]) == ({"call", "dinner", "prize"} if kind == SEVERAL else {"spam"})
    assert {"accuracy", "f1_macro", "per_label"} <= test["tuned"].keys() & test.keys()
    judged = load_rows(recipe_of(SEVERAL, "gpt2", "run", *wanted).data, objective="classification").test
    said = Classifier.load(run).predict(judged.texts.to_pylist())
    page = (run / "report.html").read_text()
    assert ("decided at the tuned thresholds" in page) == (test["tuned"]["accuracy"] < 1)
    if kind != SEVERAL:
        with (run / "predictions.csv").open(newline="") as file:
            kept = list(csv.DictReader(file))
        assert [row["predicted"] for row in kept] == [one.label for one in said]
        assert [float(row["probability"]) for row in kept] == pytest.approx(
            [one.scores[one.label] for one in said], abs=1e-5
        )
        right = np.mean([row["predicted"] == row["label"] for row in kept])
        assert right == test["tuned"]["accuracy"] != test["accuracy"]
    merge_adapter(run, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["calibration_temperature"] == manifest["temperature"]
    assert config["decision_thresholds"] == manifest["thresholds"]
    for artifact in (run, tmp_path / "merged"):
        live = Classifier.load(artifact)
        logits = live.logits(TEXTS).astype(np.float64) / manifest["temperature"]
        for row, prediction in zip(logits, live.predict(TEXTS), strict=True):
            odds = 1 / (1 + np.exp(-row)) if kind == SEVERAL else np.exp(row) / np.exp(row).sum()
            assert list(prediction.scores.values()) == pytest.approx(odds)
            given = {name for name, cut in manifest["thresholds"].items() if prediction.scores[name] >= cut}
            assert given == (set(prediction.labels) if kind == SEVERAL else {prediction.label} - {"ham"})
    from transformers import AutoModelForSequenceClassification

    # Stock transformers gives the logits that the merge was proven for.
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert stock.config.decision_thresholds == manifest["thresholds"]
    data = str(table if kind != SEVERAL else tmp_path / "data.jsonl")
    assert evaluate(run, data)["tuned"]["thresholds"] == manifest["thresholds"]
    assert main(["evaluate", str(run), "--data", data]) == 0
    assert "calibrated: temperature" in capsys.readouterr().out
    assert "temperature scaling" in (run / "README.md").read_text()
    assert "thresholds tuned on the validation texts" in (run / "report.html").read_text()


def test_a_decision_needs_rows_and_two_labels(recipe_of, tmp_path):
    table = tmp_path / "three.csv"
    table.write_text("text,label\n" + "".join(f"text {i},{'abc'[i % 3]}\n" for i in range(60)))
    single = f"data={{source: '{table}'}}"
    with pytest.raises(RecipeError, match=r"evaluation.threshold: a threshold parts two labels, not 3"):
        finetune(recipe_of(SEVERAL, "gpt2", "run", single, "evaluation.threshold=f1"))
    split = "data.split={train: 0.8, validation: 0.0, test: 0.2}"
    with pytest.raises(RecipeError, match=r"evaluation.calibrate: there are no validation rows"):
        finetune(recipe_of(SEVERAL, "gpt2", "run", single, split, "evaluation.calibrate=true"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.problem_type=regression", "evaluation.threshold=f1"], "evaluation.threshold: only labels have"),
        (["data.problem_type=regression", "evaluation.calibrate=true"], "evaluation.calibrate: only labels have"),
        (["evaluation.threshold=f2"], "evaluation.threshold"),
        (["evaluation.threshold={precision: 1.5}"], "evaluation.threshold"),
        (["data.label_columns=[a, b]"], "data.label_columns: a text with one label has it in one column"),
        (["data.problem_type=regression", "data.labels=[a, b]"], "data.labels: numbers have no labels"),
        (["data.problem_type=regression", "data.balance=oversample"], "data.balance: rows that have several labels"),
        (["data.problem_type=regression", "training.loss={focal_gamma: 2}"], "training.loss: numbers have no labels"),
        (["data.problem_type=regression", "evaluation.metric=accuracy"], "evaluation.metric: is no metric of this"),
        (["evaluation.metric=r2"], "evaluation.metric: is no metric of this problem_type"),
        (["data.problem_type=regression", "data.label_columns=[a, a]"], "data.labels: a label is listed twice"),
        (
            ["data.problem_type=multi_label_classification", "data.label_columns=[a, b]",
             "training.loss={class_weights: [1, 2, 3]}"],
            "training.loss.class_weights: the number of weights",
        ),
        (["objective=language_modeling", "method={name: full}", "evaluation.metric=loss",
          "data.problem_type=regression"], "data.problem_type: belongs to objective classification"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_kind_is_refused(tmp_path, overrides, said):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {base: gpt2-mini}\ndata: {source: a.csv}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert said in str(caught.value)


def test_regression_is_judged_by_its_loss_unless_told(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {base: gpt2-mini}\ndata: {source: a.csv, problem_type: regression}\n")
    assert load_recipe(path).evaluation.metric == "loss"
    assert load_recipe(path, ["evaluation.metric=r2"]).evaluation.metric == "r2"
