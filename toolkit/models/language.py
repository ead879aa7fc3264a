"""The language models' two halves: hidden states, and logits over all tokens or over chosen ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional

from toolkit.models.flat import runs_flat, token_states
from toolkit.models.forward import unwrapped


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


def chosen_states(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the last hidden states (P, width) of chosen tokens of a causal model, without padding where it can.

    Args:
        model: ``GPT2LMHeadModel``, or peft's wrapper of one.
        batch: ``input_ids`` and ``attention_mask``, (B, T) each, padded on the right, and ``positions`` (P,), places of
            real tokens in B * T.
    """
    body = unwrapped(model)
    if runs_flat(body):
        return token_states(body, batch["input_ids"], batch["attention_mask"], batch["positions"])
    hidden = language_model_hidden(body, batch)
    return hidden.reshape(-1, hidden.shape[-1])[batch["positions"]]


def next_token_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits (B, vocabulary), float32, of the token that follows each row.

    Args:
        model: As for ``chosen_states``.
        batch: ``input_ids`` and ``attention_mask``, (B, T) each, padded on the right.
    """
    rows, length = batch["input_ids"].shape
    last = torch.arange(rows, device=batch["input_ids"].device) * length + batch["attention_mask"].sum(1) - 1
    states = chosen_states(model, {**batch, "positions": last})
    return project_all(model, states).float()


def project_all(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return a causal model's logits (N, vocabulary) of hidden states (N, width)."""
    return functional.linear(hidden, unwrapped(model).lm_head.weight)


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
