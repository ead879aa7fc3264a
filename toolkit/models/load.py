"""Loads a base as a sequence classifier or a language model: every tensor accounted for, the head seeded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.config.schema import HeadSettings, ProblemType, QuantizationSettings
from toolkit.families import OWN_HEAD, Family, language_family
from toolkit.models.base import Base
from toolkit.models.frozen import FrozenWeights
from toolkit.models.headers import parse_json
from toolkit.models.heads import own_head, plain_config
from toolkit.models.quantize import QuantizedLayers, bitsandbytes_config, check_quantization
from toolkit.models.stored import StoredTensors, check_finite
from toolkit.models.streamed import load_body, load_head, stream_blocks
from toolkit.models.tensors import check_tensors, has_head

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GPT2_PAD = 50256
# Where a config keeps the dropout of a head that the architecture has itself; GPT-2's has no place for it.
HEAD_DROPOUT = {"gpt2": "head_dropout", "distilbert": "seq_classif_dropout"}


def load_classifier(
    base: Base,
    *,
    labels: tuple[str, ...],
    problem_type: ProblemType = "single_label_classification",
    quantization: QuantizationSettings | None,
    seed: int,
    random_init: bool = False,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    streamed: int | None = None,
    frozen_later: bool = False,
) -> PreTrainedModel:
    """Load a base as a sequence classifier in eval mode.

    The head comes from the base only if the base was trained for the same labels in the same order, and of the same
    kind; otherwise it is drawn from `seed` alone (normal, std `initializer_range`; zero bias). The global random state
    is left untouched.

    Args:
        base: From `resolve_base`.
        labels: Label names in id order.
        problem_type: What the labels are; config.json says it to stock transformers.
        quantization: How frozen weights are stored, or None.
        seed: Of the head, and of every weight with `random_init`.
        random_init: Take only the base's shape.
        device: Where the model is put.
        dtype: Of the body's unquantised weights; the head is always float32.
        compute_dtype: What 4-bit layers multiply in; None: `dtype`.
        streamed: Blocks, from the first, whose weights stay in the base's files (`models.streamed`), as does the token
            embedding; for float32 alone, without `random_init`; 0 with quantised blocks. None: the whole model is in
            memory.
        frozen_later: Whether linear weights of the blocks are left for `model.frozen` to load, once a method has been
            applied; for float32 alone, without `random_init` and quantisation.

    Returns:
        The classifier; `name_or_path` is `base.name_or_path`, `use_cache` is off, a pad token is set.

    Raises:
        ModelError: Tensors are missing, unexpected, of the wrong shape or not finite.
        CapabilityError: The quantisation cannot run on the device.
    """
    from toolkit.models.forward import CLASSIFIERS

    check_quantization(quantization, device.type)
    config = classifier_config(base, labels=labels, problem_type=problem_type)
    model_class: Any = CLASSIFIERS[base.family.model_type]
    keeps_head = not random_init and _same_labels(base, config) and has_head(base)
    with quiet_transformers(), torch.random.fork_rng(devices=_cuda_devices()):
        if random_init:
            model = _random(model_class, config, seed=seed, dtype=dtype).to(device)
        else:
            model = _meta(model_class, config)
            check_tensors(base, model, head=keeps_head)
            check_finite(base.path)
            stored = StoredTensors(base.path, base.family)
            layers = None
            if quantization is not None:
                settings = bitsandbytes_config(quantization, base.family, compute_dtype or dtype)
                layers = QuantizedLayers(model, settings, device)
            if streamed is not None:
                stream_blocks(model, stored, family=base.family, count=streamed, device=device)
            if frozen_later:
                model.frozen = FrozenWeights(model, stored, family=base.family, device=device)
            store = None if layers is None else layers.store
            load_body(model, stored, family=base.family, device=device, dtype=dtype, store=store)
            load_head(model, stored if keeps_head else None, family=base.family, device=device)
            if layers is not None:
                layers.finish()
    if not keeps_head:
        seed_head(model, base.family, seed=seed)
    for path in base.family.head:
        model.get_submodule(path).float()
    return _finish(model, base)


def load_language_model(
    base: Base,
    *,
    quantization: QuantizationSettings | None = None,
    seed: int,
    random_init: bool = False,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load a base with its language-modelling head: causal for GPT-2, masked for DistilBERT.

    A masked head that the base lacks is drawn from `seed`.

    Args:
        base: From `resolve_base`.
        quantization: How frozen weights of GPT-2's blocks are stored, or None; not with `random_init`.
        seed: Of weights that the base does not hold.
        random_init: Take only the base's shape.
        device: Where the model is put.
        dtype: Of all weights.

    Returns:
        `GPT2LMHeadModel` or `DistilBertForMaskedLM` in eval mode.

    Raises:
        ModelError: Body tensors are missing, unexpected, of the wrong shape or not finite.
        CapabilityError: The quantisation cannot run on the device.
    """
    import transformers

    check_quantization(quantization, device.type)
    names = {"gpt2": transformers.GPT2LMHeadModel, "distilbert": transformers.DistilBertForMaskedLM}
    model_class = names[base.family.model_type]
    config = language_config(base)
    with quiet_transformers(), torch.random.fork_rng(devices=_cuda_devices()):
        torch.manual_seed(seed)
        if random_init:
            model = _random(model_class, config, seed=seed, dtype=dtype)
        else:
            check_tensors(base, _meta(model_class, config), head=False)
            check_finite(base.path)
            if quantization is None:
                model = model_class.from_pretrained(base.path, config=config, local_files_only=True, dtype=dtype)
            else:
                model = _quantized(_meta(model_class, config), base, quantization, device=device, dtype=dtype)
    return _finish(model.to(device) if quantization is None else model, base)


