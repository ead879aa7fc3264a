"""A model as sizes alone: its tensors by part, from config.json and the family's table, and which of them train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from toolkit.adapters.freeze import trained_prefixes
from toolkit.adapters.methods import adapted_blocks, target_modules
from toolkit.config.schema import LoraMethod, Recipe
from toolkit.families import FAMILIES, Family

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
class Linear:
    """A linear layer of a block.

    Attributes:
        name: Its suffix in the family's table.
        fan_in: Input width.
        fan_out: Output width.
        rank: Rank of the adapter on it; 0 without one.
    """

    name: str
    fan_in: int
    fan_out: int
    rank: int = 0

    @property
    def weight(self) -> int:
        """Elements of the weight."""
        return self.fan_in * self.fan_out


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
    """

    family: Family
    objective: Literal["classification", "language_modeling"]
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
        if self.objective == "language_modeling":
            return 0 if self.family.tokenizer == "bpe" else square + 2 * self.width + self.vocabulary
        # GPT-2's score has no bias; DistilBERT's head is a square layer and a classifier, both with one.
        return self.width * self.labels + (0 if len(self.family.head) == 1 else square + self.labels)

    @property
    def adapters(self) -> int:
        """Elements of all adapters: A is (r, in), B is (out, r) (Hu et al. 2021)."""
        adapted = self.layers - self.first_adapted
        return adapted * sum(linear.rank * (linear.fan_in + linear.fan_out) for linear in self.linears)

    @property
    def frozen(self) -> int:
        """Blocks, from the first, that no gradient reaches."""
        if self.embeddings_train or self.objective != "classification":
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
        return self.adapters + self.head + blocks + norm + sum(self.embedding_tensors) * self.embeddings_train


def model_shape(config: Mapping[str, Any], recipe: Recipe, *, labels: int) -> ModelShape:
    """Return the sizes of the model that a recipe trains.

    Args:
        config: Content of the base's config.json.
        recipe: Its objective and method decide head, adapters and what trains.
        labels: Classes.

    Raises:
        RecipeError: Targets that match no layer, or more blocks than there are.
    """
    family = FAMILIES[config["model_type"]]
    inner_key, residual, embedding, attention, activation, heads = KEYS[family.model_type]
    width, layers = int(config[family.width_key]), int(config[family.layers_key])
    inner = int(config.get(inner_key) or 4 * width)
    named = config.get(activation, ACTIVATION[family.model_type])
    # models.flat runs torch's kernel instead of a GPT-2 classifier's gelu_new; DistilBERT's MLP and language models run
    # transformers' code.
    fuses = family.model_type == "gpt2" and recipe.objective == "classification"
    lora = recipe.method if isinstance(recipe.method, LoraMethod) else None
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
        lora_dropout=lora.lora_dropout if lora else 0.0,
        activation="python" if named == "gelu_new" and not fuses else "fused",
        linears=_linears(family, width=width, inner=inner, lora=lora),
        first_trained=layers,
        first_adapted=min(adapted_blocks(lora, blocks=layers)) if lora else layers,
        embeddings_train=False,
        norm_trains=False,
    )
    if isinstance(recipe.method, LoraMethod):
        return shape
    prefixes = trained_prefixes(recipe.method, family, blocks=layers)
    everything = "" in prefixes
    first = min((i for i in range(layers) if everything or f"{family.blocks}.{i}" in prefixes), default=layers)
    norm = everything or family.final_norm in prefixes
    return replace(shape, first_trained=first, embeddings_train=everything, norm_trains=norm)


def _linears(family: Family, *, width: int, inner: int, lora: LoraMethod | None) -> tuple[Linear, ...]:
    targets = target_modules(lora, family) if lora else []
    rank = lora.r if lora else 0
    found = []
    for name in family.linear:
        last = name.rpartition(".")[2]
        fan_in = inner if name in ("mlp.c_proj", "lin2") else width
        fan_out = {"c_attn": 3 * width, "c_fc": inner, "lin1": inner}.get(last, width)
        adapted = any(_matches(name, target) for target in targets)
        found.append(Linear(name, fan_in, fan_out, rank if adapted else 0))
    return tuple(found)


def _matches(name: str, target: str) -> bool:
    """Return whether a target names this layer, by peft's rule: the whole name or a dotted end of it."""
    return name == target or name.endswith(f".{target}") or target.endswith(f".{name}")
