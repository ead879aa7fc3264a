"""A step that does not fit is taken in smaller pieces, with the same rows and the same loss, and says so once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import PicoFolder, pico_cache
from safetensors.torch import load_file

from toolkit.config.load import load_recipe
from toolkit.config.schema import TrainingSettings
from toolkit.errors import OutOfMemoryError
from toolkit.evaluation.evaluate import predict_logits
from toolkit.finetune import finetune
from toolkit.listener import SILENT
from toolkit.models.forward import unwrapped
from toolkit.runtime import is_out_of_memory
from toolkit.training import gemm
from toolkit.training.objectives import ClassificationObjective
from toolkit.training.shortage import recipe_lines, split_rows
from toolkit.training.state import Progress

__all__ = ["pico_cache"]

Written = Callable[[str], Path]
FORWARD = ClassificationObjective.forward
REAL = """
import resource, sys
from toolkit.config.load import load_recipe
from toolkit.finetune import finetune
from toolkit.listener import SILENT
from toolkit.training.trainer import Trainer

class Said(type(SILENT)):
    def say(self, line):
        print(line)

gradients, most = Trainer._gradients, []
def limited(self, step):
    held = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) << 10
    most.append(held + (int(sys.argv[2]) << 20))
    resource.setrlimit(resource.RLIMIT_AS, (most[0], -1))
    try:
        return gradients(self, step)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
