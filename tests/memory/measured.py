"""Measures what a real training step allocates on the CPU: the allocator's own events, temporaries included."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile

from toolkit.adapters.apply import apply_method
from toolkit.config.schema import Recipe
from toolkit.data.pairs import PairTable
from toolkit.data.tokens import TokenTable
from toolkit.families import FAMILIES, family_of, language_family
from toolkit.memory.prefix_cache import DTYPES, PrefixCache
from toolkit.models.forward import CLASSIFIERS, checkpoint_activations, unwrapped
from toolkit.models.heads import own_head
from toolkit.training.in_backward import InBackward
from toolkit.training.instruction import InstructionObjective
from toolkit.training.objectives import ClassificationObjective
from toolkit.training.offload import offloaded
from toolkit.training.optim import build_optimizer

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 3000, "n_positions": 128, "n_embd": 64, "n_layer": 3, "n_head": 2,
        "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "distilbert": {
        "model_type": "distilbert", "vocab_size": 3000, "max_position_embeddings": 128, "dim": 64, "hidden_dim": 256,
        "n_layers": 3, "n_heads": 2, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
    },
}  # fmt: skip
DROPPING = {
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "distilbert": {"dropout": 0.1, "attention_dropout": 0.1},
}


@dataclass(frozen=True)
class Measured:
    """Bytes: what a step finds (weights, optimizer state), its peak in all, and what its forward pass leaves."""

    held: int
    peak: int
    saved: int
    trainable: int


def build_model(config: dict[str, Any], recipe: Recipe) -> torch.nn.Module:
    """A model of this config with random weights and the recipe's method: a classifier, or one that answers."""
    import transformers

    kind = config["model_type"]
    made = {"gpt2": transformers.GPT2Config, "distilbert": transformers.DistilBertConfig}[kind](
        **{key: value for key, value in config.items() if key != "model_type"}, num_labels=2, pad_token_id=0
    )
    made.use_cache = False
    answers = recipe.objective == "instruction"
    if described := own_head(recipe.model.head, config):
        made.classification_head = described
    model = transformers.GPT2LMHeadModel(made) if answers else CLASSIFIERS[kind](made)
    family = language_family(family_of(made)) if answers else family_of(made)
    model = apply_method(model, recipe.method, family=family, base_name="pico", seed=1)
    if blocks := recipe.training.recomputed_blocks(config[family.layers_key]):
        checkpoint_activations(model, blocks)
    return model


def measure(
    config: dict[str, Any],
    recipe: Recipe,
    lengths: list[int],
    *,
    kept: int = 0,
    streamed: bool = False,
    responses: list[int] | None = None,
    offload: bool = False,
) -> Measured:
    """Take two optimizer steps on one batch of these lengths and measure the second, when Adam's state exists.

    With ``kept``, the states of so many blocks are drawn at random instead of computed, and with ``streamed`` these
    blocks and the token embedding have no memory. With ``responses``, so many tokens at the end of each row carry loss.
    With ``offload``, saved tensors leave for the machine's memory.
    """
    model = build_model(config, recipe)
    if streamed:
        core = unwrapped(model)
        for module in [core.get_input_embeddings(), *core.get_submodule(FAMILIES[config["model_type"]].blocks)[:kept]]:
            module.to("meta")
    table = TokenTable.from_lengths(
        np.random.default_rng(0).integers(5, config["vocab_size"], sum(lengths)).astype(np.int32),
        np.array(lengths, dtype=np.int64),
    )
    labels = np.arange(len(lengths), dtype=np.int64) % 2
    cache = None
    if kept:
        family = FAMILIES[config["model_type"]]
        pooled = kept == config[family.layers_key]
        shape = (len(lengths) if pooled else sum(lengths), config[family.width_key])
        states = np.random.default_rng(0).standard_normal(shape).astype(DTYPES[recipe.training.prefix_cache.dtype])
        cache = PrefixCache(states, table, kept, pooled, 0.0, key="k")
    objective: torch.nn.Module = ClassificationObjective(model, table=table, labels=labels, pad_id=0, cache=cache)
    if responses is not None:
        prompts = table.lengths - np.array(responses)
        objective = InstructionObjective(model, table=PairTable(table.ids, table.offsets, prompts), pad_id=0)
    optimizer = build_optimizer(model, recipe.training, embeddings=FAMILIES[config["model_type"]].embeddings)
    trained = [p for p in model.parameters() if p.requires_grad]
    objective.train()
    micro_batches = [np.arange(len(lengths))] * recipe.training.gradient_accumulation_steps

    def forward(rows: np.ndarray) -> torch.Tensor:
        batch = objective.batch(rows, step=0)
        staying = (*objective.parameters(), *objective.buffers(), *batch.values())
        with offloaded(staying) if offload else nullcontext():
            return objective(batch)

    inside = checked_in_backward(recipe, trained, optimizer)

    def step() -> None:
        for rows in micro_batches:
            forward(rows).backward()
        if inside:
            return
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = _held(model, optimizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    peak = _peak(seen)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = forward(micro_batches[0])
    saved = sum(event.nbytes() for event in _events(seen))
    del loss
    return Measured(held=held, peak=held + peak, saved=saved, trainable=sum(p.numel() for p in trained))


def checked_in_backward(recipe: Recipe, trained: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> bool:
    """Hook the optimizer into the backward pass where the recipe says so; return whether it does."""
    if recipe.training.optimizer_in_backward:
        InBackward(trained, optimizer, Accelerator(cpu=True))
    return recipe.training.optimizer_in_backward


def _held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _events(seen: profile) -> list[Any]:
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sorted(events, key=lambda event: event.start_ns())


def _peak(seen: profile) -> int:
    return int(np.cumsum([event.nbytes() for event in _events(seen)]).max())
