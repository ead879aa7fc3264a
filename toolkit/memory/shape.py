"""A model as sizes alone: its tensors by part, from config.json and the family's table, and which of them train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from toolkit.adapters.freeze import trained_prefixes
from toolkit.adapters.methods import adapted_blocks
from toolkit.config.methods import (
    AdaloraMethod,
    BiasMethod,
    FreezingMethod,
    LayeredMethod,
    LnTuningMethod,
    LoraMethod,
    Method,
    PrefixMethod,
    TargetedMethod,
    VeraMethod,
)
from toolkit.config.schema import Recipe
from toolkit.families import FAMILIES, Family, with_head
from toolkit.memory.linears import Linear, block_linears
from toolkit.models.heads import own_head, settle_head

# config.json's spellings: width of the MLP, dropout of residuals, embeddings and attention weights, activation.
KEYS = {
    "gpt2": ("n_inner", "resid_pdrop", "embd_pdrop", "attn_pdrop", "activation_function", "n_head"),
    "distilbert": ("hidden_dim", "dropout", "dropout", "attention_dropout", "activation", "n_heads"),
}
# What transformers assumes where config.json leaves a key out.
DROPOUT = 0.1
ACTIVATION = {"gpt2": "gelu_new", "distilbert": "gelu"}
VOCABULARY = "vocab_size"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a classifier or language model and what of it trains.

    Attributes:
        family: The architecture.
        objective: Decides the head.
        width: Of the residual stream.
        inner: Of the MLP.
        heads: Of attention.
        layers: Blocks.
        vocabulary: Rows of the token embedding.
        positions: Rows of the position embedding.
        labels: Classes of the head.
        dropout: Probabilities at residuals, embeddings and attention weights.
        lora_dropout: Probability at the adapters' input.
        activation: ``python`` where transformers' own gelu_new runs, or ``fused``.
        linears: Layers of one block, in the order they run.
        first_trained: First block whose own weights train; ``layers`` if none does.
        first_adapted: First block with adapters; ``layers`` if none has.
        embeddings_train: Whether the embeddings train.
        norm_trains: Whether the norm behind the last block trains.
        biases_train: Whether biases train everywhere.
        norms_train: Whether copies of all layer norms train beside them.
        prefix: Tokens of a trained prefix.
        buffers: Elements kept for the adapters that are no parameters.
        hidden: Widths of the hidden layers of a head of the toolkit's own.
        head_dropout: Probability in such a head.
    """

    family: Family
    objective: Literal["classification", "language_modeling", "instruction"]
    width: int
    inner: int
    heads: int
    layers: int
    vocabulary: int
    positions: int
    labels: int
    dropout: tuple[float, float, float]
    lora_dropout: float
    activation: Literal["python", "fused"]
    linears: tuple[Linear, ...]
    first_trained: int
    first_adapted: int
    embeddings_train: bool
    norm_trains: bool
    biases_train: bool = False
    norms_train: bool = False
    prefix: int = 0
    buffers: int = 0
    hidden: tuple[int, ...] = ()
    head_dropout: float = 0.0

    @property
    def embedding_tensors(self) -> tuple[int, ...]:
        """Elements of each embedding tensor; DistilBERT has a norm behind them."""
        tables = (self.vocabulary * self.width, self.positions * self.width)
        return tables if self.family.final_norm else (*tables, self.width, self.width)

    @property
    def block_rest(self) -> int:
        """Elements of a block that are never quantised: biases and two norms."""
        return sum(linear.fan_out for linear in self.linears) + 4 * self.width

    @property
    def final_norm(self) -> int:
        """Elements of the norm behind the last block."""
        return 2 * self.width if self.family.final_norm else 0

    @property
    def head(self) -> int:
        """Elements of the head; a language model's output weights are its embeddings."""
        square = self.width * self.width + self.width
        if self.objective != "classification":
            return 0 if self.family.tokenizer == "bpe" else square + 2 * self.width + self.vocabulary
        if self.family.own_head:
            return sum((before + 1) * after for before, after in self.head_layers)
        # GPT-2's score has no bias; DistilBERT's head is a square layer and a classifier, both with one.
        return self.width * self.labels + (0 if len(self.family.head) == 1 else square + self.labels)

    @property
    def head_layers(self) -> tuple[tuple[int, int], ...]:
        """Input and output width of each layer of a head of the toolkit's own."""
        widths = (self.width, *self.hidden, self.labels)
        return tuple(pairwise(widths))

    @property
    def adapters(self) -> int:
        """Elements of all adapters, those that do not train included."""
        fixed = (self.layers - self.first_adapted) * sum(linear.fixed for linear in self.linears)
        return self.adapters_trained + fixed

    @property
    def adapters_trained(self) -> int:
        """Elements of all adapters that train: of LoRA, A (r, in) and B (out, r) (Hu et al. 2021)."""
        adapted = self.layers - self.first_adapted
        own = adapted * sum(linear.down + linear.up for linear in self.linears)
        return own + self.norms * self.norms_train + 2 * self.layers * self.prefix * self.width

    @property
    def norms(self) -> int:
        """Elements of all layer norms: two a block, one behind the blocks or behind the embeddings."""
        return (4 * self.layers + 2) * self.width

    @property
    def biases(self) -> int:
        """Elements of all biases but the head's."""
        linear = self.layers * sum(layer.fan_out for layer in self.linears)
        return linear + (2 * self.layers + 1) * self.width

    @property
    def frozen(self) -> int:
        """Blocks, from the first, that no gradient reaches."""
        everywhere = self.embeddings_train or self.biases_train or self.norms_train or self.prefix > 0
        if everywhere or self.objective != "classification":
            return 0
        return min(self.first_trained, self.first_adapted, self.layers - self.norm_trains)

    @property
    def block_weights(self) -> int:
        """Elements of a block's linear weights."""
        return sum(linear.weight for linear in self.linears)

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        blocks = self.layers * (self.block_weights + self.block_rest)
        return sum(self.embedding_tensors) + blocks + self.final_norm + self.head + self.adapters

    @property
    def trainable(self) -> int:
        """Elements that get a gradient."""
        blocks = (self.layers - self.first_trained) * (self.block_weights + self.block_rest)
        norm = self.final_norm if self.norm_trains else 0
        rest = sum(self.embedding_tensors) * self.embeddings_train + self.biases * self.biases_train
        return self.adapters_trained + self.head + blocks + norm + rest


