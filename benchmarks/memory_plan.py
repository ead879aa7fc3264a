"""Is the predicted peak of a run the one that is measured, and what does the Trainer of transformers need for the same?

    python benchmarks/memory_plan.py [CASE ...]

Full-size GPT-2 124M and DistilBERT 66M with random weights and their own dropout, texts of drawn lengths of which the
longest has ``longest`` tokens. Each case trains two optimizer steps on one and the same batch, so that the second one,
which finds Adam's state, is the largest of the run. Every figure comes from a process of its own:

- predicted: ``toolkit plan --json --device cpu``, with the seconds of a core that the command took;
- allocated: the events of torch's CPU allocator, counted again from the tensors alive when training begins;
- resident: ``memory.peak_bytes`` of result.json, the peak resident set until training ends, and that of each phase;
- the peer's two figures around ``Trainer.train``, its batches padded to their longest row: allocated by the same code,
  resident as the process's peak until training ends.

Writes results/memory_plan.json, case by case: what was named is measured again, the rest stays. OpenMP's threads sleep
while they wait, so that the figures come as fast beside other work; that changes no byte.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULT = "memory_plan"
LORA = "{name: lora}"
# family, method, bits, batch size, longest text, checkpointing, whether the peer runs too
CASES: dict[str, tuple[str, str, int | None, int, int, bool, bool]] = {
    "gpt2 full": ("gpt2", "{name: full}", None, 4, 128, False, True),
    "gpt2 full, checkpointing": ("gpt2", "{name: full}", None, 8, 64, True, False),
    "gpt2 full, checkpointing, in backward": ("gpt2", "{name: full}", None, 8, 64, True, False),
    "gpt2 head": ("gpt2", "{name: head}", None, 64, 64, False, False),
    "gpt2 head, long": ("gpt2", "{name: head}", None, 8, 512, False, False),
    "gpt2 last block": ("gpt2", "{name: last_n, n: 1}", None, 32, 128, False, True),
    "gpt2 last two blocks": ("gpt2", "{name: last_n, n: 2}", None, 8, 256, False, False),
    "gpt2 lora": ("gpt2", LORA, None, 8, 128, False, True),
    "gpt2 lora, wide": ("gpt2", LORA, None, 64, 64, False, True),
    "gpt2 lora, long": ("gpt2", LORA, None, 4, 512, False, True),
    "gpt2 lora, checkpointing": ("gpt2", LORA, None, 16, 256, True, True),
    "gpt2 lora, all layers": ("gpt2", "{name: lora, target_modules: all-linear}", None, 8, 128, False, False),
    "gpt2 lora, last four": ("gpt2", "{name: lora, layers: last_4}", None, 16, 128, False, False),
    "gpt2 lora, 8 bits": ("gpt2", LORA, 8, 8, 128, False, True),
    "gpt2 lora, 8 bits, checkpointing": ("gpt2", LORA, 8, 4, 256, True, False),
    "gpt2 lora, 4 bits": ("gpt2", LORA, 4, 8, 128, False, True),
    "gpt2 lora, 4 bits, checkpointing": ("gpt2", LORA, 4, 16, 64, True, False),
    "gpt2 lora, 4 bits, bf16": ("gpt2", LORA, 4, 8, 128, False, False),
    "gpt2 lora, bf16": ("gpt2", LORA, None, 8, 128, False, True),
    "gpt2 bias, bf16": ("gpt2", "{name: bias}", None, 16, 128, True, False),
    "distilbert full": ("distilbert", "{name: full}", None, 16, 64, False, True),
    "distilbert full, checkpointing": ("distilbert", "{name: full}", None, 8, 256, True, False),
    "distilbert full, long": ("distilbert", "{name: full}", None, 4, 512, False, False),
    "distilbert last block": ("distilbert", "{name: last_n, n: 1}", None, 64, 128, False, False),
    "distilbert lora": ("distilbert", LORA, None, 16, 128, False, True),
    "distilbert lora, checkpointing": ("distilbert", LORA, None, 8, 512, True, False),
    "distilbert lora, 8 bits": ("distilbert", LORA, 8, 16, 128, False, False),
    "distilbert lora, 4 bits": ("distilbert", LORA, 4, 32, 64, False, False),
}
# Cases under autocast; all others are in fp32.
BF16 = ("gpt2 lora, bf16", "gpt2 lora, 4 bits, bf16", "gpt2 bias, bf16")
# Cases whose weights are updated as soon as their gradients are there.
IN_BACKWARD = ("gpt2 full, checkpointing, in backward",)
RECIPE = """
model: {{base: '{base}', max_length: {longest}}}
data: {{train: '{folder}/train.npy', validation: '{folder}/held.npy', test: '{folder}/held.npy', duplicates: allow}}
method: {method}
quantization: {quantization}
training: {{epochs: 2, batch_size: {batch}, gradient_checkpointing: {checkpointing}, precision: {precision},
           {updates}}}
