"""The whole way: a recipe in, an artifact that stock libraries load out; killed, resumed, repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pico import pico_cache
from safetensors.torch import load_file

from toolkit.config.load import load_recipe
from toolkit.config.training import TrainingSettings
from toolkit.errors import CheckpointError, DivergedError, OutputError, Problem
from toolkit.finetune import finetune
from toolkit.listener import Silent
from toolkit.memory import prefix
from toolkit.memory.prefix_rule import BATCH_TOKENS, worth_keeping
from toolkit.models.stored import StoredTensors
from toolkit.models.streamed import StreamedBlocks
from toolkit.report.run_record import MemoryRecord, RunRecord
from toolkit.tasks import classification
from toolkit.training import offload

__all__ = ["pico_cache"]

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "train.py"
HAM = ["are we still on for dinner tonight", "see you at the station", "call me when you are home", "ok thanks dear"]
SPAM = ["you are a winner of a cash award", "free prize call now", "claim your reward today", "win a free phone now"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """120 short messages of two labels, no two alike."""
    path = tmp_path / "messages.csv"
    rows = [f"{'ham' if i % 2 else 'spam'},{(HAM if i % 2 else SPAM)[i // 2 % 4]} {i}" for i in range(120)]
    path.write_text("label,text\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def recipe_file(tmp_path: Path, data: Path, pico_cache):
    """Write a recipe of a few steps on a pico model."""

    def write(family: str = "gpt2", extra: str = "") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"model: {{base: '{pico_cache(family)}', max_length: 32}}\n"
            f"data: {{source: '{data}'}}\n"
            f"training: {{max_steps: 14, batch_size: 4, gradient_accumulation_steps: 2, learning_rate: 1e-2}}\n"
            f"evaluation: {{every: 5}}\noutput: {{dir: '{tmp_path / 'run'}', save_every: 3, log_every: 1}}\n{extra}"
        )
        return path

    return write


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = sorted(folder.glob("*.safetensors"))
    assert found, folder
    return {name: tensor for file in found for name, tensor in load_file(file).items()}


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("validation")) for line in lines if "phase" not in line]


METHODS = ["method: {name: full}", "method: {name: head}", "method: {name: last_n, n: 1}", "method: {name: lora, r: 4}"]
QUANTISED = [
    "method: {name: lora, r: 4}\nquantization: {bits: 4}",
    "method: {name: lora, r: 4}\nquantization: {bits: 8}",
]


def check_memory(memory: MemoryRecord, metrics: Path) -> None:
    """Measured and predicted of the same thing, by phase; tiny models are the framework and little else."""
    names = [phase["name"] for phase in memory["phases"]]
    assert [name for name in names if name != "frozen blocks"] == [
        "tokenise", "load", "train", "evaluate", "export", "baselines",
    ]  # fmt: skip
    assert max(phase["rss"] for phase in memory["phases"]) == memory["rss_bytes"] >= memory["peak_bytes"]
    assert memory["kind"] == "resident set"
    assert memory["predicted_bytes"] == sum(memory["predicted"].values())
    assert memory["predicted_bytes"] == pytest.approx(memory["peak_bytes"], rel=0.25)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["phase"] for line in lines if "phase" in line] == memory["phases"]
    held = [line["memory"] for line in lines if "loss" in line]
    assert held
    # The kernel counts resident pages by core: what it says now and what it says was the most may be 2 MiB apart.
    assert all(0 < one["rss"] <= memory["rss_bytes"] + 2**21 for one in held)
    assert all(one["allocated"] == one["reserved"] == 0 for one in held)


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("method", METHODS + QUANTISED)
def test_every_method_leaves_the_run_folder_of_the_contract(recipe_file, tmp_path, family, method):
    record: RunRecord = finetune(load_recipe(recipe_file(family, method)))
    run = tmp_path / "run"
    kind = "adapter" if "lora" in method else "model"
    for name in (
        "recipe.yaml",
        "result.json",
        "metrics.jsonl",
        "README.md",
        "report.html",
        "curves.png",
        "memory.png",
        kind,
    ):
        assert (run / name).exists(), name
    assert json.loads((run / "result.json").read_text()) == record
    assert record["steps"] == 14
    assert record["data"]["rows"] == {"train": 84, "validation": 12, "test": 24}
    assert 0 < record["parameters"]["trainable"] <= record["parameters"]["total"]
    assert {"loss", "accuracy", "f1_macro"} <= set(record["metrics"]["test"])
    assert record["metrics"]["baselines"]["majority"]["accuracy"] == pytest.approx(0.5, abs=0.1)
    assert record["metrics"]["baselines"]["tfidf_logistic_regression"]["rows"] == 84
    check_memory(record["memory"], run / "metrics.jsonl")
    assert record["timing"]["tokens_per_second"] > 0
    assert record["base"]["offline"] is False
    from toolkit.inference.predict import Classifier

    prediction = Classifier.load(run).predict(["free prize call now"])[0]
    assert prediction.label in ("ham", "spam")
    assert sum(prediction.scores.values()) == pytest.approx(1, abs=1e-6)


IMPORTED = """
import sys
from toolkit.config.load import load_recipe
from toolkit.config.training import TrainingSettings
from toolkit.finetune import finetune
finetune(load_recipe(sys.argv[1], ["evaluation.baselines=false"]))
print(*sys.modules)
import scipy.optimize, bitsandbytes
from peft.import_utils import is_bnb_available
from transformers.utils import is_scipy_available
assert is_bnb_available() and is_scipy_available()
"""


@pytest.mark.parametrize(
    ("method", "spared"), [("{name: lora, r: 4}", {"bitsandbytes"}), ("{name: last_n}", {"bitsandbytes", "peft"})]
)
def test_a_run_imports_what_its_recipe_needs(recipe_file, method, spared):
    command = [sys.executable, "-c", IMPORTED, str(recipe_file("gpt2", f"method: {method}"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = set(done.stdout.split())
    assert {"torch", "transformers"} <= loaded
    assert not (spared | {"scipy", "sklearn", "pandas", "datasets", "pyarrow.parquet"}) & loaded


def test_baselines_give_way_where_memory_is_short(recipe_file, monkeypatch):
    monkeypatch.setattr("toolkit.runtime.available_bytes", lambda: 255 << 20)
    record = finetune(load_recipe(recipe_file()))
    assert record["metrics"]["baselines"] is None
    assert record["metrics"]["test"]["rows"] == 24


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_it_learns(recipe_file, family):
    recipe = load_recipe(recipe_file(family, "method: {name: full}"), ["training.max_steps=40"])
    record = finetune(recipe)
    assert record["metrics"]["test"]["accuracy"] == 1.0


def test_the_same_recipe_twice_is_bit_equal(recipe_file, tmp_path):
    path = recipe_file()
    for name in ("a", "b"):
        finetune(load_recipe(path, [f"output.dir={tmp_path / name}"]))
    assert same_weights(tmp_path / "a" / "adapter", tmp_path / "b" / "adapter")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_the_public_name_trains(recipe_file, tmp_path):
    import toolkit

    assert toolkit.finetune(load_recipe(recipe_file(), ["training.max_steps=1"]))["steps"] == 1


def test_another_seed_is_another_run(recipe_file, tmp_path):
    path = recipe_file()
    finetune(load_recipe(path, [f"output.dir={tmp_path / 'a'}"]))
    finetune(load_recipe(path, [f"output.dir={tmp_path / 'b'}", "training.seed=7"]))
    assert not same_weights(tmp_path / "a" / "adapter", tmp_path / "b" / "adapter")


@pytest.mark.parametrize("rows", [8, 4, 2, 1])
def test_accumulation_changes_no_loss_and_no_weight(recipe_file, tmp_path, rows, pico_no_dropout):
    """Also on the short last window of an epoch: 84 rows are ten windows of 8 and one of 4."""
    path = recipe_file("gpt2", "method: {name: full}")
    settings = ["training.epochs=2", "training.learning_rate=1e-3", f"model.base={pico_no_dropout}"]
    whole = ["training.batch_size=8", "training.gradient_accumulation_steps=1", f"output.dir={tmp_path / 'whole'}"]
    parts = [
        f"training.batch_size={rows}", f"training.gradient_accumulation_steps={8 // rows}",
        f"output.dir={tmp_path / 'parts'}",
    ]  # fmt: skip
    for chosen in (whole, parts):
        finetune(load_recipe(path, settings + chosen))
    a, b = weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model")
    for name in a:
        assert torch.allclose(a[name], b[name], atol=2e-5), name


@pytest.fixture
def pico_no_dropout(pico_cache, tmp_path: Path) -> Path:
    """The pico GPT-2 without dropout, whose masks depend on how a batch is cut."""
    folder = tmp_path / "no-dropout"
    shutil.copytree(pico_cache("gpt2"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}))
    return folder


def launch(recipe: Path, *overrides: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [sys.executable, *launcher, str(SCRIPT), str(recipe), *overrides]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    output, _ = process.communicate(timeout=240)
    return output.decode()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on_bit_equal(recipe_file, tmp_path, number, code):
    path = recipe_file()
    finetune(load_recipe(path, [f"output.dir={tmp_path / 'plain'}", "output.save_every=end"]))
    stopped = tmp_path / "stopped"
    process = launch(path, f"output.dir={stopped}", "output.save_every=end")
    while not (stopped / "metrics.jsonl").exists() or not (stopped / "metrics.jsonl").read_bytes():
        assert process.poll() is None, finish(process)
        time.sleep(0.01)
    process.send_signal(number)
    output = finish(process)
    assert process.returncode == code, output
    assert f"stopped by {number.name} after step" in output
    assert "Traceback" not in output
    assert len(list((stopped / "checkpoints").glob("step-*"))) == 1
    finetune(load_recipe(path, [f"output.dir={stopped}", "output.save_every=end"]))
    assert losses(stopped) == losses(tmp_path / "plain")
    assert same_weights(stopped / "adapter", tmp_path / "plain" / "adapter")


def test_evaluating_more_often_changes_no_step(recipe_file, tmp_path):
    """Dropout comes back after an evaluation, and not in what is frozen below the trained blocks."""
    path = recipe_file("gpt2", "method: {name: last_n, n: 1}")
    curves = []
    for every in ("end", 1):
        run = tmp_path / f"run-{every}"
        settings = ["training.prefix_cache.enabled=false", f"evaluation.every={every}", f"output.dir={run}"]
        finetune(load_recipe(path, settings))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert len(curves[0]) == 14
    assert curves[0] == curves[1]


def test_two_processes_give_the_single_process_curve(recipe_file, tmp_path, pico_no_dropout):
    path = recipe_file("gpt2", "method: {name: full}")
    common = [f"model.base={pico_no_dropout}", "training.gradient_accumulation_steps=1", "training.max_steps=12"]
    finetune(load_recipe(path, [*common, "training.batch_size=8", f"output.dir={tmp_path / 'one'}"]))
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(_free_port()))
    both = launch(path, *common, "training.batch_size=4", f"output.dir={tmp_path / 'two'}", launcher=launcher)
    output = finish(both)
    assert both.returncode == 0, output
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a["loss"] if isinstance(a, dict) else a) == pytest.approx(
            b["loss"] if isinstance(b, dict) else b, rel=1e-4
        )
    assert json.loads((tmp_path / "two" / "result.json").read_text())["environment"]["processes"] == 2


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_finished_run_is_not_run_again(recipe_file, tmp_path):
    path = recipe_file()
    first = finetune(load_recipe(path))
    before = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert finetune(load_recipe(path)) == first
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == before
    again = finetune(load_recipe(path, ["output.overwrite=true", "training.max_steps=2"]))
    assert again["steps"] == 2


def test_a_changed_recipe_is_refused_by_field(recipe_file, tmp_path):
    path = recipe_file()
    finetune(load_recipe(path))
    with pytest.raises(OutputError) as caught:
        finetune(load_recipe(path, ["training.learning_rate=5e-3", "method.r=8"]))
    assert [problem.field for problem in caught.value.problems] == ["method.r", "training.learning_rate"]


def test_changed_data_is_refused_on_resume(recipe_file, tmp_path, data):
    path = recipe_file()
    with pytest.raises(DivergedError):
        finetune(load_recipe(path, ["training.learning_rate=1e30", "output.save_every=1"]))
    data.write_text(data.read_text().replace("dinner", "supper"))
    with pytest.raises(Exception, match=r"messages\.csv|split"):
        finetune(load_recipe(path, ["training.learning_rate=1e30", "output.save_every=1"]))


def test_every_checkpoint_bad_names_each(recipe_file, tmp_path):
    path = recipe_file()
    finetune(load_recipe(path))
    (tmp_path / "run" / "result.json").unlink()
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(saved) >= 2
    for folder in saved:
        (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        finetune(load_recipe(path))
    assert len(caught.value.problems) == len(saved)
    assert "state.json does not match its checksum" in str(caught.value)


def test_a_diverged_run_exits_3_and_its_last_checkpoint_is_finite(recipe_file, tmp_path):
    process = launch(recipe_file(), "training.learning_rate=1e15", "output.save_every=1")
    output = finish(process)
    assert process.returncode == 3, output
    assert "training diverged" in output
    assert "Traceback" not in output
    saved = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved
    for folder in saved:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / "trainable.safetensors").values())
    assert not (tmp_path / "run" / "result.json").exists()


HOLD = """
import fcntl, os, sys, time
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
os.write(lock, str(os.getpid()).encode())
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_in_use_is_refused_with_the_pid(recipe_file, tmp_path):
    (tmp_path / "run").mkdir()
    holder = [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(holder, stdout=subprocess.PIPE) as held:
        assert held.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=f"in use by process {held.pid}"):
            finetune(load_recipe(recipe_file()))
        held.kill()
    assert finetune(load_recipe(recipe_file(), ["training.max_steps=1"]))["steps"] == 1


