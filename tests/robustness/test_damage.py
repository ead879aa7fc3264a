"""P4, P5, P13, P14: nothing damaged is used, a full disk loses nothing, one writer, and never another run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from damage import (
    ALL,
    CHANGES,
    DAMAGES,
    EDITS,
    FILES,
    changed_runs,
    damaged_best,
    damaged_checkpoints,
    forked_races,
    full_disks,
    full_merges,
    loaded_damage,
    races,
)
from forked import Server
from world import SETTINGS, failures

pytestmark = pytest.mark.timeout(1200)
SEED = random.randrange(1 << 30)
LORA, NF4, LAST_BLOCK = SETTINGS[:3]


def test_p4_a_thousand_damaged_files_and_none_is_loaded(server: Server, tmp_path: Path) -> None:
    trials = loaded_damage(server, tmp_path, LORA, count=1000, seed=SEED)
    assert failures(trials) == []
    assert len({trial.case for trial in trials}) > len(FILES) * len(DAMAGES)


def test_p4_an_older_checkpoint_serves(server: Server, tmp_path: Path) -> None:
    print("seed", SEED)
    kinds = random.Random(SEED).sample(ALL, 6)
    trials = damaged_checkpoints(server, tmp_path, LAST_BLOCK, kinds=kinds, seed=SEED)
    assert len(trials) >= 5
    assert failures(trials) == []


def test_p4_a_damaged_best_checkpoint(server: Server, tmp_path: Path) -> None:
    assert failures([damaged_best(server, tmp_path, LORA)]) == []


def test_p5_a_full_disk(server: Server, tmp_path: Path) -> None:
    assert failures(full_disks(server, tmp_path / "train", LAST_BLOCK, shares=[0.0, 0.01, 0.3, 0.9])) == []
    assert failures(full_merges(server, tmp_path / "merge", LORA, shares=[0.0, 0.01, 0.5, 0.99])) == []


def test_p13_two_writers(server: Server, tmp_path: Path) -> None:
    print("seed", SEED)
    assert failures(forked_races(server, tmp_path / "forked", LORA, count=6, seed=SEED)) == []
    assert failures(races(tmp_path / "real", LORA, count=1)) == []


def test_p14_another_recipe_data_or_base(server: Server, tmp_path: Path) -> None:
    trials = changed_runs(server, tmp_path / "world", LORA)
    assert len(trials) == len(CHANGES) + len(EDITS) >= 15
    assert failures(trials) == []
