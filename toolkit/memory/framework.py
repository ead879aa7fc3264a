"""What a process holds beside its tensors: Python, torch and libraries, and memory that the allocator has free."""

from __future__ import annotations

from toolkit.config.schema import Recipe

MIB = 2**20
# Resident when recipe, data and base have been read and nothing of them is in memory yet; found by benchmarks/
# memory_plan.py. CUDA: the driver's context and cuBLAS, which max_memory_allocated does not count; not measured by us.
FRAMEWORK = {"cpu": 412 * MIB, "cuda": 500 * MIB}
ADAPTERS = 12 * MIB
# Code and tables that loading a model and the first step bring.
LATER = {"cpu": 40 * MIB, "cuda": 0}
# glibc's heap has holes: as a share of what passes through it, still there at the peak, or gone by then and in the way
# of gradients and optimizer state. CUDA's allocator reserves more than it hands out as well; not measured by us.
HOLES = {"cpu": (0.5, 0.8), "cuda": (0.0, 0.0)}


def framework_bytes(recipe: Recipe, *, device: str, found: int | None = None) -> int:
    """Return the bytes beside tensors and holes.

    Args:
        recipe: Its method decides which libraries are there.
        device: ``cpu`` or ``cuda``.
        found: Bytes that the process held before tokens and weights were there; None takes what is usual.
    """
    usual = FRAMEWORK[device] + (ADAPTERS if device == "cpu" and recipe.method.name == "lora" else 0)
    return (usual if found is None or device == "cuda" else found) + LATER[device]


def kept_free(device: str, *, passing: int, gone: int) -> int:
    """Return the bytes that are free in the allocator's hands at the peak.

    Args:
        device: ``cpu`` or ``cuda``.
        passing: Bytes of activations and workspace at the peak.
        gone: Bytes that these had been more before.
    """
    there, before = HOLES[device]
    return int(there * passing + before * gone)
