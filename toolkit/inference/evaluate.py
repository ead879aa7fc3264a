"""A trained classifier measured on a labelled file."""

from __future__ import annotations

import pathlib

from toolkit.data.labels import LabelMap
from toolkit.data.load import load_part
from toolkit.evaluation.metrics import ClassificationMetrics, classification_metrics
from toolkit.export.artifact import find_artifact
from toolkit.inference.predict import Classifier, check_classifies


def evaluate(
    path: str | pathlib.Path,
    data: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    batch_size: int = 32,
    device: str = "auto",
) -> ClassificationMetrics:
    """Return every figure of a classifier on the rows of a file.

    Args:
        path: A run folder, or the adapter or model folder of one.
        data: A csv, tsv, jsonl, parquet or npy file, a named set, or a hub id.
        text_column: Column of the text.
        label_column: Column of the label.
        batch_size: Texts computed at once; the figures depend on it only by rounding.
        device: ``auto``, or a torch device.

    Raises:
        DataError: If the data cannot be read exactly, or hold a label the classifier does not know.
        AdapterError: If there is no classifier at ``path``.
    """
    # Manifest and data come first: what is wrong with them is said before torch is imported.
    artifact = find_artifact(path)
    check_classifies(artifact)
    names = tuple(artifact.manifest.labels)
    part, _ = load_part(data, text_column=text_column, label_column=label_column, label_map=LabelMap(names))
    assert part.labels is not None
    classifier = Classifier.load(path, device=device)
    if part.token_ids is not None:
        logits = classifier.table_logits(part.token_ids, batch_size=batch_size, where=data)
    else:
        assert part.texts is not None
        logits = classifier.logits(part.texts.to_pylist(), batch_size=batch_size)
    return classification_metrics(logits, part.labels, names=names)
