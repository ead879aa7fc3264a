"""One data table per supported architecture: where its parts are, and how it reads a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Pooling = Literal["last", "first", "mean", "max"]
# A head that stock transformers cannot express: its module, its key in config.json, and what then stands before the
# architecture's name in `model_type`, so that stock transformers says it does not know the model.
OWN_HEAD = "classification_head"
OWN_TYPE = "toolkit_"


@dataclass(frozen=True)
class Family:
    """Names of one architecture's parts, as stock transformers spells them.

    Attributes:
        model_type: ``model_type`` of config.json.
        backbone: Attribute of the classifier that holds the body.
        embeddings: Module paths of the embeddings.
        blocks: Module path of the list of transformer blocks.
        final_norm: Module path of the norm after the last block, if there is one.
        head: Module paths of the classification head; none of a language model.
        lora_auto: Suffixes of the modules that ``target_modules: auto`` adapts.
        ia3_auto: The same of IA3: keys, values and the MLP's second layer.
        linear: Suffixes of every linear layer inside a block.
        norms: Suffixes of every layer norm.
        mlp_in: Path in a block of the MLP's first layer.
        activation: Path in a block of the activation behind it.
        mlp_out: Suffix of the MLP's second layer.
        fan_in_fan_out: Whether those layers are Conv1D, whose weights are stored (in, out).
        pooling: What is classified: the last real token, the first ([CLS]), or the mean or maximum of all.
        tokenizer: Which tokenisation the architecture was trained with.
        positions_key: Key of config.json with the number of positions.
        layers_key: Key of config.json with the number of blocks.
        width_key: Key of config.json with the hidden size.
        heads_key: Key of config.json with the number of attention heads.
        takes_cache: Whether keys and values of earlier tokens can be handed in, as prefix tuning does.
    """

    model_type: str
    backbone: str
    embeddings: tuple[str, ...]
    blocks: str
    final_norm: str | None
    head: tuple[str, ...]
    lora_auto: tuple[str, ...]
    ia3_auto: tuple[str, ...]
    linear: tuple[str, ...]
    norms: tuple[str, ...]
    mlp_in: str
    activation: str
    mlp_out: str
    fan_in_fan_out: bool
    pooling: Pooling
    tokenizer: Literal["bpe", "wordpiece"]
    positions_key: str
    layers_key: str
    width_key: str
    heads_key: str
    takes_cache: bool

    @property
    def own_head(self) -> bool:
        """Whether the head is the toolkit's own, which stock transformers cannot express."""
        return OWN_HEAD in self.head

    @property
    def output_layer(self) -> str:
        """Module path of the layer that gives the logits."""
        return f"{OWN_HEAD}.out_proj" if self.own_head else self.head[-1]

    @property
    def pools_one(self) -> bool:
        """Whether a row is classified by one token that has seen all others; the last block then answers for it alone.

        With a cache of earlier tokens, the first token has seen none.
        """
        return self.pooling == "last" or (self.pooling == "first" and not self.takes_cache)


FAMILIES = {
    "gpt2": Family(
        model_type="gpt2",
        backbone="transformer",
        embeddings=("transformer.wte", "transformer.wpe"),
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        head=("score",),
        lora_auto=("c_attn",),
        ia3_auto=("attn.c_attn", "mlp.c_proj"),
        linear=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        norms=("ln_1", "ln_2", "ln_f"),
        mlp_in="mlp.c_fc",
        activation="mlp.act",
        mlp_out="mlp.c_proj",
        fan_in_fan_out=True,
        pooling="last",
        tokenizer="bpe",
        positions_key="n_positions",
        layers_key="n_layer",
        width_key="n_embd",
        heads_key="n_head",
        takes_cache=True,
    ),
    "distilbert": Family(
        model_type="distilbert",
        backbone="distilbert",
        embeddings=("distilbert.embeddings",),
        blocks="distilbert.transformer.layer",
        final_norm=None,
        head=("pre_classifier", "classifier"),
        lora_auto=("q_lin", "v_lin"),
        ia3_auto=("k_lin", "v_lin", "lin2"),
        linear=("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
        norms=("LayerNorm", "sa_layer_norm", "output_layer_norm"),
        mlp_in="ffn.lin1",
        activation="ffn.activation",
        mlp_out="lin2",
        fan_in_fan_out=False,
        pooling="first",
        tokenizer="wordpiece",
        positions_key="max_position_embeddings",
        layers_key="n_layers",
        width_key="dim",
        heads_key="n_heads",
        takes_cache=False,
    ),
}


def with_head(family: Family, head: Mapping[str, Any] | None) -> Family:
    """Return a family with the head that a config.json describes under ``OWN_HEAD``; None leaves the stock one.

    The stock name of the last layer stays, with an empty tensor in it (``models.classification_head``).
    """
    if head is None:
        return family
    return replace(family, pooling=head["pooling"], head=(OWN_HEAD, family.head[-1]))


def language_family(family: Family) -> Family:
    """Return a family as its language models have it: without a classification head."""
    return replace(family, head=())


def family_of(config: Any) -> Family:
    """Return the family of a transformers config, in memory, with the head that it describes."""
    return with_head(FAMILIES[config.model_type], getattr(config, OWN_HEAD, None))


def family_of_model(model: Any) -> Family:
    """Return the family of a transformers model, which is not wrapped: a classifier's, or a language model's."""
    family = family_of(model.config)
    return family if hasattr(model, family.head[0]) else language_family(family)
