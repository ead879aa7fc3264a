"""Runs the body of a classifier without padding: one (tokens, width) matrix through every layer of a block.

Embeddings, norms and linear layers see the real tokens of all rows one after another, attention sees each row alone,
and the last block computes attention output and MLP for the one token that a row is classified by, if it is one; its
keys and values still come from all tokens. Every layer is called as the module that stands in the model, so layers of
peft and bitsandbytes, dropout and autocast do what they do in the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation
from transformers.models.distilbert.modeling_distilbert import TransformerBlock
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from toolkit.families import Family, family_of
from toolkit.models.absorbed import attend_absorbed, only_trained
from toolkit.models.classification_head import pool_packed
from toolkit.models.packed import packed_block
from toolkit.models.packing import Packing, attend, lay_out, pack, pooled_tokens

Tensor = torch.Tensor


def runs_flat(model: nn.Module) -> bool:
    """Return whether ``pooled_states``, or ``token_states`` of a language model, can run this model.

    Not so where blocks are no longer the stock ones, as under FSDP, whose hooks sit on the blocks' own forward.
    """
    config: Any = model.config
    if not has_flat_form(config.to_dict()):
        return False
    return all(type(block) is FLAT[config.model_type].block_type for block in _blocks(model))


def has_flat_form(config: Mapping[str, Any]) -> bool:
    """Return whether a base of this config.json ``runs_flat`` where its blocks are the stock ones."""
    return config.get("model_type") in FLAT and not config.get("add_cross_attention", False)


def pooled_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return what each row is classified by, (B, width): the last hidden state of one token, or a mean or maximum.

    It equals the stock padded forward to rounding: logits and every gradient to 3e-6 relative in float32.

    Args:
        model: A classifier that ``runs_flat``.
        input_ids: (B, T) int64, padded.
        attention_mask: (B, T), 1 for real tokens; None means that all are real.
    """
    family, flat = _families(model)
    ids, packing = pack(input_ids, attention_mask, pooling=family.pooling, in_steps=_by_onednn(model, input_ids))
    [hidden] = _run(model, [flat.embed(model, ids, packing)], [packing], range(len(_blocks(model))))
    return _pooled(hidden, packing, family)