Trainer._gradients = limited
finetune(load_recipe(sys.argv[1], sys.argv[3:]), listener=Said())
"""


@pytest.fixture
def written(tmp_path: Path, pico_cache: PicoFolder) -> Written:
    """Write a recipe with the given training settings; full fine-tuning of a pico GPT-2."""
    rows = [
        f"{'ham' if i % 2 else 'spam'},{'free prize' if i % 2 else 'see you'} {i} " + "call " * 20 for i in range(60)
    ]
    data = tmp_path / "messages.csv"
    data.write_text("label,text\n" + "\n".join(rows) + "\n")

    def write(training: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"model: {{base: '{pico_cache('gpt2')}', max_length: 32}}\ndata: {{source: '{data}'}}\n"
            f"method: {{name: full}}\ntraining: {{learning_rate: 1e-3, gemm: default, {training}}}\n"
            f"evaluation: {{every: end}}\noutput: {{dir: '{tmp_path / 'run'}', log_every: 1, save_every: 2}}\n"
        )
        return path

    return write


class Said(type(SILENT)):  # type: ignore[misc]
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def holding(rows: int, *, only_recomputing: bool = False) -> Any:
    """Return an objective's forward for which memory holds so many rows."""
    forward = ClassificationObjective.forward

    def limited(self: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(batch["labels"]) > rows or (only_recomputing and not self.model.is_activation_checkpointing):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    return limited


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_same_steps_in_smaller_pieces(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand, said = tmp_path / "by_hand", Said()
    finetune(
        load_recipe(written("max_steps: 5, batch_size: 2, gradient_accumulation_steps: 4"), [f"output.dir={by_hand}"])
    )
    monkeypatch.setattr(ClassificationObjective, "forward", holding(2))
    record = finetune(load_recipe(written("max_steps: 5, batch_size: 8")), listener=said)
    run = tmp_path / "run"
    assert losses(run) == losses(by_hand)
    assert all(torch.equal(tensor, trained(run)[name]) for name, tensor in trained(by_hand).items())
    lines = ["training.batch_size=2", "training.gradient_accumulation_steps=4"]
    assert record["memory"]["shortage"] == lines
    warnings = [line for line in said.lines if "did not fit" in line]
    assert len(warnings) == 2  # halved twice in the first step, and never again
    assert warnings[-1] == f"warning: step 1 did not fit into memory; it is taken again as if with {' '.join(lines)}"
    state = json.loads(next((run / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["progress"]["pieces"] == 4


def test_then_activations_are_recomputed(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand = tmp_path / "by_hand"
    small = "max_steps: 3, batch_size: 1, gradient_accumulation_steps: 4, gradient_checkpointing: true"
    finetune(load_recipe(written(small), [f"output.dir={by_hand}"]))
    monkeypatch.setattr(ClassificationObjective, "forward", holding(1, only_recomputing=True))
    record = finetune(load_recipe(written("max_steps: 3, batch_size: 4")))
    assert losses(tmp_path / "run") == losses(by_hand)
    assert record["memory"]["shortage"][-1] == "training.gradient_checkpointing=true"


def test_a_run_that_shrank_goes_on_as_small_as_it_was(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written("max_steps: 6, batch_size: 4")
    monkeypatch.setattr(ClassificationObjective, "forward", holding(1, only_recomputing=True))
    finetune(load_recipe(path, [f"output.dir={tmp_path / 'whole'}"]))
    finetune(load_recipe(path))
    run, said = tmp_path / "run", Said()
    (run / "result.json").unlink()
    newest = max((run / "checkpoints").iterdir(), key=lambda one: int(one.name.removeprefix("step-")))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    finetune(load_recipe(path), listener=said)
    assert any("resuming after step 4" in line for line in said.lines)
    assert not any("did not fit" in line for line in said.lines)
    assert losses(run) == losses(tmp_path / "whole")
    assert all(torch.equal(tensor, trained(run)[name]) for name, tensor in trained(tmp_path / "whole").items())


def test_what_does_not_fit_at_all_names_what_would_help(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClassificationObjective, "forward", holding(0))
    with pytest.raises(OutOfMemoryError, match=r"step 1, one row at a time .*model\.max_length.*no checkpoint"):
        finetune(load_recipe(written("max_steps: 2, batch_size: 4")))
    assert not (tmp_path / "run" / "result.json").exists()


def without_kernels(self: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """An objective's forward where there is no room for oneDNN's kernels."""
    if unwrapped(self.model).onednn:
        raise RuntimeError("could not create a primitive")
    return FORWARD(self, batch)


@pytest.mark.skipif(not gemm._works(), reason="this build of torch lacks oneDNN's linear layer")
def test_onednn_is_given_up_before_anything_slower(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, by_hand, run, said = written("max_steps: 6"), tmp_path / "by_hand", tmp_path / "run", Said()
    finetune(load_recipe(path, [f"output.dir={by_hand}"]))
    monkeypatch.setattr(ClassificationObjective, "forward", without_kernels)
    record = finetune(load_recipe(path, ["training.gemm=onednn"]), listener=said)
    assert record["memory"]["shortage"] == ["training.gemm=default"]
    assert len([line for line in said.lines if "did not fit" in line]) == 1
    assert losses(run) == losses(by_hand)
    assert all(torch.equal(tensor, trained(run)[name]) for name, tensor in trained(by_hand).items())
    # Taken up again, it goes on as it was.
    (run / "result.json").unlink()
    newest = max((run / "checkpoints").iterdir(), key=lambda one: int(one.name.removeprefix("step-")))
    shutil.rmtree(newest)
    finetune(load_recipe(path, ["training.gemm=onednn"]), listener=(again := Said()))
    assert any("resuming after step 4" in line for line in again.lines)
    assert not any("did not fit" in line for line in again.lines)
    assert losses(run) == losses(by_hand)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
def test_a_real_limit(written: Written, tmp_path: Path) -> None:
    long = ["model.base=gpt2-mini", "model.max_length=256", "training.max_steps=2", "training.gemm=onednn"]
    texts = "\n".join(f"{'ham' if i % 2 else 'spam'},{i} " + "free prize call " * 60 for i in range(120))
    (tmp_path / "messages.csv").write_text("label,text\n" + texts + "\n")
    path = written("batch_size: 64")
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(path), "300", *long], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "did not fit into memory" in done.stdout
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["steps"] == 2
    lines = record["memory"]["shortage"]
    if gemm._works():
        assert lines.pop(0) == "training.gemm=default"
    assert lines[0].startswith("training.batch_size=")


@pytest.mark.parametrize(("recomputing", "advised"), [("false", "gradient_checkpointing=true"), ("true", "max_length")])
def test_an_optimizer_in_the_backward_pass_is_advised_what_it_can_do(
    written: Written, monkeypatch: pytest.MonkeyPatch, recomputing: str, advised: str
) -> None:
    monkeypatch.setattr(ClassificationObjective, "forward", holding(0))
    settings = f"max_steps: 2, max_grad_norm: null, optimizer_in_backward: true, gradient_checkpointing: {recomputing}"
    with pytest.raises(OutOfMemoryError, match=rf"step 1 \(try .*{advised} or a smaller batch") as raised:
        finetune(load_recipe(written(settings)))
    assert "accumulation" not in str(raised.value)


def test_prediction_halves_a_batch_that_does_not_fit() -> None:
    lengths = np.array([5, 3, 4, 2, 1, 6, 2])
    asked: list[int] = []

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        asked.append(len(batch["rows"]))
        if asked[-1] > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return torch.stack([batch["rows"], -batch["rows"]], dim=1).float()

    logits = predict_logits(
        forward,
        lengths,
        collate=lambda rows: {"rows": torch.from_numpy(rows)},
        device=torch.device("cpu"),
        batch_size=7,
    )
    assert np.array_equal(logits[:, 0], np.arange(7))
    assert max(asked[1:]) == 4
    with pytest.raises(RuntimeError, match="another reason"):
        predict_logits(
            lambda batch: (_ for _ in ()).throw(RuntimeError("another reason")),
            lengths,
            collate=lambda rows: {"rows": torch.from_numpy(rows)},
            device=torch.device("cpu"),
        )


def test_pieces_hold_the_same_rows_in_the_same_order() -> None:
    rows = [np.arange(5), np.arange(5, 8)]
    assert split_rows(rows, 1) is rows
    for pieces in (2, 4, 8):
        cut = split_rows(rows, pieces)
        assert np.array_equal(np.concatenate(cut), np.arange(8))
        assert max(map(len, cut)) == -(-5 // pieces)
    assert [len(part) for part in split_rows([np.empty(0, dtype=np.int64)], 4)] == [0]


def test_recipe_lines_keep_the_effective_batch() -> None:
    settings = TrainingSettings(batch_size=6, gradient_accumulation_steps=2)
    assert recipe_lines(settings, Progress()) == []
    lines = recipe_lines(settings, Progress(pieces=4, recomputing=True))
    assert lines == [
        "training.batch_size=2", "training.gradient_accumulation_steps=6", "training.gradient_checkpointing=true",
    ]  # fmt: skip
    tokens = TrainingSettings(max_tokens_per_batch=1000)
    assert recipe_lines(tokens, Progress(pieces=2))[0] == "training.max_tokens_per_batch=500"


@pytest.mark.parametrize(
    ("message", "short"),
    [
        ("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory", True),
        ("could not create a primitive", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_libraries_say_when_memory_is_out(message: str, short: bool) -> None:
    assert is_out_of_memory(RuntimeError(message)) is short
