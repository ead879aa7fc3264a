"""What a run trains: a classifier or a language model, with its token tables, objective, judge and artifact."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from toolkit.adapters.apply import apply_method
from toolkit.adapters.save import save_adapter
from toolkit.config.schema import Recipe
from toolkit.data.batching import collate, lm_blocks
from toolkit.data.parts import LoadedData, Part
from toolkit.data.tokenize import Encoded, Tokenizer
from toolkit.data.tokens import TokenTable
from toolkit.evaluation.evaluate import predict_logits
from toolkit.evaluation.metrics import classification_metrics, validation_metrics
from toolkit.evaluation.mistakes import Mistake, confident_mistakes
from toolkit.export.artifact import ArtifactFacts, BaseReference, write_manifest
from toolkit.export.model import copy_tokenizer, save_model
from toolkit.export.staging import staged_folder
from toolkit.models.base import Base, resolve_folder
from toolkit.models.forward import checkpoint_activations, classify
from toolkit.models.head_start import scale_to_width, start_from_encoder, start_masked_head
from toolkit.models.load import load_classifier, load_language_model
from toolkit.training.objectives import (
    ClassificationObjective,
    LanguageModelingObjective,
    Objective,
    frequent_tokens,
    mean_loss,
)

PARTS = ("train", "validation", "test")
EVALUATION_BATCH = 32
# Running text is cut into blocks later; no text is truncated.
WHOLE_TEXT = 1 << 30

Kind = Literal["adapter", "model"]
Floats = NDArray[np.float32]


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
    def objective(self) -> Objective:
        """What is minimised."""

    def validate(self) -> dict[str, float]:
        """Return the cheap validation metrics, in the precision of training."""

    def judge(self, part: str) -> dict[str, Any]:
        """Return every figure of one part, in the precision of the saved file."""

    def mistakes(self) -> list[Mistake]:
        """Return wrong test predictions, surest first."""

    def save(self, folder: pathlib.Path) -> Kind:
        """Write ``adapter`` or ``model`` into the run folder and return that name."""


class ClassificationTask:
    """A sequence classifier tuned on labelled texts."""

    def __init__(
        self, recipe: Recipe, *, data: LoadedData, base: Base, tokenizer: Tokenizer, accelerator: Accelerator
    ) -> None:
        assert data.label_map is not None
        self._recipe, self._base, self._tokenizer, self._accelerator = recipe, base, tokenizer, accelerator
        self._names = data.label_map.names
        self._labels = {part: _labels(getattr(data, part)) for part in PARTS}
        self.tables, self.truncated = tokenize_parts(data, tokenizer, max_length=recipe.model.max_length)
        model = load_classifier(
            base,
            labels=self._names,
            quantization=recipe.quantization,
            seed=recipe.training.seed,
            random_init=recipe.model.random_init,
            device=accelerator.device,
        )
        self.model = apply_method(
            model, recipe.method, family=base.family, base_name=base.name_or_path, seed=recipe.training.seed
        )
        if recipe.training.gradient_checkpointing:
            checkpoint_activations(self.model)
        self.objective = ClassificationObjective(
            self.model, table=self.tables["train"], labels=self._labels["train"], pad_id=tokenizer.pad_id
        )
        self._test_logits: Floats | None = None

    def validate(self) -> dict[str, float]:
        """Return loss, accuracy and macro F1 of the validation rows."""
        with self._accelerator.autocast():
            return dict(validation_metrics(self._logits("validation"), self._labels["validation"]))

    def judge(self, part: str) -> dict[str, Any]:
        """Return every figure of one part."""
        logits = self._logits(part)
        if part == "test":
            self._test_logits = logits
        return dict(classification_metrics(logits, self._labels[part], names=self._names))

    def mistakes(self) -> list[Mistake]:
        """Return wrong test predictions, surest first; empty before ``judge("test")``."""
        return [] if self._test_logits is None else confident_mistakes(self._test_logits, self._labels["test"])

    def _logits(self, part: str) -> Floats:
        """Return logits (N, C) of a part; every process computes its share and gets all."""
        table, processes = self.tables[part], self._accelerator.num_processes
        share = -(-len(table) // processes)
        # All processes take equally many rows; the surplus repeats rows from the start.
        rows = (np.arange(share) * processes + self._accelerator.process_index) % len(table)
        was_training = self.model.training
        self.model.eval()
        logits = predict_logits(
            lambda batch: classify(self.model, batch),
            table.lengths[rows],
            collate=lambda chosen: collate(table, None, rows[chosen], pad_id=self._tokenizer.pad_id),
            device=self._accelerator.device,
            batch_size=EVALUATION_BATCH,
        )
        self.model.train(was_training)
        if processes == 1:
            return logits
        gathered: Any = self._accelerator.gather(torch.from_numpy(logits).to(self._accelerator.device))
        shares = gathered.cpu().numpy().reshape(processes, share, -1)
        return np.ascontiguousarray(shares.transpose(1, 0, 2).reshape(share * processes, -1)[: len(table)])

    def save(self, folder: pathlib.Path) -> Kind:
        """Write what stock peft (lora) or stock transformers (the other methods) load."""
        kind: Kind = "adapter" if self._recipe.method.name == "lora" else "model"
        model = self.model
        if kind == "adapter" and self._recipe.model.random_init:
            # No base exists that the adapter could be loaded onto.
            merged: Any = model
            model, kind = merged.merge_and_unload(), "model"
        write_artifact(model, folder / kind, kind=kind, recipe=self._recipe, base=self._base, labels=self._names)
        return kind


class LanguageModelingTask:
    """A causal or masked language model trained on text alone."""

    def __init__(
        self, recipe: Recipe, *, data: LoadedData, base: Base, tokenizer: Tokenizer, accelerator: Accelerator
    ) -> None:
        self._recipe, self._base, self._accelerator = recipe, base, accelerator
        whole, self.truncated = tokenize_parts(data, tokenizer, max_length=WHOLE_TEXT)
        special, causal = tokenizer.special, base.family.tokenizer == "bpe"
        self.tables = {
            part: lm_blocks(
                table,
                block_length=recipe.model.max_length,
                eos_id=special["eos"] if causal else None,
                frame=None if causal else (special["cls"], special["sep"]),
            )
            for part, table in whole.items()
        }
        self.model = load_language_model(
            base, seed=recipe.training.seed, random_init=recipe.model.random_init, device=accelerator.device
        )
        if recipe.model.random_init:
            self._start(recipe.model.embeddings_from)
        if recipe.training.gradient_checkpointing:
            checkpoint_activations(self.model)
        self._tokenizer = tokenizer
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        wanted = recipe.language_modeling.target_tokens
        # The same tokens for every part: a loss over others could not be compared.
        self._targets = frequent_tokens(self.tables["train"], vocabulary=vocabulary, count=wanted)
        self.objective = self._objective("train")

    def _start(self, encoder: str | None) -> None:
        """Give a random model what costs no training: an encoder's embeddings, and the frequencies of the tokens."""
        scale_to_width(self.model)
        if encoder is not None:
            start_from_encoder(self.model, self._base.path, resolve_folder(encoder, field="model.embeddings_from"))
        if self._base.family.tokenizer == "wordpiece":
            vocabulary = self.model.get_input_embeddings().weight.shape[0]
            counts = np.bincount(self.tables["train"].ids, minlength=vocabulary)
            start_masked_head(self.model, torch.from_numpy(counts))

    def _objective(self, part: str) -> LanguageModelingObjective:
        return LanguageModelingObjective(
            self.model,
            table=self.tables[part],
            targets=self._targets,
            mask_probability=self._recipe.language_modeling.mask_probability,
            mask_id=self._tokenizer.special.get("mask"),
            special_ids=tuple(self._tokenizer.special.values()),
            pad_id=self._tokenizer.pad_id,
            seed=self._recipe.training.seed,
        )

    def validate(self) -> dict[str, float]:
        """Return the loss (nats per predicted token) and the perplexity of the validation blocks."""
        with self._accelerator.autocast():
            return self._figures("validation")

    def judge(self, part: str) -> dict[str, Any]:
        """Return the loss and the perplexity of one part."""
        return dict(self._figures(part))

    def _figures(self, part: str) -> dict[str, float]:
        objective = self._objective(part)
        rows = np.arange(len(self.tables[part]), dtype=np.int64)
        was_training = self.model.training
        self.model.eval()
        batches = [
            objective.batch(rows[start : start + EVALUATION_BATCH], step=0)
            for start in range(0, len(rows), EVALUATION_BATCH)
        ]
        loss = mean_loss(
            objective, batches, prepare=lambda batch: {k: v.to(self._accelerator.device) for k, v in batch.items()}
        )
        self.model.train(was_training)
        return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}

    def mistakes(self) -> list[Mistake]:
        """Return nothing: a language model has no labels to miss."""
        return []

    def save(self, folder: pathlib.Path) -> Kind:
        """Write the language model as stock transformers loads it."""
        write_artifact(self.model, folder / "model", kind="model", recipe=self._recipe, base=self._base, labels=())
        return "model"