def token_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Return the last hidden states (P, width) of chosen tokens, as the stock padded forward has them to rounding.

    Args:
        model: A model that ``runs_flat``, its adapters inside its blocks.
        input_ids: (B, T) int64, padded on the right.
        attention_mask: (B, T), 1 for real tokens.
        positions: (P,) int64, places of real tokens in B * T.
    """
    family, flat = _families(model)
    ids, packing = pack(input_ids, attention_mask, pooling=family.pooling, in_steps=_by_onednn(model, input_ids))
    [hidden] = _run(model, [flat.embed(model, ids, packing)], [packing], range(len(_blocks(model))), pooled=False)
    length = input_ids.shape[1]
    rows = packing.row_of[positions // length]
    return hidden.index_select(0, packing.bounds[rows] + positions % length)


def prefix_states(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *, blocks: int, packed: torch.dtype | None = None
) -> list[Tensor]:
    """Return what the first ``blocks`` blocks make of each batch: (N, width), the shortest row's tokens first.

    If these are all blocks: (B, width), what each row is classified by. A block sees all batches before the next one
    runs, so that blocks whose weights are read for it are read once.

    Args:
        model: A classifier that ``runs_flat``.
        batches: Each with ``input_ids`` (B, T) int64, padded, and ``attention_mask`` (B, T), 1 for real tokens.
        blocks: How many, from the first.
        packed: What weights are packed in while a block sees the batches (``models.packed``); None: they are not.
    """
    family, flat = _families(model)
    rows = [
        pack(
            ids, batch["attention_mask"], pooling=family.pooling, in_steps=packed is not None or _by_onednn(model, ids)
        )
        for batch in batches
        for ids in [batch["input_ids"]]
    ]
    packings = [packing for _, packing in rows]
    states = _run(model, [flat.embed(model, *one) for one in rows], packings, range(blocks), packed=packed)
    if blocks < len(_blocks(model)):
        return [hidden[: len(hidden) - packing.filler] for hidden, packing in zip(states, packings, strict=True)]
    return [_pooled(hidden, packing, family) for hidden, packing in zip(states, packings, strict=True)]


def suffix_states(model: nn.Module, states: Tensor, lengths: Tensor, *, blocks: int) -> Tensor:
    """Return what ``pooled_states`` does, from the output of ``prefix_states``.

    Args:
        model: A classifier that ``runs_flat``.
        states: (N, width), the tokens of the shortest row first, equally long rows in their order; or (B, width).
        lengths: (B,) int64, tokens of each row.
        blocks: Blocks that ``states`` have behind them.
    """
    if blocks == len(_blocks(model)):
        return states
    family, _ = _families(model)
    packing, _ = lay_out(lengths, pooling=family.pooling, in_steps=_by_onednn(model, states))
    if packing.filler:
        states = functional.pad(states, (0, 0, 0, packing.filler))
    [hidden] = _run(model, [states], [packing], range(blocks, len(_blocks(model))))
    return _pooled(hidden, packing, family)


def _run(
    model: nn.Module,
    hidden: list[Tensor],
    packings: list[Packing],
    numbers: range,
    *,
    pooled: bool = True,
    packed: torch.dtype | None = None,
) -> list[Tensor]:
    """Run each batch's states through consecutive blocks, and the final norm behind the last one of the model.

    Where they are ``pooled``, the last block answers for the one token that each row is classified by.
    """
    family, flat = _families(model)
    blocks = _blocks(model)
    for number in numbers:
        block, last = blocks[number], pooled and family.pools_one and number == len(blocks) - 1
        recompute = block.gradient_checkpointing and block.training
        with _in_memory(model, number), packed_block(block, family, packed):
            for place, packing in enumerate(packings):
                step = partial(flat.block, block, packing=packing, last=last)
                states = hidden[place]
                found = checkpoint(step, states, use_reentrant=False) if recompute else step(states)
                # A wave's states stay where they are: new ones would lie between activations and cut the heap.
                alike = found.shape == states.shape and found.dtype == states.dtype
                kept = len(hidden) > 1 and alike and not torch.is_grad_enabled()
                hidden[place] = states.copy_(found) if kept else found
    if family.final_norm is not None and numbers.stop == len(blocks):
        hidden = [model.get_submodule(family.final_norm)(states) for states in hidden]
    return hidden


def _pooled(hidden: Tensor, packing: Packing, family: Family) -> Tensor:
    """Return (B, width) in the order of the batch, of what ``_run`` made of all blocks."""
    rows = hidden if family.pools_one else pool_packed(hidden, packing, pooling=family.pooling)
    return rows.index_select(0, packing.row_of)


def _by_onednn(model: Any, batch: Tensor) -> bool:
    """Return whether oneDNN multiplies: chosen for fp32 (``training.gemm``), or autocast, on a CPU."""
    return batch.device.type == "cpu" and (torch.is_autocast_enabled("cpu") or getattr(model, "onednn", False))


def _in_memory(model: Any, number: int) -> AbstractContextManager[None]:
    # A language model is in memory as a whole.
    streamed: Any = getattr(model, "streamed", None)
    within: bool = streamed is not None and number < streamed.count
    return streamed.loaded(number) if within else nullcontext()


def _families(model: nn.Module) -> tuple[Family, FlatFamily]:
    config: Any = model.config
    return family_of(config), FLAT[config.model_type]


def _blocks(model: nn.Module) -> list[Any]:
    config: Any = model.config
    return list(model.get_submodule(family_of(config).blocks).children())


def _embed_gpt2(model: Any, ids: Tensor, packing: Packing) -> Tensor:
    body = model.transformer
    hidden: Tensor = body.drop(body.wte(ids) + body.wpe(packing.positions))
    return hidden


def _embed_distilbert(model: Any, ids: Tensor, packing: Packing) -> Tensor:
    hidden: Tensor = model.distilbert.embeddings(ids[None], position_ids=packing.positions[None])
    return hidden[0]


def _block_gpt2(block: Any, hidden: Tensor, *, packing: Packing, last: bool) -> Tensor:
    """Return a GPT-2 block's output: (N, width), or (B, width) of the pooled tokens if it is ``last``."""
    attention = block.attn
    options: dict[str, Any] = {
        "packing": packing,
        "heads": attention.num_heads,
        "dropout": attention.attn_dropout.p if block.training else 0.0,
        "scale": attention.scaling,
    }
    if last and only_trained(hidden, attention.c_attn):
        # Nothing below trains: keys and values of the other tokens need not exist.
        weights, biases = attention.c_attn.weight.chunk(3, dim=1), attention.c_attn.bias.chunk(3)
        tokens, hidden = hidden, pooled_tokens(hidden, packing)
        query = torch.addmm(biases[0], block.ln_1(hidden), weights[0])
        context = attend_absorbed(query, tokens, weights[1:], biases[1:], norm=block.ln_1, **options)
    else:
        query, key, value = attention.c_attn(block.ln_1(hidden)).split(attention.split_size, dim=-1)
        if last:
            query, hidden = pooled_tokens(query, packing), pooled_tokens(hidden, packing)
        context = attend(query, key, value, single=last, causal=not last, **options)
    hidden = hidden + attention.resid_dropout(attention.c_proj(context))
    mlp = block.mlp
    output: Tensor = hidden + mlp.dropout(mlp.c_proj(_activate(mlp.act, mlp.c_fc(block.ln_2(hidden)))))
    return output