evaluation: {{every: end}}
output: {{dir: '{folder}/run', save_every: end, keep: 1, overwrite: true}}
"""
DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "distilbert": {"dropout": 0.1, "attention_dropout": 0.1, "seq_classif_dropout": 0.2},
}


def draw_texts(rows: int, longest: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Return token ids of log-normal lengths around a third of the longest, which occurs, and alternating labels."""
    chance = np.random.default_rng(seed)
    lengths = np.clip(np.round(chance.lognormal(np.log(longest / 3), 0.6, rows)), 3, longest).astype(np.int64)
    lengths[0] = longest
    return [chance.integers(1000, 20_000, length).tolist() for length in lengths], [row % 2 for row in range(rows)]


class Allocated:
    """The peak of allocated bytes between the first ``start`` and ``stop``.

    The events are those of one thread; ``start`` is called again to begin from all tensors that are alive by then.
    """

    _peak = 0
    _profile: Any = None

    def start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        if self._profile is not None:
            self.stop()
        self._held = live_tensor_bytes()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        self._profile.start()

    def stop(self) -> int:
        self._profile.stop()
        events: Any = self._profile.profiler
        memory = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
        memory.sort(key=lambda event: event.start_ns())
        seen = self._held + int(np.cumsum([event.nbytes() for event in memory]).max(initial=0))
        self._peak = max(self._peak, seen)
        return self._peak


class Resident:
    """The peak resident set of the process until ``stop``."""

    def start(self) -> None:
        pass

    def stop(self) -> int:
        status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def live_tensor_bytes() -> int:
    """Return the bytes behind all tensors that Python knows of, mapped weights included, each storage once."""
    import torch

    storages = {}
    for found in gc.get_objects():
        # Not isinstance: a lazy module of some library would load itself.
        if issubclass(type(found), torch.Tensor) and not found.is_meta:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure_toolkit(folder: pathlib.Path, kind: str) -> dict[str, Any]:
    """Train the folder's recipe; return what was allocated, or what result.json says of memory."""
    from toolkit.config.load import load_recipe
    from toolkit.finetune import finetune
    from toolkit.lean import keep_compiler_out
    from toolkit.listener import Silent

    if kind == "resident":
        # As the command line does.
        keep_compiler_out()
    recipe = load_recipe(folder / "recipe.yaml")
    if kind == "resident":
        memory = finetune(recipe)["memory"]
        phases = {phase["name"]: phase["rss"] for phase in memory["phases"]}
        return {
            "resident": memory["peak_bytes"],
            "resident_predicted": memory["predicted_bytes"] or 0,
            "phases": phases,
        }
    peak = Allocated()

    class StepsTaken(Exception):
        pass

    class Watch(Silent):
        def begin(self, *, total: int, done: int) -> None:
            peak.start()

        def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
            # Behind the last step. The checkpoint that follows is mapped to be checked, and a mapping counts as whole.
            raise StepsTaken

    peak.start()
    try:
        finetune(recipe, listener=Watch())
    except StepsTaken:
        return {"allocated": peak.stop()}
    raise AssertionError("no evaluation")


def measure_peer(folder: pathlib.Path, kind: str) -> dict[str, int]:
    """Train the same rows as the documentation of transformers and peft says, and return the peak."""
    import peers
    import torch
    import transformers

    peers.quiet()
    case = json.loads((folder / "case.json").read_text())
    family, method, bits, checkpointing = case["family"], case["method"], case["bits"], case["checkpointing"]
    name = "last_n" if "last_n" in method else method.strip("{}").partition("name: ")[2].partition(",")[0]
    options: dict[str, Any] = {}
    if bits is not None:
        stored = transformers.BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["score", "classifier", "pre_classifier"],
        )  # fmt: skip
        options = {"quantization_config": stored}
    model = peers.peer_model(pathlib.Path(case["base"]), family, name, dropout=0.05, **options)
    peak = Allocated() if kind == "allocated" else Resident()
    found = {}

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            peak.start()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            found[kind] = peak.stop()

    texts, labels = draw_texts(case["batch"], case["longest"], 1)
    torch.set_num_threads(os.cpu_count() or 1)
    peers.peer_train(
        model, texts, labels, folder=folder / "peer", batch_size=case["batch"], grouped=False, epochs=2,
        callbacks=[Watch()], gradient_checkpointing=checkpointing, bf16=case["bf16"],
    )  # fmt: skip
    return found


