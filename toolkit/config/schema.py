"""The recipe: one pydantic model per section, with every default, bound and unit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from toolkit.config.methods import Depth, Trees
from toolkit.config.methods import FullMethod as FullMethod
from toolkit.config.methods import HeadMethod as HeadMethod
from toolkit.config.methods import LastNMethod as LastNMethod
from toolkit.config.methods import LoraMethod as LoraMethod
from toolkit.config.methods import Method as Method
from toolkit.config.objectives import InstructionSettings as InstructionSettings
from toolkit.config.objectives import LanguageModelingSettings as LanguageModelingSettings
from toolkit.config.section import Fraction, Name, PositiveInt, Section, Seed
from toolkit.config.training import LossSettings as LossSettings
from toolkit.config.training import PrefixCacheSettings as PrefixCacheSettings
from toolkit.config.training import TrainingSettings as TrainingSettings


def _label_text(value: object) -> object:
    """Read the label 0 of `labels: [0, 1]` as the text it has in a data file."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Pooling = Literal["last", "first", "mean", "max"]
Label = Annotated[str, Field(min_length=1), BeforeValidator(_label_text)]


class HeadSettings(Section):
    """The layers that make logits of a text's hidden states."""

    pooling: Pooling | None = Field(
        default=None,
        description="What of a text is classified: its last token, its first, or the mean or maximum of all; null: the "
        "architecture's own (GPT-2 last, DistilBERT first).",
    )
    hidden: list[Annotated[int, Field(ge=1, le=16_384)]] = Field(
        default_factory=list,
        max_length=8,
        description="Widths of hidden layers between pooled state and labels; [] is linear.",
    )
    activation: Literal["relu", "gelu", "tanh"] = Field(default="relu", description="Behind each hidden layer.")
    dropout: Fraction = Field(
        default=0.1, description="Behind each hidden layer's activation; of a linear head, on the pooled state."
    )


class ForestHead(Section):
    """A random forest in the place of those layers, as method features fits it; config.json and the manifest hold it.

    Attributes:
        pooling: What of a text is classified.
        n_estimators: Trees.
        max_depth: Splits on the way through each.
    """

    pooling: Pooling
    n_estimators: Trees
    max_depth: Depth


class ModelSettings(Section):
    """Which pre-trained model is tuned."""

    base: Name = Field(
        description="Hub id, local folder, an embedded base (gpt2-mini, distilbert-mini), or the recipe (.yaml) of a "
        "language_modeling run, which is made first, or used where it has finished."
    )
    offline_base: Name | None = Field(
        default=None, description="Used, with a warning, only when `base` cannot be reached."
    )
    max_length: PositiveInt = Field(default=256, description="Tokens kept of each text; longer ones are truncated.")
    random_init: bool = Field(
        default=False, description="Take the base's shape and tokenizer but start from seeded random weights."
    )
    embeddings_from: Name | None = Field(
        default=None,
        description="With random_init: project this encoder's word embeddings into the new token embeddings.",
    )
    head: HeadSettings | None = Field(
        default=None,
        description="The classification head; null: the architecture's own. Stock transformers loads what it can "
        "express: on GPT-2 a linear head on the last token, on DistilBERT one hidden layer of the model's width with "
        "relu on the first. What it cannot, the toolkit alone loads.",
    )


class SplitSettings(Section):
    """How one table is cut into train, validation and test."""

    train: float = Field(default=0.7, gt=0, le=1, description="Fraction of the rows trained on.")
    validation: Fraction = Field(default=0.1, description="Fraction used to pick the best checkpoint.")
    test: Fraction = Field(default=0.2, description="Fraction used once, at the end.")
    seed: Seed = Field(default=123, description="Seed of the shuffle and of the balanced subset.")
    stratify: bool = Field(
        default=True,
        description="Keep every label's share equal in all parts (of several labels the rarest of a text's, of numbers "
        "their tenths).",
    )
    group_column: Name | None = Field(
        default=None, description="Column of an author, a thread, a patient: rows of one group stay in one part."
    )
    time_column: Name | None = Field(
        default=None,
        description="Column of numbers or ISO dates: the oldest rows train, the newest test, without shuffling. A text "
        "that repeats an older part's is left out.",
    )
    folds: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Cut the rows into so many folds: one is the test part, and train and validation share the others.",
    )
    fold: PositiveInt = Field(default=1, description="Which fold is the test part, from 1.")


