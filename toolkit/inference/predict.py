"""A trained classifier at work: texts in, labels and probabilities (or numbers) out."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import ProblemType, QuantizationSettings
from toolkit.data.tokenize import Tokenizer, load_tokenizer
from toolkit.data.tokens import TokenTable
from toolkit.errors import AdapterError, Problem
from toolkit.evaluation.decision import Decision
from toolkit.evaluation.evaluate import predict_logits
from toolkit.export.artifact import Artifact, find_artifact, verify_files
from toolkit.export.trained_base import check_settings, resolve_trained_base
from toolkit.families import Family
from toolkit.inference.predictions import AnyPrediction, Prediction, build_predictions
from toolkit.inference.texts import read_texts
from toolkit.runtime import Precision, WantedPrecision, choose_device, choose_precision, import_models

if TYPE_CHECKING:
    import torch
    from torch import nn

# Batches a chunk of a stream holds: enough that sorting by length pays, little enough that answers keep coming.
CHUNK_BATCHES = 16


__all__ = ["Classifier", "Prediction", "check_classifies", "predict_lines"]


class Classifier:
    """A trained adapter on its base, or a standalone model. Made by ``load``.

    Attributes:
        labels: Names of the labels, or of the targets of a regression, in id order.
        problem_type: What the labels are.
        decision: Temperature and thresholds fitted on validation.
        max_length: Tokens of a text that are read; the rest is cut off.
        precision: What matrices are multiplied in.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        labels: Sequence[str],
        problem_type: ProblemType = "single_label_classification",
        decision: Decision | None = None,
        max_length: int,
        device: torch.device,
        precision: Precision = "fp32",
    ) -> None:
        self.labels, self.problem_type, self.decision = tuple(labels), problem_type, decision or Decision()
        self.max_length, self.precision = max_length, precision
        self._model, self._tokenizer, self._device = model.eval(), tokenizer, device

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        *,
        device: str = "auto",
        precision: WantedPrecision = "fp32",
    ) -> Classifier:
        """Load what a run trained.

        Args:
            path: A run folder, an adapter folder, or a model folder that training or a merge wrote.
            device: ``auto``, or a torch device such as ``cpu`` or ``cuda:1``.
            precision: What matrices are multiplied in, and weights kept in where nothing else reads them; ``auto``: as
                training chooses. Less than fp32 is faster where the processor has it, and moves logits by some 1e-2.

        Raises:
            AdapterError: If there is no trained model, its files were altered, or its base is another.
            ModelError: If the base cannot be reached or is damaged.
            CapabilityError: If the device cannot run its quantised base.
        """
        artifact = find_artifact(path)
        manifest = artifact.manifest
        check_classifies(artifact)
        verify_files(artifact.folder, manifest)
        base = resolve_trained_base(artifact)
        # Everything above answers without torch.
        import_models(adapters=artifact.kind == "adapter", quantised=_quantization(artifact) is not None)
        from toolkit.adapters.save import load_adapter
        from toolkit.models.flat import runs_flat
        from toolkit.models.forward import unwrapped
        from toolkit.models.frozen import LOW
        from toolkit.models.load import load_classifier
        from toolkit.models.packed import pack_blocks
        from toolkit.training.gemm import choose_gemm, choose_packing, use_gemm

        check_settings(artifact, base.family)
        target = choose_device(device)
        chosen = choose_precision(precision, target)
        multiplied = _only_multiplied(artifact, base.family)
        lowered = chosen in LOW and multiplied
        model = load_classifier(
            base,
            labels=tuple(manifest.labels),
            problem_type=manifest.problem_type,
            quantization=_quantization(artifact),
            seed=0,
            device=target,
            frozen_later=lowered,
        )
        trained = load_adapter(model, artifact.folder) if artifact.kind == "adapter" else model
        trained.requires_grad_(False)
        if lowered:
            unwrapped(trained).frozen.load(unwrapped(trained), LOW[chosen])
        gemm = choose_gemm("auto", target)
        packing = choose_packing(gemm, chosen, target)
        use_gemm(trained, gemm)
        if packing is not None and multiplied and runs_flat(unwrapped(trained)):
            pack_blocks(unwrapped(trained), base.family, packing)
        return cls(
            trained,
            # The one trained with; the base's files may have changed since.
            load_tokenizer(artifact.folder, kind=base.family.tokenizer),
            labels=manifest.labels,
            problem_type=manifest.problem_type,
            decision=Decision(manifest.temperature, manifest.thresholds),
            max_length=manifest.max_length,
            device=target,
            precision=chosen,
        )

    def predict(self, texts: Sequence[str], *, batch_size: int = 32) -> list[Any]:
        """Classify texts; the answer to one does not depend on the others, nor on the batch size, but for rounding.

        Args:
            texts: Any texts; an empty one is classified like any other.
            batch_size: Texts computed at once.

        Returns:
            For each text a ``Prediction`` with ``label`` and ``scores``; where a text may have several labels a
            ``LabelsPrediction`` with ``labels`` and ``scores``; for numbers a ``NumbersPrediction`` with ``values``.
        """
        texts = list(texts)
        if not texts:
            return []
        logits = self.logits(texts, batch_size=batch_size)
        return build_predictions(
            texts, logits, problem_type=self.problem_type, names=self.labels, decision=self.decision
        )

    def predict_stream(self, texts: Iterable[str], *, batch_size: int = 32) -> Iterator[AnyPrediction]:
        """Classify texts as they come, in bounded memory and in their order.

        Args:
            texts: Any iterable; read ``16 * batch_size`` at a time.
            batch_size: Texts computed at once.
        """
        source = iter(texts)
        while chunk := list(islice(source, CHUNK_BATCHES * batch_size)):
            yield from self.predict(chunk, batch_size=batch_size)

    def logits(self, texts: Sequence[str], *, batch_size: int = 32) -> NDArray[np.float32]:
        """Return the logits (texts, labels) of at least one text."""
        table = self._tokenizer.encode(texts, max_length=self.max_length).table
        return self.table_logits(table, batch_size=batch_size)

    def table_logits(self, table: TokenTable, *, batch_size: int = 32, where: str = "rows") -> NDArray[np.float32]:
        """Return the logits (rows, labels) of rows of token ids, such as an .npy file holds.

        Args:
            table: At least one row.
            batch_size: Rows computed at once.
            where: The file they come from, for messages.

        Raises:
            DataError: If an id lies outside the vocabulary.
        """
        from torch import autocast

        from toolkit.data.batching import collate
        from toolkit.models.forward import classify
        from toolkit.models.frozen import LOW

        filled = _no_empty_rows(table, self._tokenizer)
        table = self._tokenizer.adopt(filled, max_length=self.max_length, where=where).table
        with autocast(self._device.type, LOW.get(self.precision), enabled=self.precision in LOW):
            return predict_logits(
                lambda batch: classify(self._model, batch),
                table.lengths,
                collate=lambda rows: collate(table, None, rows, pad_id=self._tokenizer.pad_id),
                device=self._device,
                batch_size=batch_size,
            )


