"""Rules of labels and their rows: of which kind they are, how rows are split and balanced, how labels are decided."""

from __future__ import annotations

from toolkit.config.rule import Rule
from toolkit.config.schema import LossSettings, Recipe


def _is_single(recipe: Recipe) -> bool:
    return recipe.data.problem_type == "single_label_classification"


def _is_regression(recipe: Recipe) -> bool:
    return recipe.data.problem_type == "regression"


METRICS = {
    "single_label_classification": ("accuracy", "f1_macro", "loss"),
    "multi_label_classification": ("accuracy", "f1_macro", "f1_micro", "mean_average_precision", "loss"),
    "regression": ("loss", "r2", "spearman"),
}


def _named_labels(recipe: Recipe) -> list[str] | None:
    return recipe.data.labels or recipe.data.label_columns


def _split_sum(recipe: Recipe) -> float:
    split = recipe.data.split
    return split.train + split.validation + split.test


def _labels_repeat(recipe: Recipe) -> bool:
    labels = _named_labels(recipe) or []
    return len(set(labels)) < len(labels)


def _lists_weights(recipe: Recipe, *, other_than: int) -> bool:
    weights = recipe.training.loss.class_weights
    return isinstance(weights, list) and len(weights) != other_than


LABEL_RULES = (
    Rule(("data", "labels"), _labels_repeat, "a label is listed twice", "each label once"),
    Rule(
        ("data", "split"),
        lambda r: abs(_split_sum(r) - 1) > 1e-6,
        "train, validation and test do not add up to 1",
        "for example 0.7, 0.1, 0.2",
    ),
    Rule(
        ("data", "split", "time_column"),
        lambda r: r.data.split.time_column is not None and r.data.split.group_column is not None,
        "rows cannot be cut by time and kept in groups",
        "time_column or group_column",
    ),
    Rule(
        ("data", "split", "time_column"),
        lambda r: r.data.split.time_column is not None and None not in (r.data.validation, r.data.test),
        "every part has its own file",
        "leave time_column out",
    ),
    Rule(
        ("data", "split", "folds"),
        lambda r: r.data.split.folds is not None and (r.data.split.time_column is not None or r.data.test is not None),
        "folds take turns as the test part, without order or a test file",
        "leave folds out, or time_column and data.test",
    ),
    Rule(
        ("data", "split", "fold"),
        lambda r: r.data.split.fold > (r.data.split.folds or 1),
        "there is no such fold",
        "1 to data.split.folds",
    ),
    Rule(
        ("training", "balanced_batches"),
        lambda r: r.training.balanced_batches and (not _is_single(r) or r.objective != "classification"),
        "only texts with one label each can be balanced",
        "false, or training.loss.class_weights: balanced",
    ),
    Rule(
        ("training", "balanced_batches"),
        lambda r: r.training.balanced_batches and r.training.max_tokens_per_batch is not None,
        "batches of like length are made by length alone",
        "max_tokens_per_batch: null, or balanced_batches: false",
    ),
    Rule(
        ("training", "loss", "class_weights"),
        lambda r: _lists_weights(r, other_than=len(_named_labels(r) or [])) and _named_labels(r) is not None,
        "the number of weights is not that of the labels",
        "one weight for each label",
    ),
    Rule(
        ("data", "problem_type"),
        lambda r: r.objective != "classification" and not _is_single(r),
        "belongs to objective classification",
        "leave problem_type out, or objective: classification",
    ),
    Rule(
        ("data", "label_columns"),
        lambda r: r.data.label_columns is not None and _is_single(r),
        "a text with one label has it in one column",
        "data.label_column, or problem_type multi_label_classification or regression",
    ),
    Rule(
        ("data", "labels"),
        lambda r: r.data.labels is not None and (_is_regression(r) or r.data.label_columns is not None),
        "numbers have no labels, and label_columns name their own",
        "leave labels out",
    ),
    Rule(
        ("data", "balance"),
        lambda r: r.data.balance is not None and not _is_single(r),
        "rows that have several labels, or numbers, cannot be balanced by row",
        "leave balance out; training.loss.class_weights: balanced weighs labels",
    ),
    Rule(
        ("training", "loss"),
        lambda r: _is_regression(r) and r.training.loss != LossSettings(),
        "numbers have no labels to weigh",
        "leave loss out",
    ),
    Rule(
        ("evaluation", "threshold"),
        lambda r: r.evaluation.threshold is not None and (_is_regression(r) or r.objective != "classification"),
        "only labels have a threshold",
        "leave threshold out",
    ),
    Rule(
        ("evaluation", "calibrate"),
        lambda r: r.evaluation.calibrate and (_is_regression(r) or r.objective != "classification"),
        "only labels have probabilities",
        "leave calibrate out",
    ),
    Rule(
        ("evaluation", "metric"),
        lambda r: r.objective == "classification" and r.evaluation.metric not in METRICS[r.data.problem_type],
        "is no metric of this problem_type",
        "single_label_classification: accuracy, f1_macro, loss; multi_label_classification: those, f1_micro, "
        "mean_average_precision; regression: loss, r2, spearman",
    ),
)
