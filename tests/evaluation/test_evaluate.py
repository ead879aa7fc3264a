"""Logits come back in the rows' order, whatever the batches were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolkit.evaluation.evaluate import length_sorted_batches, predict_logits

CPU = torch.device("cpu")


def ragged(rows: int = 53, *, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 50, rng.integers(1, 30)).tolist() for _ in range(rows)]


def collate_rows(texts: list[list[int]], rows: np.ndarray) -> dict[str, torch.Tensor]:
    width = max(len(texts[i]) for i in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(texts[row])] = torch.tensor(texts[row])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def mean_embedding(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    table = torch.nn.functional.one_hot(batch["input_ids"], 50).float() @ torch.linspace(-1, 1, 150).view(50, 3)
    mask = batch["attention_mask"].unsqueeze(-1)
    return (table * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize(("batch_size", "max_tokens"), [(1, None), (7, None), (32, None), (100, None), (32, 64)])
def test_order_is_restored_for_any_batch(batch_size: int, max_tokens: int | None) -> None:
    texts = ragged()
    lengths = np.array([len(t) for t in texts])
    found = predict_logits(
        mean_embedding,
        lengths,
        collate=lambda rows: collate_rows(texts, rows),
        device=CPU,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    expected = np.stack([mean_embedding(collate_rows(texts, np.array([i])))[0].numpy() for i in range(len(texts))])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32


def test_batches_cover_every_row_once_and_keep_the_budget() -> None:
    lengths = np.array([len(t) for t in ragged(200)])
    batches = list(length_sorted_batches(lengths, batch_size=16, max_tokens=80))
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(b) <= 16 and len(b) * lengths[b].max() <= 80 for b in batches)
    assert lengths[batches[0]].max() == lengths.max()


def test_one_row_above_the_budget_still_runs() -> None:
    assert [b.tolist() for b in length_sorted_batches(np.array([5, 500]), batch_size=8, max_tokens=64)] == [[1], [0]]


def test_tensors_of_an_evaluation_may_be_used_in_training() -> None:
    kept = []

    def remember(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        kept.append(batch["input_ids"].float())
        return kept[-1].sum(1, keepdim=True)

    texts = ragged(3)
    predict_logits(remember, np.ones(3), collate=lambda rows: collate_rows(texts, rows), device=CPU)
    weight = torch.ones((), requires_grad=True)
    (kept[0] * weight).sum().backward()
    assert weight.grad is not None


def test_no_rows_is_a_callers_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        predict_logits(mean_embedding, np.array([]), collate=lambda rows: {}, device=CPU)
