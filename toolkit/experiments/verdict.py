"""Which recipe is enough: the cheapest one that the test rows don't tell apart from the best, and that in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.evaluation.metrics import accuracy_interval
from toolkit.evaluation.paired import Paired, compare_answers
from toolkit.evaluation.predictions import TFIDF, Answers
from toolkit.report.comparison import Measured, RecipeRow, SeedRecord
from toolkit.report.pareto import front
from toolkit.report.run_record import RunRecord
from toolkit.report.wording import duration, method_name, percent, size, storage

# A difference that equally good classifiers would show less often than this is taken for one.
LEVEL = 0.05
# Peaks closer than this are the same memory; the faster recipe is then the cheaper one.
SAME_MEMORY = 1.05


@dataclass(frozen=True)
class Run:
    """A finished run of a recipe: its record, and its answers where they were kept."""

    record: RunRecord
    answers: Answers | None


@dataclass(frozen=True)
class Candidate:
    """A recipe with its finished runs, by seed."""

    name: str
    recipe: str
    seeds: list[SeedRecord]
    runs: dict[int, Run]

    @property
    def median(self) -> int:
        """The seed whose accuracy is the median; of an even number, the lower one."""
        ordered = sorted(self.runs, key=lambda seed: accuracy(self.runs[seed].record))
        return ordered[(len(ordered) - 1) // 2]


@dataclass(frozen=True)
class Verdict:
    """What a comparison comes to."""

    rows: list[RecipeRow]
    best: str
    enough: str
    sentences: list[str]


def accuracy(record: RunRecord) -> float:
    """Return a run's accuracy on its test rows, decided as its predictions are."""
    return float(_decided(record).get("accuracy", 0.0))


def _decided(record: RunRecord) -> dict[str, Any]:
    """Return a run's test figures, at its tuned threshold where it has one."""
    test = record["metrics"]["test"] or {}
    return {**test, **test.get("tuned", {})}


def judge(candidates: Sequence[Candidate]) -> Verdict:
    """Compare recipes by their median runs.

    Args:
        candidates: At least one has a finished run.
    """
    measured = {one.name: _measure(one) for one in candidates if one.runs}
    # Of equals, the one with less memory.
    best = max(measured, key=lambda name: (measured[name]["accuracy"], -measured[name]["peak_bytes"]))
    answers = {one.name: one.runs[one.median].answers for one in candidates if one.runs}
    apart: dict[str, Paired] = {}
    for name in measured:
        paired = _paired(answers[name], answers[best])
        if name != best and paired is not None:
            apart[name] = paired
            measured[name]["p_value"] = paired["p_value"]
            measured[name]["difference"] = paired["difference"]
            measured[name]["difference_interval"] = paired["interval"]
    names = list(measured)
    for place in front([measured[n]["peak_bytes"] for n in names], [measured[n]["accuracy"] for n in names]):
        measured[names[place]]["pareto"] = True
    close = [best, *(name for name, paired in apart.items() if paired["p_value"] >= LEVEL)]
    least = min(measured[name]["peak_bytes"] for name in close)
    enough = min(
        (name for name in close if measured[name]["peak_bytes"] <= SAME_MEMORY * least),
        key=lambda name: measured[name]["seconds"],
    )
    rows: list[RecipeRow] = [
        {"name": one.name, "recipe": one.recipe, "runs": one.seeds, "measured": measured.get(one.name)}
        for one in candidates
    ]
    sentences = _sentences(candidates, measured, apart, best=best, enough=enough)
    return Verdict(rows, best, enough, sentences + _beside_baseline(answers[enough], enough))


