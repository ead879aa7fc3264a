"""Measures what a run really takes, phase by phase, and sets it beside the prediction."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from accelerate import Accelerator

from toolkit.config.methods import FeaturesMethod
from toolkit.config.schema import Recipe
from toolkit.data.parts import LoadedData
from toolkit.data.tokens import TokenTable
from toolkit.memory.estimate import Estimate
from toolkit.memory.framework import FRAMEWORK
from toolkit.memory.inputs import Inputs, pair_inputs
from toolkit.memory.predict import predict
from toolkit.models.base import Base
from toolkit.report.run_record import MemoryRecord, PhaseRecord
from toolkit.resident import give_back
from toolkit.runtime import (
    MemoryUse,
    held_memory,
    memory_kind,
    peak_memory,
    reset_peak_memory,
)

# What a prediction covers; evaluation and export come after it.
PREDICTED_PHASES = ("tokenise", "load", "frozen blocks", "train")


class MemoryWatch:
    """Measures the peak of each phase of a run; each begins without what the one before it has left behind.

    Args:
        device: Where the run computes.

    Attributes:
        found: What the process held before the first phase.
        phases: Those that have ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._name: str | None = None
        self._time = self._started = 0.0
        give_back()
        self.found: MemoryUse = held_memory(device)
        self.phases: list[PhaseRecord] = []

    def enter(self, name: str) -> None:
        """End the phase before and start a new one."""
        self.end()
        give_back()
        reset_peak_memory(self._device)
        self._name, self._time, self._started = name, time.time(), time.perf_counter()

    def end(self) -> None:
        """End the phase."""
        if self._name is None:
            return
        seconds = round(time.perf_counter() - self._started, 3)
        self.phases.append(
            {"name": self._name, "time": round(self._time, 3), "seconds": seconds, **peak_memory(self._device)}
        )
        self._name = None

    def record(self, predicted: Estimate | None, *, shortage: list[str]) -> MemoryRecord:
        """Return what result.json says of memory; ``shortage`` as ``training.shortage.recipe_lines`` gives it."""
        covered = [phase for phase in self.phases if phase["name"] in PREDICTED_PHASES]
        peaks = {
            "allocated": max(phase["allocated"] for phase in covered),
            "reserved": max(phase["reserved"] for phase in covered),
            "rss": max(phase["rss"] for phase in covered),
        }
        kind = memory_kind(self._device)
        expected = None if predicted is None else predicted.peak_bytes
        if predicted is not None and kind == "cuda allocated":
            expected = predicted.allocated_bytes
        return {
            "kind": kind,
            "peak_bytes": peaks["allocated" if kind == "cuda allocated" else "rss"],
            "predicted_bytes": expected,
            "predicted": {} if predicted is None else predicted.breakdown,
            "allocated_bytes": peaks["allocated"],
            "reserved_bytes": peaks["reserved"],
            "rss_bytes": max(phase["rss"] for phase in self.phases),
            "phases": self.phases,
            "shortage": shortage,
        }


def predict_run(
    recipe: Recipe,
    *,
    tables: Mapping[str, TokenTable],
    data: LoadedData,
    base: Base,
    accelerator: Accelerator,
    found: MemoryUse,
) -> Estimate | None:
    """Return the prediction for a run whose tokens are there; None for several processes, on unknown devices.

    None too for method features: what scikit-learn takes is not known.

    Args:
        recipe: All settings.
        tables: Token ids by part, cut to ``max_length`` or into blocks.
        data: Its labels count.
        base: The model.
        accelerator: Processes and device.
        found: What the process held before tokens and weights.
    """
    device = accelerator.device.type
    if accelerator.num_processes > 1 or device not in FRAMEWORK or isinstance(recipe.method, FeaturesMethod):
        return None
    if recipe.objective == "instruction":
        inputs = pair_inputs(base, tables["train"], tables["validation"])
        return predict(recipe, inputs, device=device, found=found["rss"])
    lengths = {name: table.lengths.astype(np.int64) for name, table in tables.items()}
    labels = len(data.label_map.names) if data.label_map else 2
    inputs = Inputs(
        base=base,
        labels=labels,
        train=lengths["train"],
        validation=lengths["validation"],
        train_labels=data.train.labels,
    )
    return predict(recipe, inputs, device=device, found=found["rss"])
