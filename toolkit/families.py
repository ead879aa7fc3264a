"""One data table per supported architecture: where its parts are, and how it reads a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Names of one architecture's parts, as stock transformers spells them.

    Attributes:
        model_type: ``model_type`` of config.json.
        backbone: Attribute of the classifier that holds the body.
        embeddings: Module paths of the embeddings.
        blocks: Module path of the list of transformer blocks.
        final_norm: Module path of the norm after the last block, if there is one.
        head: Module paths of the classification head.
        lora_auto: Suffixes of the modules that ``target_modules: auto`` adapts.
        linear: Suffixes of every linear layer inside a block.
        fan_in_fan_out: Whether those layers are Conv1D, whose weights are stored (in, out).
        pooling: Which token is classified: the last real one, or the first ([CLS]).
        tokenizer: Which tokenisation the architecture was trained with.
        positions_key: Key of config.json with the number of positions.
        layers_key: Key of config.json with the number of blocks.
        width_key: Key of config.json with the hidden size.
    """

    model_type: str
    backbone: str
    embeddings: tuple[str, ...]
    blocks: str
    final_norm: str | None
    head: tuple[str, ...]
    lora_auto: tuple[str, ...]
    linear: tuple[str, ...]
    fan_in_fan_out: bool
    pooling: Literal["last", "first"]
    tokenizer: Literal["bpe", "wordpiece"]
    positions_key: str
    layers_key: str
    width_key: str


FAMILIES = {
    "gpt2": Family(
        model_type="gpt2",
        backbone="transformer",
        embeddings=("transformer.wte", "transformer.wpe"),
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        head=("score",),
        lora_auto=("c_attn",),
        linear=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        fan_in_fan_out=True,
        pooling="last",
        tokenizer="bpe",
        positions_key="n_positions",
        layers_key="n_layer",
        width_key="n_embd",
    ),
    "distilbert": Family(
        model_type="distilbert",
        backbone="distilbert",
        embeddings=("distilbert.embeddings",),
        blocks="distilbert.transformer.layer",
        final_norm=None,
        head=("pre_classifier", "classifier"),
        lora_auto=("q_lin", "v_lin"),
        linear=("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
        fan_in_fan_out=False,
        pooling="first",
        tokenizer="wordpiece",
        positions_key="max_position_embeddings",
        layers_key="n_layers",
        width_key="dim",
    ),
}
