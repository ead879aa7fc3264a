"""The head as scikit-learn fits it: logistic regression on the features of a frozen base, in place of training.

Stock transformers computes the very logits of that regression from the head that is written here, because both heads
can hold any linear map of the pooled state: GPT-2's is one; DistilBERT's rectifier between two layers is passed by way
of ``relu(x) - relu(-x) = x``, which is exact in floating point too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from toolkit.config.methods import FeaturesMethod
from toolkit.config.schema import LossSettings
from toolkit.errors import DataError, Problem
from toolkit.families import Family

# Of the solver; 20 to 200 are what 1,000 to 20,000 rows took.
ITERATIONS = 2_000

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Linear:
    """A linear classifier.

    Attributes:
        weight: (labels, width).
        bias: (labels,); zeros where the head has none.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]


def fit_linear(
    features: Floats,
    labels: NDArray[np.int64],
    method: FeaturesMethod,
    *,
    classes: int,
    loss: LossSettings,
    bias: bool,
) -> Linear:
    """Fit logistic regression; features are scaled to a spread of 1 first, so that ``C`` means the same on every base.

    Args:
        features: (N, width), pooled states.
        labels: (N,), ids in [0, classes).
        method: Gives ``C``.
        classes: Number of labels.
        loss: Its class weights count.
        bias: Whether the head has one; without, features are not centred either.

    Raises:
        DataError: If a label has no row.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    missing = np.setdiff1d(np.arange(classes), labels)
    if len(missing):
        wrong = f"{len(missing)} of {classes} labels have no training row"
        raise DataError(Problem("", "method.name", wrong, "rows of every label, or another method"))
    weights: Any = loss.class_weights
    if isinstance(weights, list):
        weights = dict(enumerate(weights))
    scaler = StandardScaler(with_mean=bias)
    scaled = scaler.fit_transform(features.astype(np.float64))
    regression = LogisticRegression(C=method.C, class_weight=weights, fit_intercept=bias, max_iter=ITERATIONS)
    regression.fit(scaled, labels)
    weight = regression.coef_ / scaler.scale_
    shift = regression.intercept_ - weight @ scaler.mean_ if bias else np.zeros(len(weight))
    if classes == 2:
        # Of two labels there is one row: the log-odds of the second. The first label's logit is 0.
        weight, shift = np.concatenate([0 * weight, weight]), np.concatenate([0 * shift, shift])
    return Linear(weight, shift)


def write_head(model: Any, linear: Linear, family: Family) -> None:
    """Give a classifier the head whose logits are those of a linear classifier.

    Args:
        model: From `load_classifier`.
        linear: For DistilBERT, of at most half as many labels as the model is wide (``check_method``).
        family: The architecture.
    """
    weight = torch.from_numpy(linear.weight).float()
    with torch.no_grad():
        if family.head == ("score",):
            model.score.weight.copy_(weight)
            return
        labels = len(weight)
        bias = torch.from_numpy(linear.bias).float()
        for layer in (model.pre_classifier, model.classifier):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        model.pre_classifier.weight[: 2 * labels] = torch.cat([weight, -weight])
        model.pre_classifier.bias[: 2 * labels] = torch.cat([bias, -bias])
        model.classifier.weight[:, :labels] = torch.eye(labels)
        model.classifier.weight[:, labels : 2 * labels] = -torch.eye(labels)
