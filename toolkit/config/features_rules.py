"""Rules of method features, which is fitted and not trained."""

from __future__ import annotations

from toolkit.config.methods import FeaturesMethod
from toolkit.config.rule import Rule
from toolkit.config.schema import HeadSettings, LossSettings, Recipe


def _fits(recipe: Recipe, classifier: str) -> bool:
    return isinstance(recipe.method, FeaturesMethod) and recipe.method.classifier == classifier


def _sets(recipe: Recipe, name: str) -> bool:
    return bool(getattr(recipe.method, name) != FeaturesMethod.model_fields[name].default)


FEATURES_RULES = (
    Rule(
        ("method", "name"),
        lambda r: r.method.name == "features" and r.data.problem_type != "single_label_classification",
        "features fits one label to a text",
        "problem_type single_label_classification, or method head",
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
        ("training", "max_steps"),
        lambda r: (
            r.method.name == "features" and (r.training.epochs is not None or r.training.max_steps not in (None, 1))
        ),
        "features is fitted to all rows at once",
        "leave epochs and max_steps out, or method head",
    ),
    Rule(
        ("training", "loss"),
        lambda r: (
            r.method.name == "features" and r.training.loss != LossSettings(class_weights=r.training.loss.class_weights)
        ),
        "scikit-learn has its own loss; of this one, class weights count alone",
        "label_smoothing: 0 and focal_gamma: 0, or method head",
    ),
)
