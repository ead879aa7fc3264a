"""Parameter groups and the learning rate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from toolkit.config.schema import TrainingSettings
from toolkit.training.optim import build_optimizer, learning_rate, parameter_groups


def rates(total: int, **settings) -> list[float]:
    chosen = TrainingSettings(learning_rate=1.0, **settings)
    return [learning_rate(step, total=total, settings=chosen) for step in range(total)]


def test_linear_rises_to_the_peak_and_ends_just_above_zero():
    values = rates(100, scheduler="linear", warmup_ratio=0.1)
    assert values[0] == pytest.approx(1 / 11)
    assert values[10] == 1.0
    assert max(values) == 1.0
    assert values[-1] == pytest.approx(1 / 90)
    assert all(a < b for a, b in itertools.pairwise(values[:11]))
    assert all(a > b for a, b in itertools.pairwise(values[10:]))


def test_linear_decay_is_torchs_own():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=50)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(50, scheduler="linear", warmup_ratio=0.0) == pytest.approx(expected)


def test_cosine_is_torchs_own():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(40, scheduler="cosine", warmup_ratio=0.0) == pytest.approx(expected)


def test_constant_and_a_single_step():
    assert set(rates(10, scheduler="constant", warmup_ratio=0.0)) == {1.0}
    assert rates(1, scheduler="linear", warmup_ratio=0.06) == [0.5]


def test_every_rate_is_positive_and_finite():
    for scheduler in ("linear", "cosine", "constant"):
        for total in (1, 2, 3, 17):
            assert all(math.isfinite(rate) and rate > 0 for rate in rates(total, scheduler=scheduler))


def test_biases_and_norms_do_not_decay_and_frozen_weights_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    decayed, plain = parameter_groups(model.named_parameters(), TrainingSettings(weight_decay=0.1))
    assert [p.shape for p in decayed["params"]] == [(4, 4)]
    assert [p.shape for p in plain["params"]] == [(4,), (4,), (4,)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_embeddings_have_their_own_rate_and_no_decay():
    model = nn.ModuleDict({"wte": nn.Embedding(5, 4), "body": nn.Linear(4, 4)})
    settings = TrainingSettings(learning_rate=1e-2, embedding_learning_rate=1e-3)
    *_, embedded = parameter_groups(model.named_parameters(), settings, embeddings=("wte",))
    assert [p.shape for p in embedded["params"]] == [(5, 4)]
    assert (embedded["rate_scale"], embedded["weight_decay"]) == (pytest.approx(0.1), 0.0)


def test_fused_adamw_steps_like_the_plain_one():
    torch.manual_seed(0)
    start = torch.randn(8, 8)
    results = []
    for build in (
        lambda model: build_optimizer(model, TrainingSettings(learning_rate=1e-2, weight_decay=0.1)),
        lambda model: torch.optim.AdamW(
            [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}],
            lr=1e-2,
            foreach=False,
        ),
    ):
        model = nn.Linear(8, 8)
        with torch.no_grad():
            model.weight.copy_(start)
            model.bias.zero_()
        optimizer = build(model)
        for step in range(5):
            model(torch.full((3, 8), float(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.weight.detach().clone())
    assert torch.allclose(results[0], results[1], atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw_8bit", "paged_adamw_8bit"])
def test_other_optimizers_reduce_a_loss(name):
    torch.manual_seed(0)
    # bitsandbytes keeps 8-bit state only for tensors of 4,096 elements and more.
    model = nn.Linear(64, 64)
    optimizer = build_optimizer(model, TrainingSettings(learning_rate=1e-2, optimizer=name))
    inputs, losses = torch.randn(32, 64), []
    for _ in range(10):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
