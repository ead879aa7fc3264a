"""The plan: every row once an epoch, the same global batches for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest

from toolkit.training.plan import StepPlan, TokenBudgetPlan


def plan(**changes) -> StepPlan:
    settings = {
        "rows": 103, "batch_size": 4, "accumulation": 3, "processes": 1, "seed": 5, "epochs": 2, "max_steps": None
    }  # fmt: skip
    return StepPlan(**{**settings, **changes})


@pytest.mark.parametrize("rows", [1, 11, 12, 13, 103])
def test_an_epoch_sees_every_row_once(rows):
    chosen = plan(rows=rows)
    for epoch in range(2):
        steps = range(epoch * chosen.steps_per_epoch, (epoch + 1) * chosen.steps_per_epoch)
        seen = np.concatenate([chosen.window(step) for step in steps])
        assert sorted(seen) == list(range(rows))


def test_epochs_differ_and_seeds_differ():
    chosen = plan()
    assert not np.array_equal(chosen.window(0), chosen.window(chosen.steps_per_epoch))
    assert not np.array_equal(chosen.window(0), plan(seed=6).window(0))


def test_any_step_can_be_asked_first():
    ordered = [plan().window(step) for step in range(18)]
    shuffled = plan()
    for step in (17, 3, 9, 0):
        assert np.array_equal(shuffled.window(step), ordered[step])


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_share_the_same_global_batch(processes):
    one = plan(batch_size=12, accumulation=1)
    many = plan(batch_size=12 // processes, accumulation=1, processes=processes)
    assert one.total_steps == many.total_steps
    for step in range(one.total_steps):
        shares = [many.micro_batches(step, rank=rank) for rank in range(processes)]
        assert sorted(np.concatenate([np.concatenate(share) for share in shares])) == sorted(one.window(step))
        assert len({len(share) for share in shares}) == 1


def test_micro_batches_have_the_batch_size_and_the_last_window_is_short():
    chosen = plan()
    assert [len(part) for part in chosen.micro_batches(0, rank=0)] == [4, 4, 4]
    assert [len(part) for part in chosen.micro_batches(chosen.steps_per_epoch - 1, rank=0)] == [4, 3]


def test_max_steps_may_exceed_an_epoch():
    chosen = plan(epochs=None, max_steps=20)
    assert chosen.total_steps == 20
    assert len(chosen.window(19)) == 12
    assert chosen.epoch_of(18) == 2.0


LENGTHS = np.random.default_rng(1).integers(1, 60, 400)


def budget(**changes) -> TokenBudgetPlan:
    settings = {
        "rows": 400, "batch_size": 8, "accumulation": 2, "processes": 1, "seed": 5, "epochs": 3, "max_steps": None,
        "lengths": LENGTHS, "max_tokens": 128,
    }  # fmt: skip
    return TokenBudgetPlan(**{**settings, **changes})


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_token_batches_hold_the_budget_and_every_row_once(processes):
    chosen = budget(processes=processes)
    padded = 0
    for epoch in range(3):
        seen = []
        for step in range(chosen.first_step(epoch), chosen.first_step(epoch + 1)):
            shares = [chosen.micro_batches(step, rank=rank) for rank in range(processes)]
            assert len({len(share) for share in shares}) == 1
            batches = [batch for share in shares for batch in share if len(batch)]
            assert all(len(batch) * LENGTHS[batch].max() <= 128 for batch in batches)
            padded += sum(len(batch) * LENGTHS[batch].max() for batch in batches)
            seen.append(np.concatenate(batches))
            assert sorted(seen[-1]) == sorted(chosen.window(step))
        assert sorted(np.concatenate(seen)) == list(range(400))
    assert padded < 1.15 * 3 * LENGTHS.sum()
    assert chosen.total_steps == chosen.first_step(3)


def test_token_batches_are_data_and_differ_by_epoch():
    ordered = [budget().window(step) for step in range(budget().total_steps)]
    asked = budget()
    for step in (len(ordered) - 1, 4, 0, 40):
        assert np.array_equal(asked.window(step), ordered[step])
    assert not np.array_equal(ordered[0], ordered[budget().first_step(1)])
    ends = [steps for steps in range(1, len(ordered) + 1) if budget().ends_epoch(steps)]
    assert ends == [budget().first_step(epoch) for epoch in (1, 2, 3)]
    assert budget().epoch_of(ends[1]) == 2.0


def test_a_row_over_the_budget_is_a_batch_of_its_own():
    chosen = budget(max_tokens=16, accumulation=1)
    sizes = [
        len(chosen.window(step)) for step in range(chosen.first_step(1)) if LENGTHS[chosen.window(step)].max() > 16
    ]
    assert set(sizes) == {1}


def test_balanced_batches_hold_the_labels_in_equal_shares():
    labels = np.array([0] * 80 + [1] * 20 + [2] * 3)
    chosen = plan(labels=labels, batch_size=6, accumulation=1, epochs=40)
    for step in range(chosen.steps_per_epoch - 1):
        assert np.bincount(labels[chosen.window(step)], minlength=3).tolist() == [2, 2, 2]
    first = np.concatenate([chosen.window(step) for step in range(chosen.steps_per_epoch)])
    assert len(first) == 103
    # Rows of a label take turns: none comes a third time before all came twice, over the epochs.
    counts = np.bincount(first, minlength=103)
    assert set(counts[80:100]) == {1, 2}
    assert max(counts[:80]) == 1
    three = np.concatenate([chosen.window(step) for step in range(3 * chosen.steps_per_epoch)])
    assert np.bincount(three, minlength=103)[:80].min() >= 1
    again = plan(labels=labels, batch_size=6, accumulation=1, epochs=40)
    assert np.array_equal(again.window(40), chosen.window(40))
    assert not np.array_equal(chosen.window(0), chosen.window(chosen.steps_per_epoch))
