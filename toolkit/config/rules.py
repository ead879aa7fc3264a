"""Rules between fields of a recipe, as one table; all that are broken are reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from toolkit.config.document import Path
from toolkit.config.methods import AdaloraMethod, GradualMethod, LoraMethod, leaves_adapter
from toolkit.config.schema import LossSettings, Recipe


@dataclass(frozen=True)
class Rule:
    """A condition between fields.

    Attributes:
        path: The field to point at.
        broken: Whether a recipe breaks the rule.
        wrong: What is wrong.
        right: What would be right.
    """

    path: Path
    broken: Callable[[Recipe], bool]
    wrong: str
    right: str


def _split_sum(recipe: Recipe) -> float:
    split = recipe.data.split
    return split.train + split.validation + split.test


def _labels_repeat(recipe: Recipe) -> bool:
    labels = _named_labels(recipe) or []
    return len(set(labels)) < len(labels)


def _is_lm(recipe: Recipe) -> bool:
    return recipe.objective == "language_modeling"


def _is_variant(recipe: Recipe, variant: str) -> bool:
    return isinstance(recipe.method, LoraMethod) and recipe.method.variant == variant


def _bits(recipe: Recipe) -> int | None:
    return None if recipe.quantization is None else recipe.quantization.bits


def _is_single(recipe: Recipe) -> bool:
    return recipe.data.problem_type == "single_label_classification"


def _is_regression(recipe: Recipe) -> bool:
    return recipe.data.problem_type == "regression"


METRICS = {
    "single_label_classification": ("accuracy", "f1_macro", "loss"),
    "multi_label_classification": ("accuracy", "f1_macro", "f1_micro", "mean_average_precision", "loss"),
    "regression": ("loss", "r2", "spearman"),
}


def _named_labels(recipe: Recipe) -> list[str] | None:
    return recipe.data.labels or recipe.data.label_columns


def _lists_weights(recipe: Recipe, *, other_than: int) -> bool:
    weights = recipe.training.loss.class_weights
    return isinstance(weights, list) and len(weights) != other_than


RULES = (
    Rule(
        ("training", "max_steps"),
        lambda r: r.training.epochs is not None and r.training.max_steps is not None,
        "epochs and max_steps are both set",
        "set one and leave the other null",
    ),
    Rule(
        ("training", "optimizer_in_backward"),
        lambda r: r.training.optimizer_in_backward and r.training.max_grad_norm is not None,
        "clipping needs the norm of all gradients before the first update",
        "training.max_grad_norm: null beside it",
    ),
    Rule(
        ("training", "optimizer_in_backward"),
        lambda r: r.training.optimizer_in_backward and r.training.gradient_accumulation_steps > 1,
        "an update after every micro-step is another training",
        "training.gradient_accumulation_steps: 1 beside it",
    ),
    Rule(
        ("training", "optimizer_in_backward"),
        lambda r: r.training.optimizer_in_backward and isinstance(r.method, GradualMethod | AdaloraMethod),
        "gradual wakes parameters later, and adalora reads all gradients after a step",
        "another method, or false",
    ),
    Rule(
        ("data", "source"),
        lambda r: r.data.source is None and r.data.train is None,
        "no data",
        "give data.source (a named set, file or hub id) or data.train",
    ),
    Rule(
        ("data", "train"),
        lambda r: r.data.source is not None and r.data.train is not None,
        "source and train are both set",
        "one table to split (source) or files per part (train, validation, test)",
    ),
    Rule(
        ("data", "validation"),
        lambda r: r.data.train is None and r.data.validation is not None,
        "validation is given without train",
        "give data.train too; a source is split by data.split",
    ),
    Rule(
        ("data", "test"),
        lambda r: r.data.train is None and r.data.test is not None,
        "test is given without train",
        "give data.train too; a source is split by data.split",
    ),
    Rule(("data", "labels"), _labels_repeat, "a label is listed twice", "each label once"),
    Rule(
        ("data", "split"),
        lambda r: abs(_split_sum(r) - 1) > 1e-6,
        "train, validation and test do not add up to 1",
        "for example 0.7, 0.1, 0.2",
    ),
    Rule(
        ("evaluation", "early_stopping_patience"),
        lambda r: r.evaluation.early_stopping_patience is not None and r.evaluation.every == "end",
        "early stopping needs evaluations during training",
        "evaluation.every: epoch or a number of steps",
    ),
    Rule(
        ("quantization",),
        lambda r: r.quantization is not None and not leaves_adapter(r.method),
        "quantised weights cannot be trained",
        "method lora, adalora, vera, ia3, prefix or ln_tuning, or quantization: null",
    ),
    Rule(
        ("method", "variant"),
        lambda r: _is_variant(r, "dora") and _bits(r) == 8,
        "dora needs the norms of the weights, which peft cannot take of 8-bit ones",
        "quantization.bits: 4, another variant, or quantization: null",
    ),
    Rule(
        ("method", "variant"),
        lambda r: _is_variant(r, "pissa") and r.quantization is not None,
        "pissa takes its start out of the weights, which cannot be stored quantised before that",
        "another variant, or quantization: null",
    ),
    Rule(
        ("method", "target_r"),
        lambda r: isinstance(r.method, AdaloraMethod) and r.method.target_r >= r.method.init_r,
        "adalora cuts ranks: target_r is not below init_r",
        "target_r: 8 with init_r: 12, for example",
    ),
    Rule(
        ("method", "final_ratio"),
        lambda r: isinstance(r.method, AdaloraMethod) and r.method.start_ratio + r.method.final_ratio >= 1,
        "start_ratio and final_ratio leave no step to cut ranks in",
        "a sum below 1, for example 0.1 and 0.3",
    ),
    Rule(
        ("method", "epochs_per_block"),
        lambda r: (
            isinstance(r.method, GradualMethod)
            and r.method.epochs_per_block == "plateau"
            and r.evaluation.every == "end"
        ),
        "plateau needs evaluations during training",
        "evaluation.every: epoch or a number of steps",
    ),
    Rule(
        ("training", "gradient_checkpointing"),
        lambda r: r.method.name == "prefix" and r.training.gradient_checkpointing is not False,
        "recomputed blocks would lose the prefix, which is handed to them as a cache",
        "gradient_checkpointing: false, or another method",
    ),
    Rule(
        ("model", "random_init"),
        lambda r: r.method.name == "prefix" and r.model.random_init,
        "a prefix cannot be merged into the weights, and random ones are not kept beside it",
        "another method, or model.random_init: false",
    ),
    Rule(
        ("quantization",),
        lambda r: r.quantization is not None and r.model.random_init,
        "random weights cannot be stored quantised",
        "model.random_init: false, or quantization: null",
    ),
    Rule(
        ("model", "embeddings_from"),
        lambda r: r.model.embeddings_from is not None and not r.model.random_init,
        "would overwrite trained embeddings",
        "model.random_init: true, or embeddings_from: null",
    ),
    Rule(
        ("method",),
        lambda r: _is_lm(r) and r.method.name != "full",
        "language_modeling trains every weight",
        "leave method out",
    ),
    Rule(
        ("model", "head"),
        lambda r: _is_lm(r) and r.model.head is not None,
        "language_modeling classifies nothing",
        "leave head out",
    ),
    Rule(
        ("data", "balance"),
        lambda r: _is_lm(r) and (r.data.balance is not None or r.data.labels is not None),
        "language_modeling has no labels",
        "leave balance and labels out",
    ),
    Rule(
        ("training", "loss"),
        lambda r: _is_lm(r) and r.training.loss != LossSettings(),
        "language_modeling has no labels to weigh",
        "leave loss out",
    ),
    Rule(
        ("training", "loss", "label_smoothing"),
        lambda r: r.training.loss.focal_gamma > 0 and r.training.loss.label_smoothing > 0,
        "a focal loss looks at one label, and smoothing spreads it",
        "label_smoothing: 0, or focal_gamma: 0",
    ),
    Rule(
        ("training", "loss", "class_weights"),
        lambda r: _lists_weights(r, other_than=len(_named_labels(r) or [])) and _named_labels(r) is not None,
        "the number of weights is not that of the labels",
        "one weight for each label",
    ),
    Rule(
        ("data", "problem_type"),
        lambda r: r.objective != "classification" and not _is_single(r),
        "belongs to objective classification",
        "leave problem_type out, or objective: classification",
    ),
    Rule(
        ("data", "label_columns"),
        lambda r: r.data.label_columns is not None and _is_single(r),
        "a text with one label has it in one column",
        "data.label_column, or problem_type multi_label_classification or regression",
    ),
    Rule(
        ("data", "labels"),
        lambda r: r.data.labels is not None and (_is_regression(r) or r.data.label_columns is not None),
        "numbers have no labels, and label_columns name their own",
        "leave labels out",
    ),
    Rule(
        ("data", "balance"),
        lambda r: r.data.balance is not None and not _is_single(r),
        "rows that have several labels, or numbers, cannot be balanced by row",
        "leave balance out; training.loss.class_weights: balanced weighs labels",
    ),
    Rule(
        ("training", "loss"),
        lambda r: _is_regression(r) and r.training.loss != LossSettings(),
        "numbers have no labels to weigh",
        "leave loss out",
    ),
    Rule(
        ("evaluation", "threshold"),
        lambda r: r.evaluation.threshold is not None and (_is_regression(r) or r.objective != "classification"),
        "only labels have a threshold",
        "leave threshold out",
    ),
    Rule(
        ("evaluation", "calibrate"),
        lambda r: r.evaluation.calibrate and (_is_regression(r) or r.objective != "classification"),
        "only labels have probabilities",
        "leave calibrate out",
    ),
    Rule(
        ("evaluation", "metric"),
        lambda r: r.objective == "classification" and r.evaluation.metric not in METRICS[r.data.problem_type],
        "is no metric of this problem_type",
        "single_label_classification: accuracy, f1_macro, loss; multi_label_classification: those, f1_micro, "
        "mean_average_precision; regression: loss, r2, spearman",
    ),
    Rule(
        ("evaluation", "metric"),
        lambda r: _is_lm(r) and r.evaluation.metric != "loss",
        "language_modeling is judged by its loss",
        "evaluation.metric: loss",
    ),
)


def broken_rules(recipe: Recipe) -> list[Rule]:
    """Return every rule that ``recipe`` breaks, in the order of the table."""
    return [rule for rule in RULES if rule.broken(recipe)]
