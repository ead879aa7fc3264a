"""The language models' two halves: hidden states, and a softmax over chosen tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional


def language_model_hidden(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the last hidden states, (B, T, width), of a causal or masked language model.

    Args:
        model: ``GPT2LMHeadModel`` or ``DistilBertForMaskedLM``.
        batch: ``input_ids`` and ``attention_mask``, (B, T) each.
    """
    body = model.base_model
    # DistilBERT takes no cache; GPT-2's would only cost memory here.
    extra = {"use_cache": False} if model.config.model_type == "gpt2" else {}
    hidden: torch.Tensor = body(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **extra
    ).last_hidden_state
    return hidden


def project_tokens(model: Any, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return logits (N, K) of the K tokens ``token_ids`` for hidden states (N, width)."""
    if model.config.model_type == "gpt2":
        return functional.linear(hidden, _rows(model.lm_head.weight, token_ids))
    transformed = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
    projector = model.vocab_projector
    return functional.linear(transformed, _rows(projector.weight, token_ids), _rows(projector.bias, token_ids))


def _rows(parameter: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    # Every row: a view costs nothing, an index would copy the whole vocabulary at each step.
    return parameter if len(token_ids) == len(parameter) else parameter[token_ids]