def predict_lines(
    path: str | pathlib.Path,
    source: str = "-",
    *,
    text_column: str = "text",
    batch_size: int = 32,
    device: str = "auto",
    precision: WantedPrecision = "fp32",
) -> Iterator[str]:
    """Yield a JSON line for each text of a file or of stdin: ``text`` with ``label``, ``labels`` or ``values``.

    Args:
        path: As for ``Classifier.load``.
        source: ``-`` for stdin, a text file with a text a line, or a csv, tsv, jsonl or parquet file.
        text_column: Column of the latter.
        batch_size: Texts computed at once.
        device: As for ``Classifier.load``.
        precision: As for ``Classifier.load``.

    Raises:
        DataError: If the source is missing, damaged, or holds no text.
        AdapterError: If there is no trained model at ``path``.
    """
    # The texts are looked at first: a wrong file is refused before a model is loaded.
    texts = read_texts(source, text_column=text_column, stdin=sys.stdin.buffer)
    classifier = Classifier.load(path, device=device, precision=precision)
    for prediction in classifier.predict_stream(texts, batch_size=batch_size):
        yield json.dumps(asdict(prediction), ensure_ascii=False)


def check_classifies(artifact: Artifact) -> None:
    """Refuse a language model.

    Raises:
        AdapterError: If the artifact has no labels.
    """
    if not artifact.manifest.labels:
        wrong = "a language model does not classify"
        raise AdapterError(Problem(str(artifact.folder), "labels", wrong, "a classifier's run"))


def _quantization(artifact: Artifact) -> QuantizationSettings | None:
    settings = artifact.manifest.quantization
    return QuantizationSettings(**settings) if artifact.kind == "adapter" and settings else None


def _only_multiplied(artifact: Artifact, family: Family) -> bool:
    """Return whether nothing but a product reads the weights of its base: DoRA, for one, asks for their norms."""
    from toolkit.adapters.check import read_adapter_config

    if artifact.kind == "model":
        return True
    settings = read_adapter_config(artifact.folder, family=family)
    return _quantization(artifact) is None and settings["peft_type"] == "LORA" and not settings.get("use_dora")


def _no_empty_rows(table: TokenTable, tokenizer: Tokenizer) -> TokenTable:
    """Give a row without tokens (GPT-2 reads an empty text as none) the one token that pads, its end of text."""
    lengths = table.lengths
    if len(lengths) and lengths.min() > 0:
        return table
    ids = np.insert(table.ids, table.offsets[:-1][lengths == 0], tokenizer.pad_id)
    return TokenTable.from_lengths(ids.astype(np.int32), np.maximum(lengths, 1))
