"""P6, P7: a merge takes the trained adapter and its own base, and nothing else; what it writes is proven."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from forked import Server
from merging import ALTERED, WRONG_BASES, altered_adapters, forced, merges, wrong_bases
from world import failures

pytestmark = pytest.mark.timeout(1200)
SEED = random.randrange(1 << 30)


# Others in every run; test_bad_inputs.py has each of them in one process, `make soak` all.
def test_p6_altered_adapters(server: Server, tmp_path: Path) -> None:
    assert len(ALTERED) >= 16
    chosen = random.Random(SEED).sample(sorted(ALTERED), 5)
    assert failures(altered_adapters(server, tmp_path, chosen=chosen)) == [], SEED


def test_p6_wrong_bases(server: Server, tmp_path: Path) -> None:
    assert len(WRONG_BASES) == 9
    assert failures(wrong_bases(server, tmp_path)) == []


def test_p6_force_leaves_its_trace(server: Server, tmp_path: Path) -> None:
    assert failures([forced(server, tmp_path)]) == []


def test_p7_two_families_in_three_storages(server: Server, tmp_path: Path) -> None:
    trials = merges(server, tmp_path)
    assert len(trials) == 6
    assert failures(trials) == []
