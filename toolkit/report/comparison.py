"""The content of compare.json: recipes side by side, what each costs, and which one is enough."""

from __future__ import annotations

from typing import TypedDict


class SeedRecord(TypedDict):
    """One run of a recipe.

    Attributes:
        seed: ``training.seed``.
        folder: The run folder.
        accuracy: On the test rows; None where the run failed.
        reused: Whether the run was finished before.
        failed: Why it failed, or None.
    """

    seed: int
    folder: str
    accuracy: float | None
    reused: bool
    failed: str | None


class Measured(TypedDict):
    """The figures of a recipe: those of the run whose accuracy is the median over its seeds.

    Attributes:
        seed: Of that run.
        method: In words.
        storage: Of the frozen weights, in words.
        base: The model that served.
        trainable: Parameters trained.
        total: Parameters in all.
        rows: Test rows.
        accuracy: 0 to 1.
        accuracy_interval: 95 % bootstrap interval.
        f1_macro: 0 to 1.
        peak_bytes: Measured, up to the end of training; the largest over the seeds.
        memory_kind: What it counts.
        seconds: Training, evaluations, checkpoints, and states of frozen blocks where they were computed.
        p_value: Of McNemar's exact test against the best recipe; None for the best, and where the rows differ.
        difference: Accuracy less that of the best.
        difference_interval: Its 95 % bootstrap interval.
        pareto: Whether no other recipe has less memory and at least this accuracy.
    """

    seed: int
    method: str
    storage: str
    base: str
    trainable: int
    total: int
    rows: int
    accuracy: float
    accuracy_interval: list[float]
    f1_macro: float
    peak_bytes: int
    memory_kind: str
    seconds: float
    p_value: float | None
    difference: float | None
    difference_interval: list[float] | None
    pareto: bool


class RecipeRow(TypedDict):
    """A recipe of the comparison.

    Attributes:
        name: Of its run folder.
        recipe: The YAML file.
        runs: One for each seed.
        measured: None where every run failed.
    """

    name: str
    recipe: str
    runs: list[SeedRecord]
    measured: Measured | None


class Comparison(TypedDict):
    """The content of compare.json.

    Attributes:
        format: Version of this schema, 1.
        created: UTC time, ISO 8601.
        seeds: Runs of each recipe.
        recipes: In the order given.
        best: Name of the most accurate recipe.
        enough: Name of the cheapest one that the test rows don't tell apart from it.
        verdict: What to make of it, a sentence each.
        baselines: Accuracy on the test rows of the best recipe, by name.
    """

    format: int
    created: str
    seeds: int
    recipes: list[RecipeRow]
    best: str
    enough: str
    verdict: list[str]
    baselines: dict[str, float]
