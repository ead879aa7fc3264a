"""Reads an adapter's two files and refuses every way in which they can be damaged or foreign."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from toolkit.errors import AdapterError, Problem
from toolkit.families import Family

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
# What load_adapter understands; every other field must have peft's default.
ARGUMENTS = (
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "target_modules",
    "task_type",
)
PEFT_HEADS = ("classifier", "score")
INFORMATION = ("inference_mode", "peft_type", "peft_version")


def read_adapter_config(folder: Path, *, family: Family) -> dict[str, Any]:
    """Return the arguments of `peft.LoraConfig` for a saved adapter.

    Args:
        folder: The adapter's folder.
        family: The base's architecture.

    Raises:
        AdapterError: Missing or broken JSON, another peft_type or task, a missing head, or a variant of LoRA that the
            toolkit does not write.
    """
    where = str(folder / CONFIG)
    settings = _read_json(folder / CONFIG)
    if settings.get("peft_type") != "LORA":
        raise AdapterError(Problem(where, "peft_type", f"{settings.get('peft_type')!r} is not supported", "LORA"))
    problems = _value_problems(settings, family=family, where=where) + _variant_problems(settings, where=where)
    if problems:
        raise AdapterError(problems)
    return {key: settings[key] for key in ARGUMENTS if key in settings} | {"modules_to_save": list(family.head)}


def _read_json(file: Path) -> dict[str, Any]:
    where = str(file)
    if not file.is_file():
        raise AdapterError(Problem(where, "", "missing", "the adapter folder of a finished run"))
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(Problem(where, "", f"{file.stat().st_size} bytes", f"at most {MAX_CONFIG_BYTES}"))
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(Problem(where, "", f"not valid JSON: {error}", "the file as it was saved")) from error
    if not isinstance(settings, dict):
        raise AdapterError(Problem(where, "", "not a JSON object", "the file as it was saved"))
    return settings


def _value_problems(settings: Mapping[str, Any], *, family: Family, where: str) -> list[Problem]:
    """Check the values that the toolkit writes, against what it writes."""
    keys = ("r", "lora_alpha", "lora_dropout", "base_model_name_or_path")
    r, alpha, dropout, base = (settings.get(key, "") for key in keys)
    targets, kept, excluded = (settings.get(key) for key in ("target_modules", "modules_to_save", "exclude_modules"))
    layers, pattern = settings.get("layers_to_transform"), settings.get("layers_pattern")
    head = f"the head: {', '.join(family.head)}"
    # peft reads the pattern as a regular expression too.
    stem = family.blocks.rpartition(".")[2]
    rules = (
        ("task_type", settings.get("task_type"), settings.get("task_type") == "SEQ_CLS", "SEQ_CLS"),
        ("r", r, type(r) is int and r > 0, "a whole number above 0"),
        ("lora_alpha", alpha, type(alpha) in (int, float) and 0 < alpha < float("inf"), "a number above 0"),
        ("lora_dropout", dropout, type(dropout) in (int, float) and 0 <= dropout < 1, "a number from 0 to below 1"),
        ("bias", settings.get("bias"), settings.get("bias") == "none", "none"),
        ("base_model_name_or_path", base, isinstance(base, str) and bool(base), "the base's name"),
        # peft reads a string as a regular expression: not from a file that anyone may have written.
        ("target_modules", targets, _is_names(targets), "a list of module names"),
        ("exclude_modules", excluded, excluded is None or _is_names(excluded), "null or a list of module names"),
        ("layers_to_transform", layers, layers is None or _is_numbers(layers), "null or a list of block numbers"),
        (
            "layers_pattern",
            pattern,
            pattern == (stem if layers else None),
            f"{stem} with layers_to_transform, else null",
        ),
        (
            "modules_to_save",
            kept,
            _is_names(kept) and _keeps_head(kept or [], family),
            head,
        ),
    )
    return [Problem(where, key, f"{value!r}", right) for key, value, fits, right in rules if not fits]


def _keeps_head(kept: list[str], family: Family) -> bool:
    """Whether peft would wrap the head and nothing else: it matches by ending, and adds its own guesses."""
    return all(path.endswith(tuple(kept)) for path in family.head) and set(kept) <= {*family.head, *PEFT_HEADS}


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) is int and number >= 0 for number in value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)


def _variant_problems(settings: Mapping[str, Any], *, where: str) -> list[Problem]:
    """Refuse any field of peft's that would change the arithmetic, import a module or open another file."""
    from peft import LoraConfig

    defaults = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory()
        for item in fields(LoraConfig)
    }
    problems = []
    for key in sorted(set(settings) - set(ARGUMENTS) - set(INFORMATION)):
        empty = settings[key] in (None, False, {}, [])
        if not (empty or (key in defaults and settings[key] == _as_json(defaults[key]))):
            problems.append(Problem(where, key, f"{settings[key]!r} is not supported", "peft's default"))
    return problems


def _as_json(value: Any) -> Any:
    return None if value is MISSING else json.loads(json.dumps(value, default=str))


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by their names on disk; a pickle is never opened.

    Raises:
        AdapterError: No safetensors file, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = folder / WEIGHTS
    if not file.is_file():
        wrong = f"only {PICKLE}, which is never unpickled" if (folder / PICKLE).is_file() else "missing"
        raise AdapterError(Problem(str(file), "", wrong, f"an adapter saved as {WEIGHTS}"))
    try:
        return load(file.read_bytes())
    except SafetensorError as error:
        raise AdapterError(Problem(str(file), "", f"damaged: {error}", "the file as it was saved")) from error


def tensor_problems(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], *, where: str
) -> list[Problem]:
    """Return what is wrong with a file's tensors, given those the adapter must have."""
    problems = [Problem(where, name, *_missing(name, tensors)) for name in sorted(set(wanted) - set(tensors))]
    problems += [Problem(where, name, "an unexpected tensor") for name in sorted(set(tensors) - set(wanted))]
    for name in sorted(set(wanted) & set(tensors)):
        tensor = tensors[name]
        if tensor.shape != wanted[name].shape:
            right = f"{list(wanted[name].shape)} by {CONFIG} and the base"
            problems.append(Problem(where, name, f"shape {list(tensor.shape)}", right))
        elif not tensor.is_floating_point():
            problems.append(Problem(where, name, f"dtype {tensor.dtype}", "floating point"))
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(Problem(where, name, "holds NaN or infinity", "finite weights"))
    return problems


def _missing(name: str, tensors: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """Say of a missing tensor whether it is half of a pair or a part of the head."""
    for half, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        if f".{half}." in name:
            kind = "half of a LoRA pair is absent" if name.replace(half, other) in tensors else "a LoRA pair is absent"
            return kind, "the file as it was saved"
    return "the trained head is absent", "save the adapter with its head (modules_to_save)"
