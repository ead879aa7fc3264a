"""Fixtures that all rooms share."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Two-layer models gain nothing from a second thread and lose much where the machine is shared; set before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real encoder beside the repository; tests that want them skip where they are absent."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data" / "sms_spam.tsv").is_file():
        pytest.skip("no shared data beside the repository")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep tokens and hidden states of the tests out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TOOLKIT_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_second_look() -> None:
    """Spare runs a look for garbage at all that the tests before have imported, half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of few and long tests: the last one to begin is the last to end, beside idle cores."""
    items.sort(key=lambda item: "robustness" not in item.path.parts)
