"""How figures are put into words: durations, sizes, shares, and the one sentence that says what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.report.run_record import MemoryRecord, RunRecord

METHODS = {
    "full": ("full fine-tuning", "every weight was trained"),
    "head": ("head only", "only the classification head was trained"),
    "features": (
        "logistic regression on features",
        "the base stayed frozen, and logistic regression on its features became the classification head",
    ),
    "zero_shot": (
        "zero-shot prompt",
        "nothing was trained: the base reads a prompt around each text, and the classification head holds its own "
        "embeddings of the labels' words",
    ),
    "random_forest": (
        "random forest on features",
        "the base stayed frozen, and a random forest on its features became the classification head",
    ),
    "gradual": (
        "gradual unfreezing",
        "the classification head was trained first, then one block more at a time from the top; the embeddings stayed "
        "frozen",
    ),
    "bias": ("biases and head", "the biases and the classification head were trained; the rest stayed frozen"),
    "adalora": (
        "AdaLoRA",
        "low-rank adapters whose ranks were cut during training, and the classification head were trained; the base "
        "stayed frozen",
    ),
    "vera": (
        "VeRA",
        "vectors that scale fixed random matrices beside the base's weights, and the classification head were trained; "
        "the base stayed frozen",
    ),
    "ia3": (
        "IA3",
        "scales of keys, values and inner units, and the classification head were trained; the base stayed frozen",
    ),
    "prefix": (
        "prefix tuning",
        "keys and values that stand before every text, and the classification head were trained; the base stayed "
        "frozen",
    ),
    "ln_tuning": ("layer norms and head", "the layer norms and the classification head were trained"),
}
VARIANTS = {
    "rslora": "rank-stabilised LoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "eva": "LoRA started by EVA",
    "lora_fa": "LoRA-FA",
}


def duration(seconds: float) -> str:
    """Return seconds as ``8.3 s``, ``4 min 10 s`` or ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    """Return bytes as ``612 KiB``, ``93.1 MiB`` or ``1.42 GiB``."""
    if count < 1 << 20:
        return f"{count / (1 << 10):.0f} KiB"
    if count < 1 << 30:
        return f"{count / (1 << 20):.1f} MiB"
    return f"{count / (1 << 30):.2f} GiB"


def percent(share: float, *, digits: int = 2) -> str:
    """Return a share (0 to 1) as ``95.67 %``."""
    return f"{100 * share:.{digits}f} %"


def _name(method: Mapping[str, Any]) -> str:
    forest = method.get("classifier") == "random_forest"
    return "random_forest" if forest else str(method["name"])


def method_name(method: Mapping[str, Any]) -> str:
    """Return the method as ``LoRA, rank 16``."""
    name = _name(method)
    if name == "lora":
        variant = VARIANTS.get(method.get("variant", "lora"), "LoRA")
        return f"{variant}, rank {method['r']}"
    if name == "last_n":
        blocks = method["n"]
        return "last block and head" if blocks == 1 else f"last {blocks} blocks and head"
    return METHODS[name][0] if name in METHODS else name


def method_sentence(method: Mapping[str, Any], *, head: bool = True) -> str:
    """Return what was trained and what stayed frozen, as a clause; without a ``head``, of a language model."""
    name = _name(method)
    if name == "lora":
        targets = method.get("target_modules", "auto")
        where = targets if isinstance(targets, str) else ", ".join(targets)
        variant = VARIANTS.get(method.get("variant", "lora"), "LoRA")
        also = "and the classification head " if head else ""
        return (
            f"{variant} adapters, pairs of small matrices of rank {method['r']} added to the base's own weights, "
            f"{also}were trained; the base stayed frozen (alpha {method['lora_alpha']:g}, dropout "
            f"{method['lora_dropout']:g}, target modules: {where})"
        )
    if name == "last_n":
        blocks = "the last block" if method["n"] == 1 else f"the last {method['n']} blocks"
        return f"{blocks}, the final norm and the classification head were trained; the rest stayed frozen"
    return METHODS[name][1] if name in METHODS else f"method {name}"


