"""Batches and blocks against plain loops."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data.batching import collate, epoch_order, lm_blocks
from toolkit.data.tokens import TokenTable

ROWS = st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=9), min_size=1, max_size=10)


def table_of(rows: list[list[int]]) -> TokenTable:
    flat = np.array([token for row in rows for token in row], dtype=np.int32)
    return TokenTable.from_lengths(flat, np.array([len(row) for row in rows], dtype=np.int64))


@given(rows=ROWS, data=st.data())
def test_collate_pads_on_the_right(rows: list[list[int]], data: st.DataObject) -> None:
    picked = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1)), dtype=np.int64)
    labels = np.arange(len(rows)) * 10
    batch = collate(table_of(rows), labels, picked, pad_id=7)
    width = max(len(rows[row]) for row in picked)
    ids = [rows[row] + [7] * (width - len(rows[row])) for row in picked]
    mask = [[1] * len(rows[row]) + [0] * (width - len(rows[row])) for row in picked]
    assert torch.equal(batch["input_ids"], torch.tensor(ids))
    assert torch.equal(batch["attention_mask"], torch.tensor(mask))
    assert torch.equal(batch["labels"], torch.from_numpy(labels[picked]))
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert "labels" not in collate(table_of(rows), None, picked, pad_id=7)


def test_epoch_order_is_a_pure_function() -> None:
    order = epoch_order(10, seed=123, epoch=0)
    assert order.tolist() == GOLDEN
    assert sorted(epoch_order(1000, seed=1, epoch=3).tolist()) == list(range(1000))
    assert epoch_order(1000, seed=1, epoch=3).tolist() != epoch_order(1000, seed=1, epoch=4).tolist()
    assert epoch_order(1000, seed=1, epoch=3).tolist() != epoch_order(1000, seed=2, epoch=3).tolist()


GOLDEN = [9, 5, 1, 3, 2, 4, 7, 0, 8, 6]


def chunks(stream: list[int], size: int) -> list[list[int]]:
    return [stream[low : low + size] for low in range(0, len(stream), size)]


@given(rows=ROWS, length=st.integers(3, 12))
def test_blocks_hold_the_running_text(rows: list[list[int]], length: int) -> None:
    plain = [row.tolist() for row in lm_blocks(table_of(rows), block_length=length, eos_id=2)]
    assert plain == chunks([token for row in rows for token in [*row, 2]], length)
    framed = table_of([[0, *row, 1] for row in rows])
    blocks = [row.tolist() for row in lm_blocks(framed, block_length=length, frame=(0, 1))]
    inner = chunks([token for row in rows for token in row], length - 2)
    assert blocks == [[0, *block, 1] for block in inner]
