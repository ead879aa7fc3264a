"""What costs next to nothing: the commonest answer, and TF-IDF with a linear model. Every run is measured by them.

Both see the rows of the run as the model sees them: its tokens, cut to ``max_length``. So they serve .npy data too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import ProblemType
from toolkit.evaluation.multi_label import decided
from toolkit.evaluation.regression import validation_figures
from toolkit.runtime import import_sklearn

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Ints = NDArray[np.integer]
# Rows that logistic regression learns from; more bring it little and take minutes.
MAX_ROWS = 20_000
# Pairs of neighbouring tokens share so many columns by their hash.
PAIR_COLUMNS = 1 << 20
PAIR_PRIME = 1_000_003
INVERSE_REGULARISATION = 10.0


class Tokens(TypedDict):
    """Rows of token ids, one after another.

    Attributes:
        ids: (tokens,).
        offsets: (rows + 1,), where each row begins and the last one ends.
        labels: Of each row, as ``data.targets`` has them.
    """

    ids: Ints
    offsets: Ints
    labels: NDArray[Any]


# Figures of one baseline on the part that judges, by name: accuracy and f1_macro, f1_micro where rows have several
# labels, or mae, r2 and spearman of numbers; and ``rows``, the rows it learnt from.
Baseline = dict[str, float]


def baselines(
    train: Tokens,
    judged: Tokens,
    *,
    problem_type: ProblemType = "single_label_classification",
    vocabulary: int,
    seed: int,
) -> tuple[dict[str, Baseline], dict[str, NDArray[Any]]]:
    """Return the figures, and the answers (rows, ...), of each baseline by name.

    They are ``majority`` (the commonest label, or set of labels) and ``tfidf_logistic_regression``; for numbers
    ``mean`` and ``tfidf_ridge``.

    Args:
        train: What they learn from.
        judged: What they are judged on.
        problem_type: What the labels are.
        vocabulary: Every token id is below it.
        seed: Of the rows taken where ``train`` has more than 20,000.
    """
    import_sklearn()
    from sklearn.feature_extraction.text import TfidfTransformer

    labels = train["labels"]
    constant, learned, answer = _answers(labels, problem_type)
    answers = {constant: np.repeat(answer[None], len(judged["labels"]), axis=0)}
    found = {constant: _judge(answers[constant], judged, problem_type, rows=len(labels))}
    chosen = np.arange(len(labels))
    if len(chosen) > MAX_ROWS:
        chosen = np.sort(np.random.default_rng(seed).choice(len(labels), MAX_ROWS, replace=False))
    if (labels[chosen] != labels[chosen[0]]).any():
        counts = _counts(train, vocabulary)[chosen]
        # What occurs in one text alone says nothing of another, and is most of the columns.
        known = np.flatnonzero(counts.getnnz(axis=0) > 1)
        known = known if len(known) else np.unique(counts.indices)
        weigh = TfidfTransformer(sublinear_tf=True)
        predict = _fit(weigh.fit_transform(counts[:, known]), labels[chosen], problem_type)
        answers[learned] = predict(weigh.transform(_counts(judged, vocabulary)[:, known]))
        found[learned] = _judge(answers[learned], judged, problem_type, rows=len(chosen))
    return found, answers


def _answers(labels: NDArray[Any], problem_type: ProblemType) -> tuple[str, str, NDArray[Any]]:
    """Return the names of both baselines, and what the constant one answers."""
    if problem_type == "regression":
        return "mean", "tfidf_ridge", labels.mean(axis=0)
    distinct, counts = np.unique(labels, axis=0, return_counts=True)
    return "majority", "tfidf_logistic_regression", distinct[counts.argmax()]


def _fit(texts: csr_matrix, labels: NDArray[Any], problem_type: ProblemType) -> Callable[[csr_matrix], NDArray[Any]]:
    """Return what predicts the labels of other texts."""
    from sklearn.linear_model import LogisticRegression, Ridge

    def classifier(column: NDArray[Any]) -> Callable[[csr_matrix], NDArray[Any]]:
        if (column == column[0]).all():
            return lambda texts: np.full(texts.shape[0], column[0])
        model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=200, tol=1e-3).fit(texts, column)
        return lambda texts: np.asarray(model.predict(texts))

    if problem_type == "regression":
        ridge = Ridge(random_state=0).fit(texts, labels)
        return lambda texts: np.asarray(ridge.predict(texts)).reshape(texts.shape[0], -1)
    if problem_type == "single_label_classification":
        return classifier(labels)
    each = [classifier(column) for column in labels.T]
    return lambda texts: np.stack([predict(texts) for predict in each], axis=1)


def _counts(rows: Tokens, vocabulary: int) -> csr_matrix:
    """Return how often each token, and each pair of neighbours, occurs in each row: (rows, vocabulary + 2**20)."""
    from scipy.sparse import csr_matrix

    ids, offsets = rows["ids"].astype(np.int64), rows["offsets"].astype(np.int64)
    row_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    within = np.flatnonzero(row_of[1:] == row_of[:-1])
    pairs = vocabulary + (ids[within] * PAIR_PRIME + ids[within + 1]) % PAIR_COLUMNS
    columns, places = np.concatenate([ids, pairs]), np.concatenate([row_of, row_of[within]])
    shape = (len(offsets) - 1, vocabulary + PAIR_COLUMNS)
    counts = csr_matrix((np.ones(len(columns), dtype=np.float32), (places, columns)), shape=shape)
    counts.sum_duplicates()
    return counts


def _judge(predicted: NDArray[Any], judged: Tokens, problem_type: ProblemType, *, rows: int) -> Baseline:
    from sklearn.metrics import f1_score

    truth = judged["labels"]
    if problem_type == "regression":
        return {**validation_figures(predicted, truth), "rows": rows}
    if problem_type == "multi_label_classification":
        return {**decided(predicted.astype(bool), truth), "rows": rows}
    score = f1_score(truth, predicted, average="macro", zero_division=0)
    return {"accuracy": float((predicted == truth).mean()), "f1_macro": float(score), "rows": rows}
