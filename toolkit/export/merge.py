"""Merges an adapter into its base: one standalone model, written tensor by tensor, proven equal to the live one."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from toolkit.adapters.check import read_adapter_config, read_adapter_tensors
from toolkit.adapters.save import load_adapter
from toolkit.config.schema import QuantizationSettings
from toolkit.data.tokenize import load_tokenizer
from toolkit.export.artifact import Artifact, ArtifactFacts, Manifest, verify_files, write_manifest
from toolkit.export.mergeable import find_mergeable
from toolkit.export.model import note_decision, tensor_shapes, write_model_files
from toolkit.export.parity import Parity, empty_classifier, prove_parity, reference_logits
from toolkit.export.staging import staged_folder
from toolkit.export.stream import MAX_SHARD_BYTES, Read
from toolkit.export.trained_base import check_settings, resolve_trained_base
from toolkit.export.weights import MergedWeights
from toolkit.models.base import Base
from toolkit.models.load import (
    classifier_config,
    language_config,
    load_classifier,
    load_language_model,
    skeleton,
)
from toolkit.models.stored import StoredTensors
from toolkit.report.wording import OWN_HEAD
from toolkit.resident import give_back

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["fp32", "bf16", "fp16"]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote.

    Attributes:
        output: The new model folder.
        dtype: Storage type of its weights.
        tensors: Tensors written.
        adapted: Weights that an adapter changed; 0 for a run without adapters.
        bytes: Bytes of the weights.
        parity: Figures of the proof.
        seconds: Wall time, checks of the input and the proof included.
        phases: Of them, those of ``weights``, which are read, changed and written, and of the ``proof``.
        note: What the model asks of whoever loads it; empty where stock transformers does.
    """

    output: pathlib.Path
    dtype: str
    tensors: int
    adapted: int
    bytes: int
    parity: Parity
    seconds: float
    phases: Mapping[str, float]
    note: str = ""

    def __str__(self) -> str:
        parity = self.parity
        return (
            f"{self.output}: {self.tensors} tensors, {self.adapted} of them merged with an adapter, "
            f"{self.bytes / 1e6:.1f} MB of {self.dtype} in {self.seconds:.1f} s "
            f"({', '.join(f'{phase} {seconds:.2f} s' for phase, seconds in self.phases.items())})\n"
            f"{parity.compared} of {parity.texts} texts against the live model: {parity.max_abs:.2g} apart at most, "
            f"{parity.relative:.2g} of the largest (allowed: {parity.bound:.0e})"
            + (f"\n{self.note}" if self.note else "")
        )


