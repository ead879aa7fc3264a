"""Which recipe is called enough, and that the words say what the counts do."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from toolkit.evaluation.predictions import TFIDF, Answers
from toolkit.experiments.verdict import Candidate, Run, judge
from toolkit.report.pareto import front

ROWS = 400


def run(record, *, right: np.ndarray, peak: int, seconds: float, kept: bool = True, tfidf: float = 0.5) -> Run:
    one = copy.deepcopy(record)
    one["metrics"]["test"] |= {"accuracy": float(right.mean()), "rows": ROWS}
    one["memory"]["peak_bytes"] = peak << 20
    one["timing"]["total_seconds"] = seconds
    cheap = np.arange(ROWS) < tfidf * ROWS
    rows = [(str(row), "ham") for row in range(ROWS)]
    return Run(one, Answers(rows, right, {TFIDF: cheap}) if kept else None)


def candidate(name: str, *runs: Run) -> Candidate:
    seeds = [
        {"seed": n, "folder": name, "accuracy": None, "reused": False, "failed": None if one else "exit code 4: memory"}
        for n, one in enumerate(runs)
    ]
    return Candidate(name, f"{name}.yaml", seeds, {n: one for n, one in enumerate(runs) if one})  # type: ignore[arg-type]


def right(share: float, *, flipped: int = 0) -> np.ndarray:
    answers = np.arange(ROWS) < share * ROWS
    answers[:flipped] = False
    return answers


def test_a_tuned_threshold_counts_as_its_predictions_do(record):
    """The answers that are kept were decided at the threshold; the accuracy beside them has to be theirs."""
    tuned = run(record, right=right(0.9), peak=600, seconds=5)
    tuned.record["metrics"]["test"] |= {"accuracy": 0.5, "tuned": {"accuracy": 0.9, "f1_macro": 0.88}}
    verdict = judge([candidate("tuned", tuned), candidate("plain", run(record, right=right(0.8), peak=600, seconds=5))])
    measured = {row["name"]: row["measured"] for row in verdict.rows}
    assert (verdict.best, measured["tuned"]["accuracy"], measured["tuned"]["f1_macro"]) == ("tuned", 0.9, 0.88)
    assert measured["plain"]["difference"] == pytest.approx(-0.1)


def test_the_cheapest_that_is_not_told_apart_is_enough(record):
    verdict = judge(
        [
            candidate("full", run(record, right=right(0.95), peak=3000, seconds=90)),
            candidate("lora", run(record, right=right(0.95, flipped=4), peak=1400, seconds=80)),
            candidate("last", run(record, right=right(0.95, flipped=2), peak=1380, seconds=90)),
            candidate("head", run(record, right=right(0.80), peak=600, seconds=5)),
        ]
    )
    # lora and last take the same memory to 5 %, and lora is faster; head is cheaper, and worse.
    assert (verdict.best, verdict.enough) == ("full", "lora")
    text = " ".join(verdict.sentences)
    assert "lora is enough: with 1.37 GiB and 1 min 20 s" in text
    assert "(-1.0 points, 95 % interval" in text
    assert "McNemar p = 0.12" in text
    assert "Worse than full by more than chance (p < 0.05): head." in text
    measured = {row["name"]: row["measured"] for row in verdict.rows}
    assert measured["full"]["p_value"] is None
    assert measured["head"]["p_value"] < 1e-10
    assert [name for name, one in measured.items() if one["pareto"]] == ["full", "last", "head"]


def test_a_baseline_that_does_as_well_is_said(record):
    verdict = judge([candidate("head", run(record, right=right(0.9), peak=600, seconds=5, tfidf=0.895))])
    assert verdict.enough == "head"
    assert "there is no other to choose" in verdict.sentences[1]
    assert "no recipe may be needed" in verdict.sentences[-1]
    better = judge([candidate("head", run(record, right=right(0.9), peak=600, seconds=5, tfidf=0.7))])
    assert "fewer than head by more than chance" in better.sentences[-1]


def test_seeds_are_judged_by_the_median_run_and_the_largest_peak(record):
    runs = [run(record, right=right(share), peak=600 + n, seconds=5) for n, share in enumerate((0.91, 0.7, 0.9))]
    verdict = judge([candidate("head", *runs)])
    [row] = verdict.rows
    assert row["measured"]["seed"] == 2
    assert row["measured"]["accuracy"] == pytest.approx(0.9)
    assert row["measured"]["peak_bytes"] == 602 << 20
    assert any("head 70.0 % to 91.0 %" in sentence for sentence in verdict.sentences)


def test_a_failed_recipe_is_a_row_and_a_run_without_predictions_is_not_tested(record):
    verdict = judge(
        [
            candidate("old", run(record, right=right(0.7), peak=500, seconds=5, kept=False)),
            candidate("none", None),
            candidate("lora", run(record, right=right(0.9), peak=1400, seconds=5)),
        ]
    )
    assert verdict.enough == "lora"
    assert [row["measured"] is None for row in verdict.rows] == [False, True, False]
    assert any(sentence.endswith("have other test rows: old.") for sentence in verdict.sentences)


def test_the_front_is_what_nothing_cheaper_beats():
    costs, accuracies = [3.0, 1.0, 2.0, 2.0, 4.0], [0.9, 0.7, 0.8, 0.85, 0.9]
    beaten = {
        i
        for i in range(5)
        for j in range(5)
        if costs[j] <= costs[i]
        and accuracies[j] >= accuracies[i]
        and (costs[j], accuracies[j]) != (costs[i], accuracies[i])
    }
    assert set(front(costs, accuracies)) == set(range(5)) - beaten
