"""From logits to labels, tuned on validation: a temperature for the probabilities, thresholds for the decision.

Both stay beside the model. Dividing the head's weights by the temperature would round them, and no longer give the
logits that the merge was proven for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import EvaluationSettings, ProblemType, Recipe
from toolkit.errors import Problem, RecipeError
from toolkit.evaluation import multi_label
from toolkit.evaluation.metrics import calibration_error, confusion_figures, cross_entropy, softmax

Floats = NDArray[np.floating]
# The temperature is looked for between 1/20 and 20: validation rows that are all right would want 0.
STEEPEST = 20.0
BISECTIONS = 60


@dataclass(frozen=True)
class Decision:
    """How logits become labels, beyond softmax, sigmoid, the likeliest label and 0.5.

    Attributes:
        temperature: Logits are divided by it (Guo et al. 2017, arXiv:1706.04599).
        thresholds: Probability from which a label is given, by name. Of two labels that exclude each other, the second
            one has a threshold; below it the first is given.
    """

    temperature: float = 1.0
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def probabilities(self, logits: Floats, *, problem_type: ProblemType) -> NDArray[np.float64]:
        """Return (N, C): a softmax over rivals, a sigmoid of each label, or the numbers themselves."""
        if problem_type == "regression":
            return logits.astype(np.float64)
        scaled = logits.astype(np.float64) / self.temperature
        return multi_label.sigmoid(scaled) if problem_type == "multi_label_classification" else softmax(scaled)

    def given(self, probabilities: Floats, *, names: Sequence[str]) -> NDArray[np.bool_]:
        """Return which labels are given, (N, C), where each is decided on its own."""
        return np.asarray(probabilities >= [self.thresholds.get(name, 0.5) for name in names])

    def chosen(self, probabilities: Floats, *, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the id of the label of each row, (N,), where labels exclude each other."""
        if names[-1] not in self.thresholds:
            return np.asarray(probabilities.argmax(axis=1), dtype=np.int64)
        return (probabilities[:, 1] >= self.thresholds[names[-1]]).astype(np.int64)

    def figures(
        self, logits: Floats, targets: NDArray[Any], *, problem_type: ProblemType, names: Sequence[str]
    ) -> dict[str, Any]:
        """Return ``calibrated`` (loss and ece at the temperature) and ``tuned`` (figures at the thresholds).

        Each is there only if it was fitted; the figures beside them are those without.
        """
        found: dict[str, Any] = {}
        several = problem_type == "multi_label_classification"
        probabilities = self.probabilities(logits, problem_type=problem_type)
        if self.temperature != 1:
            scaled = logits / self.temperature
            loss = multi_label.binary_cross_entropy if several else cross_entropy
            error = multi_label.decision_calibration(probabilities, targets) if several else None
            found["calibrated"] = {
                "temperature": self.temperature,
                "loss": loss(scaled, targets),
                "ece": calibration_error(scaled, targets) if error is None else error,
            }
        if self.thresholds:
            if several:
                given = self.given(probabilities, names=names)
                each = multi_label.per_label(given, probabilities, targets, names=names)
                figures = {**multi_label.decided(given, targets), "per_label": each}
            else:
                figures = confusion_figures(self.chosen(probabilities, names=names), targets, names=names)
            found["tuned"] = {"thresholds": dict(self.thresholds), **figures}
        return found

    def describe(self) -> str:
        """Return the decision in words; empty where nothing was fitted."""
        parts = [] if self.temperature == 1 else [f"temperature {self.temperature:.3g}"]
        parts += [f"{name} from {threshold:.3g}" for name, threshold in self.thresholds.items()]
        return ", ".join(parts)


# The likeliest label, or each from 0.5.
PLAIN = Decision()


