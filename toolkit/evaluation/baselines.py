"""What costs next to nothing: the commonest label, and TF-IDF with logistic regression. Every run is measured by them.

Both see the rows of the run as the model sees them: its tokens, cut to ``max_length``. So they serve .npy data too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

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
        labels: (rows,).
    """

    ids: Ints
    offsets: Ints
    labels: Ints


class Baseline(TypedDict):
    """Figures of one baseline on the part that judges.

    Attributes:
        accuracy: 0 to 1.
        f1_macro: 0 to 1.
        rows: Rows it learnt from.
    """

    accuracy: float
    f1_macro: float
    rows: int


def baselines(train: Tokens, judged: Tokens, *, vocabulary: int, seed: int) -> dict[str, Baseline]:
    """Return the figures of each baseline by name: ``majority`` and ``tfidf_logistic_regression``.

    Args:
        train: What they learn from.
        judged: What they are judged on.
        vocabulary: Every token id is below it.
        seed: Of the rows taken where ``train`` has more than 20,000.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    labels = train["labels"]
    common = np.bincount(labels).argmax()
    found = {"majority": _judge(np.full(len(judged["labels"]), common), judged, rows=len(labels))}
    chosen = np.arange(len(labels))
    if len(chosen) > MAX_ROWS:
        chosen = np.sort(np.random.default_rng(seed).choice(len(labels), MAX_ROWS, replace=False))
    if len(np.unique(labels[chosen])) > 1:
        counts = _counts(train, vocabulary)[chosen]
        # What occurs in one text alone says nothing of another, and is most of the columns.
        known = np.flatnonzero(counts.getnnz(axis=0) > 1)
        known = known if len(known) else np.unique(counts.indices)
        weigh = TfidfTransformer(sublinear_tf=True)
        classifier = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=200, tol=1e-3)
        classifier.fit(weigh.fit_transform(counts[:, known]), labels[chosen])
        predicted = classifier.predict(weigh.transform(_counts(judged, vocabulary)[:, known]))
        found["tfidf_logistic_regression"] = _judge(predicted, judged, rows=len(chosen))
    return found


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


def _judge(predicted: NDArray[Any], judged: Tokens, *, rows: int) -> Baseline:
    from sklearn.metrics import f1_score

    truth = judged["labels"]
    score = f1_score(truth, predicted, average="macro", zero_division=0)
    return {"accuracy": float((predicted == truth).mean()), "f1_macro": float(score), "rows": rows}
