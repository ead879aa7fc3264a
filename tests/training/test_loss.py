"""Losses against torch's and scikit-learn's own, in whatever pieces a step is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from toolkit.config.schema import LossSettings
from toolkit.training.loss import class_weights, classification_loss, no_labels, row_weight, target_loss

LABELS = torch.tensor([0, 2, 1, 2, 2, -100, 0, 2])
GIVEN = [0.5, 3.0, 1.25]


def logits() -> torch.Tensor:
    drawn = 3 * torch.randn(len(LABELS), 3, generator=torch.Generator().manual_seed(4))
    return drawn.requires_grad_()


def mean(settings: LossSettings, weights: torch.Tensor | None, *, pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and gradient as the trainer makes them: sums of pieces over the weight of all."""
    found = logits()
    total = row_weight(LABELS, weights)
    parts = zip(found.chunk(pieces), LABELS.chunk(pieces), strict=True)
    loss = sum(classification_loss(one, labels, settings=settings, weights=weights) for one, labels in parts) / total
    return loss.detach(), torch.autograd.grad(loss, found)[0]


@pytest.mark.parametrize("pieces", [1, 4, 8])
@pytest.mark.parametrize("given", [None, GIVEN], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_the_mean_of_torchs_loss(smoothing: float, given: Any, pieces: int) -> None:
    settings = LossSettings(label_smoothing=smoothing, class_weights=given)
    weights = class_weights(given, LABELS, classes=3)
    loss, gradient = mean(settings, weights, pieces=pieces)
    plain = logits()
    expected = nn.CrossEntropyLoss(weight=weights, label_smoothing=smoothing)(plain, LABELS)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, plain)[0])


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("given", [None, GIVEN], ids=["plain", "weighted"])
def test_focal_loss_is_its_formula_in_double_precision(given: Any, pieces: int) -> None:
    weights = class_weights(given, LABELS, classes=3)
    loss, gradient = mean(LossSettings(focal_gamma=2.0), weights, pieces=pieces)
    plain = logits()
    real = LABELS >= 0
    p = plain.double().softmax(-1)[real].gather(1, LABELS[real, None])[:, 0]
    alpha = torch.ones(3, dtype=torch.float64) if weights is None else weights.double()
    alpha = alpha[LABELS[real]]
    expected = -(alpha * (1 - p) ** 2 * p.log()).sum() / alpha.sum()
    torch.testing.assert_close(loss.double(), expected.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, plain)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0])
def test_a_sure_and_right_row_has_a_finite_gradient(gamma: float) -> None:
    sure = torch.tensor([[60.0, -60.0]], requires_grad=True)
    loss = classification_loss(sure, torch.tensor([0]), settings=LossSettings(focal_gamma=gamma), weights=None)
    [gradient] = torch.autograd.grad(loss, sure)
    assert bool(torch.isfinite(gradient).all())


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2])
    found = class_weights("balanced", torch.from_numpy(labels), classes=3)
    assert found is not None
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=0, rtol=1e-6)
    assert row_weight(torch.from_numpy(labels), found) == pytest.approx(len(labels))


SETS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
NUMBERS = torch.tensor([[1.5, 0.0, -100.0], [2.0, 3.0, 0.5], [0.0, 0.0, 0.0], [7.0, -1.0, 2.0]])


def pieces_of(targets: torch.Tensor, kind: Any, settings: LossSettings, weights: torch.Tensor | None) -> Any:
    """Return loss and gradient as the trainer makes them, of two pieces and an empty one."""
    found = logits()[:4]
    total = row_weight(targets, weights)
    parts = [(found[:1], targets[:1]), (found[1:], targets[1:]), (found[:1], no_labels(targets[:1]))]
    loss = sum(target_loss(a, b, problem_type=kind, settings=settings, weights=weights) for a, b in parts) / total
    return loss.detach(), torch.autograd.grad(loss, found)[0]


@pytest.mark.parametrize("given", [None, GIVEN], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_several_labels_have_the_mean_of_torchs_loss(smoothing: float, given: Any) -> None:
    weights = class_weights(given, SETS, classes=3)
    settings = LossSettings(label_smoothing=smoothing)
    loss, gradient = pieces_of(SETS, "multi_label_classification", settings, weights)
    plain = logits()[:4]
    smoothed = SETS * (1 - smoothing) + smoothing / 2
    expected = nn.BCEWithLogitsLoss(pos_weight=weights)(plain, smoothed)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, plain)[0])


def test_focal_loss_of_several_labels_is_its_formula_in_double_precision() -> None:
    loss, gradient = pieces_of(SETS, "multi_label_classification", LossSettings(focal_gamma=2.0), None)
    plain = logits()[:4]
    p = plain.double().sigmoid()
    p = torch.where(SETS > 0, p, 1 - p)
    expected = -((1 - p) ** 2 * p.log()).mean()
    torch.testing.assert_close(loss.double(), expected.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, plain)[0], atol=1e-6, rtol=1e-5)


def test_numbers_have_the_mean_of_torchs_squared_error() -> None:
    loss, gradient = pieces_of(NUMBERS, "regression", LossSettings(), None)
    plain = logits()[:4]
    expected = nn.MSELoss()(plain, NUMBERS)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, plain)[0])


def test_balanced_weights_of_several_labels_make_both_sides_weigh_the_same() -> None:
    sets = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.uint8)
    found = class_weights("balanced", sets, classes=4)
    assert found is not None
    # Labels that no row has, or that every row has, stay as they are.
    torch.testing.assert_close(found, torch.tensor([3.0, 1.0, 1 / 3, 1.0]))
