"""bitsandbytes storage of frozen weights: capability check, config, preparation, and the weights it really computes."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.config.schema import QuantizationSettings
from toolkit.errors import CapabilityError, Problem
from toolkit.families import Family
from toolkit.models.unpacked import multiply
from toolkit.resident import return_freed_memory

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

DEVICE_TYPES = ("cpu", "cuda")
NOISY_LOGGERS = ("bitsandbytes", "bitsandbytes.autograd._functions")
BLOCK_SIZE = 64


def check_quantization(settings: QuantizationSettings | None, device_type: str) -> None:
    """Refuse a quantised run where it cannot work.

    Args:
        settings: The recipe's `quantization` section; None always passes.
        device_type: ``cpu``, ``cuda`` and so on.

    Raises:
        CapabilityError: bitsandbytes is not installed, or does not serve the device.
    """
    if settings is None:
        return
    field = "quantization.bits"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CapabilityError(
            Problem("", field, f"{settings.bits} needs bitsandbytes", "pip install bitsandbytes, or quantization: null")
        )
    if device_type not in DEVICE_TYPES:
        right = f"a {' or '.join(DEVICE_TYPES)} device, or quantization: null"
        raise CapabilityError(Problem("", field, f"bitsandbytes does not run on {device_type}", right))


def bitsandbytes_config(
    settings: QuantizationSettings, family: Family, compute_dtype: torch.dtype = torch.float32
) -> BitsAndBytesConfig:
    """Return the transformers config that quantises the body and leaves the head alone.

    Args:
        settings: Bits and code.
        family: Its head is skipped (a language model's is its embedding); by default
            transformers would quantise DistilBERT's two head layers.
        compute_dtype: What 4-bit layers multiply in; 8-bit layers follow their input.
    """
    from transformers import BitsAndBytesConfig

    quieten_bitsandbytes()
    # A language model's output layer is its token embedding.
    skip = list(family.head) or ["lm_head"]
    if settings.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quant_type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skip,
    )


def quieten_bitsandbytes() -> None:
    """Keep bitsandbytes' advice (a line per dtype seen) out of the user's terminal."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


class QuantizedLayers:
    """Puts bitsandbytes layers into a model on the meta device and stores their weights one at a time.

    ``from_pretrained`` would map the whole file and hold what it has read of it beside the codes.

    Args:
        model: A classifier without memory; changed in place.
        config: From ``bitsandbytes_config``.
        device: Where its weights will lie.
    """

    def __init__(self, model: PreTrainedModel, config: BitsAndBytesConfig, device: torch.device) -> None:
        from transformers.quantizers import AutoHfQuantizer

        place = {"": device}
        self._model = model
        self._quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
        self._quantizer.validate_environment(device_map=place)
        self._quantizer.preprocess_model(model=model, device_map=place)
        self._operation = self._quantizer.get_quantize_ops()

    def store(self, name: str, value: torch.Tensor) -> torch.Tensor | None:
        """Return what is kept of a weight, or None if it is not quantised."""
        if not self._quantizer.param_needs_quantization(self._model, name):
            return None
        kept: torch.Tensor = self._operation.convert({name: value}, full_layer_name=name, model=self._model)[name]
        # Between the codes, which stay, the heap would keep what whole weights took: 236 MiB of GPT-2.
        return_freed_memory()
        return kept

    def finish(self) -> PreTrainedModel:
        """Return the model as ``from_pretrained`` would: it says that it is quantised; see ``prepare_quantized``."""
        self._model.hf_quantizer = self._quantizer
        self._quantizer.postprocess_model(self._model)
        return prepare_quantized(self._model)


def prepare_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze a quantised model and make its training and evaluation agree.

    peft's `prepare_model_for_kbit_training` is not used: it upcasts the embeddings too, which are the largest
    unquantised part (154 MB of GPT-2's 200 MB), and switches checkpointing on.

    Args:
        model: A model with bitsandbytes layers.

    Returns:
        The same model: every parameter frozen.
    """
    import bitsandbytes as bnb

    model.requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    widest = max((layer.in_features * layer.out_features for layer in layers), default=0)
    for layer in layers:
        own: Any = layer
        if layer.weight.device.type == "cpu":
            # Left to itself an eval forward rounds otherwise than training. 8-bit layers quantise their input too, with
            # outlier columns picked over the whole batch (logits move by 1e-2, and with the batch size), 4-bit ones on
            # AVX512-BF16 repack their weights in place, after which no training step works.
            own.forward = functools.partial(multiply, layer, widest)
        elif isinstance(layer, bnb.nn.Linear4bit):
            own.forward = functools.partial(_forward_4bit, layer)
    return model


def _forward_4bit(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Run a 4-bit layer on a GPU; under autocast in its dtype, forwards and backwards, as any linear layer runs.

    Left to itself it takes the dtype of its input, which behind a norm is float32.
    """
    import bitsandbytes as bnb

    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        plain: torch.Tensor = type(layer).forward(layer, hidden)
        return plain
    dtype = torch.get_autocast_dtype(device)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    product: torch.Tensor = bnb.matmul_4bit(
        hidden.to(dtype), layer.weight, bias=bias, quant_state=layer.weight.quant_state
    )
    return product


def is_quantized(module: nn.Module) -> bool:
    """Return whether a layer's weight is stored by bitsandbytes in 4 or 8 bits."""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """Return the weight a layer really computes with.

    Args:
        module: A bitsandbytes 4- or 8-bit layer, `nn.Linear`, or transformers' `Conv1D`.

    Returns:
        (out, in) float32, detached.
    """
    from transformers.pytorch_utils import Conv1D

    weight: Any = module.weight
    plain: torch.Tensor = weight.detach()
    if isinstance(module, Conv1D):
        return plain.float().T.contiguous()
    if not is_quantized(module):
        return plain.float()
    from bitsandbytes import functional

    if type(weight).__name__ == "Params4bit":
        plain = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        # The scales move from the weight to the layer's state in the first forward.
        state: Any = module.state
        scales = weight.SCB if weight.SCB is not None else state.SCB
        plain = functional.int8_vectorwise_dequant(weight.data, scales)
    return plain.float()


def quantization_roundtrip(
    weight: torch.Tensor, settings: QuantizationSettings, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return a weight as a quantised training run saw it.

    Args:
        weight: (out, in) float32.
        settings: How the run stored it.
        dtype: The dtype the base was loaded in before it was quantised.

    Returns:
        (out, in) float32: quantised and dequantised with bitsandbytes' own kernels.
    """
    from bitsandbytes import functional

    stored = weight.to(dtype).contiguous()
    if settings.bits == 8:
        # Int8Params quantises from fp16.
        codes, scales, _ = functional.int8_vectorwise_quant(stored.to(torch.float16))
        seen: torch.Tensor = functional.int8_vectorwise_dequant(codes, scales)
    else:
        codes, state = functional.quantize_4bit(
            stored, blocksize=BLOCK_SIZE, compress_statistics=settings.double_quant, quant_type=settings.quant_type
        )
        seen = functional.dequantize_4bit(codes, state)
    return seen.float()