def test_a_folder_with_other_files_is_left_alone(recipe_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    for overrides in ([], ["output.overwrite=true"]):
        with pytest.raises(OutputError, match="holds other files"):
            finetune(load_recipe(recipe_file(), overrides))
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_early_stopping_keeps_the_best_weights(recipe_file, tmp_path):
    extra = "evaluation: {every: 1, early_stopping_patience: 3, metric: loss}\n"
    path = recipe_file()
    path.write_text(path.read_text().replace("evaluation: {every: 5}\n", extra))
    record = finetune(load_recipe(path, ["training.max_steps=200", "training.learning_rate=3e-2"]))
    assert record["status"] == "stopped early"
    assert record["steps"] < 200
    best = record["best"]
    assert best["step"] < record["steps"]
    assert record["metrics"]["validation"]["loss"] == pytest.approx(best["value"], rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_language_modeling_lowers_the_loss_and_a_classifier_starts_from_it(recipe_file, tmp_path, family):
    path = recipe_file(family, "objective: language_modeling\n")
    record = finetune(load_recipe(path, ["training.max_steps=60", "training.learning_rate=3e-3"]))
    first = losses(tmp_path / "run")[0]
    assert record["metrics"]["test"]["loss"] < first - 0.5
    assert record["metrics"]["test"]["perplexity"] > 1
    second = recipe_file(family)
    tuned = finetune(load_recipe(second, [f"model.base={tmp_path / 'run' / 'model'}", f"output.dir={tmp_path / 'b'}"]))
    assert tuned["base"]["used"] == str(tmp_path / "run" / "model")


def test_gradient_checkpointing_changes_no_weight(recipe_file, tmp_path, pico_no_dropout):
    path = recipe_file("gpt2", "method: {name: full}")
    for name, value in (("a", "false"), ("b", "true"), ("c", "1")):
        overrides = [f"model.base={pico_no_dropout}", f"training.gradient_checkpointing={value}"]
        finetune(load_recipe(path, [*overrides, f"output.dir={tmp_path / name}"]))
    a, b, c = (weights(tmp_path / name / "model") for name in "abc")
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-6), name
        assert torch.allclose(a[name], c[name], atol=1e-6), name


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("method", ["{name: full}", "{name: lora, r: 4}"])
def test_activations_that_leave_the_device_change_no_bit(recipe_file, tmp_path, family, method, monkeypatch):
    travelled = []
    moved = offload._Moved
    monkeypatch.setattr(offload, "OFFLOADED_FROM", 1 << 10)
    monkeypatch.setattr(offload, "_Moved", lambda storage: travelled.append(1) or moved(storage))
    # A CPU that counts as a GPU.
    monkeypatch.setattr(TrainingSettings, "offloads", lambda self, device: self.activation_offload)
    path = recipe_file(family, f"method: {method}")
    for name, overrides in {"a": ["false"], "b": ["true"], "c": ["true", "training.gradient_checkpointing=1"]}.items():
        first, *more = overrides
        finetune(load_recipe(path, [f"training.activation_offload={first}", *more, f"output.dir={tmp_path / name}"]))
        assert bool(travelled) is (name != "a")
        travelled.clear()
    assert losses(tmp_path / "a") == losses(tmp_path / "b") == losses(tmp_path / "c")
    kind = "adapter" if "lora" in method else "model"
    assert same_weights(tmp_path / "a" / kind, tmp_path / "b" / kind)
    assert same_weights(tmp_path / "a" / kind, tmp_path / "c" / kind)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_cpu_says_that_it_has_no_other_memory(recipe_file, wanted):
    lines = []
    told = Silent()
    told.say = lines.append
    finetune(load_recipe(recipe_file(), [f"training.activation_offload={str(wanted).lower()}"]), listener=told)
    line = "warning: training.activation_offload does nothing on cpu, whose memory is the machine's"
    assert (line in lines) is wanted


def test_precision_bf16_runs_and_is_recorded(recipe_file):
    record = finetune(load_recipe(recipe_file(), ["training.precision=bf16"]))
    assert record["environment"]["precision"] == "bf16"


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize(
    "method", ["{name: last_n}", "{name: head}", "{name: lora, r: 4, layers: last_1, lora_dropout: 0.0}"]
)
def test_kept_states_of_frozen_blocks_change_no_loss(recipe_file, tmp_path, family, method, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    path = recipe_file(family, f"method: {method}")
    blocks = 2 if "head" in method else 1
    runs = {"plain": "training.prefix_cache.enabled=false", "kept": "training.prefix_cache.dtype=fp32", "half": ""}
    records = {}
    for name, override in runs.items():
        overrides = [f"output.dir={tmp_path / name}", *([override] if override else [])]
        records[name] = finetune(load_recipe(path, overrides))
    assert records["plain"]["prefix_cache"] is None
    assert records["kept"]["prefix_cache"]["blocks"] == blocks
    assert records["kept"]["prefix_cache"]["dtype"] == "fp32"
    assert records["half"]["prefix_cache"]["bytes"] < records["kept"]["prefix_cache"]["bytes"]
    assert losses(tmp_path / "kept")[:4] == pytest.approx(losses(tmp_path / "plain")[:4], rel=1e-5)
    assert losses(tmp_path / "half")[:2] == pytest.approx(losses(tmp_path / "plain")[:2], rel=1e-2)
    accuracies = {name: record["metrics"]["test"]["accuracy"] for name, record in records.items()}
    assert accuracies["kept"] == accuracies["plain"]
    again = finetune(load_recipe(path, [f"output.dir={tmp_path / 'again'}"]))
    # Neither for training nor for judging did a frozen block run.
    assert again["prefix_cache"]["seconds"] == 0.0
    assert losses(tmp_path / "again") == losses(tmp_path / "half")
    assert again["metrics"] == records["half"]["metrics"]
    judged = {name: record["metrics"]["test"]["loss"] for name, record in records.items()}
    assert judged["kept"] == pytest.approx(judged["plain"], rel=1e-5)


def test_a_disk_without_room_for_states_to_judge_loses_nothing(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    path, lines, keep = recipe_file("gpt2", "method: {name: last_n}"), [], classification.keep_prefixes
    common = ["training.gemm=default", "training.prefix_cache.dtype=fp32"]
    kept = finetune(load_recipe(path, [*common, f"output.dir={tmp_path / 'kept'}"]))

    def full(model, tables, plan, **rest):
        if plan.judged is None:
            raise OutputError(Problem("prefix", "output", "No space left on device", "more room"))
        return keep(model, tables, plan, **rest)

    monkeypatch.setattr(classification, "keep_prefixes", full)
    told = Silent()
    told.say = lines.append
    record = finetune(load_recipe(path, [*common, f"output.dir={tmp_path / 'full'}"]), listener=told)
    assert any("no states of the rows to judge are kept: prefix" in line for line in lines)
    assert record["metrics"]["test"]["loss"] == pytest.approx(kept["metrics"]["test"]["loss"], rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("method", ["{name: last_n}", "{name: head}", "{name: lora, r: 4, layers: last_1}"])
def test_frozen_blocks_that_stay_on_disk_change_no_bit(recipe_file, tmp_path, family, method, monkeypatch):
    path = recipe_file(family, f"method: {method}")
    # Each of the two cache folders would measure for itself which library multiplies.
    gemm = "training.gemm=default"
    blocks, reads = 2 if "head" in method else 1, []
    load_block = StreamedBlocks.loaded
    monkeypatch.setattr(StreamedBlocks, "loaded", lambda self, n: reads.append(n) or load_block(self, n))
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "one"))
    streamed = finetune(load_recipe(path, [gemm, f"output.dir={tmp_path / 'streamed'}"]))
    assert set(reads) == set(range(blocks))
    reads.clear()
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "two"))
    monkeypatch.setattr("toolkit.tasks.classification.streamed_blocks", lambda *_, **__: None)
    whole = finetune(load_recipe(path, [gemm, f"output.dir={tmp_path / 'whole'}"]))
    assert not reads
    kind = streamed["artifact"]["kind"]
    assert same_weights(tmp_path / "streamed" / kind, tmp_path / "whole" / kind)
    assert losses(tmp_path / "streamed") == losses(tmp_path / "whole")
    assert streamed["metrics"] == whole["metrics"]
    assert streamed["parameters"] == whole["parameters"]


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_one_epoch_streams_its_frozen_blocks_too(recipe_file, tmp_path, family):
    once = ["training.max_steps=null", "training.epochs=1", "training.gemm=default"]
    path = recipe_file(family, "method: {name: last_n}")
    runs = {"kept": "training.prefix_cache.dtype=fp32", "plain": "training.prefix_cache.enabled=false"}
    records = {}
    for name, override in runs.items():
        records[name] = finetune(load_recipe(path, [*once, override, f"output.dir={tmp_path / name}"]))
    assert records["plain"]["prefix_cache"] is None
    assert records["kept"]["prefix_cache"]["blocks"] == 1
    kept, plain = ([one for one in losses(tmp_path / run) if isinstance(one, float)] for run in runs)
    assert kept == pytest.approx(plain, rel=1e-4)
    # Rows that are seen less than once, and blocks that have to be in memory, gain nothing.
    for seldom in (["training.max_steps=9"], [*once, "model.random_init=true"]):
        assert not worth_keeping(load_recipe(path, seldom), blocks=1, rows=84)
    assert worth_keeping(load_recipe(path, once), blocks=1, rows=84)


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_streamed_models_are_judged_so_many_tokens_at_a_time(recipe_file, tmp_path, family, monkeypatch):
    path = recipe_file(family, "method: {name: last_n}")
    sizes, through = [], classification.through_frozen

    def watched(model, batches, *, blocks):
        sizes.extend(batch["input_ids"].numel() for batch in batches)
        return through(model, batches, blocks=blocks)

    monkeypatch.setattr(classification, "through_frozen", watched)
    # As where there is no room for their states.
    monkeypatch.setattr(prefix, "JUDGED", ())
    found = {}
    for budget in (1_024, 60):
        monkeypatch.setitem(BATCH_TOKENS, "cpu", budget)
        sizes.clear()
        record = finetune(load_recipe(path, ["training.gemm=default", f"output.dir={tmp_path / str(budget)}"]))
        assert 0 < max(sizes) <= budget
        found[budget] = record["metrics"]["test"]
    assert len(sizes) > 4
    assert found[60]["loss"] == pytest.approx(found[1_024]["loss"], rel=1e-5)
    assert found[60]["confusion"] == found[1_024]["confusion"]


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize(
    "override", ["method={name: lora, r: 4}", "method={name: last_n}", "training.gradient_checkpointing=true"]
)
def test_a_token_embedding_that_stays_on_disk_changes_no_bit(recipe_file, tmp_path, family, override, monkeypatch):
    path = recipe_file(family, "method: {name: lora, r: 4}")
    common = [override, "training.prefix_cache.enabled=false"]
    reads, rows = [], StoredTensors.rows
    monkeypatch.setattr(StoredTensors, "rows", lambda self, name, ids: reads.append(name) or rows(self, name, ids))
    stored = finetune(load_recipe(path, [*common, f"output.dir={tmp_path / 'stored'}"]))
    assert len(reads) >= stored["steps"]
    reads.clear()
    monkeypatch.setattr("toolkit.tasks.classification.streamed_blocks", lambda *_, **__: None)
    whole = finetune(load_recipe(path, [*common, f"output.dir={tmp_path / 'whole'}"]))
    assert not reads
    kind = stored["artifact"]["kind"]
    assert same_weights(tmp_path / "stored" / kind, tmp_path / "whole" / kind)
    assert losses(tmp_path / "stored") == losses(tmp_path / "whole")
    assert stored["metrics"] == whole["metrics"]
    assert stored["parameters"] == whole["parameters"]


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_optimizer_in_the_backward_pass_changes_no_bit(recipe_file, tmp_path, family, optimizer):
    path = recipe_file(family, "method: {name: full}")
    common = [
        "training.gradient_accumulation_steps=1", "training.max_grad_norm=null", f"training.optimizer={optimizer}",
    ]  # fmt: skip
    runs = {name: tmp_path / name for name in ("after", "inside", "resumed")}
    for name, value in {"after": "false", "inside": "true"}.items():
        finetune(load_recipe(path, [*common, f"output.dir={runs[name]}", f"training.optimizer_in_backward={value}"]))
    assert same_weights(runs["inside"] / "model", runs["after"] / "model")
    assert losses(runs["inside"]) == losses(runs["after"])
    shutil.copytree(runs["inside"], runs["resumed"])
    unfinish(runs["resumed"])
    finetune(load_recipe(path, [*common, f"output.dir={runs['resumed']}", "training.optimizer_in_backward=true"]))
    assert same_weights(runs["resumed"] / "model", runs["after"] / "model")


