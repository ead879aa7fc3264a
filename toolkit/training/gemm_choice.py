"""Which library multiplied fp32 matrices faster on this machine, as the cache folder remembers it; without torch."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from typing import Literal

from toolkit.cache import cache_folder
from toolkit.durable import write_file_atomically
from toolkit.errors import OutputError
from toolkit.runtime import cpu_name

logger = logging.getLogger(__name__)

Gemm = Literal["default", "onednn"]


def remembered_gemm(threads: int | None = None) -> Gemm | None:
    """Return what was measured to be faster; None where nothing was.

    Args:
        threads: That multiply; None, for a plan, takes oneDNN where any number of them did.
    """
    answers = _answers()
    found = {answers.get(_key(threads))} if threads else {answers[k] for k in answers if k.startswith(_key(""))}
    return "onednn" if "onednn" in found else "default" if "default" in found else None


def remember_gemm(gemm: Gemm, *, threads: int) -> None:
    """Keep an answer; where the cache folder cannot be written it is measured again."""
    path = cache_folder() / "gemm.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file_atomically(path, json.dumps(_answers() | {_key(threads): gemm}, indent=1))
    except (OSError, OutputError) as error:
        logger.warning("%s: not written: %s", path, error)


def _key(threads: int | str) -> str:
    return f"{cpu_name()}-{importlib.metadata.version('torch')}-{threads}"


def _answers() -> dict[str, str]:
    try:
        known = json.loads((cache_folder() / "gemm.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in known.items() if isinstance(v, str)} if isinstance(known, dict) else {}