def write_artifact(
    model: Any, folder: pathlib.Path, *, kind: Kind, recipe: Recipe, base: Base, labels: tuple[str, ...]
) -> None:
    """Write an adapter or model folder with its tokenizer and manifest, in the place of an older one.

    Raises:
        OutputError: If the disk lacks the space.
    """
    shutil.rmtree(folder, ignore_errors=True)
    max_length = recipe.model.max_length
    with staged_folder(folder) as staging:
        if kind == "adapter":
            save_adapter(model, staging)
            copy_tokenizer(base.path, staging, model_type=base.family.model_type, max_length=max_length)
        else:
            save_model(model, staging, tokenizer_from=base.path, max_length=max_length)
        write_manifest(staging, artifact_facts(recipe, base=base, kind=kind, labels=labels))


def artifact_facts(recipe: Recipe, *, base: Base, kind: Kind, labels: tuple[str, ...]) -> ArtifactFacts:
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
    )


def build_task(recipe: Recipe, *, data: LoadedData, base: Base, tokenizer: Tokenizer, accelerator: Accelerator) -> Task:
    """Return the task of the recipe's objective."""
    tasks: Mapping[str, type[ClassificationTask] | type[LanguageModelingTask]] = {
        "classification": ClassificationTask,
        "language_modeling": LanguageModelingTask,
    }
    return tasks[recipe.objective](recipe, data=data, base=base, tokenizer=tokenizer, accelerator=accelerator)


def tokenize_parts(data: LoadedData, tokenizer: Tokenizer, *, max_length: int) -> tuple[dict[str, TokenTable], int]:
    """Return the token table of every part, and how many texts were cut to ``max_length``."""
    encoded = {name: _encode(part, tokenizer, max_length=max_length) for name, part in data.parts.items()}
    for name, part in encoded.items():
        if warning := part.warning(part=name, max_length=max_length):
            data.warnings.append(warning)
    return {name: part.table for name, part in encoded.items()}, sum(part.truncated for part in encoded.values())


def _encode(part: Part, tokenizer: Tokenizer, *, max_length: int) -> Encoded:
    if part.token_ids is not None:
        return tokenizer.adopt(part.token_ids, max_length=max_length, where="token ids")
    assert part.texts is not None
    return tokenizer.encode_cached(part.texts, max_length=max_length)


def _labels(part: Part) -> NDArray[np.int64]:
    assert part.labels is not None
    return part.labels