OWN_HEAD = (
    "the classification head is the toolkit's own, which stock transformers and peft refuse to load: use toolkit "
    "predict, toolkit evaluate or toolkit.Classifier"
)
POOLINGS = {
    "last": "the last token",
    "first": "the first token",
    "mean": "the mean over all tokens",
    "max": "the maximum over all tokens",
}


def head_sentence(head: Mapping[str, Any] | None) -> str:
    """Return what a head of the toolkit's own is, as a sentence; empty for a stock one."""
    if head is None:
        return ""
    pooled = POOLINGS[head["pooling"]]
    if "n_estimators" in head:
        return f"The head is a random forest of {head['n_estimators']} trees of depth {head['max_depth']}, on {pooled}."
    hidden = head["hidden"]
    if not hidden:
        return f"The head is one linear layer on {pooled}."
    widths = ", ".join(map(str, hidden))
    layers = f"a hidden layer of {widths}" if len(hidden) == 1 else f"hidden layers of {widths}"
    return f"The head is {layers} with {head['activation']} and dropout {head['dropout']:g}, on {pooled}."


def storage(quantization: Mapping[str, Any] | None) -> str:
    """Return how the frozen weights were stored, as ``4-bit NF4, double quantisation``."""
    if quantization is None:
        return "full precision"
    if quantization["bits"] == 8:
        return "8-bit (LLM.int8)"
    double = ", double quantisation" if quantization.get("double_quant") else ""
    return f"4-bit {str(quantization['quant_type']).upper()}{double}"


def storage_sentence(method: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> str:
    """Return how the frozen weights were stored, as a sentence; empty where nothing was frozen."""
    return "" if method["name"] == "full" else f"Frozen weights were stored in {storage(quantization)}."


def memory_kind(kind: str) -> str:
    """Return in plain words what a peak of memory counted."""
    return {
        "resident set": "all memory of the process",
        "cuda allocated": "memory of the GPU",
    }.get(kind, kind)


def memory_sentence(memory: MemoryRecord) -> str:
    """Return the measured peak beside the predicted one, as a line."""
    counted = f"peak memory {size(memory['peak_bytes'])} ({memory_kind(memory['kind'])})"
    predicted = memory["predicted_bytes"]
    if predicted is None:
        return f"{counted}; not predicted"
    return f"{counted}, predicted {size(predicted)} ({predicted / memory['peak_bytes'] - 1:+.1%})"


def summary(record: RunRecord) -> str:
    """Return the run in one sentence: base, method, data."""
    rows, labels = record["data"]["rows"], record["data"]["labels"]
    base = record["base"]["used"]
    names = [origin["name"] for origin in record["data"]["origins"]]
    data = f"{rows['train']:,} texts of {_joined(names)}"
    if record["objective"] == "language_modeling":
        return f"{base}, trained as a language model on {data}."
    stored = "" if record["quantization"] is None else f" on weights stored in {storage(record['quantization'])}"
    purpose = {
        "multi_label_classification": f"to find which of {len(labels)} labels a text has",
        "regression": "to predict numbers",
    }.get(record["problem_type"], f"to tell {len(labels)} labels apart")
    tuned = f"{base}, fine-tuned with {method_name(record['method'])}{stored} on"
    if record["objective"] == "instruction":
        return f"{tuned} {rows['train']:,} prompts with their responses of {_joined(names)}."
    return f"{tuned} {data} {purpose}: {_joined(labels[:8])}{' …' if len(labels) > 8 else ''}."


def majority_share(counts: Mapping[str, int]) -> float:
    """Return the accuracy of always answering the commonest label."""
    total = sum(counts.values())
    return max(counts.values()) / total if total else 0.0


def _joined(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return " and ".join([", ".join(unique[:-1]), unique[-1]]) if len(unique) > 1 else "".join(unique)
