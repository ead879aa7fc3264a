"""What a prediction reads: the sizes of the base, and the token lengths of the data; never a weight."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import Recipe
from toolkit.data.pairs import PairTable, encode_pairs, load_rows
from toolkit.data.parts import LoadedData, Part
from toolkit.data.tokenize import Tokenizer, load_tokenizer
from toolkit.data.tokens import TokenTable
from toolkit.errors import InputError, Problem
from toolkit.models.base import Base, give_forest, resolve_base

Lengths = NDArray[np.int64]
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Inputs:
    """Sizes of base and data.

    Attributes:
        base: Whose config.json gives the shapes.
        labels: Classes.
        train: Tokens of each training row, or block of running text, before ``max_length``.
        validation: The same of validation.
        train_labels: Label of each training row, for balanced batches.
        train_targets: Tokens of each training row that carry loss; None where all do, or a fixed share.
        validation_targets: The same of validation.
    """

    base: Base
    labels: int
    train: Lengths
    validation: Lengths
    train_labels: NDArray[Any] | None = None
    train_targets: Lengths | None = None
    validation_targets: Lengths | None = None


def read_sizes(recipe: Recipe) -> Inputs:
    """Read the data's token lengths and the base's config, without torch and without weights.

    Raises:
        InputError: If the data or the base are wrong.
    """
    classifies, answers = recipe.objective == "classification", recipe.objective == "instruction"
    data = load_rows(recipe.data, objective=recipe.objective)
    # A base without its weights is enough, as for a run from random ones.
    base = give_forest(resolve_base(recipe.model.model_copy(update={"random_init": True})), recipe.method)
    tokenizer = load_tokenizer(base.path, kind=base.family.tokenizer)
    if answers:
        return _pairs(recipe, data, base, tokenizer)
    train, validation = (
        _lengths(part, tokenizer, recipe=recipe) if classifies else _blocks(part, tokenizer, recipe=recipe)
        for part in (data.train, data.validation)
    )
    labels = len(data.label_map.names) if data.label_map else 2
    return Inputs(base=base, labels=labels, train=train, validation=validation, train_labels=data.train.labels)


def _pairs(recipe: Recipe, data: LoadedData, base: Base, tokenizer: Tokenizer) -> Inputs:
    template, longest = recipe.instruction.template, recipe.model.max_length
    train, validation = (
        encode_pairs(data.parts[name], tokenizer, template=template, max_length=longest, name=name)
        for name in ("train", "validation")
    )
    return pair_inputs(base, train.table, validation.table)


def pair_inputs(base: Base, train: TokenTable, validation: TokenTable) -> Inputs:
    """Return the sizes of prompts with responses; both tables are ``PairTable``."""
    assert isinstance(train, PairTable)
    assert isinstance(validation, PairTable)
    lengths = {"train": train.lengths, "validation": validation.lengths}
    return Inputs(base, 2, **lengths, train_targets=train.targets, validation_targets=validation.targets)


def _lengths(part: Part, tokenizer: Tokenizer, *, recipe: Recipe) -> Lengths:
    longest = recipe.model.max_length
    if part.token_ids is not None:
        return np.minimum(part.token_ids.lengths, longest)
    return tokenizer.encode_cached(part.texts, max_length=longest).table.lengths


def _blocks(part: Part, tokenizer: Tokenizer, *, recipe: Recipe) -> Lengths:
    """Return the lengths of the blocks that running text is cut into, as ``data.batching.lm_blocks`` does."""
    whole = part.token_ids.lengths if part.token_ids is not None else _whole(part, tokenizer)
    # GPT-2 gets an end of text behind every row; a masked model's two frame tokens go around blocks instead.
    causal = tokenizer.kind == "bpe"
    total = int(whole.sum()) + (len(whole) if causal else -2 * len(whole))
    block = recipe.model.max_length - (0 if causal else 2)
    full, rest = divmod(max(total, 0), block)
    return np.array([block] * full + [rest] * bool(rest), dtype=np.int64) + (0 if causal else 2)


def _whole(part: Part, tokenizer: Tokenizer) -> Lengths:
    return tokenizer.encode_cached(part.texts, max_length=1 << 30).table.lengths


def choose_device(wanted: str) -> str:
    """Return ``cpu`` or ``cuda``; ``auto`` looks for an NVIDIA driver, because asking torch would cost its import."""
    if wanted != "auto":
        return wanted
    return "cuda" if pathlib.Path("/proc/driver/nvidia/gpus").is_dir() else "cpu"


def parse_bytes(text: str) -> int:
    """Return the bytes of ``4GiB``, ``4GB``, ``512 MiB`` or a plain number.

    Raises:
        InputError: It is none of these.
    """
    bare = text.strip().lower().replace(" ", "")
    number = bare.rstrip("bgikm")
    unit = bare[len(number) :]
    try:
        value = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        value = 0.0
    if not 1 <= value < 2**60:
        raise InputError(Problem("--budget", "", f"{text!r} is no amount of memory", "for example 4GiB or 512MiB"))
    return int(value)
