"""Whether a run keeps the states of its frozen blocks, and how it computes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

from toolkit.config.schema import Recipe
from toolkit.data.tokens import TokenTable
from toolkit.families import FAMILIES
from toolkit.listener import Listener
from toolkit.memory.prefix_cache import (
    PrefixCache,
    build_prefix_cache,
    lacks_room,
    prefix_key,
    table_sha256,
)
from toolkit.memory.prefix_rule import can_stream, embedding_on_disk, state_bytes, worth_keeping
from toolkit.memory.shape import model_shape
from toolkit.models.base import Base
from toolkit.models.flat import has_flat_form, prefix_states
from toolkit.models.forward import unwrapped
from toolkit.report.run_record import PrefixCacheRecord
from toolkit.training.gemm import choose_packing
from toolkit.training.gemm_choice import Gemm

# Parts whose states training reads, and parts that are judged when it has ended.
TRAINING, JUDGED = ("train", "validation"), ("validation", "test")


@dataclass(frozen=True)
class PrefixPlan:
    """Which states a run keeps.

    Attributes:
        blocks: Frozen blocks that they have behind them.
        pooled: Whether no block is left, and one state a row is kept.
        width: Of a state.
        dtype: ``fp16`` or ``fp32``.
        keys: Key of the cache of each part.
        precision: Of the blocks, as accelerate spells it.
        packed: What weights are packed in while a block runs (``models.packed``); None: they are not.
        judged: The same of the rows that are judged, in full precision; None: their blocks run each time.
    """

    blocks: int
    pooled: bool
    width: int
    dtype: Literal["fp16", "fp32"]
    keys: dict[str, str]
    precision: str
    packed: torch.dtype | None = None
    judged: PrefixPlan | None = None


def plan_prefixes(
    recipe: Recipe,
    tables: Mapping[str, TokenTable],
    *,
    base: Base,
    accelerator: Accelerator,
    gemm: Gemm,
    listener: Listener,
    dtype: Literal["fp16", "fp32"] | None = None,
) -> PrefixPlan | None:
    """Return what to keep of the rows that training reads and of those that are judged; None: better nothing.

    That is: no block is frozen, the rows are seen too seldom, the recipe says no, or the states do not fit.

    Args:
        recipe: All settings.
        tables: Token ids by part.
        base: The model.
        accelerator: Processes and precision.
        gemm: Library of fp32 products.
        listener: Hears why states that should be kept are not.
        dtype: Of the states; None: the recipe's.
    """
    settings = recipe.training.prefix_cache
    blocks = model_shape(base.config, recipe, labels=2).frozen
    if not worth_keeping(recipe, blocks=blocks, rows=len(tables["train"])) or not has_flat_form(base.config):
        return None
    dtype = dtype or settings.dtype
    width, pooled = base.config[base.family.width_key], blocks == base.config[base.family.layers_key]
    facts: dict[str, object] = {
        "base": base.fingerprint,
        "seed": recipe.training.seed if recipe.model.random_init else None,
        "blocks": blocks,
        "pooled": pooled,
        "quantization": recipe.quantization,
        "device": accelerator.device.type,
    }
    if pooled and base.family.pooling != FAMILIES[base.family.model_type].pooling:
        facts["pooling"] = base.family.pooling

    def plan_parts(names: tuple[str, ...], dtype: Literal["fp16", "fp32"], precision: str) -> PrefixPlan:
        packed = choose_packing(gemm, precision, accelerator.device)
        own = {**facts, "dtype": dtype, "precision": precision} | ({} if packed is None else {"packed": packed})
        keys = {name: prefix_key(**own, table=table_sha256(tables[name])) for name in names if len(tables[name])}
        return PrefixPlan(blocks, pooled, width, dtype, keys, precision, packed)

    plan = plan_parts(TRAINING, dtype, accelerator.mixed_precision)
    judged = plan_parts(JUDGED, "fp32", "no")
    # What is judged is worth less: it is read once a run.
    judges = judged.keys and can_stream(recipe) and accelerator.num_processes == 1
    wanted = (plan, judged) if judges else (plan,)
    reason = _lacks_room(wanted, tables, limit=settings.max_gib)
    if reason is not None and len(wanted) == 2:
        wanted = (plan,)
        reason = _lacks_room(wanted, tables, limit=settings.max_gib)
    if reason is not None:
        listener.say(f"warning: frozen blocks run in every epoch: {reason}")
        return None
    return replace(plan, judged=judged) if len(wanted) == 2 else plan


def _lacks_room(plans: tuple[PrefixPlan, ...], tables: Mapping[str, TokenTable], *, limit: float) -> str | None:
    """Return why the states of some plans may not be kept, ``limit`` GiB of them, or None."""
    sizes = {
        key: state_bytes(
            tokens=len(tables[name].ids), rows=len(tables[name]), width=plan.width, dtype=plan.dtype, pooled=plan.pooled
        )
        for plan in plans
        for name, key in plan.keys.items()
    }
    return lacks_room(sum(sizes.values()), limit=int(limit * 2**30), keep=set(sizes))


def streamed_blocks(plan: PrefixPlan | None, recipe: Recipe, accelerator: Accelerator, *, blocks: int) -> int | None:
    """Return how many blocks, from the first, stay on disk beside the token embedding; None: not even that.

    Several processes want whole models.

    Args:
        plan: What is kept of the frozen blocks' states.
        recipe: All settings.
        accelerator: Processes and device.
        blocks: Of the model.
    """
    if accelerator.num_processes > 1:
        return None
    if recipe.method.name == "zero_shot" and can_stream(recipe):
        return blocks
    if plan is not None and can_stream(recipe):
        return plan.blocks
    return 0 if embedding_on_disk(recipe, device=accelerator.device.type) else None


def keep_prefixes(
    model: nn.Module,
    tables: Mapping[str, TokenTable],
    plan: PrefixPlan,
    *,
    pad_id: int,
    accelerator: Accelerator,
    listener: Listener,
) -> dict[str, PrefixCache]:
    """Return the caches of a plan, by part.

    Raises:
        PrefixOverflowError: A state exceeds fp16.
        OutputError: The disk is full.
    """
    core = unwrapped(model)
    core.eval()

    @torch.no_grad()
    def compute(batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        with accelerator.autocast() if plan.precision != "no" else nullcontext():
            return prefix_states(core, batches, blocks=plan.blocks, packed=plan.packed)

    caches = {}
    # One process computes the states, the others of the same machine then find them.
    with accelerator.local_main_process_first():
        for name, key in plan.keys.items():
            built = build_prefix_cache(
                tables[name],
                compute,
                key=key,
                width=plan.width,
                blocks=plan.blocks,
                pooled=plan.pooled,
                dtype=plan.dtype,
                device=accelerator.device,
                pad_id=pad_id,
                advance=partial(_advance, listener, f"frozen blocks, {name}"),
            )
            caches[name] = built.to(accelerator.device)
    if core.streamed is not None:
        core.streamed.rest()
    listener.say(_describe(caches))
    return caches


def through_frozen(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], *, blocks: int
) -> list[dict[str, torch.Tensor]]:
    """Return batches of token ids as ``models.forward.classify`` takes them behind the first ``blocks`` blocks."""
    states = prefix_states(unwrapped(model), batches, blocks=blocks)
    lengths = [batch["attention_mask"].sum(1) for batch in batches]
    return [{"states": one, "lengths": count} for one, count in zip(states, lengths, strict=True)]


def prefix_record(caches: Iterable[PrefixCache]) -> PrefixCacheRecord | None:
    """Return what result.json says of the caches, that of the training rows first."""
    known: dict[str, PrefixCache] = {}
    for cache in caches:
        known.setdefault(cache.key, cache)
    distinct = list(known.values())
    if not distinct:
        return None
    return {
        "blocks": distinct[0].blocks,
        "dtype": "fp16" if distinct[0].states.itemsize == 2 else "fp32",
        "bytes": sum(cache.nbytes for cache in distinct),
        "seconds": round(sum(cache.seconds for cache in distinct), 3),
    }


def _advance(listener: Listener, what: str, done: int, total: int) -> None:
    listener.advance(what, done=done, total=total)


def _describe(caches: Mapping[str, PrefixCache]) -> str:
    record = prefix_record(caches.values())
    assert record is not None
    size = f"{record['bytes'] / 2**20:,.1f} MiB of {record['dtype']} states of {' and '.join(caches)}"
    how = f"computed in {record['seconds']:.1f} s" if record["seconds"] else "found from an earlier run"
    return f"frozen blocks: {record['blocks']} run once, {size} {how}"
