"""predictions.csv: what a run said of every test row, so that two runs can be compared row by row."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from toolkit.durable import write_file_atomically
from toolkit.errors import OutputError, Problem
from toolkit.evaluation.decision import PLAIN, Decision

COLUMNS = ("row", "label", "predicted", "probability")
TFIDF = "tfidf_logistic_regression"

Ints = NDArray[np.integer]


@dataclass(frozen=True)
class Predictions:
    """The answers to the test rows.

    Attributes:
        labels: (N,), ids of the true labels.
        predicted: (N,), ids of the labels that were given.
        probability: (N,), what the model gave its answers, 0 to 1; below 0.5 where a tuned threshold is.
        baselines: (N,) ids by the name of the baseline that gave them.
    """

    labels: Ints
    predicted: Ints
    probability: NDArray[np.floating]
    baselines: Mapping[str, Ints] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """A predictions.csv, read back.

    Attributes:
        rows: Row number and true label of every test row, in order: equal for runs that were judged on the same.
        right: (N,), whether the run's answer is the true label.
        baselines: The same of each baseline, by name.
    """

    rows: list[tuple[str, str]]
    right: NDArray[np.bool_]
    baselines: dict[str, NDArray[np.bool_]]


def predictions_of(
    logits: NDArray[np.floating],
    labels: Ints,
    *,
    names: Sequence[str],
    decision: Decision = PLAIN,
    baselines: Mapping[str, Ints],
) -> Predictions:
    """Return the answers that logits (N, C) give, decided as ``Classifier`` does, beside those of the baselines."""
    probabilities = decision.probabilities(logits, problem_type="single_label_classification")
    predicted = decision.chosen(probabilities, names=names)
    return Predictions(labels, predicted, probabilities[np.arange(len(predicted)), predicted], baselines)


def write_predictions(path: pathlib.Path, predictions: Predictions, *, row_numbers: Ints, names: Sequence[str]) -> None:
    """Write a line for each test row.

    Args:
        path: The file.
        predictions: Of N rows.
        row_numbers: (N,), 0-based rows of the table that the test part was taken from.
        names: Label names in id order.

    Raises:
        OutputError: If the disk is full.
    """
    text = io.StringIO()
    # \n whatever the system: a file is compared byte by byte.
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*COLUMNS, *predictions.baselines])
    answers = [predictions.labels, predictions.predicted]
    named = [[names[answer] for answer in ids.tolist()] for ids in (*answers, *predictions.baselines.values())]
    shown = [f"{probability:.6f}" for probability in predictions.probability.tolist()]
    lines.writerows(zip(row_numbers.tolist(), named[0], named[1], shown, *named[2:], strict=True))
    write_file_atomically(path, text.getvalue())


def read_predictions(path: pathlib.Path) -> Answers | None:
    """Read what ``write_predictions`` wrote; None where a run kept none.

    Raises:
        OutputError: If the file is not what a run writes.
    """
    if not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise OutputError(Problem(str(path), "", f"cannot be read: {error}", "the file as the run wrote it")) from error
    if tuple(header[: len(COLUMNS)]) != COLUMNS or any(len(line) != len(header) for line in lines) or not lines:
        raise OutputError(Problem(str(path), "", "not a table of predictions", "the file as the run wrote it"))
    columns = dict(zip(header, map(np.array, zip(*lines, strict=True)), strict=True))
    truth = columns["label"]
    baselines = {name: columns[name] == truth for name in header[len(COLUMNS) :]}
    rows = [(line[0], line[1]) for line in lines]
    return Answers(rows=rows, right=columns["predicted"] == truth, baselines=baselines)
