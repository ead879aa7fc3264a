"""Products by quantised weights, unpacked into one piece of memory: those of bitsandbytes, to the bit."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes import nn as bnb

from toolkit.models import unpacked
from toolkit.models.unpacked import multiply, unpack

Tensor = torch.Tensor
# Widths: scales end with a row; scales that belong to two rows; and one whose last piece of rows is shorter.
SHAPES = ((48, 128), (6, 96), (700, 512))


def build(bits: int, shape: tuple[int, int], *, nested: bool = True) -> Any:
    """Return a layer with weights of its own, as a loaded model has them."""
    fan_out, fan_in = shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(fan_out))
    if bits == 4:
        layer = bnb.Linear4bit(fan_in, fan_out, quant_type="nf4", compress_statistics=nested)
        layer.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested)
        layer.weight = layer.weight.to("cpu")
    else:
        layer = bnb.Linear8bitLt(fan_in, fan_out, has_fp16_weights=False)
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        layer.weight = bnb.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    return layer.train()


def run(forward: Any, hidden: Tensor, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return product, and the gradients of input and bias."""
    hidden = hidden.clone().requires_grad_()
    layer.bias.requires_grad_().grad = None
    product = forward(hidden)
    torch.autograd.backward(product.float().square().sum())
    assert hidden.grad is not None
    return product.detach(), hidden.grad, layer.bias.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "nested"), [(8, True), (4, True), (4, False)])
def test_products_and_gradients_are_those_of_bitsandbytes(
    bits: int, nested: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    hidden = torch.randn(9, shape[1], dtype=dtype)
    layer = build(bits, shape, nested=nested)
    layer.bias.data = layer.bias.data.to(dtype)
    found = run(lambda one: multiply(layer, 0, one), hidden, layer)
    expected = run(lambda one: type(layer).forward(layer, one), hidden, layer)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert float(expected[1].abs().sum()) > 0
    # Behind a forward of bitsandbytes 8-bit scales lie elsewhere.
    again = run(lambda one: multiply(layer, 0, one), hidden, layer)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_under_autocast_it_multiplies_in_its_dtype(bits: int) -> None:
    layer, hidden = build(bits, (48, 128)), torch.randn(9, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        product = multiply(layer, 0, hidden)
    weight, bias = unpack(layer, torch.bfloat16).clone(), layer.bias.to(torch.bfloat16)
    assert product.dtype == torch.bfloat16
    assert torch.equal(product, torch.nn.functional.linear(hidden.to(torch.bfloat16), weight, bias))
    torch.autograd.backward(product.sum())
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, (torch.ones_like(product) @ weight).float())


@pytest.mark.parametrize("bits", [8, 4])
def test_no_input_is_held(bits: int) -> None:
    layer, source = build(bits, (48, 128)), torch.randn(9, 128, requires_grad=True)
    hidden = source * 2
    seen = weakref.ref(hidden)
    product = multiply(layer, 0, hidden)
    del hidden
    assert seen() is None
    assert product.requires_grad


def test_all_weights_take_the_same_memory_and_each_thread_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "_own", threading.local())
    small, large = build(4, (48, 128)), build(8, (96, 128))
    first = unpack(small, torch.float32, widest=96 * 128)
    kept = first.clone()
    elsewhere: list[Tensor] = []
    thread = threading.Thread(target=lambda: elsewhere.append(unpack(large, torch.float32)))
    thread.start()
    thread.join()
    assert torch.equal(first, kept)
    second = unpack(large, torch.float32)
    assert second.data_ptr() == first.data_ptr() != elsewhere[0].data_ptr()
    assert torch.equal(second, elsewhere[0])
    assert torch.equal(unpack(small, torch.float32), kept)
