"""A recipe whose base another recipe makes: one command, resumed wherever it was killed, refused before it costs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pico import pico_cache
from safetensors.torch import load_file

from toolkit.cli import main
from toolkit.config.load import load_recipe
from toolkit.errors import CheckpointError, OutputError
from toolkit.finetune import finetune, read_inputs
from toolkit.memory.plan import plan_memory

__all__ = ["pico_cache"]

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["are we still on for dinner", "free prize call now", "see you at the station", "win a cash award today"]


@pytest.fixture
def chain(tmp_path: Path, pico_cache):
    """Write a language model's recipe and that of a classifier on it; return where, and the second one."""

    def write(folder: Path, family: str = "gpt2") -> Path:
        folder.mkdir(exist_ok=True)
        rows = [f"{'spam' if i % 2 else 'ham'},{TEXTS[i % 4]} {i}" for i in range(80)]
        (folder / "data.csv").write_text("label,text\n" + "\n".join(rows) + "\n")
        common = f"data: {{source: '{folder / 'data.csv'}'}}\nevaluation: {{every: 4, baselines: false}}\n"
        (folder / "domain.yaml").write_text(
            f"objective: language_modeling\nmodel: {{base: '{pico_cache(family)}', max_length: 16}}\n{common}"
            f"training: {{max_steps: 8, batch_size: 4, learning_rate: 1e-3}}\n"
            f"output: {{dir: '{folder / 'domain'}', save_every: 2, log_every: 1}}\n"
        )
        path = folder / "classifier.yaml"
        path.write_text(
            f"model: {{base: '{folder / 'domain.yaml'}', max_length: 16}}\n{common}method: {{name: last_n}}\n"
            f"training: {{max_steps: 8, batch_size: 4, learning_rate: 1e-2}}\n"
            f"output: {{dir: '{folder / 'classifier'}', save_every: 2, log_every: 1}}\n"
        )
        return path

    return write


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_command_does_what_two_do(chain, tmp_path):
    path = chain(tmp_path, "distilbert")
    planned = plan_memory(load_recipe(path), device="cpu").estimate.peak_bytes
    record = finetune(load_recipe(path))
    assert record["base"]["requested"] == str(tmp_path / "domain.yaml")
    assert record["base"]["used"] == str(tmp_path / "domain" / "model")
    by_hand = load_recipe(path, [f"model.base={tmp_path / 'domain'}", f"output.dir={tmp_path / 'by_hand'}"])
    two = finetune(by_hand)
    assert two["base"]["fingerprint"] == record["base"]["fingerprint"]
    assert same(tmp_path / "classifier", tmp_path / "by_hand")
    # The base has the shape that the plan took from the base before it.
    assert plan_memory(load_recipe(path), device="cpu").estimate.peak_bytes == planned
    # A finished language model serves again.
    written = (tmp_path / "domain" / "result.json").stat().st_mtime_ns
    finetune(load_recipe(path, [f"output.dir={tmp_path / 'third'}"]))
    assert (tmp_path / "domain" / "result.json").stat().st_mtime_ns == written
    assert same(tmp_path / "classifier", tmp_path / "third")


@pytest.mark.parametrize("killed", ["domain", "classifier"])
def test_killed_in_either_run_the_same_command_ends_bit_equal(chain, tmp_path, killed):
    finetune(load_recipe(chain(tmp_path / "whole")))
    path = chain(tmp_path / "killed")
    checkpoints = tmp_path / "killed" / killed / "checkpoints"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(path)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (checkpoints / "step-4").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / killed / "result.json").exists()
    finetune(load_recipe(path))
    for run in ("domain", "classifier"):
        assert same(tmp_path / "whole" / run, tmp_path / "killed" / run)


def test_what_is_wrong_is_said_before_the_first_run(chain, tmp_path, capsys):
    path = chain(tmp_path)
    assert main(["train", str(path), "data.text_column=body"]) == 2
    assert "no column 'body'" in capsys.readouterr().err
    assert not (tmp_path / "domain").exists()
    assert not (tmp_path / "classifier").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("objective: language_modeling", "objective: classification"), "leaves no base for another run"),
        (("max_steps: 8", "max_steps: none"), "domain.yaml:5:23: training.max_steps"),
        (("max_length: 16", "max_length: 99"), "99 tokens, but the model has 48 positions"),
    ],
)
def test_a_wrong_first_recipe_gets_its_line(chain, tmp_path, capsys, change, line):
    path = chain(tmp_path)
    first = tmp_path / "domain.yaml"
    first.write_text(first.read_text().replace(*change))
    for command in ("validate", "train"):
        assert main([command, str(path)]) == 2
        assert line in capsys.readouterr().err
    assert not (tmp_path / "domain").exists()


def test_a_recipe_made_from_itself_is_refused(chain, tmp_path, capsys):
    path = chain(tmp_path)
    first = tmp_path / "domain.yaml"
    assert main(["train", str(first), f"model.base={first}"]) == 2
    first.write_text(re.sub(r"base: '[^']+'", f"base: '{first}'", first.read_text()))
    assert main(["train", str(path)]) == 2
    assert "is made from itself" in capsys.readouterr().err


def test_validate_reads_both_recipes(chain, tmp_path, capsys):
    path = chain(tmp_path)
    assert main(["validate", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(": valid")] == [
        f"{tmp_path / 'domain.yaml'}: valid",
        f"{path}: valid",
    ]


def test_another_language_model_is_no_base_of_a_begun_run(chain, tmp_path):
    path = chain(tmp_path)
    finetune(load_recipe(path))
    (tmp_path / "classifier" / "result.json").unlink()
    first = tmp_path / "domain.yaml"
    first.write_text(first.read_text().replace("learning_rate: 1e-3", "learning_rate: 2e-3"))
    with pytest.raises(OutputError, match=r"training.learning_rate: was 0.001"):
        finetune(load_recipe(path))
    finetune(load_recipe(first, ["output.overwrite=true"]))
    with pytest.raises(CheckpointError, match="base: is not what this run began with"):
        finetune(load_recipe(path))


def test_before_the_first_run_its_own_base_stands_in_for_checks(chain, tmp_path):
    _, base = read_inputs(load_recipe(chain(tmp_path)))
    assert base.requested == str(tmp_path / "domain.yaml")
    assert base.used != str(tmp_path / "domain" / "model")
