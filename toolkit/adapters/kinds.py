"""The kinds of adapter that are written and read: what their config files may say, and what they must."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from toolkit.errors import Problem
from toolkit.families import Family

# The task of an adapter whose head is the toolkit's own: stock peft stops at it before it loads anything and prints it.
OWN_TASK = "SEQ_CLS with a head of the toolkit's own, load it with toolkit.Classifier"
COMMON = ("base_model_name_or_path", "modules_to_save", "task_type")
LAYERS = ("layers_pattern", "layers_to_transform")
# The arguments that load_adapter hands to peft, by peft_type; every other field must have peft's default.
ARGUMENTS = {
    "LORA": (
        *COMMON,
        *LAYERS,
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "lora_alpha",
        "lora_dropout",
        "r",
        "target_modules",
        "use_dora",
        "use_rslora",
    ),
    "VERA": (
        *COMMON,
        *LAYERS,
        "bias",
        "d_initial",
        "fan_in_fan_out",
        "projection_prng_key",
        "r",
        "target_modules",
        "vera_dropout",
    ),
    "IA3": (*COMMON, "exclude_modules", "fan_in_fan_out", "feedforward_modules", "target_modules"),
    "LN_TUNING": (*COMMON, "exclude_modules", "target_modules"),
    "PREFIX_TUNING": (*COMMON, "num_virtual_tokens"),
}
# What peft fills in from the base's config; load_adapter compares it.
FROM_BASE = ("encoder_hidden_size", "num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim")
INFORMATION = ("inference_mode", "peft_type", "peft_version")
PEFT_HEADS = ("classifier", "score")
MAX_KEY = 2**32 - 1

Rule = tuple[Callable[[Any], bool], str]


def value_problems(settings: Mapping[str, Any], *, family: Family, where: str) -> list[Problem]:
    """Check the values that the toolkit writes, against what it writes."""
    known = ARGUMENTS[settings["peft_type"]]
    rules = {key: rule for key, rule in _rules(settings, family).items() if key in known}
    return [
        Problem(where, key, f"{settings.get(key)!r}", right)
        for key, (fits, right) in rules.items()
        if not fits(settings.get(key))
    ]


def _rules(settings: Mapping[str, Any], family: Family) -> dict[str, Rule]:
    """Return each argument's condition and what would be right."""
    # peft reads the pattern as a regular expression too.
    stem = family.blocks.rpartition(".")[2]
    pattern = stem if settings.get("layers_to_transform") else None
    task = task_name(family)
    share: Rule = (_is_share, "a number from 0 to below 1")
    size: Rule = (_is_size, "a whole number above 0")
    above: Rule = (_is_positive, "a number above 0")
    flag: Rule = (lambda value: value is None or type(value) is bool, "true or false")
    return {
        # Adapters with an own head were once written without saying so.
        "task_type": (lambda value: value == task or (family.own_head and value == "SEQ_CLS"), task),
        "r": size,
        "num_virtual_tokens": size,
        "lora_alpha": above,
        "lora_dropout": share,
        "vera_dropout": share,
        "d_initial": above,
        "projection_prng_key": (lambda value: type(value) is int and 0 <= value <= MAX_KEY, f"0 to {MAX_KEY}"),
        "use_dora": flag,
        "use_rslora": flag,
        "bias": (lambda value: value == "none", "none"),
        "base_model_name_or_path": (lambda value: isinstance(value, str) and bool(value), "the base's name"),
        # peft reads a string as a regular expression: not from a file that anyone may have written.
        "target_modules": (is_names, "a list of module names"),
        "feedforward_modules": (lambda value: value == [] or is_names(value), "a list of module names"),
        "exclude_modules": (lambda value: value is None or is_names(value), "null or a list of module names"),
        "layers_to_transform": (lambda value: value is None or _is_numbers(value), "null or a list of block numbers"),
        "layers_pattern": (lambda value: value == pattern, f"{stem} with layers_to_transform, else null"),
        "modules_to_save": (
            lambda value: (is_names(value) and _keeps_head(value, family)) if family.head else not value,
            f"the head: {', '.join(family.head)}" if family.head else "null: a language model has no head to save",
        ),
    }


def task_name(family: Family) -> str:
    """Return the `task_type` of an adapter's file."""
    return OWN_TASK if family.own_head else "SEQ_CLS" if family.head else "CAUSAL_LM"


def is_names(value: Any) -> bool:
    """Return whether a value is a list of names, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)


def _keeps_head(kept: list[str], family: Family) -> bool:
    """Whether peft would wrap the head and nothing else: it matches by ending, and adds its own guesses."""
    return all(path.endswith(tuple(kept)) for path in family.head) and set(kept) <= {*family.head, *PEFT_HEADS}


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) is int and number >= 0 for number in value)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1