def prepare(name: str, root: pathlib.Path) -> pathlib.Path:
    """Write rows, recipe and description of a case, and its base where it is missing; return its folder."""
    import peers

    family, method, bits, batch, longest, checkpointing, _ = CASES[name]
    base, folder = root / family, root / "case"
    if not base.exists():
        peers.save_base(base, family, **DROPOUT[family])
    folder.mkdir(exist_ok=True)
    peers.save_array(folder / "train.npy", *draw_texts(batch, longest, 1))
    peers.save_array(folder / "held.npy", *draw_texts(2, longest, 2))
    facts = {"family": family, "method": method, "bits": bits, "batch": batch, "longest": longest,
             "checkpointing": checkpointing, "bf16": name in BF16}  # fmt: skip
    (folder / "case.json").write_text(json.dumps({**facts, "base": str(base)}))
    quantization = "null" if bits is None else f"{{bits: {bits}}}"
    text = RECIPE.format(
        base=base, folder=folder, method=method, quantization=quantization, batch=batch, longest=longest,
        checkpointing=str(checkpointing).lower(), precision="bf16" if name in BF16 else "fp32",
        updates="optimizer_in_backward: true, max_grad_norm: null" if name in IN_BACKWARD else "max_grad_norm: 1.0",
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(text)
    return folder


def compare(name: str, root: pathlib.Path, sides: list[str]) -> dict[str, Any]:
    """Return what was predicted and measured for one case, and for the peer where the case has one."""
    import torch

    from toolkit.runtime import environment as facts

    cpu = facts(torch.device("cpu"))["cpu"]
    folder = prepare(name, root)
    environment = {**os.environ, "TOOLKIT_CACHE": str(root / "cache"), "PYTHONPATH": str(ROOT),
                   "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip

    def measure(who: str, kind: str) -> dict[str, int]:
        # States that an earlier run left would spare this one the pass over the frozen blocks.
        shutil.rmtree(root / "cache" / "prefix", ignore_errors=True)
        # As the command line does for training: glibc asks for huge pages.
        tuned = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if who == "toolkit" else {}
        command = [sys.executable, __file__, "--measure", who, kind, str(folder)]
        done = subprocess.run(command, env={**environment, **tuned}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}, {who}: {done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    command = [sys.executable, "-m", "toolkit", "plan", str(folder / "recipe.yaml"), "--json", "--device", "cpu"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    planned = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    record: dict[str, Any] = {"case": json.loads((folder / "case.json").read_text())}
    del record["case"]["base"]
    record["tokens"] = sum(map(len, draw_texts(CASES[name][3], CASES[name][4], 1)[0]))
    record["plan_core_seconds"] = round(seconds, 2)
    record["predicted"] = {key: planned[key] for key in ("allocated_bytes", "peak_bytes", "breakdown", "moment")}
    for who in sides if CASES[name][6] else [side for side in sides if side == "toolkit"]:
        record[who] = {**measure(who, "allocated"), **measure(who, "resident"), "cpu": cpu}
    return record


def main(names: list[str], sides: list[str]) -> None:
    import peers
    import torch

    from toolkit.training.gemm import choose_gemm

    path = peers.RESULTS / f"{RESULT}.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        # A machine's first run measures which library multiplies; a plan of the first case is to know it, too.
        os.environ["TOOLKIT_CACHE"] = str(pathlib.Path(folder) / "cache")
        choose_gemm("auto", torch.device("cpu"))
        for name in names:
            started = time.perf_counter()
            record = cases[name] = {**cases.get(name, {}), **compare(name, pathlib.Path(folder), sides)}
            if sides:
                record["seconds"] = round(time.perf_counter() - started, 1)
            for kind, key in (("allocated", "allocated_bytes"), ("resident", "peak_bytes")):
                if "toolkit" not in record:
                    continue
                real, predicted = record["toolkit"][kind], record["predicted"][key]
                peer = f", peer {record['peer'][kind] / 2**20:.0f}" if "peer" in record else ""
                print(f"{name}: {kind} {real / 2**20:.0f} MiB, predicted {predicted / 2**20:.0f} MiB "
                      f"({predicted / real - 1:+.1%}){peer}", flush=True)  # fmt: skip
            peers.write(RESULT, {"cases": {known: cases[known] for known in CASES if known in cases}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--sides", nargs="*", choices=("toolkit", "peer"), default=["toolkit", "peer"])
    parser.add_argument("--measure", nargs=3, metavar=("WHO", "KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        who, kind, folder = arguments.measure
        measured = {"toolkit": measure_toolkit, "peer": measure_peer}[who](pathlib.Path(folder), kind)
        print(json.dumps(measured))
    else:
        main(arguments.cases, arguments.sides)
