"""P10: every row of bad_inputs.md through the command line: one line a problem, its exit code, nothing written."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ACCEPTED, LIGHT, RECIPE, TRAIN, Build, Case, case_id, recipe, set_to, write_world
from safetensors.torch import load_file, save_file
from trained import LORA, MAX_LENGTH, build_run, facts_of

from toolkit.cli import main
from toolkit.config.schema import ModelSettings
from toolkit.export.artifact import write_manifest
from toolkit.models.base import resolve_base

DRIVER = Path(__file__).with_name("drive.py")
HERE = Path(__file__).resolve().parent.parent.parent
PicoFolder = Callable[[str], Path]
Snapshot = dict[str, str]
# A hundred command lines in one fixture: on a machine that others use, that is minutes of wall time.
pytestmark = pytest.mark.timeout(900)


def snapshot(folder: Path) -> Snapshot:
    """Return what is in a folder, by content; a run's lock file says nothing of the run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir():
            found[str(path.relative_to(folder))] = "folder"
    return found


def check_lines(stderr: str, expected: Any) -> None:
    lines = stderr.splitlines()
    assert len(lines) == len(expected), stderr
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(f"({pattern}).*", line), (pattern, line)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def toolkit(*words: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toolkit", *words],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        **options,
    )


def cpu_seconds() -> float:
    """Return the processor time of all children so far: the wall clock says how busy the machine is."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# Rows that are answered without torch: all of them in one fresh process.

CASES = [*LIGHT, *ACCEPTED]
Answers = list[tuple[dict[str, Any], Snapshot, Snapshot]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, pico_cache: PicoFolder) -> Answers:
    root, jobs, before = tmp_path_factory.mktemp("worlds"), [], []
    base = pico_cache("gpt2")
    for number, case in enumerate(CASES):
        folder = root / str(number)
        folder.mkdir()
        write_world(folder, base)
        case.build(folder)
        command = ("validate", "recipe.yaml") if case in ACCEPTED else case.command
        jobs.append({"folder": str(folder), "command": command, "environment": dict(case.environment)})
        before.append(snapshot(folder))
        if command[:2] == ("predict", "run"):
            # Stdin and options are wrong whatever the model: they are looked at first.
            assert not (folder / "run").exists()
    driven = subprocess.run(
        [sys.executable, str(DRIVER)],
        input=json.dumps(jobs),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert driven.returncode == 0, driven.stderr
    after = [snapshot(Path(job["folder"])) for job in jobs]
    return list(zip(json.loads(driven.stdout), before, after, strict=True))


@pytest.mark.parametrize("number", range(len(LIGHT)), ids=[case_id(case) for case in LIGHT])
def test_row_without_torch(answers: Answers, number: int) -> None:
    case, (answer, before, after) = CASES[number], answers[number]
    check_lines(answer["stderr"], case.expected)
    assert answer["code"] == case.code
    assert "Traceback" not in answer["stderr"]
    assert after == before
    assert answer["seconds"] < 2
    assert not answer["torch"]


@pytest.mark.parametrize("number", range(len(LIGHT), len(CASES)), ids=[case_id(case) for case in ACCEPTED])
def test_row_that_is_accepted(answers: Answers, number: int) -> None:
    answer, before, after = answers[number]
    assert (answer["code"], answer["stderr"]) == (0, "")
    assert "recipe.yaml: valid" in answer["stdout"]
    assert after == before
    assert not answer["torch"]
    if CASES[number].row == "60":
        assert "warning: data.csv:9: label: 1 texts occur with two labels" in answer["stdout"]


# Rows that need the model: the same command line, in this process, which has torch already.


@pytest.fixture
def world(tmp_path: Path, pico_cache: PicoFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "world"
    folder.mkdir()
    write_world(folder, pico_cache("gpt2"))
    monkeypatch.chdir(folder)
    return folder


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; return its exit code and what it wrote to stderr."""

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(list(words))
        return code, capsys.readouterr().err

    return run


