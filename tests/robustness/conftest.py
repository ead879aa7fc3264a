"""Fixtures of the robustness tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forked import Server
from pico import pico_cache, pico_folder

__all__ = ["pico_cache", "pico_folder"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One warm process whose forked children run the command lines."""
    with Server(TOOLKIT_CACHE=str(tmp_path_factory.mktemp("served"))) as running:
        yield running
