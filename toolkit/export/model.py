"""A standalone model as a folder: weights, config and tokenizer; stock transformers loads it, if it has the head."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import TYPE_CHECKING, Any

import torch

from toolkit.durable import room_on_disk
from toolkit.errors import ModelError, Problem
from toolkit.export.artifact import ArtifactFacts
from toolkit.export.staging import check_space
from toolkit.export.stream import DTYPES, MAX_SHARD_BYTES, Content, Read, Shapes, write_tensors
from toolkit.families import OWN_HEAD, OWN_TYPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
)
# Left from where a base came from or how training ran; none of it is true of the exported file.
STALE = (
    "_name_or_path",
    "name_or_path",
    "use_cache",
    "torch_dtype",
    "quantization_config",
    "task_specific_params",
    "head_dropout",
)


def save_model(
    model: PreTrainedModel,
    folder: pathlib.Path,
    *,
    read: Read | None = None,
    tokenizer_from: pathlib.Path,
    dtype: str = "fp32",
    max_length: int | None = None,
) -> None:
    """Write a trained classifier or language model into ``folder``.

    The manifest is the caller's to add with ``write_manifest``, and that the folder appears whole or not at all.

    Args:
        model: A transformers model whose weights are not quantised.
        folder: Is empty, or missing.
        read: Gives the tensors that the model holds on the meta device; None where there are none.
        tokenizer_from: Folder whose tokenizer files are copied.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        max_length: Tokens that a stock pipeline truncates to; None leaves the tokenizer's own limit.

    Raises:
        OutputError: If the disk lacks the space.
        ModelError: If ``tokenizer_from`` holds no tokenizer.
        ToolkitError: If a tensor is not finite.
    """
    tensors = model.state_dict()

    def content(name: str) -> Content:
        return read(name) if read is not None and tensors[name].is_meta else tensors[name]

    folder.mkdir(parents=True, exist_ok=True)
    write_model_files(folder, model, content, tokenizer_from=tokenizer_from, dtype=dtype, max_length=max_length)


def write_model_files(
    folder: pathlib.Path,
    model: PreTrainedModel,
    read: Read,
    *,
    tokenizer_from: pathlib.Path,
    dtype: str,
    max_length: int | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write weights, config and tokenizer into ``folder`` and return the weights' bytes.

    Args:
        folder: An empty folder.
        model: Gives names, shapes and config; its own tensors are not read, so it may lie on the meta device.
        read: Name to tensor, or to slices of it; called once per name, so that only one is held.
        tokenizer_from: Folder whose tokenizer files are copied.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        max_length: Tokens that a stock pipeline truncates to, or None.
        max_shard_bytes: Largest weight file.

    Raises:
        OutputError: If the disk lacks the space.
        ModelError: If ``tokenizer_from`` holds no tokenizer.
        ToolkitError: If a tensor is not finite.
    """
    shapes = tensor_shapes(model)
    kind = DTYPES[dtype]
    needed = sum(torch.Size(shape).numel() for shape in shapes.values()) * kind.itemsize
    check_space(folder, needed=needed)
    with room_on_disk(folder, needed=needed):
        _write_json(folder / "config.json", stored_config(model, dtype=kind))
        copy_tokenizer(tokenizer_from, folder, model_type=model.config.model_type, max_length=max_length)
        return write_tensors(folder, shapes, read, dtype=kind, max_shard_bytes=max_shard_bytes)


def tensor_shapes(model: PreTrainedModel) -> Shapes:
    """Return the shape of every tensor a file of this model holds, by name; tied copies are left out."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def stored_config(model: PreTrainedModel, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json of an exported model; stock transformers knows neither type nor class of an own head."""
    settings: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    kept = {key: value for key, value in settings.items() if key not in STALE}
    name = type(model).__name__
    if OWN_HEAD in kept:
        kept, name = kept | {"model_type": f"{OWN_TYPE}{kept['model_type']}"}, f"Toolkit{name}"
    return kept | {"architectures": [name], "dtype": str(dtype).removeprefix("torch.")}


def note_decision(model: Any, facts: ArtifactFacts) -> None:
    """Write temperature and thresholds, where there are any, into the config that is stored with a model.

    Stock transformers keeps them, and applies neither.
    """
    if facts.temperature != 1:
        model.config.calibration_temperature = facts.temperature
    if facts.thresholds:
        model.config.decision_thresholds = facts.thresholds


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path, *, model_type: str, max_length: int | None) -> None:
    """Copy a base's tokenizer files, and make a stock pipeline cut and pad as training did.

    Args:
        source: Folder of the base.
        folder: Folder of the artifact.
        model_type: ``gpt2`` gets a pad token, which its stock tokenizer lacks.
        max_length: Becomes the tokenizer's ``model_max_length``; None leaves it.

    Raises:
        ModelError: If there are none.
    """
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not {"tokenizer.json", "vocab.json", "vocab.txt"} & set(present):
        raise ModelError(Problem(str(source), "tokenizer", "missing", "tokenizer.json, or vocabulary files"))
    for name in present:
        shutil.copyfile(source / name, folder / name)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if max_length is not None:
        settings["model_max_length"] = max_length
    if not settings.get("tokenizer_class"):
        settings = _stock_class(model_type, whole="tokenizer.json" in present) | settings
    if model_type == "gpt2" and not settings.get("pad_token"):
        settings["pad_token"] = settings.get("eos_token") or "<|endoftext|>"
    _write_json(path, settings)


def _stock_class(model_type: str, *, whole: bool) -> dict[str, Any]:
    """Return what tells stock transformers how to read a tokenizer whose files do not say.

    Left to itself it would pick the class by the model and put that class's normaliser in place of the file's own.
    """
    if not whole:
        return {"tokenizer_class": {"gpt2": "GPT2Tokenizer", "distilbert": "DistilBertTokenizer"}[model_type]}
    special = {
        "gpt2": {"eos_token": "<|endoftext|>"},
        "distilbert": {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    }
    # DistilBERT's forward has no token_type_ids.
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    return {"tokenizer_class": "PreTrainedTokenizerFast"} | inputs | special[model_type]


def _write_json(path: pathlib.Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
