"""Runs a classifier: the stock architectures, without padding, pooled on a real token, the head in its own dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from toolkit.models.flat import pooled_states, runs_flat


class GPT2ForSequenceClassification(transformers.GPT2ForSequenceClassification):  # type: ignore[misc]
    """Stock GPT-2 classifier that pools by attention mask.

    The stock forward takes the rightmost token that is not the pad id: with pad = eos it loses a text's own last eos.
    It also scores every position; this one scores the pooled one alone, and runs without padding. It carries the stock
    name because `save_pretrained` writes the class name into config.json.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Return the logits (B, labels); the arguments after `attention_mask` exist for peft and are unused.

        Args:
            input_ids: (B, T) int64, padded on the right.
            attention_mask: (B, T), 1 for real tokens; None means that all are real.
            inputs_embeds: Must be None.
            labels: Unused; the loss is the trainer's.
            output_attentions: Unused.
            output_hidden_states: Unused.
            return_dict: Unused.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("input_ids is needed, inputs_embeds is not supported")
        if runs_flat(self):
            pooled = pooled_states(self, input_ids, attention_mask)
        else:
            hidden = self.transformer(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            pooled = _last_real(hidden, attention_mask)
        return SequenceClassifierOutput(logits=self.score(_head_input(pooled, self.score)))


class DistilBertForSequenceClassification(transformers.DistilBertForSequenceClassification):  # type: ignore[misc]
    """Stock DistilBERT classifier that runs without padding and whose fp32 head accepts a bf16 or fp16 body."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Return the logits (B, labels); the arguments after `attention_mask` exist for peft and are unused.

        Args:
            input_ids: (B, T) int64, padded on the right.
            attention_mask: (B, T), 1 for real tokens; None means that all are real.
            inputs_embeds: Must be None.
            labels: Unused; the loss is the trainer's.
            output_attentions: Unused.
            output_hidden_states: Unused.
            return_dict: Unused.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("input_ids is needed, inputs_embeds is not supported")
        if runs_flat(self):
            pooled = pooled_states(self, input_ids, attention_mask)
        else:
            pooled = self.distilbert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        pooled = self.pre_classifier(_head_input(pooled, self.pre_classifier))
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(torch.relu(pooled))))


CLASSIFIERS = {"gpt2": GPT2ForSequenceClassification, "distilbert": DistilBertForSequenceClassification}


def _last_real(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return (B, H): each row's hidden state (B, T, H) at its last unmasked position."""
    if attention_mask is None:
        return hidden[:, -1]
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = (positions * (attention_mask != 0)).argmax(dim=-1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


def _head_input(pooled: torch.Tensor, head: nn.Module) -> torch.Tensor:
    weight = head.weight
    return pooled.to(weight.dtype) if isinstance(weight, torch.Tensor) else pooled


def classify(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a batch, through whatever wraps the model (peft, DDP, FSDP, autocast).

    Args:
        model: A classifier of `load_classifier`, or a wrapper of one.
        batch: input_ids (B, T) int64 and attention_mask (B, T); other keys are ignored.

    Returns:
        (B, labels) float32.
    """
    output: Any = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: torch.Tensor = output.logits
    return logits.float()


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each block in the backward pass instead of keeping its activations.

    transformers also makes the embedding output require a gradient, which only re-entrant checkpointing needs: it
    would drive the backward pass through frozen blocks below the first trained one. That is undone here.

    Args:
        model: A classifier or language model, with or without an adapter.
    """
    wrapper: Any = model
    base = wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    base.disable_input_require_grads()
