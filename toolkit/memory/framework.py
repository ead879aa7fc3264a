"""What a process holds beside its tensors: Python, torch and libraries, and what these load when they first work."""

from __future__ import annotations

from toolkit.config.schema import Recipe

MIB = 2**20
# Resident when recipe, data and base are read and nothing of them is in memory yet.
FRAMEWORK = {"cpu": 430 * MIB, "cuda": 500 * MIB}


def framework_bytes(recipe: Recipe, *, device: str, found: int | None = None) -> int:
    """Return the bytes beside tensors at the peak.

    Args:
        recipe: Its method and storage decide which libraries are there.
        device: ``cpu`` or ``cuda``.
        found: Bytes that the process held before tokens and weights were there; None takes what is usual.
    """
    return FRAMEWORK[device]
