"""A sequence classifier tuned on labelled texts."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from toolkit.adapters.apply import apply_method
from toolkit.adapters.eva import TOKENS, start_from_data
from toolkit.adapters.schedule import orthogonality_penalty
from toolkit.config.methods import AdaloraMethod, FeaturesMethod, LoraMethod, leaves_adapter
from toolkit.config.schema import Recipe
from toolkit.data.batching import collate
from toolkit.data.parts import Part
from toolkit.data.shuffle import epoch_order
from toolkit.data.targets import Targets
from toolkit.data.tokens import TokenTable
from toolkit.errors import OutputError
from toolkit.evaluation.baselines import Tokens, baselines
from toolkit.evaluation.decision import Decision, fit_decision
from toolkit.evaluation.evaluate import predict_logits
from toolkit.evaluation.figures import all_figures, validation_figures
from toolkit.evaluation.mistakes import Mistake, worst_mistakes
from toolkit.evaluation.predictions import Predictions, predictions_of
from toolkit.memory.prefix import (
    PrefixPlan,
    keep_prefixes,
    plan_prefixes,
    prefix_record,
    streamed_blocks,
    through_frozen,
)
from toolkit.memory.prefix_cache import PrefixCache, PrefixOverflowError
from toolkit.memory.prefix_rule import BATCH_TOKENS, frozen_in_low_precision
from toolkit.models.forward import checkpoint_activations, classify, pooled, unwrapped
from toolkit.models.frozen import LOW
from toolkit.models.load import load_classifier
from toolkit.report.run_record import PrefixCacheRecord
from toolkit.tasks.features import fit_forest, fit_linear, write_forest, write_head
from toolkit.tasks.task import EVALUATION_BATCH, PARTS, Kind, Setup, tokenize_parts, write_artifact
from toolkit.training.gemm import use_gemm
from toolkit.training.objectives import ClassificationObjective

Floats = NDArray[np.float32]


class ClassificationTask:
    """A sequence classifier tuned on labelled texts."""

    def __init__(self, setup: Setup) -> None:
        recipe, data, base, tokenizer = setup.recipe, setup.data, setup.base, setup.tokenizer
        accelerator = setup.accelerator
        assert data.label_map is not None
        self._recipe, self._base, self._tokenizer, self._accelerator = recipe, base, tokenizer, accelerator
        self._tokenizer_from = base.path
        self._names, self._kind = data.label_map.names, recipe.data.problem_type
        self._labels = {part: _labels(getattr(data, part)) for part in PARTS}
        setup.memory.enter("tokenise")
        self.tables, self.truncated = tokenize_parts(data, tokenizer, max_length=recipe.model.max_length)
        self._gemm, self._listener, self._memory = setup.gemm, setup.listener, setup.memory
        plan_kept = partial(
            plan_prefixes, recipe, self.tables, base=base, accelerator=accelerator, gemm=setup.gemm,
            listener=setup.listener,
        )  # fmt: skip
        try:
            self._build(plan_kept())
        except PrefixOverflowError:
            setup.listener.say("warning: a state of the frozen blocks exceeds fp16: kept in fp32")
            self._build(plan_kept(dtype="fp32"))
        self.objective = ClassificationObjective(
            self.model,
            table=self.tables["train"],
            labels=self._labels["train"],
            pad_id=tokenizer.pad_id,
            cache=self._caches.get("train"),
            loss=recipe.training.loss,
            problem_type=self._kind,
            classes=len(self._names),
            penalty=_penalty(self.model, recipe),
        )
        if isinstance(recipe.method, FeaturesMethod):
            self.objective.solve = self.fit_head
        if isinstance(recipe.method, LoraMethod) and recipe.method.variant == "eva":
            self._start_from_texts()
        self._test_logits: Floats | None = None
        self._decision, self._warnings = Decision(), data.warnings
        self._baselines: dict[str, NDArray[Any]] = {}

    def _build(self, plan: PrefixPlan | None) -> None:
        """Load the model with its method, and keep the states of its frozen blocks if there is a plan for them."""
        recipe, base, accelerator = self._recipe, self._base, self._accelerator
        self._memory.enter("load")
        model = load_classifier(
            base,
            labels=self._names,
            problem_type=self._kind,
            quantization=recipe.quantization,
            seed=recipe.training.seed,
            random_init=recipe.model.random_init,
            device=accelerator.device,
            streamed=streamed_blocks(plan, recipe, accelerator, blocks=base.config[base.family.layers_key]),
            frozen_later=frozen_in_low_precision(
                recipe, low_precision=accelerator.mixed_precision in LOW, processes=accelerator.num_processes
            ),
        )
        self.model = apply_method(
            model, recipe.method, family=base.family, base_name=base.name_or_path, seed=recipe.training.seed
        )
        if (frozen := unwrapped(self.model).frozen) is not None:
            frozen.load(unwrapped(self.model), LOW[accelerator.mixed_precision])
        use_gemm(self.model, self._gemm)
        if blocks := recipe.training.recomputed_blocks(base.config[base.family.layers_key]):
            checkpoint_activations(self.model, blocks)
        self._caches: dict[str, PrefixCache] = {}
        self._judged: dict[str, PrefixCache] = {}
        self._plan_judged = None if plan is None else plan.judged
        if plan is not None:
            self._memory.enter("frozen blocks")
            self._caches = self._keep(plan)

    def _keep(self, plan: PrefixPlan) -> dict[str, PrefixCache]:
        return keep_prefixes(
            self.model, self.tables, plan, pad_id=self._tokenizer.pad_id, accelerator=self._accelerator,
            listener=self._listener,
        )  # fmt: skip

    @property
    def prefix_cache(self) -> PrefixCacheRecord | None:
        """What was kept of the frozen first blocks, or None."""
        return prefix_record([*self._caches.values(), *self._judged.values()])

    def _start_from_texts(self) -> None:
        """Give every A of EVA its start: one batch of the rows that the first epoch begins with."""
        seed, lengths = self._recipe.training.seed, self.tables["train"].lengths
        order = epoch_order(len(lengths), seed=seed, epoch=0)
        count = int(np.searchsorted(np.cumsum(lengths[order]), TOKENS)) + 1
        batch = self.objective.batch(order[:count], step=0)
        moved = {name: tensor.to(self._accelerator.device) for name, tensor in batch.items()}
        with self._accelerator.autocast():
            start_from_data(self.model, lambda: self.objective(moved), seed=seed)

    def fit_head(self) -> int:
        """Fit the head on the features of the training rows (method features); return the tokens that were read."""
        method, model = self._recipe.method, unwrapped(self.model)
        assert isinstance(method, FeaturesMethod)
        features, labels = self._logits("train", cache=self._caches.get("train"), read=pooled), self._labels["train"]
        training, classes = self._recipe.training, len(self._names)
        if method.classifier == "random_forest":
            forest = fit_forest(features, labels, method, classes=classes, loss=training.loss, seed=training.seed)
            write_forest(model, forest)
        else:
            bias = len(self._base.family.head) == 2
            linear = fit_linear(features, labels, method, classes=classes, loss=training.loss, bias=bias)
            write_head(model, linear, self._base.family)
        return len(self.tables["train"].ids)

    def validate(self) -> dict[str, float]:
        """Return loss, and what judges this kind of labels, of the validation rows."""
        with self._accelerator.autocast():
            logits = self._logits("validation", cache=self._caches.get("validation"))
        return validation_figures(logits, self._labels["validation"], problem_type=self._kind)

    def judge(self, part: str) -> dict[str, Any]:
        """Return every figure of one part, by the whole model; validation comes first and fits the decision."""
        self._in_full_precision()
        logits, targets = self._logits(part, cache=self._states_to_judge(part)), self._labels[part]
        if part == "test":
            self._test_logits = logits
        elif self._kind != "regression":
            self._fit_decision(logits, targets)
        return all_figures(logits, targets, problem_type=self._kind, names=self._names, decision=self._decision)

    def _states_to_judge(self, part: str) -> PrefixCache | None:
        """Return the states of a part's rows in full precision, which the next run on them finds; None: none are kept.

        With them the model is as whole as it is without: its frozen blocks are the base's.
        """
        plan, self._plan_judged = self._plan_judged, None
        if plan is not None:
            try:
                self._judged = self._keep(plan)
            except OutputError as error:
                # The weights are trained, and it can do without.
                self._listener.say(f"warning: no states of the rows to judge are kept: {error}")
        return self._judged.get(part)

    def _in_full_precision(self) -> None:
        """End training: what is judged and saved are the base's own weights."""
        core = unwrapped(self.model)
        if core.frozen is not None:
            core.frozen.leave(core)

    def _fit_decision(self, logits: Floats, targets: Targets) -> None:
        self._decision, warnings = fit_decision(
            logits, targets, settings=self._recipe.evaluation, problem_type=self._kind, names=self._names
        )
        self._warnings.extend(warnings)
        if found := self._decision.describe():
            self._listener.say(f"decision, fitted on validation: {found}")
        for warning in warnings:
            self._listener.say(f"warning: {warning}")

    def baselines(self) -> dict[str, Any]:
        """Return the figures of the baselines on the test rows."""
        tables = {part: self._baseline_table(part) for part in ("train", "test")}
        train, test = (
            Tokens(ids=table.ids, offsets=table.offsets, labels=self._labels[part]) for part, table in tables.items()
        )
        vocabulary = self._base.config["vocab_size"]
        figures, self._baselines = baselines(
            train, test, problem_type=self._kind, vocabulary=vocabulary, seed=self._recipe.training.seed
        )
        return dict(figures)

    def _baseline_table(self, part: str) -> TokenTable:
        return self.tables[part]

    def mistakes(self) -> list[Mistake]:
        """Return wrong test predictions, worst first; empty before ``judge("test")``."""
        if self._test_logits is None:
            return []
        return worst_mistakes(
            self._test_logits,
            self._labels["test"],
            problem_type=self._kind,
            names=self._names,
            decision=self._decision,
        )

    def predictions(self) -> Predictions | None:
        """Return the answers to the test rows; None before ``judge("test")``, and where a row has not one label."""
        if self._test_logits is None or self._kind != "single_label_classification":
            return None
        return predictions_of(
            self._test_logits,
            self._labels["test"],
            names=self._names,
            decision=self._decision,
            baselines=self._baselines,
        )

    def _logits(
        self, part: str, *, cache: PrefixCache | None = None, read: Callable[..., torch.Tensor] = classify
    ) -> Floats:
        """Return logits (N, C) of a part, or what else ``read`` gives; processes share the work, and all get all."""
        table, processes = self.tables[part], self._accelerator.num_processes
        share = -(-len(table) // processes)
        # All processes take equally many rows; the surplus repeats rows from the start.
        rows = (np.arange(share) * processes + self._accelerator.process_index) % len(table)
        was_training = self.model.training
        self.model.eval()

        def batch_of(chosen: NDArray[np.int64]) -> dict[str, torch.Tensor]:
            if cache is not None:
                return cache.batch(rows[chosen])
            return collate(table, None, rows[chosen], pad_id=self._tokenizer.pad_id)

        streamed = unwrapped(self.model).streamed if cache is None else None
        # Blocks that the model does not have to run itself: their states are kept, or come wave by wave.
        before = streamed.count if streamed is not None else 0 if cache is None else cache.blocks
        # What is streamed is small; 32 long rows of activations would be more than a step of training takes.
        budget = None if streamed is None else BATCH_TOKENS.get(self._accelerator.device.type, BATCH_TOKENS["cpu"])
        logits = predict_logits(
            lambda batch: read(self.model, batch, blocks=before),
            table.lengths[rows],
            collate=batch_of,
            device=self._accelerator.device,
            batch_size=budget or EVALUATION_BATCH,
            max_tokens=budget,
            wave=None if streamed is None else partial(through_frozen, self.model, blocks=before),
        )
        if streamed is not None:
            streamed.rest()
        self.model.train(was_training)
        if processes == 1:
            return logits
        gathered: Any = self._accelerator.gather(torch.from_numpy(logits).to(self._accelerator.device))
        shares = gathered.cpu().numpy().reshape(processes, share, -1)
        return np.ascontiguousarray(shares.transpose(1, 0, 2).reshape(share * processes, -1)[: len(table)])

    def save(self, folder: pathlib.Path) -> Kind:
        """Write what stock peft or, for methods without an adapter, stock transformers loads."""
        self._in_full_precision()
        kind: Kind = "adapter" if leaves_adapter(self._recipe.method) else "model"
        model = self.model
        if kind == "adapter" and self._recipe.model.random_init:
            # No base exists that the adapter could be loaded onto.
            merged: Any = model
            model, kind = merged.merge_and_unload(), "model"
        write_artifact(
            model,
            folder / kind,
            kind=kind,
            recipe=self._recipe,
            base=self._base,
            labels=self._names,
            decision=self._decision,
            tokenizer_from=self._tokenizer_from,
        )
        return kind


def _penalty(model: nn.Module, recipe: Recipe) -> Callable[[], torch.Tensor] | None:
    method = recipe.method
    if not isinstance(method, AdaloraMethod) or method.orthogonal_weight == 0:
        return None
    return partial(orthogonality_penalty, model, method.orthogonal_weight)


def _labels(part: Part) -> Targets:
    assert part.labels is not None
    return part.labels
