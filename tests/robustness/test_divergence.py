"""P12, P17: a number that is not finite stops the run within the step; missing memory loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import Server
from injections import PLACES, diverged, out_of_memory
from world import SETTINGS, failures

pytestmark = pytest.mark.timeout(1200)


def test_p12_not_finite_at_ten_places(server: Server, tmp_path: Path) -> None:
    assert len(PLACES) >= 10
    assert failures(diverged(server, tmp_path, places=list(PLACES))) == []


def test_p17_no_memory_left(server: Server, tmp_path: Path) -> None:
    assert failures([out_of_memory(server, tmp_path, SETTINGS[3])]) == []
