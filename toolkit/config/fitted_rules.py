"""Rules of the methods that take no step: features, which is fitted, and zero_shot, which only asks."""

from __future__ import annotations

from toolkit.config.methods import FeaturesMethod, FittedMethod, ZeroShotMethod
from toolkit.config.rule import Rule
from toolkit.config.schema import HeadSettings, LossSettings, Recipe

# Where a prompt takes the text, and the words of all labels.
TEXT, WORDS = "{text}", "{words}"


def _fits(recipe: Recipe, classifier: str) -> bool:
    return isinstance(recipe.method, FeaturesMethod) and recipe.method.classifier == classifier


def _sets(recipe: Recipe, name: str) -> bool:
    return bool(getattr(recipe.method, name) != FeaturesMethod.model_fields[name].default)


FITTED_RULES = (
    Rule(
        ("method", "name"),
        lambda r: isinstance(r.method, FittedMethod) and r.data.problem_type != "single_label_classification",
        "features and zero_shot give one label to a text",
        "problem_type single_label_classification, or method head",
    ),
    Rule(
        ("training", "max_steps"),
        lambda r: (
            isinstance(r.method, FittedMethod)
            and (r.training.epochs is not None or r.training.max_steps not in (None, 1))
        ),
        "features and zero_shot take no steps",
        "leave epochs and max_steps out, or method head",
    ),
    Rule(
        ("method", "C"),
        lambda r: _fits(r, "random_forest") and _sets(r, "C"),
        "a random forest has no weights to penalise",
        "leave C out, or classifier: logistic_regression",
    ),
    *(
        Rule(
            ("method", name),
            lambda r, name=name: _fits(r, "logistic_regression") and _sets(r, name),  # type: ignore[misc]
            "logistic regression has no trees",
            f"leave {name} out, or classifier: random_forest",
        )
        for name in ("n_estimators", "max_depth", "min_samples_leaf")
    ),
    Rule(
        ("model", "head"),
        lambda r: (
            _fits(r, "random_forest")
            and r.model.head is not None
            and r.model.head != HeadSettings(pooling=r.model.head.pooling)
        ),
        "the head is the random forest, which has no layers and no dropout",
        "of head, pooling alone",
    ),
    Rule(
        ("training", "loss"),
        lambda r: (
            isinstance(r.method, FeaturesMethod)
            and r.training.loss != LossSettings(class_weights=r.training.loss.class_weights)
        ),
        "scikit-learn has its own loss; of this one, class weights count alone",
        "label_smoothing: 0 and focal_gamma: 0, or method head",
    ),
    Rule(
        ("training", "loss"),
        lambda r: isinstance(r.method, ZeroShotMethod) and r.training.loss != LossSettings(),
        "zero_shot minimises no loss",
        "no training.loss, or method head",
    ),
    Rule(
        ("method", "prompt"),
        lambda r: isinstance(r.method, ZeroShotMethod) and r.method.prompt.count(TEXT) != 1,
        "the prompt has no single place for the text",
        "{text} once",
    ),
    Rule(
        ("method", "prompt"),
        lambda r: isinstance(r.method, ZeroShotMethod) and r.method.prompt.endswith((TEXT, " ")),
        "the prompt ends with the text or a space, and the answer is looked for behind it",
        "a question behind {text}, without a space at its end",
    ),
)