def _measure(one: Candidate) -> Measured:
    record = one.runs[one.median].record
    test = _decided(record)
    kept = record["prefix_cache"]
    correct = round(test["accuracy"] * test["rows"])
    return {
        "seed": one.median,
        "method": method_name(record["method"]),
        "storage": storage(record["quantization"]),
        "base": record["base"]["used"],
        "trainable": record["parameters"]["trainable"],
        "total": record["parameters"]["total"],
        "rows": test["rows"],
        "accuracy": test["accuracy"],
        "accuracy_interval": accuracy_interval(correct, test["rows"]),
        "f1_macro": test["f1_macro"],
        "peak_bytes": max(run.record["memory"]["peak_bytes"] for run in one.runs.values()),
        "memory_kind": record["memory"]["kind"],
        "seconds": record["timing"]["total_seconds"] + (kept["seconds"] if kept else 0.0),
        "p_value": None,
        "difference": None,
        "difference_interval": None,
        "pareto": False,
    }


def _paired(one: Answers | None, other: Answers | None) -> Paired | None:
    """Compare two runs where both kept their answers, and to the same rows."""
    if one is None or other is None or one.rows != other.rows:
        return None
    return compare_answers(one.right, other.right)


def _sentences(
    candidates: Sequence[Candidate],
    measured: dict[str, Measured],
    apart: dict[str, Paired],
    *,
    best: str,
    enough: str,
) -> list[str]:
    top, chosen = measured[best], measured[enough]
    low, high = (percent(end, digits=1) for end in top["accuracy_interval"])
    said = [
        f"{best} is the most accurate: {percent(top['accuracy'])} of {top['rows']:,} test rows "
        f"(95 % interval {low} to {high})."
    ]
    cost = f"{size(chosen['peak_bytes'])} and {duration(chosen['seconds'])}"
    if enough == best:
        others = [name for name in measured if name != best]
        why = "no other recipe is both cheaper and as good on these rows" if others else "there is no other to choose"
        said.append(f"{enough} is enough, with {cost}: {why}.")
    else:
        paired = apart[enough]
        low, high = (f"{100 * end:+.1f}" for end in paired["interval"])
        said.append(
            f"{enough} is enough: with {cost} it is the cheapest that these rows don't tell apart from {best} "
            f"({100 * paired['difference']:+.1f} points, 95 % interval {low} to {high}, McNemar p = "
            f"{paired['p_value']:.2g}; {best} takes {size(top['peak_bytes'])} and {duration(top['seconds'])})."
        )
    worse = [name for name, paired in apart.items() if paired["p_value"] < LEVEL]
    if worse:
        said.append(f"Worse than {best} by more than chance (p < {LEVEL:g}): {', '.join(worse)}.")
    other = [name for name in measured if name != best and name not in apart]
    if other:
        said.append(
            f"Not compared row by row, because they kept no predictions or have other test rows: {', '.join(other)}."
        )
    if len({figures["memory_kind"] for figures in measured.values()}) > 1:
        said.append("Some peaks are of a GPU and some of a whole process: they can't be set side by side.")
    spreads = [(one.name, [accuracy(run.record) for run in one.runs.values()]) for one in candidates]
    lines = [f"{name} {percent(min(a), digits=1)} to {percent(max(a), digits=1)}" for name, a in spreads if len(a) > 1]
    if lines:
        said.append(f"Over the seeds: {'; '.join(lines)}. The test above is of each recipe's median run.")
    return said


def _beside_baseline(answers: Answers | None, enough: str) -> list[str]:
    """Say whether the recipe that is enough beats TF-IDF with logistic regression."""
    if answers is None or TFIDF not in answers.baselines:
        return []
    right = answers.baselines[TFIDF]
    paired = compare_answers(answers.right, right)
    cheap = f"TF-IDF with logistic regression has {percent(float(right.mean()))} of the same rows"
    if paired["p_value"] >= LEVEL:
        chance = f"p = {paired['p_value']:.2g}"
        return [f"{cheap}, which they don't tell apart from {enough} ({chance}): no recipe may be needed."]
    verb = "fewer" if paired["difference"] > 0 else "more"
    return [f"{cheap}, {verb} than {enough} by more than chance (p = {paired['p_value']:.2g})."]
