"""A causal or masked language model trained on text alone."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from toolkit.data.batching import lm_blocks
from toolkit.data.tokens import TokenTable
from toolkit.evaluation.mistakes import Mistake
from toolkit.models.base import resolve_folder
from toolkit.models.forward import checkpoint_activations
from toolkit.models.head_start import scale_to_width, start_from_encoder, start_masked_head
from toolkit.models.load import load_language_model
from toolkit.report.run_record import PrefixCacheRecord
from toolkit.tasks.task import EVALUATION_BATCH, Kind, Setup, tokenize_parts, write_artifact
from toolkit.training.gemm import use_gemm
from toolkit.training.objectives import (
    LanguageModelingObjective,
    Objective,
    frequent_tokens,
    mean_loss,
)

# Running text is cut into blocks later; no text is truncated.
WHOLE_TEXT = 1 << 30


class LanguageTask:
    """What language models share: they are judged by their loss, and classify nothing."""

    prefix_cache: PrefixCacheRecord | None = None
    tables: dict[str, TokenTable]
    model: Any
    _accelerator: Accelerator

    def validate(self) -> dict[str, float]:
        """Return the loss (nats per predicted token) and the perplexity of the validation rows."""
        with self._accelerator.autocast():
            return self._figures("validation")

    def judge(self, part: str) -> dict[str, Any]:
        """Return the loss and the perplexity of one part."""
        return dict(self._figures(part))

    def _objective(self, part: str) -> Objective:
        raise NotImplementedError

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

    def baselines(self) -> None:
        """Return None: nothing is classified."""
        return

    def mistakes(self) -> list[Mistake]:
        """Return nothing: a language model has no labels to miss."""
        return []

    def predictions(self) -> None:
        """Return None: nothing is classified."""
        return


class LanguageModelingTask(LanguageTask):
    """A causal or masked language model trained on text alone."""

    def __init__(self, setup: Setup) -> None:
        recipe, data, base, tokenizer = setup.recipe, setup.data, setup.base, setup.tokenizer
        accelerator = setup.accelerator
        self._recipe, self._base, self._accelerator = recipe, base, accelerator
        setup.memory.enter("tokenise")
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
        setup.memory.enter("load")
        self.model = load_language_model(
            base, seed=recipe.training.seed, random_init=recipe.model.random_init, device=accelerator.device
        )
        if recipe.model.random_init:
            self._start(recipe.model.embeddings_from)
        use_gemm(self.model, setup.gemm)
        if blocks := recipe.training.recomputed_blocks(base.config[base.family.layers_key]):
            checkpoint_activations(self.model, blocks)
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

    def save(self, folder: pathlib.Path) -> Kind:
        """Write the language model as stock transformers loads it."""
        write_artifact(self.model, folder / "model", kind="model", recipe=self._recipe, base=self._base, labels=())
        return "model"
