"""The run's record, result.json: its schema, and writing and reading it whole or not at all."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, cast

from toolkit.durable import write_file_atomically
from toolkit.errors import OutputError, Problem

FORMAT = 1
MAX_BYTES = 16 << 20
# What records lacked while they held the measured peak alone.
MEASURED_ALONE: dict[str, Any] = {
    "predicted_bytes": None,
    "predicted": {},
    "allocated_bytes": 0,
    "reserved_bytes": 0,
    "phases": [],
    "shortage": [],
}


class BaseRecord(TypedDict):
    """The pre-trained model a run started from.

    Attributes:
        requested: ``model.base`` of the recipe.
        used: What served: the same, or ``model.offline_base``.
        offline: Whether the requested base could not be reached.
        fingerprint: ``sha256:...`` over the base's tensors and architecture.
        name_or_path: What ``from_pretrained`` takes: a hub id or a folder.
        model_type: ``gpt2`` or ``distilbert``.
    """

    requested: str
    used: str
    offline: bool
    fingerprint: str
    name_or_path: str
    model_type: str


class ArtifactRecord(TypedDict):
    """What the run trained, as a folder inside the run folder.

    Attributes:
        kind: ``adapter`` (stock peft loads it onto the base) or ``model`` (stock transformers loads it alone), unless
            the head is the toolkit's own.
        folder: Its name inside the run folder.
        max_length: Tokens of a text the model reads; the rest is cut off.
        head: Pooling, and widths, activation and dropout or the size of a forest, of a head that stock transformers
            lacks; else null.
        template: What stood around the prompts of objective instruction; null elsewhere.
    """

    kind: Literal["adapter", "model"]
    folder: str
    max_length: int
    head: Mapping[str, Any] | None
    template: str | None


class OriginRecord(TypedDict):
    """Where rows came from, and what exactly served them."""

    name: str
    served: str
    sha256: str
    rows: int
    licence: str | None


class DataRecord(TypedDict):
    """The rows of a run.

    Attributes:
        origins: One entry per file or set.
        rows: Rows by part: train, validation, test.
        counts: Rows by part and label.
        labels: Names of the labels, or of the targets of a regression, in id order; empty without labels.
        truncated: Texts that were cut to ``max_length``.
        warnings: One sentence each.
    """

    origins: list[OriginRecord]
    rows: dict[str, int]
    counts: dict[str, dict[str, int]]
    labels: list[str]
    truncated: int
    warnings: list[str]


class ParameterRecord(TypedDict):
    """Numbers of parameters; a quantised weight counts once per element."""

    total: int
    trainable: int


class BestRecord(TypedDict):
    """The evaluation whose weights were kept."""

    step: int
    metric: str
    value: float


class MetricsRecord(TypedDict):
    """Figures by part, as ``toolkit.evaluation.figures.all_figures`` has them; ``loss`` alone without labels.

    Attributes:
        validation: Of the validation rows, or null without any.
        test: Of the test rows, or null without any.
        baselines: Of the test rows by ``toolkit.evaluation.baselines``, or null where they were not asked for.
    """

    validation: Mapping[str, Any] | None
    test: Mapping[str, Any] | None
    baselines: Mapping[str, Any] | None


class TimingRecord(TypedDict):
    """Seconds, and real (unpadded) tokens trained on per second of training."""

    train_seconds: float
    total_seconds: float
    tokens_per_second: float


class PhaseRecord(TypedDict):
    """What one phase of a run took.

    Attributes:
        name: tokenise, load, frozen blocks, train, evaluate or export.
        time: When it began, in Unix seconds.
        seconds: How long it went on.
        allocated: Peak bytes of CUDA's allocator; 0 on a CPU.
        reserved: Peak bytes that it had taken from the card; 0 on a CPU.
        rss: Peak bytes of the resident set.
    """

    name: str
    time: float
    seconds: float
    allocated: int
    reserved: int
    rss: int


class MemoryRecord(TypedDict):
    """Peak memory of a run in bytes, measured and predicted.

    Attributes:
        kind: What ``peak_bytes`` and ``predicted_bytes`` count: ``resident set`` on a CPU, ``cuda allocated``.
        peak_bytes: Measured, up to the end of training.
        predicted_bytes: What ``toolkit plan`` says of the same; null for several processes, on devices it does not
            know, and in records from before it was kept.
        predicted: The prediction by part; the framework's is measured before tokens and weights are there.
        allocated_bytes: Peak of CUDA's allocator up to the end of training; 0 on a CPU.
        reserved_bytes: What it had taken from the card; 0 on a CPU.
        rss_bytes: Peak resident set of the whole run, evaluation and export included.
        phases: In their order.
        shortage: Recipe lines that say from the start what the run did when memory ran out; none where it sufficed.
    """

    kind: str
    peak_bytes: int
    predicted_bytes: int | None
    predicted: dict[str, int]
    allocated_bytes: int
    reserved_bytes: int
    rss_bytes: int
    phases: list[PhaseRecord]
    shortage: list[str]


class PrefixCacheRecord(TypedDict):
    """The kept states of the frozen first blocks.

    Attributes:
        blocks: Blocks whose states were kept.
        dtype: ``fp16`` or ``fp32``.
        bytes: Bytes of the states.
        seconds: Time spent on computing them, beside ``timing``; 0 where an earlier run had left them.
    """

    blocks: int
    dtype: str
    bytes: int
    seconds: float


class RunRecord(TypedDict):
    """Everything a finished run knows about itself; the content of ``result.json``.

    Attributes:
        format: Version of this schema, 1.
        name: Name of the run folder.
        status: ``finished``, or ``stopped early`` where early stopping ended it.
        objective: As in the recipe.
        problem_type: What the labels are, as transformers spells it.
        created: UTC time of the end, ISO 8601.
        method: The recipe's method section.
        quantization: The recipe's quantization section, or null.
        steps: Optimizer steps done.
        epochs: Passes over the training rows, fractional.
        prefix_cache: Null where no block was frozen, or its states were not kept.
        environment: Versions, device, threads and platform.
    """

    format: int
    name: str
    status: str
    objective: Literal["classification", "language_modeling", "instruction"]
    problem_type: str
    created: str
    base: BaseRecord
    artifact: ArtifactRecord
    data: DataRecord
    method: dict[str, Any]
    quantization: dict[str, Any] | None
    parameters: ParameterRecord
    steps: int
    epochs: float
    best: BestRecord | None
    metrics: MetricsRecord
    timing: TimingRecord
    memory: MemoryRecord
    prefix_cache: PrefixCacheRecord | None
    environment: dict[str, Any]


def write_run_record(record: RunRecord, path: pathlib.Path) -> None:
    """Write ``record`` as JSON; a reader sees the old file or the new one, never a part.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
        ValueError: If a number is not finite.
    """
    write_file_atomically(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_run_record(path: pathlib.Path) -> RunRecord:
    """Read a record that ``write_run_record`` wrote.

    Raises:
        OutputError: If it is missing, not JSON, of another format, or lacks keys.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        data = json.loads(raw.decode("utf-8")) if len(raw) <= MAX_BYTES else None
    except OSError as error:
        raise OutputError(Problem(where, "", f"cannot be read: {error.strerror}", "the folder of a run")) from error
    except (ValueError, RecursionError) as error:
        raise OutputError(Problem(where, "", f"not JSON: {error}", "the result.json that a run wrote")) from error
    if not isinstance(data, dict):
        raise OutputError(Problem(where, "", "not a JSON object of a run", "the result.json that a run wrote"))
    if data.get("format") != FORMAT:
        raise OutputError(Problem(where, "format", f"is {data.get('format')!r}", f"{FORMAT}"))
    # Records from before there was a cache, a prediction, a head, or more than one kind of labels.
    data.setdefault("prefix_cache", None)
    data.setdefault("problem_type", "single_label_classification")
    for section, key in (("metrics", "baselines"), ("artifact", "head")):
        if isinstance(data.get(section), dict):
            data[section].setdefault(key, None)
    memory = data.get("memory")
    if isinstance(memory, dict):
        data["memory"] = {**MEASURED_ALONE, "rss_bytes": memory.get("peak_bytes"), **memory}
    missing = sorted(RunRecord.__required_keys__ - data.keys())
    if missing:
        raise OutputError(Problem(where, key, "missing", "the result.json that a run wrote") for key in missing)
    return cast(RunRecord, data)
