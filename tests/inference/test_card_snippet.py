"""The loading snippet of the model card, run as it stands, gives the toolkit's own answers."""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trained import INT8, LABELS, LORA, MAX_LENGTH, NF4, build_run

from toolkit.config.schema import FullMethod, HeadSettings
from toolkit.export.artifact import ArtifactFacts, find_artifact, write_manifest
from toolkit.inference.predict import Classifier
from toolkit.report.model_card import loading_snippet

PicoFolder = Callable[[str], Path]


def record_of(run: Path) -> Any:
    """The part of result.json that the snippet is made of."""
    artifact = find_artifact(run)
    manifest = artifact.manifest
    return {
        "base": {**manifest.base.model_dump(), "model_type": manifest.model_type},
        "artifact": {
            "kind": artifact.kind,
            "folder": artifact.folder.name,
            "max_length": MAX_LENGTH,
            "head": None if manifest.head is None else manifest.head.model_dump(),
        },
        "data": {"labels": list(LABELS)},
        "quantization": manifest.quantization,
        "problem_type": manifest.problem_type,
        "metrics": {"test": {"calibrated": {"temperature": manifest.temperature}} if manifest.temperature != 1 else {}},
    }


def execute(snippet: str) -> list[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), {})
    return printed.getvalue().splitlines()


# peft's PeftModel reads an attribute that transformers renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize(("quantization", "close"), [(None, 2e-4), (NF4, 2e-2), (INT8, 2e-2)])
def test_adapter(
    family: str,
    quantization: Any,
    close: float,
    pico_cache: PicoFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = build_run(tmp_path / "run", pico_cache(family), method=LORA, quantization=quantization)
    monkeypatch.chdir(run)
    lines = execute(loading_snippet(record_of(run)))
    expected = Classifier.load(run, device="cpu").predict(["A text to classify", "Another one"])
    assert len(lines) == 2
    for line, prediction in zip(lines, expected, strict=True):
        assert line.startswith(prediction.text)
        # Printed to four digits; a stock 4-bit layer computes with bf16 scales on some CPUs.
        assert ast.literal_eval(line.removeprefix(prediction.text)) == pytest.approx(prediction.scores, abs=close)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_fitted_temperature_is_in_the_snippet(
    pico_cache: PicoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(tmp_path / "run", pico_cache("gpt2"), method=LORA)
    facts = find_artifact(run).manifest
    fitted = {name: getattr(facts, name) for name in ArtifactFacts.model_fields} | {"temperature": 2.5}
    write_manifest(run / "adapter", ArtifactFacts(**fitted))
    monkeypatch.chdir(run)
    line = execute(loading_snippet(record_of(run)))[0]
    (prediction,) = Classifier.load(run, device="cpu").predict(["A text to classify"])
    assert ast.literal_eval(line.removeprefix(prediction.text)) == pytest.approx(prediction.scores, abs=2e-4)


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_model(family: str, pico_cache: PicoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run(tmp_path / "run", pico_cache(family), method=FullMethod(name="full"))
    monkeypatch.chdir(run)
    (line,) = execute(loading_snippet(record_of(run)))
    (prediction,) = Classifier.load(run, device="cpu").predict(["A text to classify"])
    found = {score["label"]: score["score"] for score in ast.literal_eval(line)[0]}
    assert found == pytest.approx(prediction.scores, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_other_kinds_of_labels(
    problem_type: str, pico_cache: PicoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's snippet names the kind; the model's pipeline reads it in config.json."""
    for method, family in ((LORA, "gpt2"), (FullMethod(name="full"), "distilbert")):
        run = build_run(tmp_path / family, pico_cache(family), method=method, problem_type=problem_type)
        monkeypatch.chdir(run)
        line = execute(loading_snippet(record_of(run)))[0]
        (prediction,) = Classifier.load(run, device="cpu").predict(["A text to classify"])
        expected = prediction.values if problem_type == "regression" else prediction.scores
        found = ast.literal_eval(line.removeprefix("A text to classify"))
        if method is not LORA:
            found = {score["label"]: score["score"] for score in found[0]}
        assert found == pytest.approx(expected, abs=1e-4)
        assert sum(expected.values()) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("method", [LORA, FullMethod(name="full")], ids=lambda method: method.name)
def test_a_head_of_the_toolkits_own(
    method: Any, pico_cache: PicoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = HeadSettings(pooling="mean", hidden=[16])
    run = build_run(tmp_path / "run", pico_cache("distilbert"), method=method, head=head)
    monkeypatch.chdir(run)
    (line,) = execute(loading_snippet(record_of(run)))
    assert line == str(Classifier.load(run).predict(["A text to classify"]))