class DataSettings(Section):
    """Which rows are trained and tested on: one `source` to split, or files per part."""

    source: Name | None = Field(
        default=None, description="Named set (sms_spam, movie_reviews), a data file, or a hub dataset id."
    )
    train: Name | None = Field(default=None, description="File of training rows, instead of source.")
    validation: Name | None = Field(default=None, description="File of validation rows; else cut from train.")
    test: Name | None = Field(default=None, description="File of test rows; else cut from train.")
    text_column: Name = Field(default="text", description="Column that holds the text.")
    problem_type: ProblemType = Field(
        default="single_label_classification",
        description="single_label_classification: one label a text (softmax). multi_label_classification: any number "
        "of labels, each yes or no (sigmoid). regression: numbers.",
    )
    label_column: Name = Field(
        default="label",
        description="Column that holds the label; with several labels a list of them; with regression the number.",
    )
    label_columns: Annotated[list[Name], Field(min_length=1)] | None = Field(
        default=None,
        description="Instead of label_column: a column of 0 and 1 for each label (multi_label_classification), or a "
        "column of numbers for each target (regression). In .npy they are the last columns, in this order.",
    )
    label_separator: Annotated[str, Field(min_length=1)] = Field(
        default="|", description="Between the labels of a list in csv and tsv; a JSON list needs none."
    )
    prompt_column: Name = Field(default="prompt", description="Column of the prompt; objective instruction alone.")
    response_column: Name = Field(
        default="response", description="Column of the response; objective instruction alone."
    )
    labels: Annotated[list[Label], Field(min_length=2)] | None = Field(
        default=None, description="Label names in id order; null takes the sorted names found."
    )
    balance: Literal["undersample", "oversample"] | None = Field(
        default=None,
        description="undersample: as many rows of every label as the rarest has, in all parts. oversample: training "
        "rows of rarer labels repeat until every label has as many as the commonest.",
    )
    duplicates: Literal["refuse", "remove", "allow"] = Field(
        default="refuse",
        description="The same text in two parts: refuse (repeats stay in one part when the toolkit splits), "
        "remove repeats, or allow the leak.",
    )
    near_duplicates: Annotated[float, Field(ge=0.5, lt=1)] | None = Field(
        default=None,
        description="Texts count as the same for `duplicates` from this share of five-byte pieces in common (Jaccard), "
        "case and white space aside; 0.8 finds edited copies. null: only equal texts.",
    )
    max_rows: PositiveInt | None = Field(default=None, description="Use a seeded sample of this many rows.")
    train_rows: PositiveInt | None = Field(
        default=None,
        description="Train on a seeded sample of this many training rows; validation and test stay whole, so that "
        "sizes can be compared.",
    )
    split: SplitSettings = Field(default_factory=SplitSettings, description="Used where one table is split.")


class QuantizationSettings(Section):
    """bitsandbytes storage of the frozen weights (Dettmers et al. 2023, arXiv:2305.14314)."""

    bits: Literal[4, 8] = Field(default=4, description="Bits per frozen weight.")
    quant_type: Literal["nf4", "fp4"] = Field(default="nf4", description="4-bit code; unused at 8 bits.")
    double_quant: bool = Field(default=True, description="Quantise the 4-bit scales too; unused at 8 bits.")


class PrecisionTarget(Section):
    """A wish for the decision threshold."""

    precision: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Share of right texts among those given the label; of such thresholds the one that finds most."
    )


class EvaluationSettings(Section):
    """When validation runs and what picks the best checkpoint."""

    every: Literal["epoch", "end"] | PositiveInt = Field(default="epoch", description="epoch, end, or steps.")
    metric: Literal["accuracy", "f1_macro", "loss", "f1_micro", "mean_average_precision", "r2", "spearman"] = Field(
        default="accuracy",
        description="Picks the best. accuracy and f1_macro of labels; f1_micro and mean_average_precision where a text "
        "may have several (accuracy then counts texts whose labels are all right); r2 and spearman of numbers; loss.",
    )
    early_stopping_patience: PositiveInt | None = Field(
        default=None, description="Stop after this many evaluations without a better metric."
    )
    threshold: Literal["f1"] | PrecisionTarget | None = Field(
        default=None,
        description="Tune the probability from which a label is given on the validation rows, for F1 or a precision: "
        "of each label where a text may have several, else of the second of two labels. null: the likeliest, or 0.5.",
    )
    calibrate: bool = Field(
        default=False,
        description="Fit a temperature for the probabilities on the validation rows (arXiv:1706.04599); toolkit "
        "predict divides logits by it.",
    )
    baselines: bool = Field(
        default=True, description="Judge the commonest label and TF-IDF with logistic regression on the test rows too."
    )


class OutputSettings(Section):
    """Where the run is kept."""

    dir: Name | None = Field(default=None, description="Run folder; null: runs/<recipe name>.")
    save_every: Literal["epoch", "end"] | PositiveInt = Field(default="epoch", description="epoch, end, or steps.")
    keep: PositiveInt = Field(default=2, description="Checkpoints kept, beside the best one.")
    overwrite: bool = Field(default=False, description="Start anew in a folder that holds a run.")
    log_every: PositiveInt = Field(default=10, description="Optimizer steps per line of metrics.jsonl.")
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = Field(
        default=None, description="Experiment tracker to log to as well."
    )


class Recipe(Section):
    """A whole run. Every key has a default but `model.base` and the data."""

    objective: Literal["classification", "language_modeling", "instruction"] = Field(
        default="classification",
        description="language_modeling (causal or masked) needs no labels and no method; instruction trains GPT-2 to "
        "answer prompts: pairs of texts, the loss on responses alone.",
    )
    model: ModelSettings
    data: DataSettings
    method: Method = Field(default_factory=LoraMethod, description="What is trained.")
    quantization: QuantizationSettings | None = Field(default=None, description="null: full-precision weights.")
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    language_modeling: LanguageModelingSettings = Field(default_factory=LanguageModelingSettings)
    instruction: InstructionSettings = Field(default_factory=InstructionSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    output: OutputSettings = Field(default_factory=OutputSettings)
