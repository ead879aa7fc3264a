"""A saved model is what stock transformers loads, tokenizer included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from trained import LABELS, train

from toolkit.config.schema import FullMethod, ModelSettings
from toolkit.data.tokenize import load_tokenizer
from toolkit.errors import ModelError
from toolkit.export.model import copy_tokenizer, save_model
from toolkit.models.base import resolve_base
from toolkit.models.load import load_language_model

PicoFolder = Callable[[str], Path]


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_a_classifier_comes_back(family: str, pico_cache: PicoFolder, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = resolve_base(ModelSettings(base=str(pico_cache(family)), max_length=8))
    model = train(base, method=FullMethod(name="full"), quantization=None)
    save_model(model, tmp_path / "model", tokenizer_from=base.path, max_length=8)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert list(loaded.config.id2label.values()) == list(LABELS)
    assert loaded.config.pad_token_id is not None


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_a_language_model_keeps_its_ties(family: str, pico_cache: PicoFolder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    base = resolve_base(ModelSettings(base=str(pico_cache(family)), max_length=8))
    model = load_language_model(base, seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    save_model(model, tmp_path / "model", tokenizer_from=base.path)
    kind = AutoModelForCausalLM if family == "gpt2" else AutoModelForMaskedLM
    loaded, report = kind.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    # And it serves as the base of the next run.
    assert resolve_base(ModelSettings(base=str(tmp_path / "model"), max_length=8)).family == base.family


def test_the_config_tells_no_old_stories(pico_cache: PicoFolder, tmp_path: Path) -> None:
    base = resolve_base(ModelSettings(base=str(pico_cache("gpt2")), max_length=8))
    model = train(base, method=FullMethod(name="full"), quantization=None)
    save_model(model, tmp_path / "m", tokenizer_from=base.path, dtype="bf16", max_length=8)
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert (config["dtype"], config["problem_type"]) == ("bfloat16", "single_label_classification")
    assert not {"_name_or_path", "name_or_path", "use_cache"} & config.keys()
    assert str(pico_cache("gpt2")) not in (tmp_path / "m" / "config.json").read_text(encoding="utf-8")


def test_a_tokenizer_that_is_missing_is_named(pico_cache: PicoFolder, tmp_path: Path) -> None:
    base = resolve_base(ModelSettings(base=str(pico_cache("gpt2")), max_length=8))
    model = train(base, method=FullMethod(name="full"), quantization=None)
    with pytest.raises(ModelError, match="tokenizer: missing"):
        save_model(model, tmp_path / "m", tokenizer_from=tmp_path)


@pytest.mark.parametrize("settings", [None, {}, {"pad_token": None}, {"pad_token": "<pad>"}])
def test_gpt2_gets_a_pad_token(settings: dict[str, str] | None, pico_folder: PicoFolder, tmp_path: Path) -> None:
    source = pico_folder("gpt2")
    if settings is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "out").mkdir()
    copy_tokenizer(source, tmp_path / "out", model_type="gpt2", max_length=17)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["model_max_length"] == 17
    assert written["pad_token"] == ((settings or {}).get("pad_token") or "<|endoftext|>")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_stock_transformers_reads_texts_as_training_did(family: str, pico_cache: PicoFolder, tmp_path: Path) -> None:
    """Stock DistilBERT's class lower-cases; this tokenizer.json does not, and training followed the file."""
    from transformers import AutoTokenizer

    kind: Literal["bpe", "wordpiece"] = "bpe" if family == "gpt2" else "wordpiece"
    texts = ["You are a WINNER", "Grüße, 北京", "", "see you"]
    ours = load_tokenizer(pico_cache(family), kind=kind).encode(texts, max_length=17).table
    copy_tokenizer(pico_cache(family), tmp_path, model_type=family, max_length=17)
    stock = AutoTokenizer.from_pretrained(tmp_path)(texts, truncation=True)
    assert stock["input_ids"] == [ours[row].tolist() for row in range(len(texts))]
    assert set(stock) == {"input_ids", "attention_mask"}
