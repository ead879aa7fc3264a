"""Whether a run keeps the states of its frozen blocks, and how it computes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from toolkit.config.schema import PrefixCacheSettings, Recipe
from toolkit.data.tokens import TokenTable
from toolkit.listener import Listener
from toolkit.memory.prefix_cache import (
    PrefixCache,
    PrefixOverflowError,
    build_prefix_cache,
    lacks_room,
    prefix_key,
    table_sha256,
)
from toolkit.memory.prefix_rule import state_bytes, worth_keeping
from toolkit.models.base import Base
from toolkit.models.flat import prefix_states, runs_flat
from toolkit.models.forward import frozen_blocks, unwrapped
from toolkit.report.run_record import PrefixCacheRecord


def keep_prefixes(
    model: nn.Module,
    tables: Mapping[str, TokenTable],
    *,
    recipe: Recipe,
    base: Base,
    pad_id: int,
    accelerator: Accelerator,
    listener: Listener,
) -> dict[str, PrefixCache]:
    """Return the caches of the training and validation rows; empty where a run is better off without.

    That is: no block is frozen, the rows are seen once or less, the recipe says no, or the states do not fit.
    """
    settings, blocks, core = recipe.training.prefix_cache, frozen_blocks(model), unwrapped(model)
    parts = {name: tables[name] for name in ("train", "validation") if len(tables[name])}
    if not worth_keeping(recipe, blocks=blocks, rows=len(tables["train"])) or not runs_flat(core):
        return {}
    width, layers = base.config[base.family.width_key], base.config[base.family.layers_key]
    pooled = blocks == layers
    facts = {
        "base": base.fingerprint,
        "seed": recipe.training.seed if recipe.model.random_init else None,
        "blocks": blocks,
        "pooled": pooled,
        "quantization": recipe.quantization,
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "dtype": settings.dtype,
    }
    keys = {name: prefix_key(**facts, table=table_sha256(table)) for name, table in parts.items()}
    needed = sum(
        state_bytes(tokens=len(table.ids), rows=len(table), width=width, dtype=settings.dtype, pooled=pooled)
        for table in parts.values()
    )
    reason = lacks_room(needed, limit=int(settings.max_gib * 2**30), keep=set(keys.values()))
    if reason is not None:
        listener.say(f"warning: frozen blocks run in every epoch: {reason}")
        return {}

    @torch.no_grad()
    def compute(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with accelerator.autocast():
            return prefix_states(core, batch["input_ids"], batch["attention_mask"], blocks=blocks)

    core.eval()
    caches = {}
    try:
        # One process computes the states, the others of the same machine then find them.
        with accelerator.local_main_process_first():
            for name, table in parts.items():
                built = build_prefix_cache(
                    table,
                    compute,
                    key=keys[name],
                    width=width,
                    blocks=blocks,
                    pooled=pooled,
                    dtype=settings.dtype,
                    device=accelerator.device,
                    pad_id=pad_id,
                    advance=partial(_advance, listener, f"frozen blocks, {name}"),
                )
                caches[name] = built.to(accelerator.device)
    except PrefixOverflowError:
        listener.say("warning: a state of the frozen blocks exceeds fp16: kept in fp32")
        wide = settings.model_copy(update={"dtype": "fp32"})
        return keep_prefixes(
            model, tables, recipe=_with_cache(recipe, wide), base=base, pad_id=pad_id, accelerator=accelerator,
            listener=listener,
        )  # fmt: skip
    listener.say(_describe(caches, settings.dtype))
    return caches


def prefix_record(caches: Mapping[str, PrefixCache]) -> PrefixCacheRecord | None:
    """Return what result.json says of the caches."""
    if not caches:
        return None
    return {
        "blocks": caches["train"].blocks,
        "dtype": "fp16" if caches["train"].states.itemsize == 2 else "fp32",
        "bytes": sum(cache.nbytes for cache in caches.values()),
        "seconds": round(sum(cache.seconds for cache in caches.values()), 3),
    }


def _with_cache(recipe: Recipe, settings: PrefixCacheSettings) -> Recipe:
    training = recipe.training.model_copy(update={"prefix_cache": settings})
    return recipe.model_copy(update={"training": training})


def _advance(listener: Listener, what: str, done: int, total: int) -> None:
    listener.advance(what, done=done, total=total)


def _describe(caches: Mapping[str, PrefixCache], dtype: str) -> str:
    record = prefix_record(caches)
    assert record is not None
    size = f"{record['bytes'] / 2**20:,.1f} MiB of {dtype} states"
    how = f"computed in {record['seconds']:.1f} s" if record["seconds"] else "found from an earlier run"
    return f"frozen blocks: {record['blocks']} run once, {size} {how}"
