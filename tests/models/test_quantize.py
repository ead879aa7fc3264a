from __future__ import annotations

import importlib.util
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from pico import BaseOf, Batch, PicoFolder
from safetensors.torch import load_file
from torch import nn

from toolkit.config.schema import QuantizationSettings
from toolkit.errors import CapabilityError
from toolkit.models.base import Base
from toolkit.models.forward import CLASSIFIERS, classify
from toolkit.models.load import load_classifier
from toolkit.models.quantize import (
    bitsandbytes_config,
    check_quantization,
    dequantized_weight,
    is_quantized,
    prepare_quantized,
    quantization_roundtrip,
)

CPU = torch.device("cpu")
FAMILY_NAMES = ["gpt2", "distilbert"]
MODES = {
    "nf4": QuantizationSettings(),
    "fp4": QuantizationSettings(quant_type="fp4", double_quant=False),
    "int8": QuantizationSettings(bits=8),
}


def load(base: Base, quantization: QuantizationSettings | None, **more: Any) -> Any:
    return load_classifier(base, labels=("ham", "spam"), quantization=quantization, seed=1, device=CPU, **more)


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> QuantizationSettings:
    return MODES[request.param]


@pytest.fixture(params=FAMILY_NAMES)
def base(request: pytest.FixtureRequest, pico_cache: PicoFolder, base_of: BaseOf) -> Base:
    return base_of(pico_cache(request.param))


def quantized_names(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if is_quantized(module)}


def test_exactly_the_linear_layers_of_the_blocks_are_quantised(base: Base, mode: QuantizationSettings) -> None:
    model = load(base, mode)
    names = {name for name, _ in model.named_modules()}
    expected = {
        name
        for name in names
        if name.startswith(base.family.blocks) and name.endswith(tuple(f".{suffix}" for suffix in base.family.linear))
    }
    assert len(expected) == 2 * len(base.family.linear)
    assert quantized_names(model) == expected
    for path in base.family.head:
        head = model.get_submodule(path)
        assert type(head) is nn.Linear
        assert head.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_layers_stored_one_by_one_are_those_of_from_pretrained(
    base: Base, mode: QuantizationSettings, batch: Batch
) -> None:
    ours, by_the_way = load(base, mode), load(base, mode, streamed=0)
    stock = CLASSIFIERS[base.family.model_type].from_pretrained(
        base.path,
        num_labels=2,
        pad_token_id=ours.config.pad_token_id,
        quantization_config=bitsandbytes_config(mode, base.family),
        device_map={"": CPU},
    )
    theirs = stock.state_dict()
    body = {name: value for name, value in ours.state_dict().items() if not name.startswith(base.family.head)}
    assert len(body) > 20
    assert set(ours.state_dict()) == set(theirs)
    assert all(torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype for name, value in body.items())
    for model in (ours, by_the_way):
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"):
            assert getattr(model, name, None) == getattr(stock, name, None), name
        assert model.config.quantization_config.to_dict() == stock.config.quantization_config.to_dict()
    head = {name: value for name, value in ours.state_dict().items() if name not in body}
    stock.load_state_dict(head, strict=False)
    with torch.no_grad():
        expected = classify(ours, batch)
        assert torch.equal(classify(by_the_way, batch), expected)
        assert torch.equal(classify(prepare_quantized(stock).eval(), batch), expected)


def test_the_weights_it_computes_with_are_the_roundtrip_of_the_bases(base: Base, mode: QuantizationSettings) -> None:
    model = load(base, mode)
    stored = load_file(base.path / "model.safetensors")
    for name in quantized_names(model):
        weight = stored[f"{name}.weight"]
        weight = weight.T if base.family.fan_in_fan_out else weight
        seen = quantization_roundtrip(weight, mode)
        assert torch.equal(dequantized_weight(model.get_submodule(name)), seen)
        error = ((seen - weight).norm() / weight.norm()).item()
        assert 0 < error < (0.02 if mode.bits == 8 else 0.15)


