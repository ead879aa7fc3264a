"""Reads an adapter's two files and refuses every way in which they can be damaged or foreign."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from toolkit.adapters.kinds import ARGUMENTS, FROM_BASE, INFORMATION, value_problems
from toolkit.errors import AdapterError, Problem
from toolkit.families import Family

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
OTHER_PARTS = (".lora_magnitude_vector", ".vera_", ".ia3_l", ".ln_tuning_layers.", "prompt_embeddings")


def read_adapter_config(folder: Path, *, family: Family) -> dict[str, Any]:
    """Return the arguments of peft's config for a saved adapter, `peft_type` among them.

    Args:
        folder: The adapter's folder.
        family: The base's architecture.

    Raises:
        AdapterError: Missing or broken JSON, another peft_type or task, a missing head, or a variant that the toolkit
            does not write.
    """
    where = str(folder / CONFIG)
    settings = _read_json(folder / CONFIG)
    kind = settings.get("peft_type")
    if not isinstance(kind, str) or kind not in ARGUMENTS:
        right = f"one of {', '.join(ARGUMENTS)}"
        raise AdapterError(Problem(where, "peft_type", f"{kind!r} is not supported", right))
    problems = value_problems(settings, family=family, where=where) + _variant_problems(settings, where=where)
    if problems:
        raise AdapterError(problems)
    known = {key: settings[key] for key in ARGUMENTS[kind] if key in settings}
    task = "SEQ_CLS" if family.own_head else settings["task_type"]
    return known | {"modules_to_save": list(family.head) or None, "peft_type": kind, "task_type": task}


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


def _variant_problems(settings: Mapping[str, Any], *, where: str) -> list[Problem]:
    """Refuse any field of peft's that would change the arithmetic, import a module or open another file."""
    kind = settings["peft_type"]
    defaults = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory()
        for item in fields(config_class(kind))
    }
    read = {*ARGUMENTS[kind], *INFORMATION, *(FROM_BASE if kind == "PREFIX_TUNING" else ())}
    problems = []
    for key in sorted(set(settings) - read):
        empty = settings[key] in (None, False, {}, [])
        if not (empty or (key in defaults and settings[key] == _as_json(defaults[key]))):
            problems.append(Problem(where, key, f"{settings[key]!r} is not supported", "peft's default"))
    return problems


def config_class(kind: str) -> Any:
    """Return peft's config class of a `peft_type`."""
    import peft

    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]


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
    """Say of a missing tensor whether it is half of a pair, another part of the adapter, or a part of the head."""
    for half, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        if f".{half}." in name:
            kind = "half of a LoRA pair is absent" if name.replace(half, other) in tensors else "a LoRA pair is absent"
            return kind, "the file as it was saved"
    if any(part in name for part in OTHER_PARTS):
        return "a part of the adapter is absent", "the file as it was saved"
    return "the trained head is absent", "save the adapter with its head (modules_to_save)"