def model_shape(config: Mapping[str, Any], recipe: Recipe, *, labels: int) -> ModelShape:
    """Return the sizes of the model that a recipe trains.

    Args:
        config: Content of the base's config.json.
        recipe: Its objective and method decide head, adapters and what trains.
        labels: Classes.

    Raises:
        RecipeError: Targets that match no layer, or more blocks than there are.
    """
    described = own_head(settle_head(recipe.model.head, config), config)
    family = with_head(FAMILIES[config["model_type"]], described)
    inner_key, residual, embedding, attention, activation, heads = KEYS[family.model_type]
    width, layers = int(config[family.width_key]), int(config[family.layers_key])
    inner = int(config.get(inner_key) or 4 * width)
    named = config.get(activation, ACTIVATION[family.model_type])
    method = recipe.method
    # models.flat runs torch's kernel instead of a GPT-2's gelu_new; DistilBERT's MLP, language models of running text
    # and whatever stands behind a prefix run transformers' code.
    flat = recipe.objective != "language_modeling" and not isinstance(method, PrefixMethod)
    fuses = family.model_type == "gpt2" and flat
    targeted = method if isinstance(method, TargetedMethod) else None
    layered = method if isinstance(method, LayeredMethod) else None
    linears = block_linears(family, width=width, inner=inner, method=targeted)
    shape = ModelShape(
        family=family,
        objective=recipe.objective,
        width=width,
        inner=inner,
        heads=int(config[heads]),
        layers=layers,
        vocabulary=int(config[VOCABULARY]),
        positions=int(config[family.positions_key]),
        labels=labels,
        dropout=(
            float(config.get(residual, DROPOUT)),
            float(config.get(embedding, DROPOUT)),
            float(config.get(attention, DROPOUT)),
        ),
        lora_dropout=_adapter_dropout(method),
        activation="python" if named == "gelu_new" and not fuses else "fused",
        linears=linears,
        first_trained=layers,
        first_adapted=min(adapted_blocks(layered, blocks=layers)) if layered else 0 if targeted else layers,
        embeddings_train=False,
        norm_trains=False,
        biases_train=isinstance(method, BiasMethod),
        norms_train=isinstance(method, LnTuningMethod),
        prefix=method.num_virtual_tokens if isinstance(method, PrefixMethod) else 0,
        buffers=_shared(method, linears),
        hidden=tuple(described["hidden"]) if described else (),
        head_dropout=described["dropout"] if described else 0.0,
    )
    if isinstance(method, LoraMethod) and method.variant == "pissa":
        # Its start is kept for the file.
        return replace(shape, buffers=shape.adapters)
    if not isinstance(method, FreezingMethod) or isinstance(method, BiasMethod):
        return shape
    prefixes = trained_prefixes(method, family, blocks=layers)
    everything = "" in prefixes
    first = min((i for i in range(layers) if everything or f"{family.blocks}.{i}" in prefixes), default=layers)
    norm = everything or family.final_norm in prefixes
    return replace(shape, first_trained=first, embeddings_train=everything, norm_trains=norm)


def _adapter_dropout(method: Method) -> float:
    if isinstance(method, LoraMethod | AdaloraMethod):
        return method.lora_dropout
    return method.vera_dropout if isinstance(method, VeraMethod) else 0.0


def _shared(method: Method, linears: tuple[Linear, ...]) -> int:
    """Return the elements of VeRA's random matrices, as large as the largest adapted layer."""
    adapted = [linear for linear in linears if linear.rank]
    if not isinstance(method, VeraMethod) or not adapted:
        return 0
    return method.r * (max(linear.fan_in for linear in adapted) + max(linear.fan_out for linear in adapted))
