"""Predicts what a recipe needs and, for a budget, finds the fastest settings that fit, or says what would."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.config.load import dump_recipe
from toolkit.config.methods import FeaturesMethod
from toolkit.config.schema import Recipe
from toolkit.config.training import no_offload
from toolkit.durable import write_file_atomically
from toolkit.errors import OutputError, Problem, RecipeError
from toolkit.memory.candidates import alternatives, candidates, losses, slowness, with_training
from toolkit.memory.estimate import Estimate
from toolkit.memory.inputs import Inputs, choose_device, parse_bytes, read_sizes
from toolkit.memory.predict import predict
from toolkit.memory.shape import model_shape


@dataclass(frozen=True)
class Change:
    """One setting changed to fit a budget.

    Attributes:
        settings: Dotted settings and their new values, as overrides.
        before: What the recipe said.
        saves_bytes: Peak before it minus peak after it, the changes above it already made.
        time_factor: Estimated time of a step over the time without it; None where nothing like it was measured.
        exact: Whether the arithmetic stays the same to rounding.
    """

    settings: dict[str, Any]
    before: dict[str, Any]
    saves_bytes: int
    time_factor: float | None
    exact: bool


@dataclass(frozen=True)
class MemoryPlan:
    """What a recipe needs, and what makes it fit.

    Attributes:
        recipe: With the changes made.
        base: Name of the base whose shapes were used.
        device: ``cpu`` or ``cuda``.
        budget_bytes: What may be used, or None.
        written: Prediction for the recipe as it is written.
        estimate: Prediction with the changes.
        changes: What was changed, in order.
        advice: If nothing fits: why, and what would.
    """

    recipe: Recipe
    base: str
    device: str
    budget_bytes: int | None
    written: Estimate
    estimate: Estimate
    changes: tuple[Change, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the planned recipe stays within the budget; None without one."""
        return None if self.budget_bytes is None else self.estimate.peak_bytes <= self.budget_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of settings whose effect depends on the device."""
        training = self.recipe.training
        if training.offloads(self.device):
            return ("training.activation_offload: the time that copying takes was not measured",)
        return (no_offload(self.device),) if training.activation_offload else ()

    def as_dict(self) -> dict[str, Any]:
        """Return what ``toolkit plan --json`` prints."""
        return {
            "peak_bytes": self.estimate.peak_bytes,
            "allocated_bytes": self.estimate.allocated_bytes,
            "breakdown": self.estimate.breakdown,
            "moment": self.estimate.moment,
            "device": self.device,
            "base": self.base,
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "recipe_peak_bytes": self.written.peak_bytes,
            "changes": [vars(change) for change in self.changes],
            "advice": list(self.advice),
            "notes": list(self.notes),
        }


def plan_memory(recipe: Recipe, *, budget: int | str | None = None, device: str = "auto") -> MemoryPlan:
    """Predict the peak memory of training a recipe, without loading a weight.

    With a budget, the fastest settings of the same effective batch that fit are looked for: micro-batch and
    accumulation, checkpointing, on CUDA activations in the machine's memory, and, only where these do not suffice, kept
    states of frozen blocks, 8-bit optimizer state and quantised weights.

    Args:
        recipe: From ``load_recipe``.
        budget: Bytes, or text such as ``4GiB``; None only predicts.
        device: ``cpu``, ``cuda``, or ``auto``.

    Raises:
        InputError: If data, base or budget are wrong.
    """
    if isinstance(recipe.method, FeaturesMethod):
        wrong = "scikit-learn fits features, and what it takes is not predicted"
        raise RecipeError(Problem("", "method.name", wrong, "a plan of method head, without scikit-learn"))
    limit = parse_bytes(budget) if isinstance(budget, str) else budget
    return _Planner(read_sizes(recipe), choose_device(device)).plan(recipe, limit)


class _Planner:
    def __init__(self, inputs: Inputs, device: str) -> None:
        self._inputs, self._device = inputs, device
        self._blocks = int(inputs.base.config[inputs.base.family.layers_key])

    def plan(self, recipe: Recipe, limit: int | None) -> MemoryPlan:
        written = self.predict(recipe)
        facts: dict[str, Any] = {"base": self._inputs.base.used, "device": self._device, "written": written}
        if limit is None:
            return MemoryPlan(recipe=recipe, budget_bytes=None, estimate=written, **facts)
        for candidate in sorted(self._candidates(recipe), key=lambda one: self._cost(recipe, one)):
            if self.predict(candidate).peak_bytes <= limit:
                changes = tuple(self._changes(recipe, candidate))
                predicted = self.predict(candidate)
                return MemoryPlan(recipe=candidate, budget_bytes=limit, estimate=predicted, changes=changes, **facts)
        advice = tuple(self._advice(recipe, limit))
        return MemoryPlan(recipe=recipe, budget_bytes=limit, estimate=written, advice=advice, **facts)

    def _cost(self, recipe: Recipe, candidate: Recipe) -> tuple[int, bool, float]:
        """Return what orders candidates: the same arithmetic first, then what was measured, then time."""
        moves = candidate.training.activation_offload and not recipe.training.activation_offload
        return losses(recipe, candidate), moves, self._slowness(candidate)

    def predict(self, recipe: Recipe) -> Estimate:
        return predict(recipe, self._inputs, device=self._device)

    def _changes(self, recipe: Recipe, chosen: Recipe) -> Iterator[Change]:
        """Yield the differences one after another, each with what it saves on top of those before it."""
        current, peak = recipe, self.predict(recipe).peak_bytes
        for names in (
            ("batch_size", "gradient_accumulation_steps"),
            ("gradient_checkpointing",),
            ("allocator",),
            ("activation_offload",),
            ("optimizer",),
        ):
            new = {name: getattr(chosen.training, name) for name in names}
            old = {name: getattr(recipe.training, name) for name in names}
            if new == old:
                continue
            changed = with_training(current, **new)
            yield self._change(current, changed, new, old, peak, prefix="training.")
            current, peak = changed, self.predict(changed).peak_bytes
        if chosen.training.prefix_cache != recipe.training.prefix_cache:
            changed = with_training(current, prefix_cache=chosen.training.prefix_cache)
            yield self._change(
                current, changed, {"enabled": True}, {"enabled": False}, peak, prefix="training.prefix_cache."
            )
            current, peak = changed, self.predict(changed).peak_bytes
        if chosen.quantization != recipe.quantization:
            assert chosen.quantization is not None
            new = {"bits": chosen.quantization.bits}
            old = {"bits": recipe.quantization.bits if recipe.quantization else None}
            yield self._change(current, chosen, new, old, peak, prefix="quantization.")

    def _change(
        self, before: Recipe, after: Recipe, new: dict[str, Any], old: dict[str, Any], peak: int, *, prefix: str
    ) -> Change:
        measured = "activation_offload" not in new
        return Change(
            settings={prefix + name: value for name, value in new.items()},
            before={prefix + name: value for name, value in old.items()},
            saves_bytes=peak - self.predict(after).peak_bytes,
            time_factor=round(self._slowness(after) / self._slowness(before), 3) if measured else None,
            exact=prefix == "training." and "optimizer" not in new,
        )

    def _advice(self, recipe: Recipe, limit: int) -> Iterator[str]:
        """Yield why nothing fits, then what would, one line each."""
        least = self._least(recipe)
        parts = sorted(least.breakdown.items(), key=lambda item: -item[1])[:3]
        largest = ", ".join(f"{part} {size / 2**20:.0f} MiB" for part, size in parts)
        yield (
            f"the least this recipe needs is {least.peak_bytes / 2**20:.0f} MiB, "
            f"over the budget of {limit / 2**20:.0f} MiB: {largest}"
        )
        found = False
        for text, other in alternatives(recipe):
            need = self._least(other).peak_bytes
            if need <= limit:
                found = True
                yield f"{text} fits: from {need / 2**20:.0f} MiB"
        if not found:
            yield "no other method or length fits either: take a smaller base or a larger budget"

    def _least(self, recipe: Recipe) -> Estimate:
        single = (self.predict(one) for one in self._candidates(recipe) if one.training.batch_size == 1)
        return min(single, key=lambda one: one.peak_bytes)

    def _candidates(self, recipe: Recipe) -> list[Recipe]:
        return candidates(recipe, blocks=self._blocks, device=self._device)

    def _slowness(self, recipe: Recipe) -> float:
        lengths = np.minimum(self._inputs.train, recipe.model.max_length)
        shape = model_shape(self._inputs.base.config, recipe, labels=self._inputs.labels)
        mean = float(lengths.mean())
        share = shape.trainable / shape.total
        return slowness(recipe, mean_length=mean, trained_share=share, blocks=self._blocks, device=self._device)


def write_recipe(plan: MemoryPlan, path: pathlib.Path) -> None:
    """Write the planned recipe as a new YAML file.

    Raises:
        OutputError: The file exists, or its folder does not.
    """
    if path.exists():
        raise OutputError(Problem(str(path), "--write", "exists already", "a new file"))
    if not path.parent.is_dir():
        raise OutputError(Problem(str(path), "--write", "its folder does not exist", "an existing folder"))
    write_file_atomically(path, dump_recipe(plan.recipe))
