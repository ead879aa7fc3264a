"""Attention of one query a row whose keys and values are never formed.

With K = X W_k and one query q, the scores q K^T are (q W_k^T) X^T, and the context p V is (p X) W_v: for each head two
products with the hidden states X instead of two projections of them. At GPT-2's width and 12 heads that is a 32nd of
the work of a token, and X needs no gradient. The norm before the projections is folded in as well: it is a scale and a
shift of the normalised states, which hold no parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import nn
from transformers.pytorch_utils import Conv1D

from toolkit.models.packing import Packing, fill_pooled, padded_places, real_positions

Tensor = torch.Tensor


def only_trained(tokens: Tensor, *layers: nn.Module) -> bool:
    """Return whether a training step reaches these layers and nothing below, and they are a weight and a bias.

    An adapter on them, or dropout before it, cannot be folded. Evaluation takes the projections too, so that a model
    and the same model under an untrained adapter agree to the bit.
    """
    plain = all(type(layer) in (nn.Linear, Conv1D) for layer in layers)
    return (
        plain
        and torch.is_grad_enabled()
        and not tokens.requires_grad
        and any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    )


def attend_absorbed(
    query: Tensor,
    tokens: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    norm: nn.LayerNorm | None,
    packing: Packing,
    heads: int,
    dropout: float,
    scale: float,
) -> Tensor:
    """Return softmax attention of one query a row over all tokens of its row, shaped like ``query``.

    Args:
        query: (B, width), with filler (``packing.pooled_tokens``).
        tokens: (N, width), hidden states; no gradient flows to them.
        weights: Projections (in, out) of keys and of values.
        biases: Their biases (out,).
        norm: Applied to the tokens before the projections, or None.
        packing: Where the rows lie.
        heads: Number of heads.
        dropout: Probability of dropping an attention weight.
        scale: Factor on the products of queries and keys.
    """
    width = tokens.shape[-1]
    to_keys, to_values = (weight.view(width, heads, -1) for weight in weights)
    key_bias, value_bias = (bias.view(heads, -1) for bias in biases)
    if query.device.type == "cpu":
        query, tokens = query.float(), tokens.float()
    query = query[: len(packing.pooled)].view(-1, heads, width // heads)
    tokens = tokens[: len(tokens) - packing.filler]
    if norm is not None:
        tokens = functional.layer_norm(tokens, (width,), eps=norm.eps)
    states = tokens.new_zeros(len(query) * packing.longest, width)
    # In place: no gradient flows here, and a copy would be the largest tensor of the step.
    states.index_copy_(0, padded_places(packing), tokens)
    states = states.view(len(query), packing.longest, width).to(query.dtype)
    del tokens
    # Autocast would compile kernels for the sizes of every batch (``models.cpu_kernels``), for products that are few.
    with torch.autocast("cpu", enabled=False):
        folded = torch.einsum("bhd,whd->bhw", query, to_keys)
        # The same for every token of a row: softmax takes it out, and its gradient is rounding error as elsewhere.
        constant = torch.einsum("bhd,hd->bh", query, key_bias)
        if norm is not None:
            constant = constant + folded @ norm.bias
            folded = folded * norm.weight
        scores = scale * (folded @ states.transpose(1, 2) + constant[..., None])
        scores = scores.masked_fill(~real_positions(packing)[:, None], float("-inf"))
        # Dropped weights no longer add up to 1, so shifts count by what is left.
        kept = functional.dropout(scores.softmax(-1), dropout)
        total = kept.sum(-1, keepdim=True)
        context = kept @ states
        if norm is not None:
            context = context * norm.weight + total * norm.bias
        attended = torch.einsum("bhw,whd->bhd", context, to_values) + total * value_bias
    return fill_pooled(attended.flatten(1), packing)