def merge_adapter(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    dtype: Dtype = "fp32",
    base: str | None = None,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> MergeReport:
    """Write one standalone model, and prove that its logits are the trained ones.

    Stock transformers loads it, unless its head is the toolkit's own.

    The base's tensors are read, changed and written one at a time. A run that trained the model's own weights has
    nothing to merge; its model is written anew in ``dtype``.

    Args:
        source: A run folder, or the adapter or model folder in it.
        output: A new folder.
        dtype: Storage type of the weights.
        base: Where the base lies now, if it has moved.
        force: Merge into a base with another fingerprint; recorded in the output's manifest.
        max_shard_bytes: Largest weight file.

    Raises:
        AdapterError: If the artifact is altered, already merged, or belongs to another base.
        ModelError: If the base cannot be reached or is damaged.
        OutputError: If the output exists, lies in the input, or does not fit on the disk.
        ToolkitError: If the proof fails; nothing is left at ``output``.
    """
    started = time.perf_counter()
    source, output = pathlib.Path(source), pathlib.Path(output)
    artifact = find_mergeable(source, output, dtype=dtype)
    verify_files(artifact.folder, artifact.manifest)
    found = resolve_trained_base(artifact, base=base, force=force)
    manifest = artifact.manifest
    # The tokenizer trained with stands in the artifact; the base's files may have changed since.
    tokenizer = load_tokenizer(artifact.folder, kind=found.family.tokenizer)
    bits = manifest.quantization["bits"] if artifact.kind == "adapter" and manifest.quantization else None
    # The live model comes first: it refuses a damaged adapter before anything is written.
    phases = {"weights": 0.0, "proof": 0.0}
    with _timed(phases, "proof"):
        live = _live(artifact, found)
        give_back()
        reference = reference_logits(live, tokenizer, max_length=manifest.max_length, bits=bits)
        del live
    skeleton = _skeleton(found, manifest)
    with staged_folder(output) as staging:
        with _timed(phases, "weights"):
            read, counts = _weights(artifact, found, skeleton)
            size = write_model_files(
                staging,
                skeleton,
                read,
                tokenizer_from=artifact.folder,
                dtype=dtype,
                max_length=manifest.max_length,
                max_shard_bytes=max_shard_bytes,
            )
            adapted = counts()
        give_back()
        with _timed(phases, "proof"):
            parity = prove_parity(staging, reference, tokenizer, max_length=manifest.max_length, dtype=dtype)
        write_manifest(staging, _merged_facts(manifest, found, dtype=dtype, parity=parity))
    return MergeReport(
        output=output,
        dtype=dtype,
        tensors=len(tensor_shapes(skeleton)),
        adapted=adapted,
        bytes=size,
        parity=parity,
        seconds=time.perf_counter() - started,
        phases=phases,
        note=OWN_HEAD if found.family.own_head else "",
    )


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time of the block to a phase."""
    started = time.perf_counter()
    yield
    phases[name] += time.perf_counter() - started


def _live(artifact: Artifact, base: Base) -> nn.Module:
    """Return the trained model as it ran: the base, quantised as in training, under its adapter.

    Where they can, the blocks of a base that was not quantised stay on disk.
    """
    adapter = artifact.kind == "adapter"
    check_settings(artifact, base.family)
    manifest, blocks = artifact.manifest, base.config[base.family.layers_key]
    quantization = _quantization(manifest) if adapter else None
    if manifest.template is not None:
        return load_adapter(load_language_model(base, quantization=quantization, seed=0, device=CPU), artifact.folder)
    model = load_classifier(
        base,
        labels=tuple(manifest.labels),
        problem_type=manifest.problem_type,
        quantization=quantization,
        seed=0,
        device=CPU,
        # peft hands VeRA's one pair of random matrices from layer to layer, which must have memory for it.
        streamed=None if quantization is not None or manifest.method.get("name") == "vera" else blocks,
    )
    return load_adapter(model, artifact.folder) if adapter else model


def _quantization(manifest: Manifest) -> QuantizationSettings | None:
    return None if manifest.quantization is None else QuantizationSettings(**manifest.quantization)


def _skeleton(base: Base, manifest: Manifest) -> PreTrainedModel:
    """Return the model without memory: names, shapes, layer types and config."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel
    if manifest.template is not None:
        model = skeleton(lambda: AutoModelForCausalLM.from_config(language_config(base)))
    else:
        config = classifier_config(base, labels=tuple(manifest.labels), problem_type=manifest.problem_type)
        model = skeleton(lambda: empty_classifier(config))
    note_decision(model, manifest)
    return model


def _weights(artifact: Artifact, base: Base, skeleton: PreTrainedModel) -> tuple[Read, Callable[[], int]]:
    """Return what reads one final tensor, and what counts the adapted ones once all were read."""
    stored = StoredTensors(base.path, base.family)
    if artifact.kind == "model":
        return stored.pieces, lambda: 0
    settings = read_adapter_config(artifact.folder, family=base.family)
    merged = MergedWeights(
        stored,
        skeleton,
        family=base.family,
        adapter=read_adapter_tensors(artifact.folder),
        settings=settings,
        quantization=_quantization(artifact.manifest),
    )

    def count() -> int:
        merged.check_all_used()
        return merged.adapted

    return merged.read, count


def _merged_facts(manifest: Manifest, base: Base, *, dtype: str, parity: Parity) -> ArtifactFacts:
    facts = {name: getattr(manifest, name) for name in ArtifactFacts.model_fields}
    record = {
        "from": manifest.kind,
        "dtype": dtype,
        "parity": parity.as_dict(),
        "quantization": manifest.quantization,
        "base_fingerprint": base.fingerprint if manifest.kind == "adapter" else manifest.base.fingerprint,
    }
    return ArtifactFacts(**(facts | {"kind": "model", "quantization": None, "merge": record}))
