"""What a run measured of itself: the peak of each phase, and the prediction beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolkit.memory.estimate import Estimate
from toolkit.memory.measure import MemoryWatch

MIB = 2**20
CPU = torch.device("cpu")
PREDICTED = Estimate({"weights": 30 * MIB, "framework": 400 * MIB}, "training", 7, 2)


def fill(mebibytes: int) -> None:
    """Touch memory and let it go."""
    np.ones(mebibytes * MIB, dtype=np.uint8).sum()


@pytest.fixture
def watched() -> MemoryWatch:
    watch = MemoryWatch(CPU)
    for name, mebibytes in (("load", 0), ("train", 200), ("evaluate", 0), ("export", 400)):
        watch.enter(name)
        fill(mebibytes)
    watch.end()
    return watch


def test_each_phase_has_its_own_peak(watched: MemoryWatch) -> None:
    peaks = {phase["name"]: phase["rss"] for phase in watched.phases}
    assert list(peaks) == ["load", "train", "evaluate", "export"]
    assert 150 * MIB < peaks["train"] - peaks["load"] < 260 * MIB
    # The peak of training does not reach into the next phase.
    assert peaks["evaluate"] < peaks["train"] - 100 * MIB
    assert peaks["export"] - peaks["evaluate"] > 300 * MIB
    times = [phase["time"] for phase in watched.phases]
    assert times == sorted(times)
    assert all(phase["allocated"] == phase["reserved"] == 0 for phase in watched.phases)


def test_what_is_predicted_is_what_training_takes(watched: MemoryWatch) -> None:
    record = watched.record(PREDICTED, shortage=[])
    peaks = {phase["name"]: phase["rss"] for phase in watched.phases}
    assert record["kind"] == "resident set"
    assert record["peak_bytes"] == peaks["train"] < record["rss_bytes"] == peaks["export"]
    assert record["predicted_bytes"] == PREDICTED.peak_bytes == sum(record["predicted"].values())
    assert watched.record(None, shortage=[])["predicted_bytes"] is None


def test_a_phase_begins_without_what_the_one_before_left() -> None:
    watch = MemoryWatch(CPU)
    # Small blocks lie in glibc's heap, which keeps what is free below the last of them.
    blocks = [bytearray(60_000) for _ in range(3_000)]
    last = blocks[-1]
    watch.enter("load")
    blocks.clear()
    watch.enter("train")
    watch.end()
    assert len(last) == 60_000
    peaks = {phase["name"]: phase["rss"] for phase in watch.phases}
    assert peaks["train"] < peaks["load"] - 100 * MIB
