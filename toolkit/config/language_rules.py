"""Rules between fields of a recipe that trains a language model; all that are broken are reported."""

from __future__ import annotations

from toolkit.config.methods import FullMethod, LoraMethod
from toolkit.config.objectives import PROMPT
from toolkit.config.rule import Rule
from toolkit.config.schema import LossSettings, Recipe


def _is_lm(recipe: Recipe) -> bool:
    return recipe.objective == "language_modeling"


def _answers(recipe: Recipe) -> bool:
    return recipe.objective == "instruction"


def _has_labels(recipe: Recipe) -> bool:
    return recipe.objective == "classification"


LANGUAGE_RULES = (
    Rule(
        ("method",),
        lambda r: _is_lm(r) and r.method.name != "full",
        "language_modeling trains every weight",
        "leave method out",
    ),
    Rule(
        ("model", "head"),
        lambda r: not _has_labels(r) and r.model.head is not None,
        "a language model classifies nothing",
        "leave head out",
    ),
    Rule(
        ("data", "balance"),
        lambda r: not _has_labels(r) and (r.data.balance is not None or r.data.labels is not None),
        "a language model has no labels",
        "leave balance and labels out",
    ),
    Rule(
        ("training", "loss"),
        lambda r: not _has_labels(r) and r.training.loss != LossSettings(),
        "a language model has no labels to weigh",
        "leave loss out",
    ),
    Rule(
        ("evaluation", "metric"),
        lambda r: not _has_labels(r) and r.evaluation.metric != "loss",
        "a language model is judged by its loss",
        "evaluation.metric: loss",
    ),
    Rule(
        ("method",),
        lambda r: _answers(r) and not (isinstance(r.method, FullMethod | LoraMethod)),
        "instruction trains adapters or every weight: a language model has no head to train",
        "method lora or full",
    ),
    Rule(
        ("method", "variant"),
        lambda r: _answers(r) and isinstance(r.method, LoraMethod) and r.method.variant == "eva",
        "eva starts from the tokens that texts are classified by",
        "another variant",
    ),
    Rule(
        ("model", "random_init"),
        lambda r: _answers(r) and r.model.random_init,
        "random weights know no language to answer in",
        "model.random_init: false, or objective language_modeling first",
    ),
    Rule(
        ("instruction", "template"),
        lambda r: r.instruction.template.count(PROMPT) != 1,
        f"{PROMPT} does not stand in it once",
        f"text with {PROMPT} where the prompt goes",
    ),
)
