"""Where downloaded sets, token tables, states and what is known of libraries are kept between runs."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Return $TOOLKIT_CACHE, or ~/.cache/classifier-toolkit."""
    given = os.environ.get("TOOLKIT_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "classifier-toolkit"


def offline() -> bool:
    """Return whether the environment forbids the network (TOOLKIT_OFFLINE or HF_HUB_OFFLINE)."""
    names = ("TOOLKIT_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").lower() in {"1", "true", "yes", "on"} for name in names)


def put_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a staging folder and rename it to ``target``, which is complete or absent, never half.

    Args:
        target: Final folder; if another process made it first, its copy stays.
        fill: Writes the files into the folder it is given.

    Raises:
        OSError: The disk is full or the folder cannot be written; nothing is left behind.
    """
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    staging.mkdir(parents=True)
    try:
        fill(staging)
        for file in staging.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
