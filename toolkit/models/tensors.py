"""Compares the tensors a folder holds with those its architecture needs, before they are loaded."""

from __future__ import annotations

import re

from torch import nn

from toolkit.errors import ModelError, Problem
from toolkit.families import OWN_HEAD, Family
from toolkit.models.base import Base
from toolkit.models.headers import FLOAT_DTYPES, TensorInfo, read_tensor_headers

# Heads of other tasks, and the causal masks that old GPT-2 files store as buffers: not read, not wanted.
OTHER_HEADS = {
    "gpt2": re.compile(rf"lm_head\.weight|score\.weight|.*\.attn\.(bias|masked_bias)|{OWN_HEAD}\..*"),
    "distilbert": re.compile(
        r"(vocab_transform|vocab_layer_norm|vocab_projector|pre_classifier|classifier|qa_outputs)\.(weight|bias)"
        rf"|.*embeddings\.position_ids|{OWN_HEAD}\..*"
    ),
}
MAX_LISTED = 8


def has_head(base: Base) -> bool:
    """Return whether the folder holds a classification head."""
    held = read_tensor_headers(base.path)
    return all(any(name.startswith(f"{path}.") for name in held) for path in base.family.head)


def check_tensors(base: Base, skeleton: nn.Module, *, head: bool) -> None:
    """Check names, shapes and dtypes of a folder's tensors against a model's skeleton.

    Args:
        base: The folder.
        skeleton: The model to be loaded, on the meta device.
        head: Whether the head outside the body has to come from the folder too.

    Raises:
        ModelError: Every missing, unexpected or misshapen tensor (the first 8 of them).
    """
    family = base.family
    held = {body_name(name, family): info for name, info in read_tensor_headers(base.path).items()}
    wanted = {body_name(name, family): tuple(value.shape) for name, value in skeleton.state_dict().items()}
    body = {name for name in wanted if head or not OTHER_HEADS[family.model_type].fullmatch(name)}
    where = str(base.path)
    problems = [Problem(where, name, "the tensor is missing", "a complete model") for name in sorted(body - set(held))]
    for name, info in sorted(held.items()):
        # A classification head that is drawn anew may have any shape in the file; another task's is not read at all.
        unread = name not in wanted or name.startswith(family.head)
        other = name not in body and unread and OTHER_HEADS[family.model_type].fullmatch(name) is not None
        problem = None if other else _tensor_problem(name, info, wanted=wanted.get(name))
        problems += [] if problem is None else [problem]
    if len(problems) > MAX_LISTED:
        rest = len(problems) - MAX_LISTED
        problems = [*problems[:MAX_LISTED], Problem(where, "", f"and {rest} more tensors", "another config.json?")]
    if problems:
        raise ModelError(problems)


def _tensor_problem(name: str, info: TensorInfo, *, wanted: tuple[int, ...] | None) -> Problem | None:
    where = str(info.file)
    if wanted is None:
        return Problem(where, name, "an unexpected tensor", "a model of the architecture in config.json")
    if info.shape != wanted:
        return Problem(where, name, f"shape {list(info.shape)}", f"{list(wanted)} by config.json")
    if info.dtype not in FLOAT_DTYPES:
        return Problem(where, name, f"dtype {info.dtype}", "floating point: " + ", ".join(FLOAT_DTYPES))
    return None


def body_name(name: str, family: Family) -> str:
    """Return a name without the body's prefix, which files saved from the bare body lack, in today's spelling."""
    name = name.removeprefix(f"{family.backbone}.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
