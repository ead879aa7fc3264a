"""P1, P2, P3: what is killed or stopped goes on by the same command and ends bit-equal."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from forked import Server
from kills import (
    early_signals,
    injected_kills,
    injected_signals,
    killed_merges,
    launcher_signal,
    random_kills,
    timed_kills,
)
from world import SETTINGS, Setting, failures

# Wall time on a machine that others use; the processor time is about a minute in all.
pytestmark = pytest.mark.timeout(1200)
SEED = random.randrange(1 << 30)


def name(setting: Setting) -> str:
    return setting.name.replace(" ", "-").replace(",", "")


# Twenty kills: GPT-2 and DistilBERT, fp32 and 4-bit, LoRA, the last block over kept states, and full.
@pytest.mark.parametrize("setting", SETTINGS[:4], ids=name)
def test_p1_killed_anywhere(server: Server, tmp_path: Path, setting: Setting) -> None:
    print("seed", SEED)
    trials = random_kills(server, tmp_path / "launched", setting, count=2, seed=SEED)
    trials += timed_kills(server, tmp_path / "forked", setting, count=3, seed=SEED)
    assert len(trials) == 5
    assert failures(trials) == []


# A part of the hundred and fifty points each, another one in every run; `make soak` takes all.
@pytest.mark.parametrize("setting", SETTINGS[:3], ids=name)
def test_p2_killed_at_a_write(server: Server, tmp_path: Path, setting: Setting) -> None:
    print("seed", SEED)
    trials = injected_kills(server, tmp_path, setting, points=slice(1 + SEED % 20, None, 20))
    assert len(trials) >= 7
    assert failures(trials) == []


def test_p2_a_merge_killed_at_a_write(server: Server, tmp_path: Path) -> None:
    trials = killed_merges(server, tmp_path, SETTINGS[0], points=slice(None, None, 2))
    assert len(trials) >= 7
    assert failures(trials) == []


def test_p3_signals_at_any_place_and_twice(server: Server, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    print("seed", SEED)
    cases = [
        (chance.random(), number, count) for number in (signal.SIGTERM, signal.SIGINT) for count in (1, 2) for _ in "ab"
    ]
    trials = injected_signals(server, tmp_path, SETTINGS[0], cases=cases)
    assert len(trials) == 8
    assert failures(trials) == []


def test_p3_a_signal_to_the_launcher_alone(tmp_path: Path) -> None:
    trial = launcher_signal(tmp_path, SETTINGS[0], signal.SIGTERM)
    assert not trial.failure


def test_p3_a_signal_while_it_starts(tmp_path: Path) -> None:
    cases = [(delay, number) for delay in (0.3, 3.0) for number in (signal.SIGTERM, signal.SIGINT)]
    assert failures(early_signals(tmp_path, SETTINGS[0], cases=cases)) == []
