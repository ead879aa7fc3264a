"""Predictions are those of the trained model, whatever the batches, the order and the form it is kept in."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import run as run_process
from typing import Any

import numpy as np
import pytest
import torch
from pico import build_pico
from trained import INT8, LABELS, MAX_LENGTH, NF4, build_run

from toolkit.config.methods import Ia3Method
from toolkit.config.schema import FullMethod, LoraMethod, ModelSettings, QuantizationSettings
from toolkit.data.tokens import TokenTable
from toolkit.errors import AdapterError, DataError
from toolkit.export.artifact import ArtifactFacts, read_manifest, write_manifest
from toolkit.export.merge import merge_adapter
from toolkit.export.model import save_model
from toolkit.inference.predict import CHUNK_BATCHES, Classifier, predict_lines
from toolkit.models.base import resolve_base
from toolkit.models.load import load_language_model
from toolkit.models.packed import PackedLinear
from toolkit.training.gemm import choose_packing

needs_bf16 = pytest.mark.skipif(
    choose_packing("default", "bf16", torch.device("cpu")) is None, reason="this processor does not multiply bf16"
)
REPOSITORY = Path(__file__).resolve().parents[2]
PicoFolder = Callable[[str], Path]
WORDS = ["you", "are", "a", "winner", "of", "cash", "hey", "on", "for", "dinner", "free", "prize", "call", "see"]


def texts(count: int = 40) -> list[str]:
    rng = np.random.default_rng(2)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count)]


def scores(classifier: Classifier, found: list[str], **options: int) -> np.ndarray:
    predictions = classifier.predict(found, **options)
    assert [prediction.text for prediction in predictions] == found
    return np.array([list(prediction.scores.values()) for prediction in predictions])


@pytest.fixture
def classifier(pico_cache: PicoFolder, tmp_path: Path) -> Classifier:
    return Classifier.load(build_run(tmp_path / "run", pico_cache("gpt2")), device="cpu")


# peft's PeftModel reads an attribute that transformers renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("quantization", [None, NF4])
def test_stock_peft_gives_the_same(
    family: str, quantization: QuantizationSettings | None, pico_cache: PicoFolder, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

    base = pico_cache(family)
    run = build_run(tmp_path / "run", base, quantization=quantization)
    found = scores(Classifier.load(run, device="cpu"), texts())
    tokenizer = AutoTokenizer.from_pretrained(base)
    if family == "gpt2":
        tokenizer.pad_token = "<|endoftext|>"
    stored = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["score", "pre_classifier", "classifier"],
    )
    options = {} if quantization is None else {"quantization_config": stored}
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(LABELS), pad_token_id=tokenizer.pad_token_id, dtype=torch.float32, **options
    )
    for module in model.modules():
        # See models/quantize.py: an AVX512-BF16 machine would repack the weights.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, run / "adapter").eval()
    batch = tokenizer(texts(), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_batches_and_order_do_not_matter(batch_size: int, classifier: Classifier) -> None:
    rows = texts()
    expected = scores(classifier, rows, batch_size=5)
    np.testing.assert_allclose(scores(classifier, rows, batch_size=batch_size), expected, atol=1e-6)
    np.testing.assert_allclose(scores(classifier, rows[::-1], batch_size=batch_size)[::-1], expected, atol=1e-6)


@pytest.mark.parametrize("quantization", [None, NF4])
def test_run_adapter_and_merged_model_agree(
    quantization: QuantizationSettings | None, pico_cache: PicoFolder, tmp_path: Path
) -> None:
    run = build_run(tmp_path / "run", pico_cache("distilbert"), quantization=quantization)
    merge_adapter(run, tmp_path / "merged")
    places = (run, run / "adapter", tmp_path / "merged")
    first, *others = (scores(Classifier.load(place, device="cpu"), texts()) for place in places)
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)
    # The texts are told apart at all.
    assert np.ptp(first, axis=0).max() > 0.01


def test_int8_and_full_runs_load(pico_cache: PicoFolder, tmp_path: Path) -> None:
    for name, options in {"int8": {"quantization": INT8}, "full": {"method": FullMethod(name="full")}}.items():
        run = build_run(tmp_path / name, pico_cache("gpt2"), **options)  # type: ignore[arg-type]
        assert np.isfinite(scores(Classifier.load(run, device="cpu"), texts(3))).all()


# Whether a run's base is only multiplied: then its weights may lie in memory otherwise.
in_every_form = pytest.mark.parametrize(
    ("options", "multiplied"),
    [
        ({}, True),
        ({"method": LoraMethod(name="lora", r=4, target_modules="all-linear")}, True),
        ({"method": FullMethod(name="full")}, True),
        ({"method": LoraMethod(name="lora", r=4, variant="dora", target_modules="all-linear")}, False),
        ({"method": Ia3Method(name="ia3")}, False),
        ({"quantization": NF4}, False),
    ],
    ids=["lora", "all layers", "full", "dora", "ia3", "4 bits"],
)


@in_every_form
@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_bf16_rounds_weights_once_and_answers_as_autocast_does(
    options: dict[str, Any],
    multiplied: bool,
    family: str,
    pico_cache: PicoFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As on a processor that does not multiply bf16.
    monkeypatch.setattr("toolkit.training.gemm.choose_packing", lambda *_: None)
    run = build_run(tmp_path / "run", pico_cache(family), **options)
    plain, low = (Classifier.load(run, device="cpu", precision=one) for one in ("fp32", "bf16"))
    assert (low.precision, plain.precision) == ("bf16", "fp32")
    halves = [weight for weight in low._model.parameters() if weight.dtype == torch.bfloat16]
    assert bool(halves) == multiplied
    exact = plain.logits(texts())
    plain.precision = "bf16"
    assert np.array_equal(low.logits(texts()), plain.logits(texts()))
    # One text of forty may lie where rounding weighs much: 0.14 of the largest logit was seen.
    assert 0 < np.abs(low.logits(texts()) - exact).mean() < 0.02 * np.abs(exact).max()


@needs_bf16
@in_every_form
@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_packed_weights_give_the_bits_of_autocast_and_with_gelu_no_worse_ones(
    options: dict[str, Any],
    multiplied: bool,
    family: str,
    pico_cache: PicoFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = build_run(tmp_path / "run", pico_cache(family), **options)
    # Where oneDNN wins, weights are packed in fp32, too, and autocast does not reach them.
    monkeypatch.setattr("toolkit.training.gemm.choose_gemm", lambda *_: "default")
    plain, fused = (Classifier.load(run, device="cpu", precision=one) for one in ("fp32", "bf16"))
    with monkeypatch.context() as patch:
        patch.setattr("toolkit.models.packed.GELU", {})
        low = Classifier.load(run, device="cpu", precision="bf16")
    assert any(isinstance(layer, PackedLinear) for layer in low._model.modules()) == multiplied
    exact = plain.logits(texts())
    plain.precision = "bf16"
    twin = plain.logits(texts())
    assert np.array_equal(low.logits(texts()), twin)
    assert np.abs(fused.logits(texts()) - exact).max() < max(2 * np.abs(twin - exact).max(), 1e-6)


def test_labels_and_scores(classifier: Classifier) -> None:
    assert classifier.labels == LABELS
    for prediction in classifier.predict(texts(5)):
        assert tuple(prediction.scores) == LABELS
        assert sum(prediction.scores.values()) == pytest.approx(1)
        assert prediction.label == max(prediction.scores, key=lambda label: prediction.scores[label])


def test_no_texts_and_empty_texts(classifier: Classifier) -> None:
    assert classifier.predict([]) == []
    rows = ["", "see you", "", "free prize"]
    together = scores(classifier, rows)
    np.testing.assert_allclose(together, np.concatenate([scores(classifier, [row]) for row in rows]), atol=1e-6)
    assert np.isfinite(together).all()


def test_text_beyond_the_length_is_cut(classifier: Classifier) -> None:
    long = "see you " * 200
    np.testing.assert_allclose(scores(classifier, [long]), scores(classifier, [long + "free prize"]))


def test_a_stream_is_answered_as_it_comes(classifier: Classifier) -> None:
    taken = 0

    def source() -> Iterator[str]:
        nonlocal taken
        for text in texts(60):
            taken += 1
            yield text

    stream = classifier.predict_stream(source(), batch_size=1)
    next(stream)
    assert taken == CHUNK_BATCHES
    assert len(list(stream)) == 59
    assert [p.text for p in classifier.predict_stream(texts(60), batch_size=3)] == texts(60)


def test_token_ids_are_checked(classifier: Classifier) -> None:
    table = TokenTable.from_lengths(np.array([5, 7, 99_999], dtype=np.int32), np.array([2, 1]))
    with pytest.raises(DataError, match="outside the vocabulary"):
        classifier.table_logits(table)


def test_lines_of_a_pipe(pico_cache: PicoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run(tmp_path / "run", pico_cache("gpt2"))
    feed(monkeypatch, "\ufefffree prize\r\nGrüße 北京\nno newline at the end".encode())
    lines = [json.loads(line) for line in predict_lines(run, "-", device="cpu")]
    assert [line["text"] for line in lines] == ["free prize", "Grüße 北京", "no newline at the end"]
    assert set(lines[0]) == {"text", "label", "scores"}


def test_lines_of_a_file(pico_cache: PicoFolder, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", pico_cache("gpt2"))
    (tmp_path / "a.csv").write_text('body,n\n"NA, or ""null""",1\n007,2\n')
    lines = [json.loads(line) for line in predict_lines(run, str(tmp_path / "a.csv"), text_column="body", device="cpu")]
    assert [line["text"] for line in lines] == ['NA, or "null"', "007"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "stdin: is empty (a text a line)"),
        (b"\n", "stdin:1: text: the text is empty (a text in every row)"),
        (b"ok\n\xff\xfe\n", "stdin:2: not UTF-8 at byte 0 (UTF-8 text)"),
        (b"ok\nhalf\0\n", "stdin:2: text: a NUL character (text without NUL)"),
    ],
)
def test_bad_pipes_name_their_line(
    content: bytes, message: str, pico_cache: PicoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(tmp_path / "run", pico_cache("gpt2"))
    feed(monkeypatch, content)
    with pytest.raises(DataError) as caught:
        list(predict_lines(run, "-", device="cpu"))
    assert str(caught.value) == message


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_an_altered_adapter_or_base_is_refused(pico_folder: PicoFolder, tmp_path: Path) -> None:
    base = pico_folder("gpt2")
    run = build_run(tmp_path / "run", base)
    shutil.rmtree(base)
    build_pico(base, "gpt2", seed=1)
    with pytest.raises(AdapterError, match="fingerprint"):
        Classifier.load(run, device="cpu")
    with (run / "adapter" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(AdapterError, match="altered"):
        Classifier.load(run, device="cpu")


def test_a_language_model_is_refused(pico_cache: PicoFolder, tmp_path: Path) -> None:
    base = resolve_base(ModelSettings(base=str(pico_cache("gpt2")), max_length=8))
    language_model = load_language_model(base, seed=0, device=torch.device("cpu"))
    save_model(language_model, tmp_path / "run" / "model", tokenizer_from=base.path)
    classifies = build_run(tmp_path / "other", pico_cache("gpt2"), method=FullMethod(name="full"))
    facts = {name: getattr(read_manifest(classifies / "model"), name) for name in ArtifactFacts.model_fields}
    write_manifest(tmp_path / "run" / "model", ArtifactFacts(**(facts | {"labels": []})))
    with pytest.raises(AdapterError, match="a language model does not classify"):
        Classifier.load(tmp_path / "run", device="cpu")


def test_wrong_inputs_are_refused_without_torch() -> None:
    code = (
        "import sys\n"
        "from toolkit.errors import InputError\n"
        "from toolkit.inference.evaluate import evaluate\n"
        "from toolkit.inference.predict import Classifier, predict_lines\n"
        "for attempt in (lambda: Classifier.load('none'), lambda: evaluate('none', 'x.csv'),\n"
        "                lambda: list(predict_lines('none', 'none.txt'))):\n"
        "    try:\n"
        "        attempt()\n"
        "    except InputError:\n"
        "        continue\n"
        "    sys.exit(3)\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    assert run_process([sys.executable, "-c", code], check=False, cwd=REPOSITORY).returncode == 0
