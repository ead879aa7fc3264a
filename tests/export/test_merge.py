"""A merged model is the trained one, for every base and method, and nothing else is ever merged."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import build_pico
from safetensors.torch import load_file, save_file
from trained import INT8, LABELS, LORA, MAX_LENGTH, NF4, build_run, facts_of

from toolkit.adapters.save import load_adapter
from toolkit.config.schema import FullMethod, HeadMethod, LastNMethod, LoraMethod, ModelSettings, QuantizationSettings
from toolkit.errors import AdapterError, InputError, ModelError, OutputError, ToolkitError
from toolkit.export.artifact import find_artifact, read_manifest, write_manifest
from toolkit.export.changes import LoraChange
from toolkit.export.merge import merge_adapter
from toolkit.export.parity import rounding_bound
from toolkit.models.base import resolve_base
from toolkit.models.forward import classify
from toolkit.models.load import load_classifier
from toolkit.models.quantize import dequantized_weight, is_quantized

FAMILIES = ("gpt2", "distilbert")
STORAGE = {"fp32": None, "int8": INT8, "nf4": NF4, "fp4": QuantizationSettings(quant_type="fp4", double_quant=False)}
PicoFolder = Callable[[str], Path]


def random_batch(rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    lengths = torch.randint(2, MAX_LENGTH, (rows,), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": torch.randint(5, 60, mask.shape, generator=generator) * mask, "attention_mask": mask}


def live_model(run: Path) -> Any:
    manifest = read_manifest(run / "adapter")
    base = resolve_base(ModelSettings(base=manifest.base.name_or_path, max_length=MAX_LENGTH))
    quantization = None if manifest.quantization is None else QuantizationSettings(**manifest.quantization)
    model = load_classifier(base, labels=LABELS, quantization=quantization, seed=0, device=torch.device("cpu"))
    return load_adapter(model, run / "adapter")


def stock_logits(folder: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
    return logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("storage", ["fp32", "nf4", "fp4"])
def test_stock_transformers_gives_the_live_logits(
    family: str, storage: str, pico_cache: PicoFolder, tmp_path: Path
) -> None:
    run = build_run(tmp_path / "run", pico_cache(family), quantization=STORAGE[storage])
    report = merge_adapter(run, tmp_path / "merged")
    batch = random_batch()
    with torch.no_grad():
        live = classify(live_model(run), batch)
    found = stock_logits(tmp_path / "merged", batch)
    if storage == "fp32":
        assert float((found - live).abs().max()) <= 1e-5
    assert relative(found, live) <= 1e-4
    assert report.parity.relative <= report.parity.bound
    assert 0 < min(report.phases.values()) < sum(report.phases.values()) < report.seconds
    assert f"(weights {report.phases['weights']:.2f} s, proof {report.phases['proof']:.2f} s)" in str(report)
    assert report.adapted == 2 * (4 if family == "gpt2" else 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_merge_holds_the_weights_that_training_saw(family: str, pico_cache: PicoFolder, tmp_path: Path) -> None:
    """8-bit layers round their activations too, so the weights are compared, and the logits more loosely."""
    run = build_run(tmp_path / "run", pico_cache(family), quantization=INT8)
    report = merge_adapter(run, tmp_path / "merged")
    live = live_model(run)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    compared = 0
    for name, layer in live.base_model.model.named_modules():
        if not name.endswith(".base_layer") or not is_quantized(layer):
            continue
        path = name.removesuffix(".base_layer")
        lora = live.base_model.model.get_submodule(path)
        # peft's own delta, not ours.
        expected = dequantized_weight(layer) + lora.get_delta_weight("default").float()
        stored = merged[f"{path}.weight"].T if family == "gpt2" else merged[f"{path}.weight"]
        torch.testing.assert_close(stored, expected, rtol=0, atol=1e-6)
        compared += 1
    assert compared == report.adapted == 2 * (4 if family == "gpt2" else 6)
    batch = random_batch()
    with torch.no_grad():
        live_logits = classify(live, batch)
    assert relative(stock_logits(tmp_path / "merged", batch), live_logits) < 0.05
    assert report.parity.relative <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_equal_pefts_own_merge_on_fp32(family: str, pico_cache: PicoFolder, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", pico_cache(family))
    merge_adapter(run, tmp_path / "merged")
    expected = live_model(run).merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_changes_the_answer(family: str, pico_cache: PicoFolder, tmp_path: Path) -> None:
    """Without this, a merge that forgets the adapter and a proof that forgets it too would agree."""
    run = build_run(tmp_path / "run", pico_cache(family))
    merge_adapter(run, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(pico_cache(family) / "model.safetensors")
    changed = [name for name in merged if name in base and not torch.equal(merged[name], base[name])]
    assert len(changed) == 2 * (4 if family == "gpt2" else 6)
    head = "score.weight" if family == "gpt2" else "classifier.weight"
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert torch.equal(merged[head], adapter[f"base_model.model.{head}"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [FullMethod(name="full"), HeadMethod(name="head"), LastNMethod(name="last_n", n=1)])
def test_other_methods_are_written_anew(family: str, method: Any, pico_cache: PicoFolder, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", pico_cache(family), method=method)
    report = merge_adapter(run, tmp_path / "merged")
    original, copied = (load_file(f / "model.safetensors") for f in (run / "model", tmp_path / "merged"))
    assert original.keys() == copied.keys()
    assert all(torch.equal(original[name], copied[name]) for name in original)
    # The live model scores the pooled position alone, stock GPT-2 every one: another order of sums.
    assert report.parity.max_abs <= 1e-6
    assert report.adapted == 0


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 0.05), ("fp16", 5e-3)])
def test_half_precision_is_cast_once(dtype: str, bound: float, pico_cache: PicoFolder, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", pico_cache("gpt2"))
    merge_adapter(run, tmp_path / "whole")
    report = merge_adapter(run, tmp_path / "half", dtype=dtype)  # type: ignore[arg-type]
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    for name, tensor in whole.items():
        assert torch.equal(half[name], tensor.to(half[name].dtype))
    assert next(iter(half.values())).dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert 0 < report.parity.relative < bound
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_pipeline_answers(family: str, pico_cache: PicoFolder, tmp_path: Path) -> None:
    from transformers import pipeline

    merge_adapter(build_run(tmp_path / "run", pico_cache(family)), tmp_path / "merged")
    classifier = pipeline("text-classification", str(tmp_path / "merged"), top_k=None)
    texts = ["free prize call now " * 20, "see you"]
    answers = classifier(texts, truncation=True, batch_size=2)
    assert {score["label"] for score in answers[0]} == set(LABELS)
    alone = classifier(texts[1:], truncation=True)
    for together, single in zip(answers[1], alone[0], strict=True):
        assert together["score"] == pytest.approx(single["score"], abs=1e-6)


def test_shards_load_and_hold_the_same(pico_cache: PicoFolder, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", pico_cache("gpt2"))
    merge_adapter(run, tmp_path / "one")
    merge_adapter(run, tmp_path / "many", max_shard_bytes=100_000)
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 2
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == one.keys()
    assert all(torch.equal(together[name], one[name]) for name in one)
    batch = random_batch()
    assert torch.equal(stock_logits(tmp_path / "many", batch), stock_logits(tmp_path / "one", batch))


def test_bases_saved_without_prefix_and_in_half_precision(pico_cache: PicoFolder, tmp_path: Path) -> None:
    """openai-community/gpt2 stores its body without `transformer.`, embedded bases store fp16."""
    base = tmp_path / "bare"
    shutil.copytree(pico_cache("gpt2"), base)
    tensors = load_file(base / "model.safetensors")
    bare = {n.removeprefix("transformer."): t.half() for n, t in tensors.items() if not n.startswith("lm_head")}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    run = build_run(tmp_path / "run", base)
    merge_adapter(run, tmp_path / "merged")
    batch = random_batch()
    with torch.no_grad():
        live = classify(live_model(run), batch)
    assert float((stock_logits(tmp_path / "merged", batch) - live).abs().max()) <= 1e-5


def test_the_manifest_carries_the_proof(pico_cache: PicoFolder, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", pico_cache("gpt2"), quantization=NF4)
    report = merge_adapter(run, tmp_path / "merged")
    manifest = find_artifact(tmp_path / "merged").manifest
    assert (manifest.kind, manifest.quantization, manifest.labels) == ("model", None, list(LABELS))
    assert manifest.merge is not None
    assert manifest.merge["parity"] == report.parity.as_dict()
    assert manifest.merge["quantization"] == NF4.model_dump()
    assert set(manifest.files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert "8 of them merged" in str(report)


def test_twice_is_bit_equal(pico_cache: PicoFolder, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", pico_cache("distilbert"))
    for name in ("a", "b"):
        merge_adapter(run, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


# What must be refused, each with nothing left at the output.


def refused(run: Path, output: Path, error: type[ToolkitError], match: str, **options: Any) -> None:
    before = sorted(output.parent.iterdir())
    with pytest.raises(error, match=match):
        merge_adapter(run, output, **options)
    assert sorted(output.parent.iterdir()) == before


@pytest.fixture
def run(pico_folder: PicoFolder, tmp_path: Path) -> Path:
    return build_run(tmp_path / "run", pico_folder("gpt2"))


def remake_manifest(run: Path) -> None:
    """Make the altered files look untouched, so that the checks behind the hashes are met."""
    folder = run / "adapter"
    manifest = read_manifest(folder)
    base = resolve_base(ModelSettings(base=manifest.base.name_or_path, max_length=MAX_LENGTH))
    write_manifest(folder, facts_of(base, method=LORA.model_dump(), quantization=None, adapter=True))


def test_another_base(run: Path, tmp_path: Path) -> None:
    other = build_pico(tmp_path / "other", "gpt2", seed=1)
    refused(run, tmp_path / "out", AdapterError, "fingerprint sha256:.* has sha256:", base=str(other))


def test_a_base_that_changed_in_one_bit(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "base-gpt2" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    refused(run, tmp_path / "out", AdapterError, "fingerprint")


def test_force_takes_another_base_and_says_so(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = build_pico(tmp_path / "other", "gpt2", seed=1)
    with caplog.at_level(logging.WARNING):
        merge_adapter(run, tmp_path / "out", base=str(other), force=True)
    assert "because of force" in caplog.text
    manifest = find_artifact(tmp_path / "out").manifest
    assert manifest.merge is not None
    assert manifest.merge["base_fingerprint"] != manifest.base.fingerprint


def test_a_base_that_moved(run: Path, tmp_path: Path) -> None:
    (tmp_path / "base-gpt2").rename(tmp_path / "moved")
    refused(run, tmp_path / "out", ModelError, "no such folder")
    merge_adapter(run, tmp_path / "out", base=str(tmp_path / "moved"))


def test_a_flipped_bit_in_the_adapter(run: Path, tmp_path: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)
    refused(run, tmp_path / "out", AdapterError, "altered: sha256")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("score.weight", "head is absent"),
        ("transformer.h.1.mlp.c_fc.lora_A.weight", "half of a LoRA pair"),
    ],
)
def test_missing_tensors_behind_a_right_hash(run: Path, tmp_path: Path, name: str, match: str) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"base_model.model.{name}"]
    save_file(tensors, path)
    remake_manifest(run)
    refused(run, tmp_path / "out", AdapterError, match)


def test_not_a_number_behind_a_right_hash(run: Path, tmp_path: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    remake_manifest(run)
    refused(run, tmp_path / "out", AdapterError, "NaN")


def test_another_alpha_than_the_manifests(run: Path, tmp_path: Path) -> None:
    path = run / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"lora_alpha": 80}))
    remake_manifest(run)
    refused(run, tmp_path / "out", AdapterError, "lora_alpha: is 80")


def test_a_merged_model(run: Path, tmp_path: Path) -> None:
    merge_adapter(run, tmp_path / "merged")
    refused(tmp_path / "merged", tmp_path / "again", AdapterError, "merged already")


def test_an_output_that_exists_or_lies_inside(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    refused(run, tmp_path / "full", OutputError, "exists already")
    refused(run, run / "merged", OutputError, "lies inside the input")
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_too_large_for_fp16(pico_folder: PicoFolder, tmp_path: Path) -> None:
    base = pico_folder("gpt2")
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = build_run(tmp_path / "run", base)
    refused(run, tmp_path / "out", ToolkitError, "ln_f.bias: not finite as F16", dtype="fp16")


def test_a_merge_that_goes_wrong_is_caught(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LoraChange.apply
    monkeypatch.setattr(LoraChange, "apply", lambda self, leaf, base, own: 1.05 * plain(self, leaf, base, own))
    refused(run, tmp_path / "out", ToolkitError, "differs from the live one")


def test_a_tokenizer_that_stock_reads_differently(pico_folder: PicoFolder, tmp_path: Path) -> None:
    base = pico_folder("distilbert")
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "DistilBertTokenizer"}')
    refused(build_run(tmp_path / "run", base), tmp_path / "out", ToolkitError, "give other tokens than in training")


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10, 10, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refused(run, tmp_path / "out", InputError, "1,000 bytes free")


def test_one_tensor_at_a_time(pico_cache: PicoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the weights are written, no tensor of an earlier name is alive."""
    import weakref

    from toolkit.export import weights

    alive: list[int] = []
    references: list[weakref.ref[torch.Tensor]] = []
    original = weights.MergedWeights.read

    def read(self: weights.MergedWeights, name: str) -> torch.Tensor:
        alive.append(sum(reference() is not None for reference in references))
        tensor = original(self, name)
        references.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(weights.MergedWeights, "read", read)
    merge_adapter(build_run(tmp_path / "run", pico_cache("gpt2")), tmp_path / "merged")
    assert len(alive) > 20
    assert max(alive) <= 1


def test_a_real_encoder_in_4_bits(minilm: Path, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", minilm, method=LoraMethod(), quantization=NF4)
    report = merge_adapter(run, tmp_path / "merged")
    assert report.parity.live_relative <= 1e-4
    assert np.isfinite(report.parity.max_abs)


def test_the_bound_of_rounding_grows_with_the_root_of_the_depth() -> None:
    assert [rounding_bound("bf16", blocks=blocks) for blocks in (6, 12, 48)] == [0.1, 0.1, 0.2]
