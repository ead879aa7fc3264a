"""A head that stock transformers lacks: it is in the adapter, survives the merge, and stock never loads without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ladder import LADDER
from safetensors.torch import load_file, save_file
from trained import INT8, LABELS, LORA, NF4, build_run

from toolkit.config.schema import FullMethod, HeadMethod, HeadSettings, LastNMethod
from toolkit.errors import AdapterError, ToolkitError
from toolkit.export.artifact import ArtifactFacts, find_artifact, read_manifest, write_manifest
from toolkit.export.merge import merge_adapter
from toolkit.inference.predict import Classifier

PicoFolder = Callable[[str], Path]
FAMILIES = ("gpt2", "distilbert")
TEXTS = ["free prize call now", "see you", "hey are we still on for dinner tonight", ""]
HIDDEN = HeadSettings(pooling="mean", hidden=[24], activation="gelu")
LINEAR = HeadSettings(pooling="max", dropout=0.0)
STORAGE: dict[str, Any] = {"fp32": None, "int8": INT8, "nf4": NF4}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "storage", "head", "bound"),
    [
        (LORA, "fp32", HIDDEN, 1e-5),
        (LORA, "nf4", LINEAR, 1e-4),
        (LORA, "int8", HIDDEN, 5e-2),
        (LADDER["vera"], "fp32", LINEAR, 1e-5),
        (LADDER["ln_tuning"], "fp32", HeadSettings(pooling="first", hidden=[8, 8]), 1e-5),
        (FullMethod(name="full"), "fp32", HIDDEN, 1e-5),
        (HeadMethod(name="head"), "fp32", LINEAR, 1e-5),
        (LastNMethod(name="last_n", n=1), "fp32", HeadSettings(pooling="last", hidden=[7]), 1e-5),
    ],
)
def test_a_merged_model_answers_as_the_live_one(
    pico_cache: PicoFolder, tmp_path: Path, family: str, method: Any, storage: str, head: HeadSettings, bound: float
) -> None:
    run = build_run(tmp_path / "run", pico_cache(family), method=method, quantization=STORAGE[storage], head=head)
    live = Classifier.load(run, device="cpu").logits(TEXTS)
    report = merge_adapter(run, tmp_path / "merged")
    found = Classifier.load(tmp_path / "merged", device="cpu").logits(TEXTS)
    assert np.abs(found - live).max() / max(1.0, np.abs(live).max()) <= bound
    assert report.parity.relative <= report.parity.bound
    assert "the toolkit's own" in str(report)
    artifact, merged = find_artifact(run), read_manifest(tmp_path / "merged")
    assert artifact.manifest.head == merged.head
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == f"toolkit_{family}"
    assert config["architectures"][0].startswith("Toolkit")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in load_file(next(artifact.folder.glob("*.safetensors"))).items():
        if "classification_head" in name:
            assert torch.equal(written[name.removeprefix("base_model.model.")], tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_the_architecture_has_is_merged_into_a_stock_model(
    pico_cache: PicoFolder, tmp_path: Path, family: str
) -> None:
    from transformers import AutoModelForSequenceClassification

    head = HeadSettings(hidden=[] if family == "gpt2" else [64], dropout=0.4)
    run = build_run(tmp_path / "run", pico_cache(family), head=head)
    report = merge_adapter(run, tmp_path / "merged")
    assert "own" not in str(report)
    assert "head" not in json.loads((tmp_path / "merged" / "manifest.json").read_text())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "head_dropout" not in config
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[11, 12, 13]])
    with torch.no_grad():
        expected = Classifier.load(run, device="cpu")._model(input_ids=ids).logits
        torch.testing.assert_close(stock(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def refusals(folder: Path, family: str) -> dict[str, Callable[[], Any]]:
    """Every way in which stock transformers makes a classifier of a folder."""
    import transformers

    explicit = {
        "gpt2": transformers.GPT2ForSequenceClassification,
        "distilbert": transformers.DistilBertForSequenceClassification,
    }[family]
    return {
        "auto": lambda: transformers.AutoModelForSequenceClassification.from_pretrained(folder),
        "class": lambda: explicit.from_pretrained(folder),
        "pipeline": lambda: transformers.pipeline("text-classification", str(folder)),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_refuses_the_model(pico_cache: PicoFolder, tmp_path: Path, family: str) -> None:
    # As wide as the stock head, so that only the guard tells them apart.
    merge_adapter(build_run(tmp_path / "run", pico_cache(family), head=LINEAR), tmp_path / "merged")
    for name, load in refusals(tmp_path / "merged", family).items():
        with pytest.raises((ValueError, RuntimeError)) as caught:
            load()
        assert ("toolkit_" in str(caught.value)) or name == "class"


# peft's PeftModel reads an attribute that transformers renamed, and knows no layer norms.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "ln_tuning", "ia3", "prefix"])
def test_stock_peft_refuses_the_adapter(pico_cache: PicoFolder, tmp_path: Path, family: str, method: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    if method == "prefix" and family == "distilbert":
        pytest.skip("DistilBERT takes no prefix")
    run = build_run(tmp_path / "run", pico_cache(family), method=LADDER[method], head=LINEAR)
    assert np.isfinite(Classifier.load(run, device="cpu").logits(TEXTS)).all()
    stock = AutoModelForSequenceClassification.from_pretrained(pico_cache(family), num_labels=len(LABELS))
    with pytest.raises(ValueError, match=r"Invalid task type: .*load it with toolkit\.Classifier"):
        PeftModel.from_pretrained(stock, run / "adapter")
    # Without that word, as adapters were once written, the toolkit loads it all the same, and stock peft does not.
    path, manifest = run / "adapter" / "adapter_config.json", find_artifact(run).manifest
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}))
    facts = ArtifactFacts(**{name: getattr(manifest, name) for name in ArtifactFacts.model_fields})
    write_manifest(run / "adapter", facts)
    assert np.isfinite(Classifier.load(run, device="cpu").logits(TEXTS)).all()
    # An empty score where a matrix belongs; of DistilBERT's two layers, one that the file lacks.
    with pytest.raises((RuntimeError, KeyError), match=r"size mismatch for .*score|pre_classifier"):
        PeftModel.from_pretrained(stock, run / "adapter")


def test_an_adapter_without_its_own_head_is_refused(pico_cache: PicoFolder, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", pico_cache("gpt2"), head=HIDDEN)
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.classification_head.hidden.0.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = find_artifact(run).manifest
    write_manifest(
        run / "adapter", ArtifactFacts(**{name: getattr(manifest, name) for name in ArtifactFacts.model_fields})
    )
    for act in (lambda: Classifier.load(run), lambda: merge_adapter(run, tmp_path / "merged")):
        with pytest.raises(AdapterError, match="the trained head is absent"):
            act()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("head", [None, HeadSettings(pooling="mean"), HIDDEN.model_copy(update={"hidden": [25]})])
def test_a_manifest_with_another_head_is_refused(
    pico_cache: PicoFolder, tmp_path: Path, head: HeadSettings | None
) -> None:
    run = build_run(tmp_path / "run", pico_cache("distilbert"), head=HIDDEN)
    path = run / "adapter" / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"head": None if head is None else head.model_dump()}))
    with pytest.raises((AdapterError, ToolkitError)):
        Classifier.load(run)
