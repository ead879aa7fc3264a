"""The kept states of frozen blocks: exact, continued after a kill, made anew where damaged, bounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toolkit.data.tokens import TokenTable
from toolkit.memory import prefix_cache
from toolkit.memory.prefix_cache import PrefixCache, PrefixOverflowError, build_prefix_cache, lacks_room

WIDTH = 4
LENGTHS = np.array([3, 1, 7, 2, 5, 5, 4, 9, 1, 6], dtype=np.int64)


@pytest.fixture(autouse=True)
def small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(prefix_cache, "CHUNK_TOKENS", 10)
    monkeypatch.setattr(prefix_cache, "BATCH_TOKENS", {"cpu": 8})


@pytest.fixture
def table() -> TokenTable:
    return TokenTable.from_lengths(np.arange(1, LENGTHS.sum() + 1, dtype=np.int32), LENGTHS)


class Compute:
    """A stand-in for the frozen blocks whose states say which token they belong to; fails at a given call."""

    def __init__(self, *, pooled: bool = False, fails_at: int | None = None, scale: float = 1.0) -> None:
        self.calls, self.pooled, self.fails_at, self.scale = 0, pooled, fails_at, scale

    def __call__(self, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        return [self.states(batch) for batch in batches]

    def states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        lengths = batch["attention_mask"].sum(1)
        assert (lengths.diff() >= 0).all()
        ids = batch["input_ids"][:, 0] if self.pooled else batch["input_ids"][batch["attention_mask"].bool()]
        return ids[:, None] * self.scale + torch.arange(WIDTH) / 8


def build(table: TokenTable, compute: Any, **changes: Any) -> PrefixCache:
    settings: dict[str, Any] = {
        "key": "k", "width": WIDTH, "blocks": 1, "pooled": False, "dtype": "fp16", "device": torch.device("cpu"),
        "pad_id": 0,
    }  # fmt: skip
    return build_prefix_cache(table, compute, **(settings | changes))


def expected(table: TokenTable) -> np.ndarray:
    return table.ids[:, None] + np.arange(WIDTH, dtype=np.float16) / 8


def mapped_kib(file: Path) -> int:
    """KiB of a mapped file that count as this process's memory."""
    spans = Path("/proc/self/smaps").read_text().split(str(file))[1:]
    return sum(int(span.partition("Rss:")[2].split()[0]) for span in spans)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux")
def test_states_that_were_looked_at_are_not_held(table: TokenTable, tmp_path: Path) -> None:
    file = tmp_path / "prefix" / "k" / "states"
    cache = build(table, Compute())
    assert mapped_kib(file) == 0
    cache.batch(np.arange(3))
    assert mapped_kib(file) == 0
    again = build(table, Compute())
    assert again.seconds == 0
    assert mapped_kib(file) == 0
    assert np.isfinite(again.states).all()
    assert mapped_kib(file) > 0


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_token_has_its_own_state(table: TokenTable, dtype: str) -> None:
    heard: list[tuple[int, int]] = []
    cache = build(table, Compute(), dtype=dtype, advance=lambda done, total: heard.append((done, total)))
    np.testing.assert_array_equal(cache.states, expected(table))
    assert heard[-1] == (len(table), len(table))
    assert cache.nbytes == table.ids.size * WIDTH * (2 if dtype == "fp16" else 4)
    rows = np.array([7, 3, 0, 5, 4])
    batch = cache.batch(rows, np.arange(10))
    assert batch["lengths"].tolist() == LENGTHS[rows].tolist()
    assert batch["labels"].tolist() == rows.tolist()
    in_order = [3, 0, 5, 4, 7]  # ascending length, rows 5 and 4 as they come
    wanted = np.concatenate([expected(table)[table.offsets[r] : table.offsets[r + 1]] for r in in_order])
    np.testing.assert_array_equal(batch["states"], wanted)


def test_one_state_a_row_where_no_block_is_left(table: TokenTable) -> None:
    cache = build(table, Compute(pooled=True), pooled=True)
    rows = np.array([7, 3, 0])
    np.testing.assert_array_equal(cache.batch(rows)["states"][:, 0], table.ids[table.offsets[:-1][rows]])


def test_a_second_run_computes_nothing(table: TokenTable) -> None:
    first = build(table, Compute())
    again = Compute()
    second = build(table, again)
    assert again.calls == 0
    assert second.seconds == 0.0
    np.testing.assert_array_equal(first.states, second.states)


def test_a_killed_pass_goes_on_where_it_was(table: TokenTable) -> None:
    whole = Compute()
    build(table, whole, key="whole")
    killed, rest = Compute(fails_at=whole.calls - 1), Compute()
    with pytest.raises(KeyboardInterrupt):
        build(table, killed)
    cache = build(table, rest)
    assert 0 < rest.calls < whole.calls
    np.testing.assert_array_equal(cache.states, expected(table))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.unlink(),
        lambda path: path.with_name("checksums").write_text("0 1\n1 x\n\n2"),
        lambda path: path.with_name("checksums").write_bytes(b"\xff\x00"),
    ],
    ids=["flipped", "cut", "gone", "half_checksums", "binary_checksums"],
)
def test_damaged_states_are_made_anew(table: TokenTable, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    build(table, Compute())
    damage(tmp_path / "prefix" / "k" / "states")
    again = Compute()
    np.testing.assert_array_equal(build(table, again).states, expected(table))
    assert again.calls > 0


def test_a_state_beyond_fp16_is_refused(table: TokenTable) -> None:
    with pytest.raises(PrefixOverflowError):
        build(table, Compute(scale=1e5))
    assert build(table, Compute(scale=1e5), key="wide", dtype="fp32").states[-1, 0] == 1e5 * table.ids[-1]


def test_room_is_made_by_what_was_unused_for_longest_and_never_beyond_the_limit(
    table: TokenTable, tmp_path: Path
) -> None:
    import os

    for age, key in ((300, "old"), (200, "middle"), (100, "new")):
        build(table, Compute(), key=key)
        os.utime(tmp_path / "prefix" / key, (1e9 - age, 1e9 - age))
    one = table.ids.size * WIDTH * 2
    assert "max_gib" in str(lacks_room(one, limit=one - 1, keep={"mine"}))
    # Three caches with their checksums are over the limit of about two.
    assert lacks_room(one, limit=2 * one + 200, keep={"mine"}) is None
    assert sorted(path.name for path in (tmp_path / "prefix").iterdir()) == ["new"]
    assert "GiB free" in str(lacks_room(1 << 60, limit=1 << 61, keep={"mine"}))
