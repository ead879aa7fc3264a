"""McNemar's test against its definition and scipy's permutation test; the interval against scipy's bootstrap."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from scipy.stats import bootstrap, chi2, permutation_test

from toolkit.evaluation.paired import compare_answers, mcnemar


def answers(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    one = chance.random(rows) < 0.9
    return one, np.where(chance.random(rows) < 0.85, one, chance.random(rows) < 0.6)


@pytest.mark.parametrize(("only_one", "only_other"), [(3, 9), (0, 6), (12, 12), (1, 0), (40, 21)])
def test_it_is_the_sign_test_of_the_rows_that_differ(only_one: int, only_other: int) -> None:
    uneven, fewer = only_one + only_other, min(only_one, only_other)
    tail = sum(comb(uneven, k) for k in range(fewer + 1)) / 2**uneven
    assert mcnemar(only_one, only_other) == pytest.approx(min(1.0, 2 * tail))


def test_large_counts_near_the_corrected_chi_square() -> None:
    # McNemar's own approximation, with Edwards' correction for continuity.
    approximate = chi2.sf((abs(310 - 250) - 1) ** 2 / (310 + 250), df=1)
    assert mcnemar(310, 250) == pytest.approx(approximate, rel=0.02)


def test_it_is_the_permutation_test_of_paired_rows() -> None:
    one, other = answers(400, 1)
    found = compare_answers(one, other)
    shuffled = permutation_test(
        (one.astype(float), other.astype(float)), lambda a, b, axis: (a - b).mean(axis=axis), vectorized=True,
        permutation_type="samples", n_resamples=9_999, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert found["p_value"] == pytest.approx(float(shuffled.pvalue), abs=0.01)
    assert found["difference"] == pytest.approx(one.mean() - other.mean())


def test_the_interval_is_that_of_resampled_rows() -> None:
    one, other = answers(400, 2)
    difference = (one.astype(float) - other).reshape(1, -1)
    drawn = bootstrap(difference, np.mean, method="percentile", n_resamples=4_000, rng=np.random.default_rng(0))
    low, high = drawn.confidence_interval
    assert compare_answers(one, other)["interval"] == pytest.approx([low, high], abs=0.006)


def test_equal_answers_are_not_told_apart_and_still_uncertain() -> None:
    one, _ = answers(50, 3)
    found = compare_answers(one, one)
    assert (found["p_value"], found["difference"]) == (1.0, 0.0)
    # Of 50 rows, none differed: with 95 % confidence fewer than 7.1 % would.
    assert found["interval"] == pytest.approx([-0.0711, 0.0711], abs=1e-3)


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="not of the same rows"):
        compare_answers(np.array([True]), np.array([True, False]))
