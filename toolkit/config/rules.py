"""Rules between fields of a recipe, as tables; all that are broken are reported."""

from __future__ import annotations

from toolkit.config.fitted_rules import FITTED_RULES
from toolkit.config.label_rules import LABEL_RULES
from toolkit.config.language_rules import LANGUAGE_RULES
from toolkit.config.methods import AdaloraMethod, GradualMethod, LoraMethod, leaves_adapter
from toolkit.config.rule import Rule as Rule
from toolkit.config.schema import Recipe


def _is_variant(recipe: Recipe, variant: str) -> bool:
    return isinstance(recipe.method, LoraMethod) and recipe.method.variant == variant


def _bits(recipe: Recipe) -> int | None:
    return None if recipe.quantization is None else recipe.quantization.bits


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
        ("training", "loss", "label_smoothing"),
        lambda r: r.training.loss.focal_gamma > 0 and r.training.loss.label_smoothing > 0,
        "a focal loss looks at one label, and smoothing spreads it",
        "label_smoothing: 0, or focal_gamma: 0",
    ),
)


def broken_rules(recipe: Recipe) -> list[Rule]:
    """Return every rule that ``recipe`` breaks, in the order of the tables."""
    tables = (*RULES, *LABEL_RULES, *FITTED_RULES, *LANGUAGE_RULES)
    return [rule for rule in tables if rule.broken(recipe)]
