"""Checks a model folder before anything heavy touches it: config, weights, tokenizer, manifest, labels."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from toolkit.durable import sha256
from toolkit.errors import ModelError, Problem, nearest
from toolkit.families import FAMILIES, OWN_HEAD, Family, with_head
from toolkit.models.headers import TensorInfo, parse_json, read_tensor_headers, weight_files
from toolkit.models.heads import plain_config

__all__ = ["TensorInfo", "check_model_folder", "read_tensor_headers", "weight_files"]

MANIFEST = "manifest.json"
TOKENIZER_FILES = {"bpe": "tokenizer.json, or vocab.json and merges.txt", "wordpiece": "tokenizer.json or vocab.txt"}


def check_model_folder(path: Path, *, family_types: Collection[str], weights: bool = True) -> dict[str, Any]:
    """Check all of a model folder that can be checked without loading it.

    Args:
        path: The folder: config.json, safetensors, tokenizer files, perhaps a manifest.json.
        family_types: The model types that are supported.
        weights: Whether the weights will be used; without, a folder may lack them.

    Returns:
        The content of config.json; ``model_type`` is the stock one where the head is the toolkit's own.

    Raises:
        ModelError: Every problem found, one line each; nothing of the folder was executed or unpickled.
    """
    if not path.is_dir():
        raise ModelError(Problem(str(path), "", "not a folder" if path.exists() else "no such folder"))
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            Problem(str(path), "adapter_config.json", "this is an adapter", "the folder of its base model, or merge it")
        )
    config = plain_config(_read_config(path), where=str(path / "config.json"))
    _check_model_type(config, family_types=family_types, where=str(path / "config.json"))
    family = with_head(FAMILIES[config["model_type"]], config.get(OWN_HEAD))
    problems = _config_problems(config, family=family, where=str(path / "config.json"))
    checks = (_weight_problems, _tokenizer_problems, _manifest_problems) if weights else (_tokenizer_problems,)
    for check in checks:
        try:
            problems += check(path, config=config, family=family)
        except ModelError as error:
            problems += error.problems
    if problems:
        raise ModelError(problems)
    return config


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(Problem(str(path), "config.json", "missing", "a model folder in Hugging Face layout"))
    return parse_json(file.read_bytes(), where=str(file))


def _check_model_type(config: Mapping[str, Any], *, family_types: Collection[str], where: str) -> None:
    model_type = config.get("model_type")
    if model_type not in family_types:
        hint = nearest(str(model_type), family_types)
        right = f"supported: {', '.join(family_types)}" + (f"; {hint}" if hint else "")
        raise ModelError(Problem(where, "model_type", f"{model_type!r} is not supported", right))


def _config_problems(config: Mapping[str, Any], *, family: Family, where: str) -> list[Problem]:
    problems = []
    if "auto_map" in config:
        problems.append(
            Problem(where, "auto_map", "asks for code from the model folder, which is never run", "remove it")
        )
    if config.get("quantization_config"):
        problems.append(
            Problem(where, "quantization_config", "the weights are quantised already", "the full-precision model")
        )
    for key in ("vocab_size", family.positions_key, family.layers_key, family.width_key):
        value = config.get(key)
        if type(value) is not int or value < 1:
            problems.append(Problem(where, key, f"{value!r}", "a whole number above 0"))
    return problems + _label_problems(config, where=where)


def _label_problems(config: Mapping[str, Any], *, where: str) -> list[Problem]:
    """Refuse an id2label with gaps or duplicates, or one that label2id contradicts."""
    id2label, label2id = config.get("id2label"), config.get("label2id")
    if id2label is None:
        return []
    if not isinstance(id2label, dict) or sorted(id2label) != sorted(str(i) for i in range(len(id2label))):
        return [Problem(where, "id2label", "its ids have gaps", "ids 0, 1, 2, ...")]
    if len(set(map(str, id2label.values()))) < len(id2label):
        return [Problem(where, "id2label", "a label is there twice", "each label once")]
    if label2id is not None and label2id != {label: int(i) for i, label in id2label.items()}:
        return [Problem(where, "label2id", "disagrees with id2label", "the inverse of id2label")]
    return []


def _weight_problems(path: Path, *, config: Mapping[str, Any], family: Family) -> list[Problem]:
    tensors = read_tensor_headers(path)
    labels = config.get("id2label")
    head = tensors.get(f"{family.output_layer}.weight")
    if head is None or labels is None or (head.shape and head.shape[0] == len(labels)):
        return []
    wrong = f"shape {list(head.shape)} for {len(labels)} labels in config.json"
    return [Problem(str(head.file), f"{family.output_layer}.weight", wrong, "a row per label")]


def _tokenizer_problems(path: Path, *, config: Mapping[str, Any], family: Family) -> list[Problem]:
    size = _tokenizer_size(path, kind=family.tokenizer)
    if size is None:
        return [Problem(str(path), "tokenizer", "missing", TOKENIZER_FILES[family.tokenizer])]
    vocabulary = config.get("vocab_size")
    if isinstance(vocabulary, int) and size > vocabulary:
        wrong = f"{size} token ids, but the embeddings have {vocabulary} rows"
        return [Problem(str(path), "tokenizer", wrong, "the tokenizer the model was trained with")]
    return []


def _tokenizer_size(path: Path, *, kind: str) -> int | None:
    """Return one more than the highest token id, or None if there is no tokenizer."""
    whole, words = path / "tokenizer.json", path / "vocab.txt"
    if whole.is_file():
        table = parse_json(whole.read_bytes(), where=str(whole))
        try:
            vocabulary = table["model"]["vocab"]
            ids = [*vocabulary.values(), *(token["id"] for token in table.get("added_tokens") or [])]
            return int(max(ids)) + 1
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(Problem(str(whole), "model.vocab", "no table of tokens", "a fast tokenizer")) from error
    if kind == "wordpiece" and words.is_file():
        return len(words.read_bytes().splitlines())
    if kind == "bpe" and (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return len(parse_json((path / "vocab.json").read_bytes(), where=str(path / "vocab.json")))
    return None


def _manifest_problems(path: Path, *, config: Mapping[str, Any], family: Family) -> list[Problem]:
    """Compare the files and the labels with the manifest of an exported model, where there is one."""
    file = path / MANIFEST
    if not file.is_file():
        return []
    manifest = parse_json(file.read_bytes(), where=str(file))
    problems = []
    for name, facts in sorted((manifest.get("files") or {}).items()):
        if Path(name).name != name or not (path / name).is_file():
            problems.append(Problem(str(file), name, "missing", "the folder as it was exported"))
        elif sha256(path / name) != str(facts.get("sha256", "")).removeprefix("sha256:"):
            problems.append(
                Problem(str(path / name), "", "its checksum differs from the manifest", "the file as it was exported")
            )
    labels, id2label = manifest.get("labels"), config.get("id2label") or {}
    if labels is not None and [id2label.get(str(i)) for i in range(len(id2label))] != list(labels):
        problems.append(
            Problem(str(file), "labels", f"{json.dumps(labels)} differ from config.json's id2label", "the same labels")
        )
    return problems