def problems(stderr: str) -> list[str]:
    """Return the lines after what a run says of its inputs, which is said as soon as it is known."""
    told = ("data: ", "split: ", "parameters: ", "texts: ", "steps: ", "machine: ", "warning: ", "resuming ")
    return [line for line in stderr.splitlines() if line != "base: base" and not line.startswith(told)]


def change_weights(change: Callable[[dict[str, torch.Tensor]], object], name: str = "base/model.safetensors") -> Build:
    def build(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return build


WTE = "transformer.wte.weight"
WEIGHTS = [
    Case(
        "73",
        [rf"base: {WTE.removeprefix('transformer.')}: the tensor is missing \(a complete model\)"],
        change_weights(lambda t: t.pop(WTE)),
    ),
    Case(
        "73",
        [r"base/model\.safetensors: h\.9\.extra: an unexpected tensor \("],
        change_weights(lambda t: t.update({"transformer.h.9.extra": torch.zeros(2)})),
    ),
    Case(
        "74",
        [r"base/model\.safetensors: ln_f\.bias: shape \[63\] \(\[64\] by config\.json\)"],
        change_weights(lambda t: t.update({"transformer.ln_f.bias": torch.zeros(63)})),
    ),
    Case(
        "76",
        [r"base/model\.safetensors: transformer\.ln_f\.bias: holds NaN or infinity \(finite weights\)"],
        change_weights(lambda t: t["transformer.ln_f.bias"].fill_(float("nan"))),
    ),
]


@pytest.mark.parametrize("case", WEIGHTS, ids=case_id)
def test_weights(world: Path, run: Run, case: Case) -> None:
    case.build(world)
    before = snapshot(world)
    code, stderr = run(*TRAIN)
    check_lines("\n".join(problems(stderr)), case.expected)
    assert code == 2
    assert snapshot(world) == before


def test_58_and_80_long_texts_are_cut_and_a_pad_token_is_set(world: Path, run: Run) -> None:
    data = world / "data.csv"
    data.write_text(data.read_text().replace("text 7,", "text 7 " + "word " * 60 + ","))
    code, stderr = run(*TRAIN, "method={name: full}")
    assert code == 0
    assert "1 cut to max_length" in stderr
    assert json.loads((world / "run" / "result.json").read_text())["data"]["truncated"] == 1
    assert json.loads((world / "base" / "config.json").read_text()).get("pad_token_id") is None
    assert json.loads((world / "run" / "model" / "config.json").read_text())["pad_token_id"] == 0


# Trained adapters.


@pytest.fixture
def adapted(world: Path) -> Path:
    build_run(world / "run", world / "base")
    (world / "texts.txt").write_text("free prize call now\nsee you\n")
    return world


def remake_manifest(folder: Path) -> None:
    """Make altered files look untouched, so that the checks behind the hashes are met."""
    base = resolve_base(ModelSettings(base=str(folder / "base"), max_length=MAX_LENGTH))
    write_manifest(
        folder / "run" / "adapter", facts_of(base, method=LORA.model_dump(), quantization=None, adapter=True)
    )


def change_adapter(change: Callable[[dict[str, torch.Tensor]], object]) -> Build:
    return change_weights(change, "run/adapter/adapter_model.safetensors")


def settings(**changes: Any) -> Build:
    def build(folder: Path) -> None:
        path = folder / "run" / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return build


def pickled(folder: Path) -> None:
    path = folder / "run" / "adapter" / "adapter_model.safetensors"
    path.rename(path.with_name("adapter_model.bin"))


HEAD = "base_model.model.score.weight"
PAIR = "base_model.model.transformer.h.1.mlp.c_fc.lora_A.weight"
FILE = r"run/adapter/adapter_model\.safetensors"
ALTERED = [
    Case("83", [rf"{FILE}: {HEAD}: the trained head is absent \("], change_adapter(lambda t: t.pop(HEAD))),
    Case("84", [rf"{FILE}: {PAIR}: half of a LoRA pair is absent \("], change_adapter(lambda t: t.pop(PAIR))),
    Case("85", [rf"{FILE}: extra: an unexpected tensor"], change_adapter(lambda t: t.update(extra=torch.zeros(1)))),
    Case(
        "86",
        [
            r"run/adapter/adapter_config\.json: r: is 8 \(4 by the manifest\)",
            r"run/adapter/adapter_config\.json: lora_alpha: is 80 \(8(\.0)? by the manifest\)",
        ],
        settings(r=8, lora_alpha=80),
    ),
    Case(
        "86",
        [r"run/adapter/adapter_config\.json: target_modules: is \['attn\.c_attn'\] \(\['attn\.c_attn', "],
        settings(target_modules=["attn.c_attn"]),
    ),
    Case("87", [rf"{FILE}: {HEAD}: holds NaN or infinity \("], change_adapter(lambda t: t[HEAD].fill_(float("nan")))),
    Case(
        "88",
        [rf"{FILE}: {HEAD}: dtype torch\.int32 \(floating point\)"],
        change_adapter(lambda t: t.update({HEAD: t[HEAD].int()})),
    ),
    Case(
        "89",
        [r"run/adapter/adapter_config\.json: peft_type: 'LOHA' is not supported \(one of LORA, "],
        settings(peft_type="LOHA"),
    ),
    Case("90", [rf"{FILE}: only adapter_model\.bin, which is never unpickled \("], pickled),
]


@pytest.mark.parametrize(
    "command", [("predict", "run", "texts.txt"), ("merge", "run", "-o", "merged")], ids=lambda c: c[0]
)
@pytest.mark.parametrize("case", ALTERED, ids=case_id)
def test_altered_adapter(adapted: Path, run: Run, case: Case, command: tuple[str, ...]) -> None:
    case.build(adapted)
    code, stderr = run(*command)
    assert code == 2
    assert re.match(r"run/adapter/adapter_\w+\.\w+: ?(: )?(altered: |missing|weights that)", stderr), stderr
    remake_manifest(adapted)
    before = snapshot(adapted)
    code, stderr = run(*command)
    check_lines(stderr, case.expected)
    assert code == 2
    assert snapshot(adapted) == before


def test_82_another_base(adapted: Path, run: Run, pico_cache: PicoFolder) -> None:
    change_weights(lambda t: t["transformer.ln_f.bias"].add_(1))(adapted)
    before = snapshot(adapted)
    for command in (("predict", "run", "texts.txt"), ("merge", "run", "-o", "merged")):
        code, stderr = run(*command)
        check_lines(stderr, [r"run/adapter: base: trained on .* with fingerprint sha256:\w+, but .* has sha256:\w+ \("])
        assert code == 2
    assert snapshot(adapted) == before


def test_91_and_96_merged_already_and_outputs(adapted: Path, run: Run) -> None:
    assert run("merge", "run", "-o", "merged")[0] == 0
    before = snapshot(adapted)
    wrong = {
        ("merged", "again"): r"merged: merge: is merged already \(the run that it was merged from\)",
        ("run", "merged"): r"merged: output: exists already \(a new folder\)",
        ("run", "run/merged"): r"run/merged: output: lies inside the input run \(",
        ("run", "data.csv/x"): r"data\.csv/x: output: .*data\.csv cannot be written \(",
        ("run", "/proc/nowhere"): r"/proc/nowhere: output: .*(cannot be made|cannot be written).*\(",
    }
    for (source, output), expected in wrong.items():
        code, stderr = run("merge", source, "-o", output)
        check_lines(stderr, [expected])
        assert code == 2
    assert snapshot(adapted) == before


def test_96_an_output_that_cannot_be_made(world: Path, run: Run) -> None:
    """Where even root may not write; elsewhere the permission is asked for first."""
    if not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    before = snapshot(world)
    code, stderr = run(*TRAIN, "output.dir=/proc/nowhere")
    check_lines("\n".join(problems(stderr)), [r"/proc/nowhere: output\.dir: (cannot be made|is not writable).*\("])
    assert code == 2
    assert snapshot(world) == before


# Checkpoints.

SAVE = ("training.max_steps=3", "output.save_every=1", "output.keep=5", "evaluation.every=end")


@pytest.fixture
def unfinished(world: Path, run: Run) -> Path:
    """Three checkpoints and no result, as after a kill at the very end."""
    assert run(*TRAIN, *SAVE)[0] == 0
    shutil.rmtree(world / "run" / "adapter")
    (world / "run" / "result.json").unlink()
    assert len(list((world / "run" / "checkpoints").iterdir())) == 3
    return world


def test_92_a_half_checkpoint_is_skipped_with_its_reason(unfinished: Path, run: Run) -> None:
    path = unfinished / "run" / "checkpoints" / "step-3" / "trainable.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    code, stderr = run(*TRAIN, *SAVE)
    assert code == 0
    assert "warning: checkpoint step-3 is skipped: trainable.safetensors does not match its checksum" in stderr
    assert "resuming after step 2" in stderr


def test_93_every_checkpoint_bad(unfinished: Path, run: Run) -> None:
    for number, folder in enumerate(sorted((unfinished / "run" / "checkpoints").iterdir())):
        for path in (folder / "state.json", folder / "manifest.json")[: 1 + number % 2]:
            path.write_text("{}")
    before = snapshot(unfinished)
    code, stderr = run(*TRAIN, *SAVE)
    assert code == 2
    where = r"run/checkpoints/step-%d: .* \(output\.overwrite=true starts anew\)"
    check_lines("\n".join(problems(stderr)), [where % step for step in (3, 2, 1)])
    assert snapshot(unfinished) == before


def test_94_resume_with_another_recipe_data_or_base(unfinished: Path, run: Run) -> None:
    before = snapshot(unfinished)
    code, stderr = run(*TRAIN, *SAVE, "training.seed=7", "method.r=8")
    check_lines(stderr, [r"run: method\.r: was 16 when this run began, is 8 now \(",
                         r"run: training\.seed: was 123 when this run began, is 7 now \("])  # fmt: skip
    assert code == 2
    assert snapshot(unfinished) == before
    data = unfinished / "data.csv"
    text = data.read_text()
    data.write_text(text.replace("text 7", "text seven"))
    code, stderr = run(*TRAIN, *SAVE)
    check_lines("\n".join(problems(stderr)), [r"run/split\.json: .*"])
    assert code == 2
    data.write_text(text)
    change_weights(lambda t: t["transformer.ln_f.bias"].add_(1))(unfinished)
    code, stderr = run(*TRAIN, *SAVE)
    check_lines("\n".join(problems(stderr)), [r"run/checkpoints/step-3: base: is not what this run began with \("])
    assert code == 2
    after = snapshot(unfinished)
    assert {name for name in after if after[name] != before.get(name)} == {"base/model.safetensors"}


def test_95_a_locked_folder(world: Path, run: Run) -> None:
    (world / "run").mkdir()
    descriptor = os.open(world / "run" / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, b"4242")
        before = snapshot(world)
        code, stderr = run(*TRAIN)
        check_lines("\n".join(problems(stderr)), [r"run: output\.dir: is in use by process 4242 \(wait for it, or"])
        assert code == 2
        assert snapshot(world) == before
    finally:
        os.close(descriptor)


# What the machine cannot do.


def test_97_quantisation_that_cannot_run(world: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(RECIPE + "quantization: {bits: 4}\n")(world)
    before = snapshot(world)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        code, stderr = run(*TRAIN)
    check_lines("\n".join(problems(stderr)), [r"recipe\.yaml:5:\d+: quantization\.bits: 4 needs bitsandbytes \("])
    assert code == 2
    monkeypatch.setattr("toolkit.models.quantize.DEVICE_TYPES", ("cuda",))
    code, stderr = run(*TRAIN)
    check_lines("\n".join(problems(stderr)), [r"recipe\.yaml:5:\d+: quantization\.bits: bitsandbytes does not run on"])
    assert code == 2
    assert snapshot(world) == before


def test_97_a_disk_below_the_estimate(world: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10, 10, 1000)  # type: ignore[attr-defined]
    before = snapshot(world)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    code, stderr = run(*TRAIN, "output.dir=runs/deep/run")
    check_lines("\n".join(problems(stderr)), [r"runs/deep/run: output: 1,000 bytes free \([\d,]+ bytes needed\)"])
    assert code == 2
    assert snapshot(world) == before


# Exit codes, in real processes.


def test_the_command_line_itself(world: Path) -> None:
    """One row of each section, as a user meets it; the interpreter's start is part of the time."""
    (world / "base" / "config.json").write_text("{")
    recipes = {"a": set_to(training="{epochs: 0}"), "b": set_to(data="{source: dta.csv}"), "c": RECIPE}
    for name, text in recipes.items():
        (world / f"{name}.yaml").write_text(text)
    before = snapshot(world)
    for words, expected in {
        ("train", "a.yaml"): r"a\.yaml:4:\d+: training\.epochs: 0 is not allowed \(an integer >= 1 or null\)",
        ("validate", "b.yaml"): r"dta\.csv: no such file \(did you mean data\.csv\?\)",
        ("train", "c.yaml"): r"base/config\.json: not valid JSON",
        ("merge", "run", "-o", "out"): r"run: no such folder \(a run folder",
        ("predict", "run"): r"stdin: is empty \(a text a line\)",
    }.items():
        started = cpu_seconds()
        done = toolkit(*words, cwd=world, stdin=subprocess.DEVNULL)
        check_lines(done.stderr, [expected])
        assert (done.returncode, done.stdout) == (2, "")
        assert cpu_seconds() - started < 2
    assert snapshot(world) == before


def test_debug_adds_the_traceback_and_keeps_the_code(world: Path) -> None:
    done = toolkit("train", "none.yaml", "--debug", cwd=world)
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("none.yaml: no such file (")


def test_1_is_a_bug_in_the_toolkit(world: Path) -> None:
    code = "import toolkit.cli, toolkit.config.load as l; l.load_recipe = None; toolkit.cli.run()"
    done = subprocess.run(
        [sys.executable, "-c", code, *TRAIN], cwd=world, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("words", [("schema",), ("validate", "recipe.yaml"), ("--help",)], ids=lambda w: w[0])
def test_141_is_a_reader_that_has_gone(world: Path, words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "toolkit", *words],
        cwd=world,
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_3_is_a_run_that_diverged(world: Path, run: Run) -> None:
    code, stderr = run(*TRAIN, "training.learning_rate=1e15", "training.max_steps=9", "output.save_every=1")
    assert code == 3
    [line] = problems(stderr)
    assert re.match(r"training diverged: .* \(lower training\.learning_rate, now 1e\+15; ", line), line
    saved = list((world / "run" / "checkpoints").glob("step-*/trainable.safetensors"))
    assert saved
    for path in saved:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values())


def test_4_is_out_of_memory(world: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Iterator[None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("toolkit.training.trainer.Trainer._step", fail)
    code, stderr = run(*TRAIN)
    assert code == 4
    [line] = problems(stderr)
    assert "training.batch_size=2 training.gradient_accumulation_steps=2 keeps the effective batch" in line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_130_and_143_are_stops_after_a_checkpoint(world: Path, number: signal.Signals, code: int) -> None:
    words = (*TRAIN, "training.max_steps=100000", "output.save_every=end", "evaluation.every=end", "output.log_every=1")
    command = [sys.executable, "-m", "toolkit", *words]
    process = subprocess.Popen(command, cwd=world, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics, deadline = world / "run" / "metrics.jsonl", time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=400)
    assert process.returncode == code, stderr
    [line] = problems(stderr.decode())
    assert re.match(rf"stopped by {number.name} after step \d+; the same command goes on from there", line), line
    assert len(list((world / "run" / "checkpoints").glob("step-*"))) == 1


def test_0_is_done(world: Path, run: Run) -> None:
    assert run(*TRAIN)[0] == 0
    assert (world / "run" / "result.json").is_file()


ROWS_HERE = {"58", "80", "82", "91", "92", "93", "94", "95"}


def test_every_row_has_a_case() -> None:
    rows = {case.row for case in [*LIGHT, *ACCEPTED, *WEIGHTS, *ALTERED]} | ROWS_HERE
    assert {*map(str, range(1, 98)), "63b"} - rows == set()