def _activate(activation: nn.Module, hidden: Tensor) -> Tensor:
    # transformers writes gelu_new out in Python: 2-8 % of a step slower than torch's, and it keeps four tensors of the
    # MLP's width for the backward pass instead of one. They differ by 2.4e-7.
    if isinstance(activation, NewGELUActivation):
        return functional.gelu(hidden, approximate="tanh")
    activated: Tensor = activation(hidden)
    return activated


def _block_distilbert(block: Any, hidden: Tensor, *, packing: Packing, last: bool) -> Tensor:
    """Return a DistilBERT block's output: (N, width), or (B, width) of the pooled tokens if it is ``last``."""
    attention = block.attention
    options: dict[str, Any] = {
        "packing": packing,
        "heads": attention.n_heads,
        "dropout": attention.dropout.p if block.training else 0.0,
        "scale": attention.scaling,
    }
    if last and only_trained(hidden, attention.k_lin, attention.v_lin):
        weights = attention.k_lin.weight.T, attention.v_lin.weight.T
        biases = attention.k_lin.bias, attention.v_lin.bias
        tokens, hidden = hidden, pooled_tokens(hidden, packing)
        context = attend_absorbed(attention.q_lin(hidden), tokens, weights, biases, norm=None, **options)
    else:
        key, value = attention.k_lin(hidden), attention.v_lin(hidden)
        if last:
            hidden = pooled_tokens(hidden, packing)
        context = attend(attention.q_lin(hidden), key, value, single=last, causal=False, **options)
    hidden = block.sa_layer_norm(attention.out_lin(context) + hidden)
    # Not block.ffn: its chunking cuts the second dimension, which here is the width.
    output: Tensor = block.output_layer_norm(block.ffn.ff_chunk(hidden) + hidden)
    return output


@dataclass(frozen=True)
class FlatFamily:
    """How one architecture runs flat.

    Attributes:
        block_type: The stock class of a block.
        embed: Classifier, ids (N,) and packing to the first hidden states (N, width).
        block: Block and hidden states to the next ones.
    """

    block_type: type[nn.Module]
    embed: Callable[[Any, Tensor, Packing], Tensor]
    block: Callable[..., Tensor]


FLAT = {
    "gpt2": FlatFamily(GPT2Block, _embed_gpt2, _block_gpt2),
    "distilbert": FlatFamily(TransformerBlock, _embed_distilbert, _block_distilbert),
}
