"""Figures in words."""

from __future__ import annotations

import pytest

from toolkit.report import wording
from toolkit.report.run_record import RunRecord


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.31, "8.3 s"),
        (59.9, "59.9 s"),
        (60, "1 min 00 s"),
        (250.6, "4 min 11 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(2048, "2 KiB"), (97_622_426, "93.1 MiB"), (1_524_713_390, "1.42 GiB")])
def test_size(count: int, text: str) -> None:
    assert wording.size(count) == text


@pytest.mark.parametrize(
    ("method", "name", "sentence"),
    [
        ({"name": "full"}, "full fine-tuning", "every weight was trained"),
        ({"name": "head"}, "head only", "only the classification head was trained"),
        ({"name": "last_n", "n": 1}, "last block and head", "the last block, the final norm"),
        ({"name": "last_n", "n": 3}, "last 3 blocks and head", "the last 3 blocks, the final norm"),
        (
            {"name": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_lin", "v_lin"]},
            "LoRA, rank 8",
            "target modules: q_lin, v_lin",
        ),
    ],
)
def test_methods(method: dict[str, object], name: str, sentence: str) -> None:
    assert wording.method_name(method) == name
    assert sentence in wording.method_sentence(method)


def test_storage() -> None:
    assert wording.storage(None) == "full precision"
    assert wording.storage({"bits": 8, "quant_type": "nf4", "double_quant": True}) == "8-bit (LLM.int8)"
    assert wording.storage({"bits": 4, "quant_type": "fp4", "double_quant": False}) == "4-bit FP4"
    assert wording.storage_sentence({"name": "full"}, None) == ""


def test_summary(record: RunRecord) -> None:
    assert wording.summary(record) == (
        "openai-community/gpt2, fine-tuned with LoRA, rank 16 on weights stored in 4-bit NF4, double quantisation on "
        "1,046 texts of sms_spam to tell 2 labels apart: ham and spam."
    )


def test_majority_share() -> None:
    assert wording.majority_share({"a": 3, "b": 1}) == 0.75
    assert wording.majority_share({}) == 0.0


def test_the_measured_peak_stands_beside_the_predicted_one(record: RunRecord):
    memory = record["memory"]
    assert wording.memory_sentence(memory) == (
        "peak memory 1.40 GiB (all memory of the process), predicted 1.38 GiB (-1.5%)"
    )
    assert wording.memory_sentence({**memory, "predicted_bytes": None}).endswith("; not predicted")
