"""Fixtures of the data room: files in a temporary folder, a private cache, no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

WriteFile = Callable[[str, "bytes | str"], str]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TOOLKIT_CACHE", str(folder))
    monkeypatch.setenv("TOOLKIT_OFFLINE", "1")
    return folder


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    def write_file(name: str, content: bytes | str) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file