def test_an_optimizer_in_the_backward_pass_stops_before_it_updates_by_a_loss_that_is_none(recipe_file, tmp_path):
    overrides = [
        "training.gradient_accumulation_steps=1", "training.max_grad_norm=null", "training.optimizer_in_backward=true",
        "training.learning_rate=1e12", "training.optimizer=sgd", "output.save_every=1",
    ]  # fmt: skip
    with pytest.raises(DivergedError, match="training diverged"):
        finetune(load_recipe(recipe_file("gpt2", "method: {name: full}"), overrides))
    for file in (tmp_path / "run" / "checkpoints").glob("*/trainable.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values())


def unfinish(run: Path) -> None:
    """Take a run's record and its newest checkpoint away."""
    (run / "result.json").unlink()
    newest = max((run / "checkpoints").iterdir(), key=lambda one: int(one.name.removeprefix("step-")))
    shutil.rmtree(newest)


def test_states_that_may_not_be_kept_are_computed_in_every_epoch(recipe_file):
    record = finetune(
        load_recipe(recipe_file("gpt2", "method: {name: last_n}"), ["training.prefix_cache.max_gib=1e-9"])
    )
    assert record["prefix_cache"] is None
    assert record["steps"] == 14


def test_token_batches_train_stop_and_go_on_bit_equal(recipe_file, tmp_path):
    path = recipe_file("gpt2", "method: {name: full}")
    common = ["training.max_tokens_per_batch=64", "training.epochs=2", "output.save_every=2"]
    whole = finetune(load_recipe(path, [*common, f"output.dir={tmp_path / 'whole'}"]))
    again = tmp_path / "again"
    finetune(load_recipe(path, [*common, f"output.dir={again}"]))
    for name in ("result.json", "model"):
        target = again / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    shutil.rmtree(max((again / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name[5:])))
    record = finetune(load_recipe(path, [*common, f"output.dir={again}"]))
    assert record["epochs"] == whole["epochs"] == 2.0
    assert same_weights(tmp_path / "whole" / "model", again / "model")
    assert losses(tmp_path / "whole") == losses(again)


def test_a_tracker_gets_the_figures(recipe_file, tmp_path):
    pytest.importorskip("tensorboard")
    path = recipe_file()
    finetune(load_recipe(path, ["output.tracker=tensorboard", "training.max_steps=6", "evaluation.every=3"]))
    events = list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert events
    assert any(b"validation/accuracy" in file.read_bytes() for file in events)
