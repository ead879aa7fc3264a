"""pydantic's validation errors as the toolkit's one-line problems."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from toolkit.config.document import Document, Path
from toolkit.config.schema import Recipe
from toolkit.errors import Problem, nearest

# What users of other trainers write, and what it is called here.
FOREIGN_NAMES = {
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "lr_scheduler_type": "scheduler",
    "optim": "optimizer",
    "bf16": "precision",
    "fp16": "precision",
    "load_in_4bit": "bits",
    "load_in_8bit": "bits",
    "output_dir": "dir",
    "save_steps": "save_every",
    "eval_steps": "every",
    "logging_steps": "log_every",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "base_model": "base",
}


def explain(error: ValidationError, documents: Mapping[Path, Document], recipe: Document) -> list[Problem]:
    """Turn a pydantic error on ``recipe`` into problems, one for each field.

    Args:
        error: What pydantic raised.
        documents: Which command-line override set a path, where one did.
        recipe: The merged document, with the recipe file's positions.
    """
    problems: dict[Path, Problem] = {}
    for item in error.errors(include_url=False, include_context=False):
        path = _real_path(item["loc"], recipe.data, missing=item["type"] == "missing")
        # A union reports one error per branch; the field has one rule, said once.
        if path not in problems:
            wrong, right = _describe(item["type"], path, item["input"])
            problems[path] = Problem(locate(path, documents, recipe), dotted(path), wrong, right)
    # Nor is a section wrong beside what is wrong inside it.
    around = {path[:end] for path in problems for end in range(1, len(path))}
    return [problem for path, problem in problems.items() if path not in around]


def dotted(path: Path) -> str:
    """Return ``a.b[2]`` for ``("a", "b", 2)``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def locate(path: Path, documents: Mapping[Path, Document], recipe: Document) -> str:
    """Return where the value at ``path`` was written: the override that set it, or the file's line."""
    for end in range(len(path), 0, -1):
        if path[:end] in documents:
            return documents[path[:end]].source
    return recipe.where(path)


def _real_path(loc: tuple[int | str, ...], data: Any, *, missing: bool) -> Path:
    """Drop the names of union branches, which pydantic mixes into the path."""
    path: list[int | str] = []
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if inside:
            path.append(part)
            data = data[part]
        elif missing and last:
            path.append(part)
    return tuple(path)


def _describe(kind: str, path: Path, value: Any) -> tuple[str, str]:
    if kind == "missing":
        return "missing", rule(path)
    if kind == "extra_forbidden":
        return "unknown key", _nearest_key(path)
    if kind == "union_tag_not_found":
        return "name is missing", "name: one of " + ", ".join(sorted(_method_names()))
    if kind == "union_tag_invalid":
        name = str(value.get("name"))
        return f"unknown method {name!r}", nearest(name, _method_names()) or "one of " + ", ".join(
            sorted(_method_names())
        )
    shown = _shown(value)
    hint = nearest(value, _choices(path)) if isinstance(value, str) else ""
    return f"{shown} is not allowed", "; ".join(part for part in (hint, rule(path)) if part)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _method_names() -> list[str]:
    return list(Recipe.model_json_schema()["properties"]["method"]["discriminator"]["mapping"])


def _nearest_key(path: Path) -> str:
    key, section = str(path[-1]), path[:-1]
    keys = list(_schema_at(section).get("properties", {}))
    if FOREIGN_NAMES.get(key) in keys:
        return f"here it is called {FOREIGN_NAMES[key]}"
    return nearest(key, keys) or "one of " + ", ".join(keys)


def _schema_at(path: Path) -> dict[str, Any]:
    """Return the JSON Schema of the field at ``path``, references resolved."""
    root: dict[str, Any] = Recipe.model_json_schema()
    schema = root
    for part in path:
        schema = _flatten(schema, root)
        schema = schema.get("items", {}) if isinstance(part, int) else schema.get("properties", {}).get(part, {})
    return _flatten(schema, root)


def _flatten(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Merge references and union branches: properties together, the rest as given."""
    if "$ref" in schema:
        schema = {**schema, **root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]}
    branches = [_flatten(branch, root) for branch in schema.get("anyOf", schema.get("oneOf", []))]
    properties = {key: value for branch in branches for key, value in branch.get("properties", {}).items()}
    items = next((branch["items"] for branch in branches if "items" in branch), None)
    merged = {**schema, "branches": branches}
    if properties or "properties" in schema:
        merged["properties"] = {**properties, **schema.get("properties", {})}
    if items is not None:
        merged["items"] = items
    return merged


def _choices(path: Path) -> list[str]:
    schema = _schema_at(path)
    branches = schema["branches"] or [schema]
    return [str(choice) for branch in branches for choice in _enumerated(branch)]


def _enumerated(schema: dict[str, Any]) -> list[Any]:
    return list(schema.get("enum", [schema["const"]] if "const" in schema else []))


def rule(path: Path) -> str:
    """Say in words what the field at ``path`` accepts, from its JSON Schema."""
    schema = _schema_at(path)
    branches = schema["branches"] or [schema]
    texts = [text for text in (_rule_of(branch) for branch in branches) if text]
    return " or ".join(dict.fromkeys(texts))


def _rule_of(schema: dict[str, Any]) -> str:
    if choices := _enumerated(schema):
        words = ", ".join(json.dumps(choice) if not isinstance(choice, str) else choice for choice in choices)
        return f"one of {words}" if len(choices) > 1 else words
    kind = schema.get("type", "")
    if kind == "array":
        least = f" of at least {schema['minItems']}" if "minItems" in schema else ""
        most = f" of at most {schema['maxItems']}" if "maxItems" in schema else ""
        return f"a list{least}{most}"
    names = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false"}
    if kind in names:
        bounds = [
            f"{sign} {schema[key]:.10g}"
            for key, sign in (
                ("minimum", ">="),
                ("exclusiveMinimum", ">"),
                ("maximum", "<="),
                ("exclusiveMaximum", "<"),
            )
            if key in schema
        ]
        return names[kind] + (" " + " and ".join(bounds) if bounds else "")
    return {"null": "null", "object": "a section of `key: value` lines"}.get(kind, "")
