"""The head as scikit-learn fits it: logistic regression or a random forest on the features of a frozen base.

Stock transformers computes the very logits of that regression from the head that is written here, because both heads
can hold any linear map of the pooled state: GPT-2's is one; DistilBERT's rectifier between two layers is passed by way
of ``relu(x) - relu(-x) = x``, which is exact in floating point too. A forest is a head of the toolkit's own.
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
from toolkit.families import OWN_HEAD, Family
from toolkit.runtime import import_sklearn

# Of the solver; 20 to 200 are what 1,000 to 20,000 rows took.
ITERATIONS = 2_000

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Linear:
    """A linear classifier.

    Attributes:
        weight: (labels, width).
        bias: (labels,); zeros where the head has none.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]


@dataclass(frozen=True)
class Forest:
    """Complete trees, as ``models.classification_head.RandomForest`` holds them.

    Attributes:
        feature: (trees, nodes).
        threshold: (trees, nodes); a float32 state is above it exactly where it is above scikit-learn's.
        probability: (trees, nodes + 1, labels).
    """

    feature: Ids
    threshold: Floats
    probability: NDArray[np.float64]


def fit_linear(
    features: Floats,
    labels: Ids,
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
    import_sklearn()
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    _check_labels(labels, classes)
    scaler = StandardScaler(with_mean=bias)
    scaled = scaler.fit_transform(features.astype(np.float64))
    regression = LogisticRegression(C=method.C, class_weight=_weights(loss), fit_intercept=bias, max_iter=ITERATIONS)
    regression.fit(scaled, labels)
    weight = regression.coef_ / scaler.scale_
    shift = regression.intercept_ - weight @ scaler.mean_ if bias else np.zeros(len(weight))
    if classes == 2:
        # Of two labels there is one row: the log-odds of the second. The first label's logit is 0.
        weight, shift = np.concatenate([0 * weight, weight]), np.concatenate([0 * shift, shift])
    return Linear(weight, shift)


def fit_forest(
    features: Floats, labels: Ids, method: FeaturesMethod, *, classes: int, loss: LossSettings, seed: int
) -> Forest:
    """Fit a random forest (Breiman 2001, doi:10.1023/A:1010933404324), as scikit-learn grows it.

    Args:
        features: (N, width), pooled states.
        labels: (N,), ids in [0, classes).
        method: Gives ``n_estimators``, ``max_depth`` and ``min_samples_leaf``.
        classes: Number of labels.
        loss: Its class weights count.
        seed: Of the rows and features that each tree sees.

    Raises:
        DataError: If a label has no row.
    """
    import_sklearn()
    from sklearn.ensemble import RandomForestClassifier

    _check_labels(labels, classes)
    forest = RandomForestClassifier(
        n_estimators=method.n_estimators,
        max_depth=method.max_depth,
        min_samples_leaf=method.min_samples_leaf,
        class_weight=_weights(loss),
        random_state=seed,
    )
    forest.fit(features, labels)
    trees = [_completed(tree.tree_, depth=method.max_depth) for tree in forest.estimators_]
    feature, threshold, probability = (np.stack(part) for part in zip(*trees, strict=True))
    return Forest(feature, threshold, probability)


def _completed(tree: Any, *, depth: int) -> tuple[Ids, Floats, NDArray[np.float64]]:
    """Return the features and thresholds of a tree's inner nodes, level by level, and its leaves' probabilities."""
    nodes, features, thresholds = np.zeros(1, dtype=np.int64), [], []
    for _ in range(depth):
        leaf = tree.children_left[nodes] < 0
        features.append(np.where(leaf, 0, tree.feature[nodes]))
        thresholds.append(np.where(leaf, 0.0, tree.threshold[nodes]))
        children = np.stack([tree.children_left[nodes], tree.children_right[nodes]], axis=1)
        # Both ways down from a leaf lead to it.
        nodes = np.where(leaf[:, None], nodes[:, None], children).ravel()
    return np.concatenate(features), _rounded_down(np.concatenate(thresholds)), tree.value[nodes, 0]


def _rounded_down(exact: NDArray[np.float64]) -> Floats:
    """Return the largest float32 numbers that are not above these: the same float32 numbers are above both."""
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def _check_labels(labels: Ids, classes: int) -> None:
    missing = np.setdiff1d(np.arange(classes), labels)
    if len(missing):
        wrong = f"{len(missing)} of {classes} labels have no training row"
        raise DataError(Problem("", "method.name", wrong, "rows of every label, or another method"))


def _weights(loss: LossSettings) -> Any:
    """Return class weights as scikit-learn takes them."""
    weights = loss.class_weights
    return dict(enumerate(weights)) if isinstance(weights, list) else weights


def write_forest(model: Any, forest: Forest) -> None:
    """Give a classifier whose head is a random forest its trees."""
    head = model.get_submodule(OWN_HEAD)
    with torch.no_grad():
        for name, part in vars(forest).items():
            getattr(head, name).copy_(torch.from_numpy(part))


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
