"""Products by bitsandbytes' weights on a CPU: each is unpacked into the same memory, forwards and again backwards.

bitsandbytes unpacks into a new tensor for every product, and its 8-bit product holds on to its input for the gradient
of a weight, which is frozen. The weights unpacked here have the same bits, and so have products and gradients by the
same library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

Tensor = torch.Tensor
# Bytes unpacked at once, under what ``resident.map_tensors`` gives pages of their own: they pass through the cache.
PIECE = 7 << 17

# A thread has its own: those of a server predict side by side.
_own = threading.local()


def multiply(layer: Any, widest: int, hidden: Tensor) -> Tensor:
    """Run a quantised layer; under autocast in its dtype, in both directions.

    Args:
        layer: A bitsandbytes 4- or 8-bit layer; its ``product``, if it has one, multiplies what is float32
            (``training.gemm``).
        widest: Elements of the largest weight of its model.
        hidden: (..., in).

    Returns:
        (..., out), outside autocast in the dtype of ``hidden``.
    """
    autocast = torch.is_autocast_enabled("cpu")
    own = getattr(layer, "compute_dtype", None) or hidden.dtype
    dtype = torch.get_autocast_dtype("cpu") if autocast else own
    bias = None if layer.bias is None else layer.bias.to(dtype)
    apply: Any = _Product.apply
    product: Tensor = apply(hidden.to(dtype), bias, layer, widest)
    return product if autocast else product.to(hidden.dtype)


class _Product(torch.autograd.Function):
    """``x W^T + b`` and its gradients; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor | None, layer: Any, widest: int) -> Tensor:
        """Return (..., out) of ``hidden`` (..., in)."""
        ctx.layer, ctx.widest = layer, widest
        return _product_of(layer, hidden)(hidden, unpack(layer, hidden.dtype, widest=widest), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of input and bias."""
        (gradient,) = gradients
        to_input = to_bias = None
        if ctx.needs_input_grad[0]:
            weight = unpack(ctx.layer, gradient.dtype, widest=ctx.widest)
            to_input = _product_of(ctx.layer, gradient)(gradient.contiguous(), weight.T)
        if ctx.needs_input_grad[1]:
            to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return to_input, to_bias, None, None


def _product_of(layer: Any, operand: Tensor) -> Callable[..., Tensor]:
    """Return what multiplies (..., in) by the transpose of a weight (out, in), and adds a bias."""
    return getattr(layer, "product", linear) if operand.dtype == torch.float32 else linear


def unpack(layer: Any, dtype: torch.dtype, *, widest: int = 0) -> Tensor:
    """Return the weight that a layer computes with, valid until this thread unpacks the next one.

    Args:
        layer: A bitsandbytes 4- or 8-bit layer on a CPU.
        dtype: float32, bfloat16 or float16.
        widest: Elements to make room for, for those that come later.

    Returns:
        (out, in).
    """
    four = type(layer.weight).__name__ == "Params4bit"
    rows, width = layer.weight.quant_state.shape if four else layer.weight.shape
    room = _room(max(widest, rows * width) * dtype.itemsize)
    weight = room[: rows * width * dtype.itemsize].view(dtype).view(rows, width)
    codes, scales = _four_bit_parts(layer.weight) if four else _eight_bit_parts(layer)
    step = max(PIECE // (width * dtype.itemsize), 1)
    if four:
        state = layer.weight.quant_state
        if width % state.blocksize:
            # A scale belongs to several rows.
            step = rows
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            weight[start:stop] = torch.ops.bitsandbytes.dequantize_4bit(
                codes[start * width // 2 : stop * width // 2],
                scales[start * width // state.blocksize : -(-stop * width // state.blocksize)],
                state.blocksize,
                state.quant_type,
                (stop - start, width),
                dtype,
            )
        return weight
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        weight[piece] = codes[piece].to(dtype).mul_(scales[piece])
    return weight


def _four_bit_parts(weight: Any) -> tuple[Tensor, Tensor]:
    """Return codes (elements / 2) and a float32 scale a block, which may be quantised itself."""
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        outer = state.state2
        kernel = torch.ops.bitsandbytes.dequantize_blockwise
        scales = kernel(scales, outer.absmax, outer.code, outer.blocksize, torch.float32) + state.offset
    codes: Tensor = weight.data.reshape(-1)
    return codes, scales.float()


def _eight_bit_parts(layer: Any) -> tuple[Tensor, Tensor]:
    """Return codes (out, in) and a scale a row (out, 1); scales move from the weight to the layer's state."""
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data, scales.unsqueeze(1).mul(1.0 / 127.0)


def _room(size: int) -> Tensor:
    room: Tensor | None = getattr(_own, "room", None)
    if room is None or len(room) < size:
        # The smaller one goes first.
        _own.room = None
        room = _own.room = torch.empty(size, dtype=torch.uint8)
    return room
