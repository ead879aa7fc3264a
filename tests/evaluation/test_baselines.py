"""The cheap ways are what scikit-learn makes of the same tokens, and see nothing of the test rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression

from toolkit.evaluation import baselines as room
from toolkit.evaluation.baselines import Tokens, baselines

VOCABULARY = 60


def rows(count: int, seed: int, labels: int = 3) -> Tokens:
    """Rows whose tokens lean towards their label's part of the vocabulary."""
    chance = np.random.default_rng(seed)
    lengths = chance.integers(1, 12, count)
    truth = chance.integers(0, labels, count)
    leaning = np.repeat(truth, lengths) * 20 + chance.integers(0, 20, lengths.sum())
    ids = np.where(chance.random(lengths.sum()) < 0.4, leaning, chance.integers(0, VOCABULARY, lengths.sum()))
    return Tokens(ids=ids.astype(np.int32), offsets=np.concatenate([[0], np.cumsum(lengths)]), labels=truth)


def as_text(tokens: Tokens) -> list[str]:
    offsets = tokens["offsets"]
    return [" ".join(f"t{i}" for i in tokens["ids"][low:high]) for low, high in pairwise(offsets)]


def test_they_are_what_scikit_learn_makes_of_the_same_tokens() -> None:
    train, test = rows(400, 0), rows(150, 1)
    found, answers = baselines(train, test, vocabulary=VOCABULARY, seed=0)
    words = CountVectorizer(ngram_range=(1, 2), min_df=2, token_pattern=r"\S+")
    weigh = TfidfTransformer(sublinear_tf=True)
    plain = LogisticRegression(C=room.INVERSE_REGULARISATION, max_iter=200, tol=1e-3)
    plain.fit(weigh.fit_transform(words.fit_transform(as_text(train))), train["labels"])
    expected = plain.predict(weigh.transform(words.transform(as_text(test))))
    accuracy = found["tfidf_logistic_regression"]["accuracy"]
    assert accuracy == pytest.approx(float((expected == test["labels"]).mean()), abs=0.01)
    assert accuracy == float((answers["tfidf_logistic_regression"] == test["labels"]).mean())
    assert accuracy > 0.6 > found["majority"]["accuracy"]
    common = np.bincount(train["labels"]).argmax()
    assert found["majority"]["accuracy"] == float((test["labels"] == common).mean())


def test_large_parts_are_sampled_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_ROWS", 50)
    found, _ = baselines(rows(400, 0), rows(150, 1), vocabulary=VOCABULARY, seed=0)
    assert found["tfidf_logistic_regression"]["rows"] == 50
    assert found["majority"]["rows"] == 400


def test_odd_parts_do_not_stop_a_run() -> None:
    single = Tokens(ids=np.array([1, 2]), offsets=np.array([0, 1, 2]), labels=np.array([1, 1]))
    assert set(baselines(single, single, vocabulary=VOCABULARY, seed=0)[0]) == {"majority"}
    no_pair_twice = Tokens(ids=np.array([1, 2]), offsets=np.array([0, 1, 2]), labels=np.array([0, 1]))
    found, _ = baselines(no_pair_twice, no_pair_twice, vocabulary=VOCABULARY, seed=0)
    assert found["tfidf_logistic_regression"]["accuracy"] == 1.0
