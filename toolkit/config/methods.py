"""The `method` section of a recipe: what is trained, one model per method, with every default and bound."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toolkit.config.section import Fraction, Name, PositiveFloat, PositiveInt, Section

Layers = Literal["all"] | Annotated[str, Field(pattern=r"^last_[1-9]\d*$")]
Targets = Literal["auto", "all-linear"] | Annotated[list[Name], Field(min_length=1)]
Trees = Annotated[int, Field(ge=1, le=1_000)]
Depth = Annotated[int, Field(ge=1, le=12)]
Decay = Annotated[float, Field(gt=0, le=1)]
TARGETS = "auto: attention projections of the family; all-linear; or module names."
LAYERS = (
    "Blocks that get adapters: all, or last_4 for the last four; none below needs a backward pass, and the prefix "
    "cache serves."
)
LAYER_DECAY = (
    "Learning rate of a block over that of the one above; the head has the full rate, the embeddings the lowest."
)


class FullMethod(Section):
    """Train every weight."""

    name: Literal["full"]
    layer_decay: Decay = Field(default=1.0, description=LAYER_DECAY)


class HeadMethod(Section):
    """Train the classification head alone; the body stays frozen."""

    name: Literal["head"]


class FeaturesMethod(Section):
    """Fit a classifier of scikit-learn on the features of the frozen base; it becomes the classification head."""

    name: Literal["features"]
    classifier: Literal["logistic_regression", "random_forest"] = Field(
        default="logistic_regression",
        description="What is fitted. Stock transformers loads logistic regression; a random forest the toolkit alone.",
    )
    C: PositiveFloat = Field(
        default=1.0,
        description="Of logistic regression: inverse strength of the penalty on the weights of the scaled features.",
    )
    n_estimators: Trees = Field(default=100, description="Trees of the random forest.")
    max_depth: Depth = Field(
        default=10,
        description="Splits on the way through a tree, at most. A tree takes 4 * 2^max_depth * (2 + labels) bytes.",
    )
    min_samples_leaf: PositiveInt = Field(default=1, description="Training rows in each leaf of a tree, at least.")


class ZeroShotMethod(Section):
    """Train nothing: a prompt asks the base what each text is, and the word it would go on with is the answer.

    GPT-2 alone (Radford et al. 2019, "Language models are unsupervised multitask learners"). Labels serve for figures.
    """

    name: Literal["zero_shot"]
    prompt: Annotated[str, Field(min_length=1, max_length=10_000)] = Field(
        default='Text: "{text}"\n\nIs this text {words}? Answer:',
        description="What the base reads: {text} once, and a question behind it; {words} becomes the words of all "
        "labels. The answer's word follows with a space.",
    )
    words: dict[Name, Name] = Field(
        default={}, description="The word that stands for a label, one token of the base; unnamed: the label itself."
    )


class LastNMethod(Section):
    """Train the last n blocks, the final norm and the head."""

    name: Literal["last_n"]
    n: PositiveInt = Field(default=1, description="Blocks trained, counted from the end.")
    layer_decay: Decay = Field(default=1.0, description=LAYER_DECAY)


class GradualMethod(Section):
    """Train the head first, then one block more at a time, from the top (Howard & Ruder 2018, arXiv:1801.06146).

    The embeddings stay frozen. Lower blocks learn more slowly.
    """

    name: Literal["gradual"]
    blocks: Literal["all"] | PositiveInt = Field(default="all", description="Blocks that train in the end.")
    epochs_per_block: Literal["plateau"] | PositiveInt = Field(
        default=1,
        description="Epochs until the next block joins, or plateau: it joins when an evaluation brings no better one.",
    )
    layer_decay: Decay = Field(default=1 / 2.6, description=LAYER_DECAY)


class BiasMethod(Section):
    """Train the biases and the head (BitFit; Ben Zaken et al. 2021, arXiv:2106.10199)."""

    name: Literal["bias"]
    layer_decay: Decay = Field(default=1.0, description=LAYER_DECAY)


class LoraMethod(Section):
    """Train low-rank adapters and the head (Hu et al. 2021, arXiv:2106.09685)."""

    name: Literal["lora"] = "lora"
    variant: Literal["lora", "rslora", "dora", "pissa", "eva", "lora_fa"] = Field(
        default="lora",
        description="rslora: scaled by alpha / sqrt(r) (arXiv:2312.03732). dora: magnitudes train apart from "
        "directions (2402.09353). pissa: starts from the largest singular values of the weights (2404.02948). "
        "eva: A starts from the directions in which training texts vary (2410.07170). lora_fa: A stays as it was "
        "drawn (2308.03303).",
    )
    r: PositiveInt = Field(default=16, description="Rank of each adapter.")
    lora_alpha: PositiveFloat = Field(default=32, description="The delta is scaled by alpha / r.")
    lora_dropout: Fraction = Field(default=0.05, description="Dropout on the adapter's input.")
    lora_plus_ratio: PositiveFloat = Field(
        default=1.0, description="Learning rate of B over that of A (LoRA+, arXiv:2402.12354, advises 16)."
    )
    target_modules: Targets = Field(default="auto", description=TARGETS)
    layers: Layers = Field(default="all", description=LAYERS)


class AdaloraMethod(Section):
    """Train low-rank adapters whose ranks are cut where they matter least (Zhang et al. 2023, arXiv:2303.10512)."""

    name: Literal["adalora"]
    init_r: PositiveInt = Field(default=12, description="Rank of each adapter at the start.")
    target_r: PositiveInt = Field(default=8, description="Rank of an adapter in the end, on average.")
    lora_alpha: PositiveFloat = Field(default=32, description="The delta is scaled by alpha / init_r.")
    lora_dropout: Fraction = Field(default=0.05, description="Dropout on the adapter's input.")
    start_ratio: Fraction = Field(default=0.1, description="Fraction of the steps before ranks are cut.")
    final_ratio: Fraction = Field(default=0.3, description="Fraction of the steps, at the end, with the ranks fixed.")
    every: PositiveInt = Field(default=10, description="Steps between two cuts.")
    orthogonal_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.5, description="Weight of the penalty on singular vectors that are not orthogonal; part of the loss."
    )
    target_modules: Targets = Field(default="auto", description=TARGETS)
    layers: Layers = Field(default="all", description=LAYERS)


class VeraMethod(Section):
    """Train two vectors a layer that scale frozen random matrices, and the head (Kopiczko et al. 2023).

    See arXiv:2310.11454. A tenth of LoRA's trained parameters and fewer; it wants a larger rank and learning rate.
    """

    name: Literal["vera"]
    r: PositiveInt = Field(default=256, description="Rank of the shared random matrices.")
    d_initial: PositiveFloat = Field(default=0.1, description="Start of the vector between the two matrices.")
    vera_dropout: Fraction = Field(default=0.0, description="Dropout on the adapter's input.")
    target_modules: Targets = Field(default="auto", description=TARGETS)
    layers: Layers = Field(default="all", description=LAYERS)


class Ia3Method(Section):
    """Train a scale for each key, value and inner unit of the MLP, and the head (Liu et al. 2022, arXiv:2205.05638)."""

    name: Literal["ia3"]
    target_modules: Targets = Field(
        default="auto",
        description="auto: keys, values and the MLP's second layer (GPT-2: with the queries); all-linear; or names.",
    )


class PrefixMethod(Section):
    """Train keys and values that stand before every text in every block, and the head; GPT-2 alone.

    Li & Liang 2021, arXiv:2101.00190, without their reparametrisation.
    """

    name: Literal["prefix"]
    num_virtual_tokens: PositiveInt = Field(
        default=20, description="Tokens before each text; max_length and they must fit the model's positions."
    )


class LnTuningMethod(Section):
    """Train the layer norms and the head (Zhao et al. 2023, arXiv:2312.11420)."""

    name: Literal["ln_tuning"]


Method = Annotated[
    FullMethod
    | HeadMethod
    | FeaturesMethod
    | ZeroShotMethod
    | LastNMethod
    | GradualMethod
    | BiasMethod
    | LoraMethod
    | AdaloraMethod
    | VeraMethod
    | Ia3Method
    | PrefixMethod
    | LnTuningMethod,
    Field(discriminator="name"),
]
# No step is taken: the head is solved for, or read out of the base.
FittedMethod = FeaturesMethod | ZeroShotMethod
FreezingMethod = FullMethod | HeadMethod | FittedMethod | LastNMethod | GradualMethod | BiasMethod
# Those that peft puts beside the base, which may then be quantised.
AdapterMethod = LoraMethod | AdaloraMethod | VeraMethod | Ia3Method | PrefixMethod | LnTuningMethod
# Of those, the ones that change chosen linear layers, and the ones that can leave the lower blocks out.
TargetedMethod = LoraMethod | AdaloraMethod | VeraMethod | Ia3Method
LayeredMethod = LoraMethod | AdaloraMethod | VeraMethod


def leaves_adapter(method: Method) -> bool:
    """Return whether a method's result is an adapter, and not a whole model."""
    return isinstance(method, AdapterMethod)
