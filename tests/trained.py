"""Run folders with a trained artifact, for the rooms that read them: `from trained import ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.adapters.apply import apply_method
from toolkit.adapters.save import save_adapter
from toolkit.config.methods import Method, leaves_adapter
from toolkit.config.schema import (
    HeadSettings,
    LoraMethod,
    ModelSettings,
    QuantizationSettings,
)
from toolkit.export.artifact import ArtifactFacts, BaseReference, write_manifest
from toolkit.export.model import copy_tokenizer, save_model
from toolkit.models.base import Base, resolve_base
from toolkit.models.heads import own_head
from toolkit.models.load import load_classifier

LABELS = ("ham", "spam", "größer")
MAX_LENGTH = 24
NF4 = QuantizationSettings(bits=4)
INT8 = QuantizationSettings(bits=8)
LORA = LoraMethod(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")


def build_run(
    folder: Path,
    base: Path,
    *,
    method: Method = LORA,
    quantization: QuantizationSettings | None = None,
    dtype: str = "fp32",
    problem_type: Any = "single_label_classification",
    head: HeadSettings | None = None,
) -> Path:
    """Write a run folder whose trained weights are random and large enough to change every answer."""
    folder.mkdir(parents=True)
    found = resolve_base(ModelSettings(base=str(base), max_length=MAX_LENGTH, head=head))
    model = train(found, method=method, quantization=quantization, problem_type=problem_type)
    adapter = leaves_adapter(method)
    artifact = folder / ("adapter" if adapter else "model")
    if adapter:
        save_adapter(model, artifact)
        copy_tokenizer(found.path, artifact, model_type=found.family.model_type, max_length=MAX_LENGTH)
    else:
        save_model(model, artifact, tokenizer_from=found.path, max_length=MAX_LENGTH, dtype=dtype)
    facts = facts_of(found, method=method.model_dump(), quantization=quantization, adapter=adapter)
    write_manifest(artifact, facts.model_copy(update={"problem_type": problem_type}))
    return folder


def train(
    base: Base,
    *,
    method: Any,
    quantization: QuantizationSettings | None,
    seed: int = 3,
    problem_type: Any = "single_label_classification",
) -> nn.Module:
    """Stand in for training: draw what the method trains."""
    device = torch.device("cpu")
    model = load_classifier(
        base, labels=LABELS, problem_type=problem_type, quantization=quantization, seed=0, device=device
    )
    trained = apply_method(model, method, family=base.family, base_name=base.name_or_path, seed=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return trained.eval()


def facts_of(base: Base, *, method: dict[str, Any], quantization: Any, adapter: bool) -> ArtifactFacts:
    return ArtifactFacts(
        kind="adapter" if adapter else "model",
        base=BaseReference(
            requested=base.requested, used=base.used, name_or_path=base.name_or_path, fingerprint=base.fingerprint
        ),
        method=method,
        quantization=None if quantization is None else quantization.model_dump(),
        labels=list(LABELS),
        max_length=MAX_LENGTH,
        model_type=base.family.model_type,
        head=HeadSettings(**described) if (described := own_head(base.head, base.config)) else None,
    )
