"""Which library multiplies fp32 matrices on a CPU: torch's default (MKL), or oneDNN where it is measured to be faster.

On some processors oneDNN is twice as fast (an AMD CPU with AVX-512: 150 against 340 GFLOP/s), on others it loses (an
AMD CPU with AVX2: 140 against 120). A short measurement decides, once for each machine. Results differ by rounding.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from toolkit.families import family_of_model
from toolkit.models.cpu_kernels import NARROWEST
from toolkit.models.forward import frozen_blocks, unwrapped
from toolkit.models.packed import PackedLinear
from toolkit.models.quantize import is_quantized
from toolkit.training.gemm_choice import Gemm, remember_gemm, remembered_gemm

logger = logging.getLogger(__name__)

Tensor = torch.Tensor
# Tokens and width of the measured product: a batch of 8 messages, GPT-2's attention.
SHAPE = (192, 768, 768)
REPEATS = 9
# oneDNN has to win by this much: it keeps kernels for every size of batch it meets (``models.cpu_kernels``), 120 MiB
# after 565 steps of LoRA on gpt2-mini, and a measurement may err. Where it won by 1.13, such steps took 93 s, not 116.
MARGIN = 1.2


def choose_gemm(wanted: Literal["auto", "default", "onednn"], device: torch.device) -> Gemm:
    """Return the library for this machine; ``auto`` measures, and remembers the answer in the cache folder.

    The answer is kept, because a run that is repeated or resumed has to round as before.
    """
    if device.type != "cpu" or not _works():
        return "default"
    if wanted != "auto":
        return wanted
    threads = torch.get_num_threads()
    known = remembered_gemm(threads)
    if known is None:
        known = "onednn" if measured_gain() >= MARGIN else "default"
        remember_gemm(known, threads=threads)
    return known


def choose_packing(gemm: Gemm, precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype in which weights are packed for passes without gradients (``models.packed``), or None.

    Only where oneDNN multiplies anyway: by MKL, GPT-2's frozen blocks take 1.27 times as long in float32, and 70 MiB
    less.

    Args:
        gemm: Library of the run's fp32 products.
        precision: What matrices are multiplied in.
        device: Where.
    """
    by_onednn = precision == "bf16" or (precision != "fp16" and gemm == "onednn")
    if device.type != "cpu" or not by_onednn or not _works():
        return None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return dtype if _packs(dtype) else None


def measured_gain() -> float:
    """Return how many times faster oneDNN is, over a forward and a backward product of both layouts of a weight."""
    rows, fan_in, fan_out = SHAPE
    weight, hidden = torch.randn(fan_out, fan_in), torch.randn(rows, fan_in)
    layouts = (weight, weight.T.contiguous().T)
    seconds: dict[str, list[float]] = {"default": [], "onednn": []}
    kernels = {"default": torch.nn.functional.linear, "onednn": _product}
    for _ in range(REPEATS + 2):
        for name, kernel in kernels.items():
            started = time.perf_counter()
            for layout in layouts:
                kernel(kernel(hidden, layout), layout.T)
            seconds[name].append(time.perf_counter() - started)
    # The fastest round of each: what else runs on the machine slows rounds down, and never speeds one up.
    default, onednn = (min(times) for times in seconds.values())
    return default / onednn


def use_gemm(model: nn.Module, gemm: Gemm) -> None:
    """Make a model's linear layers, plain or quantised, multiply by a library; adapters keep their own way.

    So do layers that multiply a few rows: the head, and a classifier's last block where it trains alone. There oneDNN's
    kernels, and the holes they leave, took 265 MiB more for steps that were a fifteenth faster (GPT-2, by tokens).
    """
    core = unwrapped(model)
    core.onednn = gemm == "onednn"
    family = family_of_model(core)
    blocks = list(core.get_submodule(family.blocks).children())
    few = [core.get_submodule(path) for path in family.head]
    if few and family.pools_one and frozen_blocks(model) == len(blocks) - 1:
        few.append(blocks[-1])
    passed = {layer for module in few for layer in module.modules()}
    for layer in model.modules():
        own: Any = layer
        # An adapter shows the weight of the layer that it wraps.
        unpacked = isinstance(layer, nn.Linear) and is_quantized(layer)
        if layer in passed or not (unpacked or type(layer) in (nn.Linear, Conv1D)):
            continue
        # Quantised layers have a forward of their own, which asks for the product (``models.unpacked``).
        name, way = ("product", _product) if unpacked else ("forward", functools.partial(_forward, layer))
        if gemm != "onednn":
            own.__dict__.pop(name, None)
        elif unpacked or min(own.weight.shape) >= NARROWEST:
            setattr(own, name, way)


def _forward(layer: Any, hidden: Tensor) -> Tensor:
    """Run a layer by oneDNN, or as it is where its operands are not fp32 on a CPU."""
    weight, bias = layer.weight, layer.bias
    if hidden.dtype != torch.float32 or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        plain: Tensor = type(layer).forward(layer, hidden)
        return plain
    apply: Any = _Linear.apply
    product: Tensor = apply(hidden, weight.T if isinstance(layer, Conv1D) else weight, bias)
    return product


class _Linear(torch.autograd.Function):
    """``x W^T + b`` and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (..., out) of ``hidden`` (..., in) and ``weight`` (out, in)."""
        # A frozen weight needs no input for its backward pass.
        ctx.save_for_backward(weight, hidden if ctx.needs_input_grad[1] else None)
        return _product(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of input, weight and bias."""
        (gradient,) = gradients
        weight, hidden = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_input = _product(gradient.contiguous(), weight.T) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            rows = hidden.reshape(-1, hidden.shape[-1]).T.contiguous()
            # As the weight itself lies in memory: a Conv1D's gradient that lies across is copied, half of a step.
            across = not weight.is_contiguous()
            to_weight = _product(rows, flat.T.contiguous()).T if across else _product(flat.T.contiguous(), rows)
        return to_input, to_weight, flat.sum(0) if ctx.needs_input_grad[2] else None


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return product


@functools.lru_cache
def _packs(dtype: torch.dtype) -> bool:
    """Return whether build and processor compute with packed weights what they should."""
    # A run's random numbers are drawn as ever.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        layer, hidden = nn.Linear(65, 66), torch.randn(3, 65)
        expected = nn.functional.gelu(layer(hidden), approximate="tanh")
        try:
            if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return False
            found = PackedLinear(layer, dtype, gelu="tanh")(hidden)
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            logger.info("oneDNN's packed weights cannot be used: %s", error)
            return False
    return torch.allclose(found.float(), expected, atol=1e-4 if dtype == torch.float32 else 5e-2)


@functools.lru_cache(maxsize=1)
def _works() -> bool:
    """Return whether this build of torch has the operation, which is not public, and it computes what it should."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    hidden, weight, bias = torch.randn(3, 65), torch.randn(66, 65), torch.randn(66)
    expected = nn.functional.linear(hidden, weight, bias)
    try:
        found = (_product(hidden, weight, bias), _product(hidden, weight.T.contiguous().T, bias))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        logger.info("oneDNN's linear layer cannot be used: %s", error)
        return False
    return all(torch.allclose(one, expected, atol=1e-4) for one in found)
