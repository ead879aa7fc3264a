"""P11: the parsers meet changed bytes with the project's errors only, within a second and 200 MB."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz import CORPUS, fuzzed, mutate, write_targets
from world import failures

pytestmark = pytest.mark.timeout(900)
SEED = random.randrange(1 << 30)
# Those with a seed file of many shapes; `make soak` takes all of them for longer.
OFTEN = ("recipe", "csv", "npy", "parquet", "manifest", "adapter config", "safetensors header")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("targets")
    write_targets(world)
    return world


@pytest.mark.parametrize("name", OFTEN)
def test_p11_changed_bytes(targets: Path, name: str) -> None:
    trials = fuzzed(targets, name, count=100, seed=SEED)
    assert len(trials) == 100
    assert failures(trials) == [], SEED


def test_the_corpus_is_tried() -> None:
    kept = {folder.name.replace("_", " ") for folder in CORPUS.iterdir()}
    assert kept
    assert kept <= set(OFTEN)


def test_mutations_change() -> None:
    chance = random.Random(0)
    assert len({mutate(b"label,text\nham,hello\n", chance) for _ in range(200)}) > 150
