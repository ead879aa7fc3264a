"""Rules of method features, which is fitted and not trained."""

from __future__ import annotations

from toolkit.config.methods import FeaturesMethod
from toolkit.config.rule import Rule
from toolkit.config.schema import LossSettings

FEATURES_RULES = (
    Rule(
        ("method", "name"),
        lambda r: r.method.name == "features" and r.data.problem_type != "single_label_classification",
        "features fits one label to a text",
        "problem_type single_label_classification, or method head",
    ),
    Rule(
        ("method", "classifier"),
        lambda r: isinstance(r.method, FeaturesMethod) and r.method.classifier == "random_forest",
        "trees are no classification head that stock transformers loads, and scikit-learn keeps them in a pickle",
        "logistic_regression",
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
        "features is fitted by cross entropy; of the loss, class weights count alone",
        "label_smoothing: 0 and focal_gamma: 0, or method head",
    ),
)