def check_decision(recipe: Recipe, *, validation: int, labels: int) -> None:
    """Refuse a threshold or a temperature that the data of a run cannot give.

    Args:
        recipe: All settings.
        validation: Validation rows.
        labels: How many labels there are.

    Raises:
        RecipeError: No validation rows, or one threshold for more than two labels that exclude each other.
    """
    wanted = {"threshold": recipe.evaluation.threshold is not None, "calibrate": recipe.evaluation.calibrate}
    fields = [f"evaluation.{name}" for name, asked in wanted.items() if asked]
    if fields and not validation:
        wrong = "there are no validation rows to fit it on"
        raise RecipeError(Problem("", field, wrong, "data.split.validation above 0") for field in fields)
    if wanted["threshold"] and recipe.data.problem_type == "single_label_classification" and labels != 2:
        wrong = f"a threshold parts two labels, not {labels}"
        raise RecipeError(Problem("", "evaluation.threshold", wrong, "null: the likeliest label"))


def fit_decision(
    logits: Floats,
    targets: NDArray[Any],
    *,
    settings: EvaluationSettings,
    problem_type: ProblemType,
    names: Sequence[str],
) -> tuple[Decision, list[str]]:
    """Return what the recipe asks to be fitted on validation rows, and a warning for each wish that had no answer.

    Args:
        logits: (N, C), finite.
        targets: As ``data.targets`` has them for this kind.
        settings: The recipe's evaluation section.
        problem_type: What the targets are; never regression.
        names: The C names in id order.
    """
    temperature = fit_temperature(logits, targets) if settings.calibrate else 1.0
    if settings.threshold is None:
        return Decision(temperature), []
    wanted = None if settings.threshold == "f1" else settings.threshold.precision
    probabilities = Decision(temperature).probabilities(logits, problem_type=problem_type)
    several = problem_type == "multi_label_classification"
    tuned = range(len(names)) if several else [1]
    thresholds, warnings = {}, []
    for index in tuned:
        truth = targets[:, index] if several else targets == 1
        threshold, reached = tune_threshold(probabilities[:, index], truth.astype(bool), precision=wanted)
        thresholds[names[index]] = threshold
        if not reached:
            what = "a row of it" if wanted is None else f"a precision of {wanted:g}"
            warnings.append(f"validation has not {what} for label {names[index]}: its threshold is {threshold:.3g}")
    return Decision(temperature, thresholds), warnings


def fit_temperature(logits: Floats, targets: NDArray[Any]) -> float:
    """Return the temperature with the lowest loss, between 1/20 and 20.

    The loss is convex in the inverse temperature, so that its slope has one zero, found by bisection.

    Args:
        logits: (N, C).
        targets: (N,) ids, or (N, C) of 0 and 1.
    """
    exact = logits.astype(np.float64)

    def slope(inverse: float) -> float:
        if targets.ndim == 2:
            return float(np.mean((multi_label.sigmoid(inverse * exact) - targets) * exact))
        expected = (softmax(inverse * exact) * exact).sum(axis=1)
        return float(np.mean(expected - exact[np.arange(len(exact)), targets]))

    low, high = 1 / STEEPEST, STEEPEST
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) <= 0 else (low, middle)
    return 2 / (low + high)


def tune_threshold(scores: Floats, truth: NDArray[np.bool_], *, precision: float | None) -> tuple[float, bool]:
    """Return the threshold with the best F1, or of those with a precision the one that finds most; and if there is one.

    Thresholds lie halfway between two neighbouring scores, so that rounding moves no row across.

    Args:
        scores: (N,), probabilities of the label.
        truth: (N,), whether a row has it.
        precision: Wanted share of right rows among those given the label; None: the best F1. Where no threshold has it,
            the most precise one is returned.
    """
    if not truth.any():
        return 0.5, False
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    hits = np.cumsum(truth[order])[ends]
    given = ends + 1
    precisions, reached = hits / given, True
    # Of equals the first one: the highest threshold.
    if precision is None:
        best = int(np.argmax(2 * hits / (given + truth.sum())))
    elif (good := precisions >= precision).any():
        best = int(np.argmax(np.where(good, hits, -1)))
    else:
        best, reached = int(np.argmax(precisions)), False
    below = ranked[ends[best] + 1] if best + 1 < len(ends) else 0.0
    return float((ranked[ends[best]] + below) / 2), reached