def _quantized(
    model: Any, base: Base, quantization: QuantizationSettings, *, device: torch.device, dtype: torch.dtype
) -> Any:
    """Give a causal language model on the meta device its weights, those of its blocks quantised."""
    family = language_family(base.family)
    layers = QuantizedLayers(model, bitsandbytes_config(quantization, family, dtype), device)
    stored = StoredTensors(base.path, family)
    load_body(model, stored, family=family, device=device, dtype=dtype, store=layers.store)
    # The output layer is the token embedding.
    model.tie_weights()
    return layers.finish()


def classifier_config(base: Base, *, labels: tuple[str, ...], problem_type: ProblemType) -> PretrainedConfig:
    """Return the base's transformers config for a classifier of these labels, with the head that it gets.

    By its problem_type a stock pipeline applies a softmax, a sigmoid for each label, or nothing.
    """
    config = _base_config(base)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = problem_type
    if base.family.own_head:
        setattr(config, OWN_HEAD, own_head(base.head, base.config))
    elif isinstance(base.head, HeadSettings):
        setattr(config, HEAD_DROPOUT[config.model_type], base.head.dropout)
    return config


def seed_head(model: nn.Module, family: Family, *, seed: int) -> None:
    """Draw the classification head from its own generator, so that it depends on `seed` and its shape alone.

    A layer has std `initializer_range`, a hidden layer of a head of the toolkit's own sqrt(2 / inputs) (He et al. 2015,
    arXiv:1502.01852, equation 10): through narrow layers of 0.02 nothing would reach the labels.
    """
    generator = torch.Generator().manual_seed(seed)
    std = float(model.config.initializer_range)  # type: ignore[union-attr, arg-type]
    for path in family.head:
        for name, parameter in model.get_submodule(path).named_parameters():
            drawn = torch.zeros(parameter.shape)
            if name.endswith("weight"):
                spread = (2 / drawn.shape[1]) ** 0.5 if name.startswith("hidden.") else std
                drawn.normal_(std=spread, generator=generator)
            parameter.data = drawn.to(parameter.device)


def language_config(base: Base) -> PretrainedConfig:
    """Return the base's transformers config for a language model, which has no head of a classifier."""
    config = _base_config(base)
    vars(config).pop(OWN_HEAD, None)
    return config


def _base_config(base: Base) -> PretrainedConfig:
    """Return the base's config with no cache and a pad token (row 80: GPT-2 has none, it gets its eos)."""
    config = read_config(base.path)
    config.use_cache = False
    config.name_or_path = base.name_or_path
    if config.pad_token_id is None:
        eos = config.eos_token_id if config.eos_token_id is not None else GPT2_PAD
        config.pad_token_id = min(int(eos), config.vocab_size - 1)
    return config


def read_config(folder: Path) -> PretrainedConfig:
    """Return the transformers config of a checked model folder; of a model with an own head, that of its body too."""
    from transformers import AutoConfig

    settings = parse_json((folder / "config.json").read_bytes(), where=str(folder / "config.json"))
    if OWN_HEAD not in settings:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    plain = plain_config(settings, where=str(folder / "config.json"))
    config: PretrainedConfig = type(AutoConfig.for_model(plain["model_type"])).from_dict(plain)
    return config


def _same_labels(base: Base, config: PretrainedConfig) -> bool:
    kind = base.config.get("problem_type") or "single_label_classification"
    return bool(base.config.get("label2id") == config.label2id and kind == config.problem_type)


def _meta(model_class: Any, config: PretrainedConfig) -> Any:
    """Return the model's skeleton: names and shapes without memory."""
    return skeleton(lambda: model_class(config))


def skeleton(build: Callable[[], Any]) -> Any:
    """Return the model that ``build`` makes as names and shapes without memory, tied ones tied."""
    with without_memory():
        model = build()
    model.tie_weights()
    return model


@contextmanager
def without_memory() -> Iterator[None]:
    """Give what is built inside names and shapes; numbers are not drawn, for which torch would import sympy."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        yield


def _random(model_class: Any, config: PretrainedConfig, *, seed: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(seed)
    return model_class(config).to(dtype)


def _finish(model: Any, base: Base) -> PreTrainedModel:
    model.name_or_path = base.name_or_path
    model.config.name_or_path = base.name_or_path
    return model.eval()


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count()))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and its advice about new heads while a model loads."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
