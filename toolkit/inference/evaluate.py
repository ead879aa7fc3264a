"""A trained model measured on a file: a classifier on labels, one that answers prompts on responses."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from toolkit.data.labels import LabelMap
from toolkit.data.load import load_part
from toolkit.data.pairs import read_pairs
from toolkit.data.targets import TargetFormat
from toolkit.evaluation.figures import all_figures
from toolkit.export.artifact import Manifest, find_artifact
from toolkit.inference.generate import Generator
from toolkit.inference.predict import Classifier, check_classifies
from toolkit.runtime import WantedPrecision


def evaluate(
    path: str | pathlib.Path,
    data: str,
    *,
    text_column: str = "text",
    label_column: str | None = None,
    label_separator: str = "|",
    batch_size: int = 32,
    device: str = "auto",
    precision: WantedPrecision = "fp32",
) -> Mapping[str, Any]:
    """Return every figure of a classifier on the rows of a file.

    Args:
        path: A run folder, or the adapter or model folder of one.
        data: A csv, tsv, jsonl, parquet or npy file, a named set, or a hub id.
        text_column: Column of the text.
        label_column: Column of the label (None: ``label``) or of the list of labels. Where a text may have several
            labels, and for numbers, None reads a column for each, by its name.
        label_separator: Between the labels of a list that is no JSON.
        batch_size: Texts computed at once; the figures depend on it only by rounding.
        device: ``auto``, or a torch device.
        precision: What matrices are multiplied in, as for ``Classifier.load``.

    Raises:
        DataError: If the data cannot be read exactly, or hold a label the classifier does not know.
        AdapterError: If there is no classifier at ``path``.
    """
    # Manifest and data come first: what is wrong with them is said before torch is imported.
    artifact = find_artifact(path)
    check_classifies(artifact)
    manifest = artifact.manifest
    names = tuple(manifest.labels)
    targets = _targets(manifest, label_column, label_separator)
    part, _ = load_part(data, text_column=text_column, targets=targets, label_map=LabelMap(names))
    assert part.labels is not None
    classifier = Classifier.load(path, device=device, precision=precision)
    if part.token_ids is not None:
        logits = classifier.table_logits(part.token_ids, batch_size=batch_size, where=data)
    else:
        assert part.texts is not None
        logits = classifier.logits(part.texts.to_pylist(), batch_size=batch_size)
    return all_figures(
        logits, part.labels, problem_type=manifest.problem_type, names=names, decision=classifier.decision
    )


def _targets(manifest: Manifest, column: str | None, separator: str) -> TargetFormat:
    if manifest.problem_type == "single_label_classification":
        return TargetFormat(column=column or "label")
    columns = () if column is not None else tuple(manifest.labels)
    return TargetFormat(manifest.problem_type, column or "label", columns, separator)


def answers(path: str | pathlib.Path) -> bool:
    """Return whether a trained model answers prompts.

    Raises:
        AdapterError: If there is no trained model at ``path``.
    """
    return find_artifact(path).manifest.template is not None


def evaluate_answers(
    path: str | pathlib.Path,
    data: str,
    *,
    prompt_column: str = "prompt",
    response_column: str = "response",
    batch_size: int = 32,
    device: str = "auto",
) -> dict[str, float]:
    """Return the loss and perplexity of a file's responses under what an ``instruction`` run trained.

    Args:
        path: As for ``evaluate``.
        data: A csv, tsv, jsonl or parquet file, or a hub id.
        prompt_column: Column of the prompt.
        response_column: Column of the response.
        batch_size: Pairs computed at once.
        device: ``auto``, or a torch device.

    Raises:
        DataError: If the data cannot be read exactly, or a prompt leaves no room for a response.
        AdapterError: If there is no such model at ``path``.
    """
    pairs = read_pairs(data, prompt_column=prompt_column, response_column=response_column)
    return Generator.load(path, device=device).judge(pairs, batch_size=batch_size)
