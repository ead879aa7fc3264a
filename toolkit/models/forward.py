"""Runs a classifier: the stock architectures, without padding, pooled on real tokens, the head in its own dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from toolkit.families import OWN_HEAD, family_of
from toolkit.models.classification_head import give_own_head, pool_padded
from toolkit.models.flat import pooled_states, runs_flat, suffix_states
from toolkit.models.frozen import FrozenWeights
from toolkit.models.streamed import StreamedBlocks
from toolkit.parameters import trains


class Prefix(NamedTuple):
    """What the first blocks made of a batch (``flat.prefix_states``), given instead of its token ids.

    Attributes:
        states: (N, width), the tokens of the shortest row first, equally long rows in their order; (B, width) if no
            block is left.
        lengths: (B,) int64.
        blocks: Blocks that ``states`` have behind them.
    """

    states: torch.Tensor
    lengths: torch.Tensor
    blocks: int


class _FlatClassifier:
    """The forward both classifiers share: without padding, one state a row, the head in its own dtype.

    The head is the stock one, or where the config describes one, the toolkit's own.

    Attributes:
        streamed: The first blocks, where their weights stay in the base's files; else None.
        frozen: Linear weights that are read once a method has been applied; else None.
        onednn: Whether oneDNN multiplies fp32 matrices (``training.gemm``).
    """

    streamed: StreamedBlocks | None = None
    frozen: FrozenWeights | None = None
    onednn: bool = False

    def __init__(self: Any, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        give_own_head(self, config)

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        prefix: Prefix | None = None,
        past_key_values: Any = None,
    ) -> SequenceClassifierOutput:
        """Return the logits (B, labels); the arguments from `inputs_embeds` to `return_dict` exist for peft alone.

        Args:
            input_ids: (B, T) int64, padded on the right.
            attention_mask: (B, T), 1 for real tokens; None means that all are real.
            inputs_embeds: Must be None.
            labels: Unused; the loss is the trainer's.
            output_attentions: Unused.
            output_hidden_states: Unused.
            return_dict: Unused.
            prefix: Instead of `input_ids`, what the first blocks made of them.
            past_key_values: Keys and values of P trained tokens before each row (peft's prefix tuning); the
                attention mask then is (B, P + T). The padded forward takes them.
        """
        if prefix is not None:
            pooled = suffix_states(self, prefix.states, prefix.lengths, blocks=prefix.blocks)
        elif input_ids is None or inputs_embeds is not None:
            raise ValueError("input_ids is needed, inputs_embeds is not supported")
        elif past_key_values is not None:
            pooled = self.pooled_padded(input_ids, attention_mask, past_key_values)
        elif runs_flat(self):
            pooled = pooled_states(self, input_ids, attention_mask)
        else:
            pooled = self.pooled_padded(input_ids, attention_mask)
        return SequenceClassifierOutput(logits=self.head_logits(pooled))

    def pooled_padded(
        self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Any = None
    ) -> torch.Tensor:
        """Return what each row is classified by, (B, width), by the stock padded body."""
        hidden = self.padded_states(input_ids, attention_mask, past_key_values)
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        return pool_padded(hidden, mask, pooling=family_of(self.config).pooling)

    def head_logits(self: Any, pooled: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, labels) of pooled states (B, width)."""
        head = getattr(self, OWN_HEAD, self.stock_logits)
        # Autocast would compile kernels for every row count (`models.cpu_kernels`), for products that are few.
        with torch.autocast("cpu", enabled=False):
            logits: torch.Tensor = head(pooled)
        return logits


class GPT2ForSequenceClassification(_FlatClassifier, transformers.GPT2ForSequenceClassification):  # type: ignore[misc]
    """Stock GPT-2 classifier that pools by attention mask.

    The stock forward takes the rightmost token that is not the pad id: with pad = eos it loses a text's own last eos.
    It also scores every position; this one scores the pooled one alone, and runs without padding. It carries the stock
    name because `save_pretrained` writes the class name into config.json.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # Of the recipe's head alone: a stock config has none.
        self.head_dropout = getattr(config, "head_dropout", 0.0)

    def padded_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Any
    ) -> torch.Tensor:
        """Return the last hidden states (B, T, width)."""
        hidden: torch.Tensor = self.transformer(
            input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=False
        ).last_hidden_state
        return hidden

    def stock_logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, labels) by the one layer of the architecture."""
        if self.head_dropout:
            pooled = functional.dropout(pooled, self.head_dropout, training=self.training)
        logits: torch.Tensor = self.score(_head_input(pooled, self.score))
        return logits


class DistilBertForSequenceClassification(
    _FlatClassifier,
    transformers.DistilBertForSequenceClassification,  # type: ignore[misc]
):
    """Stock DistilBERT classifier that runs without padding and whose fp32 head accepts a bf16 or fp16 body."""

    def padded_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: None
    ) -> torch.Tensor:
        """Return the last hidden states (B, T, width)."""
        hidden: torch.Tensor = self.distilbert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden

    def stock_logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, labels) by the two layers of the architecture."""
        pooled = self.pre_classifier(_head_input(pooled, self.pre_classifier))
        logits: torch.Tensor = self.classifier(self.dropout(torch.relu(pooled)))
        return logits


CLASSIFIERS = {"gpt2": GPT2ForSequenceClassification, "distilbert": DistilBertForSequenceClassification}


def _head_input(pooled: torch.Tensor, head: nn.Module) -> torch.Tensor:
    weight = head.weight
    return pooled.to(weight.dtype) if isinstance(weight, torch.Tensor) else pooled


def classify(model: nn.Module, batch: Mapping[str, torch.Tensor], *, blocks: int = 0) -> torch.Tensor:
    """Return the logits of a batch, through whatever wraps the model (peft, DDP, FSDP, autocast).

    Args:
        model: A classifier of `load_classifier`, or a wrapper of one.
        batch: input_ids (B, T) int64 and attention_mask (B, T), or the states and lengths of a `Prefix`; other keys
            are ignored.
        blocks: Blocks that the states have behind them.

    Returns:
        (B, labels) float32.
    """
    output: Any
    if "states" in batch:
        states = batch["states"] if torch.is_autocast_enabled(batch["states"].device.type) else batch["states"].float()
        output = model(prefix=Prefix(states, batch["lengths"], blocks))
    else:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: torch.Tensor = output.logits
    return logits.float()


def pooled(model: nn.Module, batch: Mapping[str, torch.Tensor], *, blocks: int = 0) -> torch.Tensor:
    """Return the states (B, width) that the head would classify, float32; the arguments are those of `classify`."""
    core = unwrapped(model)
    seen: list[torch.Tensor] = []
    first = core.get_submodule(family_of(core.config).head[0])
    hook = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        classify(model, batch, blocks=blocks)
    finally:
        hook.remove()
    return seen[0].float()


def frozen_blocks(model: nn.Module) -> int:
    """Return how many blocks, from the first, no gradient reaches in the whole run; 0 where the embeddings train.

    Args:
        model: A classifier with its method applied, or a language model.
    """
    base = unwrapped(model)
    family = family_of(base.config)
    if any(trains(p) for path in family.embeddings for p in base.get_submodule(path).parameters()):
        return 0
    if hasattr(model, "prompt_encoder"):
        # A trained prefix stands before the texts in every block.
        return 0
    blocks = list(base.get_submodule(family.blocks).children())
    count = next((n for n, block in enumerate(blocks) if any(trains(p) for p in block.parameters())), len(blocks))
    norm = () if family.final_norm is None else base.get_submodule(family.final_norm).parameters()
    # A pooled state stands behind the final norm, so where that trains, the last block is not part of the prefix.
    return min(count, len(blocks) - 1) if any(trains(p) for p in norm) else count


def rest_frozen_blocks(model: nn.Module) -> None:
    """Put the embeddings and the blocks below the first trained one into eval mode, where there are such blocks."""
    count, base = frozen_blocks(model), unwrapped(model)
    family = family_of(base.config)
    if count == 0:
        return
    trained, mode = list(base.get_submodule(family.blocks).children())[count:], model.training
    base.get_submodule(family.backbone).eval()
    for block in trained:
        block.train(mode)


def unwrapped(model: nn.Module) -> Any:
    """Return the transformers model inside peft's wrapper, or the model itself."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper


def checkpoint_activations(model: nn.Module, blocks: int | None = None) -> None:
    """Recompute blocks in the backward pass instead of keeping their activations.

    transformers also makes the embedding output require a gradient, which only re-entrant checkpointing needs: it
    would drive the backward pass through frozen blocks below the first trained one. That is undone here.

    Args:
        model: A classifier or language model, with or without an adapter.
        blocks: How many, from the first; the backward pass frees the others' activations before it comes to them. None:
            all.
    """
    base = unwrapped(model)
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    base.disable_input_require_grads()
    if blocks is not None:
        for block in list(base.get_submodule(family_of(base.config).blocks))[blocks:]:
            block.gradient_checkpointing = False