def test_the_output_of_a_layer_is_that_of_its_dequantised_weight(base: Base, mode: QuantizationSettings) -> None:
    model = load(base, mode)
    name = sorted(quantized_names(model))[0]
    layer = model.get_submodule(name)
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = nn.functional.linear(x, dequantized_weight(layer), layer.bias)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
        # after a forward the 8-bit scales lie elsewhere
        torch.testing.assert_close(nn.functional.linear(x, dequantized_weight(layer), layer.bias), expected)


def test_training_and_evaluation_agree_and_can_alternate(base: Base, mode: QuantizationSettings, batch: Batch) -> None:
    model = load(base, mode)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.get_submodule(base.family.head[-1]).requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)

    def evaluated() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return classify(model, batch)

    before = evaluated()
    model.train()
    trained = classify(model, batch)
    torch.autograd.backward(trained.square().sum())
    assert torch.equal(trained.detach(), before)
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert torch.equal(evaluated(), before)
    assert torch.equal(classify(model.train(), batch).detach(), before)


def test_a_row_does_not_depend_on_its_batch(base: Base, mode: QuantizationSettings, batch: Batch) -> None:
    model = load(base, mode)
    with torch.no_grad():
        together = classify(model, batch)
        for i in range(4):
            alone = classify(model, {key: value[i : i + 1] for key, value in batch.items()})
            torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=1e-5)


def test_a_cpu_that_could_repack_the_weights_leaves_them(
    base: Base, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load(base, MODES["nf4"]).eval()
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    codes = [layer.weight.data.clone() for layer in layers]
    with torch.no_grad():
        classify(model, batch)
    for layer, before in zip(layers, codes, strict=True):
        assert torch.equal(layer.weight.data, before)
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_embeddings_keep_the_dtype_they_were_loaded_in(base: Base) -> None:
    model = load(base, MODES["nf4"], dtype=torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {model.get_submodule(path).weight.dtype for path in base.family.head} == {torch.float32}


def test_plain_layers_are_given_as_out_in() -> None:
    from transformers.pytorch_utils import Conv1D

    linear, conv = nn.Linear(3, 5), Conv1D(5, 3)
    assert torch.equal(dequantized_weight(linear), linear.weight.detach())
    assert torch.equal(dequantized_weight(conv), conv.weight.detach().T)


def test_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = QuantizationSettings()
    check_quantization(None, "mps")
    check_quantization(settings, "cpu")
    with pytest.raises(CapabilityError, match=r"quantization.bits: bitsandbytes does not run on mps"):
        check_quantization(settings, "mps")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match="4 needs bitsandbytes"):
        check_quantization(settings, "cpu")


def test_a_4_bit_layer_follows_autocast_both_ways(base: Base) -> None:
    model = load(base, MODES["nf4"])
    for name in sorted(quantized_names(model)):
        layer = model.get_submodule(name)
        weight, bias = dequantized_weight(layer), layer.bias.clone()
        chance = torch.Generator().manual_seed(0)
        x, slope = (torch.randn(7, width, generator=chance) for width in (layer.in_features, layer.out_features))
        results = []
        for run in (layer, lambda x, weight=weight, bias=bias: nn.functional.linear(x, weight, bias)):
            given = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                output = run(given)
            (output.float() * slope).sum().backward()
            results.append((output.detach(), given.grad))
        (ours, ours_back), (plain, plain_back) = results
        assert ours.dtype == plain.dtype == torch.bfloat16
        # One rounding of bf16 apart at most: the products are summed in another order.
        torch.testing.assert_close(ours, plain, rtol=2**-7, atol=2**-8)
        torch.testing.assert_close(ours_back, plain_back, rtol=2**-7, atol=2**-8)
        # bitsandbytes would leave the bias rounded.
        assert torch.equal(layer.bias, bias)
