"""A finished run's record, and small recipes on pico models."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
from pico import pico_cache

__all__ = ["pico_cache"]

HAM = ["are we still on for dinner tonight", "see you at the station", "call me when you are home", "ok thanks dear"]
SPAM = ["you are a winner of a cash award", "free prize call now", "claim your reward today", "win a free phone now"]


@pytest.fixture
def record():
    """The record that the tests of the report share."""
    path = Path(__file__).resolve().parents[1] / "report" / "conftest.py"
    spec = importlib.util.spec_from_file_location("report_records", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return copy.deepcopy(module.RECORD)


@pytest.fixture
def write_recipe(tmp_path: Path, pico_cache):
    """Write a recipe of a few steps under a name of its own; all read the same messages."""
    data = tmp_path / "messages.csv"
    rows = [f"{'ham' if i % 2 else 'spam'},{(HAM if i % 2 else SPAM)[i // 2 % 4]} {i}" for i in range(120)]
    data.write_text("label,text\n" + "\n".join(rows) + "\n")

    def write(name: str, extra: str = "", *, steps: int = 8) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"model: {{base: '{pico_cache('distilbert')}', max_length: 16}}\ndata: {{source: '{data}'}}\n"
            f"training: {{max_steps: {steps}, batch_size: 8, learning_rate: 1e-2, gemm: default}}\n"
            f"evaluation: {{every: 4}}\n"
            f"output: {{dir: '{tmp_path / 'runs' / name}', save_every: 2}}\n{extra}"
        )
        return str(path)

    return write
