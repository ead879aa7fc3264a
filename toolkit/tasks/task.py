"""What every kind of run is to the trainer and the report, and what all kinds share: tokens in, an artifact out."""

from __future__ import annotations

import pathlib
import shutil
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from accelerate import Accelerator

from toolkit.adapters.save import save_adapter
from toolkit.config.schema import Recipe
from toolkit.data.parts import LoadedData, Part
from toolkit.data.tokenize import Tokenizer
from toolkit.data.tokens import Encoded, TokenTable
from toolkit.evaluation.decision import Decision
from toolkit.evaluation.mistakes import Mistake
from toolkit.evaluation.predictions import Predictions
from toolkit.export.artifact import ArtifactFacts, BaseReference, write_manifest
from toolkit.export.model import copy_tokenizer, note_decision, save_model
from toolkit.export.staging import staged_folder
from toolkit.listener import Listener
from toolkit.memory.measure import MemoryWatch
from toolkit.models.base import Base
from toolkit.models.heads import own_head, read_head
from toolkit.models.stored import StoredTensors
from toolkit.report.run_record import PrefixCacheRecord
from toolkit.training.gemm_choice import Gemm
from toolkit.training.objectives import Objective

PARTS = ("train", "validation", "test")
EVALUATION_BATCH = 32

Kind = Literal["adapter", "model"]


@dataclass(frozen=True)
class Setup:
    """What a task is built from.

    Attributes:
        recipe: All settings.
        data: Rows of all parts.
        base: The model to start from.
        tokenizer: The base's.
        accelerator: Processes and precision.
        gemm: Library of fp32 matrix products (``training.gemm``).
        listener: Hears how long preparations go.
        memory: Measures what each preparation takes.
    """

    recipe: Recipe
    data: LoadedData
    base: Base
    tokenizer: Tokenizer
    accelerator: Accelerator
    gemm: Gemm
    listener: Listener
    memory: MemoryWatch


class Task(Protocol):
    """One kind of run, seen by the trainer and the report.

    Attributes:
        model: The model with its method applied.
        tables: Token ids by part.
        truncated: Texts cut to ``max_length``.
    """

    model: Any
    tables: dict[str, TokenTable]
    truncated: int

    @property
    def prefix_cache(self) -> PrefixCacheRecord | None:
        """What was kept of the frozen first blocks, or None."""

    @property
    def objective(self) -> Objective:
        """What is minimised."""

    def validate(self) -> dict[str, float]:
        """Return the cheap validation metrics, in the precision of training."""

    def judge(self, part: str) -> dict[str, Any]:
        """Return every figure of one part, in the precision of the saved file."""

    def baselines(self) -> dict[str, Any] | None:
        """Return what costs next to nothing, judged on the test rows; None without labels."""

    def mistakes(self) -> list[Mistake]:
        """Return wrong test predictions, surest first."""

    def predictions(self) -> Predictions | None:
        """Return the answers to the test rows, the baselines' beside them; None without labels or test rows."""

    def save(self, folder: pathlib.Path) -> Kind:
        """Write ``adapter`` or ``model`` into the run folder and return that name."""


def tokenize_parts(data: LoadedData, tokenizer: Tokenizer, *, max_length: int) -> tuple[dict[str, TokenTable], int]:
    """Return the token table of every part, and how many texts were cut; training texts are let go."""
    encoded = {name: _encode(part, tokenizer, max_length=max_length) for name, part in data.parts.items()}
    truncated = note_truncation(data, encoded, max_length=max_length)
    tokenizer.backend.rest()
    return {name: part.table for name, part in encoded.items()}, truncated


def note_truncation(data: LoadedData, encoded: dict[str, Encoded], *, max_length: int) -> int:
    """Return how many texts were cut, with a warning of each part's; training texts are let go."""
    for name, part in encoded.items():
        if warning := part.warning(part=name, max_length=max_length):
            data.warnings.append(warning)
    # Nobody reads these again: 110 MiB of 2 million short texts. Those of the test rows are shown in the report.
    data.train.texts = data.validation.texts = data.train.responses = data.validation.responses = None
    return sum(part.truncated for part in encoded.values())


def _encode(part: Part, tokenizer: Tokenizer, *, max_length: int) -> Encoded:
    if part.token_ids is not None:
        return tokenizer.adopt(part.token_ids, max_length=max_length, where="token ids")
    assert part.texts is not None
    return tokenizer.encode_cached(part.texts, max_length=max_length)


def write_artifact(
    model: Any,
    folder: pathlib.Path,
    *,
    kind: Kind,
    recipe: Recipe,
    base: Base,
    labels: tuple[str, ...],
    decision: Decision | None = None,
    tokenizer_from: pathlib.Path | None = None,
) -> None:
    """Write an adapter or model folder with its tokenizer and manifest, in the place of an older one.

    Args:
        model: The trained model.
        folder: Where it goes.
        kind: What it is.
        recipe: All settings.
        base: What it was trained from.
        labels: Names, in the order of their ids; empty for a language model.
        decision: Temperature and thresholds.
        tokenizer_from: Folder of the tokenizer; None: the base's.

    Raises:
        OutputError: If the disk lacks the space.
    """
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer_from = tokenizer_from or base.path
    max_length = recipe.model.max_length
    facts = artifact_facts(recipe, base=base, kind=kind, labels=labels, decision=decision or Decision())
    note_decision(model, facts)
    with staged_folder(folder) as staging:
        if kind == "adapter":
            save_adapter(model, staging)
            copy_tokenizer(tokenizer_from, staging, model_type=base.family.model_type, max_length=max_length)
        else:
            streamed = any(parameter.is_meta for parameter in model.parameters())
            read = StoredTensors(base.path, base.family).pieces if streamed else None
            save_model(model, staging, read=read, tokenizer_from=tokenizer_from, max_length=max_length)
        write_manifest(staging, facts)


def artifact_facts(
    recipe: Recipe, *, base: Base, kind: Kind, labels: tuple[str, ...], decision: Decision
) -> ArtifactFacts:
    """Return what an artifact's manifest says beside its files."""
    return ArtifactFacts(
        kind=kind,
        base=BaseReference(
            requested=base.requested, used=base.used, name_or_path=base.name_or_path, fingerprint=base.fingerprint
        ),
        method=recipe.method.model_dump(mode="json"),
        quantization=None if recipe.quantization is None else recipe.quantization.model_dump(mode="json"),
        labels=list(labels),
        max_length=recipe.model.max_length,
        model_type=base.family.model_type,
        problem_type=recipe.data.problem_type,
        temperature=decision.temperature,
        thresholds=dict(decision.thresholds),
        head=read_head(described) if labels and (described := own_head(base.head, base.config)) else None,
        template=recipe.instruction.template if recipe.objective == "instruction" else None,
    )
