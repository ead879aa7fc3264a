"""A finished run's record, as the trainer writes it."""

from __future__ import annotations

import copy

import pytest

from toolkit.report.run_record import RunRecord

RECORD: RunRecord = {
    "format": 1,
    "name": "gpt2_qlora_4bit",
    "status": "finished",
    "objective": "classification",
    "problem_type": "single_label_classification",
    "created": "2026-11-22T22:40:00Z",
    "base": {
        "requested": "openai-community/gpt2",
        "used": "openai-community/gpt2",
        "offline": False,
        "fingerprint": "sha256:" + "3f" * 32,
        "name_or_path": "openai-community/gpt2",
        "model_type": "gpt2",
    },
    "artifact": {"kind": "adapter", "folder": "adapter", "max_length": 256, "head": None},
    "data": {
        "origins": [
            {
                "name": "sms_spam",
                "served": "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
                "sha256": "7d" * 32,
                "rows": 5574,
                "licence": "CC BY 4.0",
            }
        ],
        "rows": {"train": 1046, "validation": 149, "test": 299},
        "counts": {
            "train": {"ham": 523, "spam": 523},
            "validation": {"ham": 75, "spam": 74},
            "test": {"ham": 149, "spam": 150},
        },
        "labels": ["ham", "spam"],
        "truncated": 3,
        "warnings": ["12 texts occur with two labels"],
    },
    "method": {"name": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "auto"},
    "quantization": {"bits": 4, "quant_type": "nf4", "double_quant": True},
    "parameters": {"total": 124_736_256, "trainable": 296_448},
    "steps": 655,
    "epochs": 5.0,
    "best": {"step": 520, "metric": "accuracy", "value": 0.9732},
    "metrics": {
        "validation": {"loss": 0.13, "accuracy": 0.9732, "f1_macro": 0.9731},
        "test": {
            "loss": 0.1412,
            "accuracy": 0.959866,
            "f1_macro": 0.959865,
            "rows": 299,
            "mcc": 0.9198,
            "ece": 0.021,
            "accuracy_interval": [0.9364, 0.98],
            "per_label": {
                "ham": {"precision": 0.966, "recall": 0.953, "f1": 0.9595, "support": 149},
                "spam": {"precision": 0.954, "recall": 0.9667, "f1": 0.9603, "support": 150},
            },
            "confusion": [[142, 7], [5, 145]],
        },
        "baselines": {
            "majority": {"accuracy": 0.5017, "f1_macro": 0.3341, "rows": 1045},
            "tfidf_logistic_regression": {"accuracy": 0.9231, "f1_macro": 0.923, "rows": 1045},
        },
    },
    "timing": {"train_seconds": 251.3, "total_seconds": 290.2, "tokens_per_second": 812.4},
    "memory": {
        "kind": "resident set",
        "peak_bytes": 1_502_341_120,
        "predicted_bytes": 1_480_000_000,
        "predicted": {"weights": 980_000_000, "gradients": 0, "framework": 500_000_000},
        "allocated_bytes": 0,
        "reserved_bytes": 0,
        "rss_bytes": 1_502_341_120,
        "phases": [
            {"name": "load", "time": 100.0, "seconds": 4.0, "allocated": 0, "reserved": 0, "rss": 900_000_000},
            {"name": "train", "time": 104.5, "seconds": 20.0, "allocated": 0, "reserved": 0, "rss": 1_502_341_120},
        ],
        "shortage": [],
    },
    "prefix_cache": None,
    "environment": {
        "python": "3.11.4",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "peft": "0.21.2",
        "device": "cpu",
        "cpu": "AMD EPYC 9R14",
        "threads": 2,
    },
}


@pytest.fixture
def record() -> RunRecord:
    return copy.deepcopy(RECORD)
