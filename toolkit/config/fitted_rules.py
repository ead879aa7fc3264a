"""Rules of the methods that take no step: features, which is fitted, and zero_shot, which only asks."""

from __future__ import annotations

from toolkit.config.methods import FeaturesMethod, FittedMethod, ZeroShotMethod
from toolkit.config.rule import Rule
from toolkit.config.schema import LossSettings

# Where a prompt takes the text, and the words of all labels.
TEXT, WORDS = "{text}", "{words}"


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
        ("method", "classifier"),
        lambda r: isinstance(r.method, FeaturesMethod) and r.method.classifier == "random_forest",
        "trees are no classification head that stock transformers loads, and scikit-learn keeps them in a pickle",
        "logistic_regression",
    ),
    Rule(
        ("training", "loss"),
        lambda r: (
            isinstance(r.method, FeaturesMethod)
            and r.training.loss != LossSettings(class_weights=r.training.loss.class_weights)
        ),
        "features is fitted by cross entropy; of the loss, class weights count alone",
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
