"""oneDNN against torch's default product: the same numbers to rounding, in every layer and gradient."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from pico import BaseOf, PicoFolder, base_of, pico_cache
from torch import nn
from transformers.pytorch_utils import Conv1D

from toolkit.adapters.apply import apply_method
from toolkit.config.schema import FullMethod, LastNMethod, LoraMethod, QuantizationSettings
from toolkit.models.forward import classify
from toolkit.models.load import load_classifier
from toolkit.models.quantize import is_quantized
from toolkit.training import gemm
from toolkit.training.gemm_choice import remembered_gemm

__all__ = ["base_of", "pico_cache"]

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not gemm._works(), reason="this build of torch lacks oneDNN's linear layer")
METHODS = {
    "full": FullMethod(name="full"),
    "last_n": LastNMethod(name="last_n"),
    "lora": LoraMethod(r=4, target_modules="all-linear", lora_dropout=0.0),
}


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = classify(model, batch)
    functional.cross_entropy(logits, torch.arange(len(logits)) % 2).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6 * largest, msg=name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grow by one with every product that oneDNN makes."""
    made: list[int] = []
    product = gemm._product
    monkeypatch.setattr(gemm, "_product", lambda *arguments: made.append(1) or product(*arguments))
    return made


@needs_onednn
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_both_libraries_give_the_same_logits_and_gradients(
    pico_cache: PicoFolder,
    base_of: BaseOf,
    family: str,
    method: str,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemm, "NARROWEST", 8)
    base = base_of(pico_cache(family))
    model: Any = load_classifier(base, labels=("a", "b"), quantization=None, seed=1, device=CPU)
    model = apply_method(model, METHODS[method], family=base.family, base_name="x", seed=2).eval()
    ids = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([[12], [3], [7], [1]])).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    expected = gradients(model, batch)
    gemm.use_gemm(model, "onednn")
    found = gradients(model, batch)
    assert calls
    compare(found, expected)
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        classify(model, batch)
    gemm.use_gemm(model, "default")
    again = gradients(model, batch)
    assert not calls
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@needs_onednn
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_are_unpacked_are_multiplied_by_either(
    pico_cache: PicoFolder, base_of: BaseOf, bits: int, calls: list[int]
) -> None:
    base = base_of(pico_cache("gpt2"))
    stored = QuantizationSettings.model_validate({"bits": bits})
    model: Any = load_classifier(base, labels=("a", "b"), quantization=stored, seed=1, device=CPU)
    model = apply_method(model, METHODS["lora"], family=base.family, base_name="x", seed=2).eval()
    ids = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = gradients(model, batch)
    gemm.use_gemm(model, "onednn")
    found = gradients(model, batch)
    # Forwards and, but for the first block's, whose input has no gradient, backwards.
    layers = sum(isinstance(module, nn.Linear) and is_quantized(module) for module in model.modules())
    assert layers < len(calls) < 2 * layers
    compare(found, expected)
    gemm.use_gemm(model, "default")
    again = gradients(model, batch)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@needs_onednn
@pytest.mark.parametrize("layer", [Conv1D(96, 64), nn.Linear(64, 96)])
def test_a_weights_gradient_lies_in_memory_as_the_weight_does(layer: Any) -> None:
    """Else it is copied across, element by element, before it is accumulated."""
    model = nn.Sequential(layer)
    hidden = torch.randn(5, 64)
    [expected] = torch.autograd.grad(model(hidden).square().sum(), layer.weight)
    layer.forward = functools.partial(gemm._forward, layer)
    [found] = torch.autograd.grad(model(hidden).square().sum(), layer.weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert found.stride() == layer.weight.stride()


@pytest.mark.parametrize(
    ("method", "alone"), [(METHODS["full"], False), (METHODS["last_n"], True), (LastNMethod(name="last_n", n=2), False)]
)
def test_what_multiplies_a_few_rows_keeps_torchs_library(
    pico_cache: PicoFolder, base_of: BaseOf, method: Any, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "NARROWEST", 8)
    base = base_of(pico_cache("distilbert"))
    model: Any = load_classifier(base, labels=("a", "b"), quantization=None, seed=1, device=CPU)
    model = apply_method(model, method, family=base.family, base_name="x", seed=2)
    gemm.use_gemm(model, "onednn")
    blocks = list(model.get_submodule(base.family.blocks))
    replaced = ["forward" in vars(layer) for layer in (blocks[0].ffn.lin1, blocks[-1].ffn.lin1, model.pre_classifier)]
    assert replaced == [True, not alone, False]


@pytest.mark.parametrize(("gain", "chosen"), [(0.8, "default"), (1.1, "default"), (2.0, "onednn")])
@needs_onednn
def test_the_faster_one_is_chosen_once_for_a_machine(
    gain: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gemm, "measured_gain", lambda: gain)
    assert gemm.choose_gemm("auto", CPU) == chosen
    monkeypatch.setattr(gemm, "measured_gain", lambda: 1 / gain)
    assert gemm.choose_gemm("auto", CPU) == chosen
    assert list(json.loads((tmp_path / "cache" / "gemm.json").read_text()).values()) == [chosen]
    # A plan knows no number of threads.
    assert remembered_gemm() == chosen
    assert remembered_gemm(torch.get_num_threads() + 1) is None
    assert gemm.choose_gemm("onednn", CPU) == "onednn"
    assert gemm.choose_gemm("auto", torch.device("meta")) == "default"


def test_a_damaged_answer_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(gemm, "measured_gain", lambda: 0.5)
    for damage in ("{", "[1]", '{"x": 3}', '{"x": [3]}'):
        (tmp_path / "gemm.json").write_text(damage)
        assert remembered_gemm() is None
        assert gemm.choose_gemm("auto", CPU) == "default"


@needs_onednn
def test_the_measurement_measures() -> None:
    assert 0.05 < gemm.measured_gain() < 50


def test_without_the_operation_the_default_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_works", lambda: False)
    assert gemm.choose_gemm("onednn", CPU) == "default"
