"""Is the predicted peak of a run the one that is measured, and what does the Trainer of transformers need for the same?

    python benchmarks/memory_plan.py [CASE ...]

Full-size GPT-2 124M and DistilBERT 66M with random weights and their own dropout, texts of drawn lengths of which the
longest has ``longest`` tokens. Most cases train two optimizer steps on one and the same batch, so that the second one,
which finds Adam's state, is the largest of the run; the last ones train two epochs of many batches, as users do. Every
figure comes from a process of its own:

- predicted: ``toolkit plan --json --device cpu``, with the seconds of a core that the command took;
- allocated: the events of torch's CPU allocator, counted again from the tensors alive when training begins; not of the
  many batches;
- resident: ``memory.peak_bytes`` of result.json, the peak resident set until training ends, and that of each phase;
- the peer's two figures around ``Trainer.train``, its batches padded to their longest row: allocated by the same code,
  resident as the process's peak until training ends.

Writes results/memory_plan.json, case by case: what was named is measured again, the rest stays. OpenMP's threads sleep
while they wait, so that the figures come as fast beside other work; that changes no byte.
"""

from __future__ import annotations

import argparse
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe and its rows.

    Attributes:
        family: ``gpt2`` or ``distilbert``.
        method: As a recipe has it, in YAML.
        batch: Rows of a batch.
        longest: Tokens of the longest text.
        bits: Of frozen weights; None: not quantised.
        checkpointing: Whether blocks are recomputed.
        precision: ``fp32`` or ``bf16``.
        gemm: Who multiplies in fp32: ``default``, which is MKL here, or ``onednn``. bf16 has oneDNN alone.
        in_backward: Whether weights are updated as soon as their gradients are there.
        batches: Batches of an epoch. With one, both steps see the same rows, and what depends on the number of
            batches does not count: oneDNN's kernels and holes between tensors of many sizes.
        max_tokens: Tokens of a batch, in place of ``batch``.
        peer: Whether the peer runs too.
    """

    family: str
    method: str
    batch: int
    longest: int
    bits: int | None = None
    checkpointing: bool = False
    precision: str = "fp32"
    gemm: str = "default"
    in_backward: bool = False
    batches: int = 1
    max_tokens: int | None = None
    peer: bool = False

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return self.batch * self.batches


FULL, HEAD, LAST, LORA = "{name: full}", "{name: head}", "{name: last_n, n: 1}", "{name: lora}"
CASES = {
    "gpt2 full": Case("gpt2", FULL, 4, 128, peer=True),
    "gpt2 full, checkpointing": Case("gpt2", FULL, 8, 64, checkpointing=True),
    "gpt2 full, checkpointing, in backward": Case("gpt2", FULL, 8, 64, checkpointing=True, in_backward=True),
    "gpt2 head": Case("gpt2", HEAD, 64, 64),
    "gpt2 head, long": Case("gpt2", HEAD, 8, 512),
    "gpt2 last block": Case("gpt2", LAST, 32, 128, peer=True),
    "gpt2 last two blocks": Case("gpt2", "{name: last_n, n: 2}", 8, 256),
    "gpt2 lora": Case("gpt2", LORA, 8, 128, peer=True),
    "gpt2 lora, wide": Case("gpt2", LORA, 64, 64, peer=True),
    "gpt2 lora, long": Case("gpt2", LORA, 4, 512, peer=True),
    "gpt2 lora, checkpointing": Case("gpt2", LORA, 16, 256, checkpointing=True, peer=True),
    "gpt2 lora, all layers": Case("gpt2", "{name: lora, target_modules: all-linear}", 8, 128),
    "gpt2 lora, last four": Case("gpt2", "{name: lora, layers: last_4}", 16, 128),
    "gpt2 lora, 8 bits": Case("gpt2", LORA, 8, 128, bits=8, peer=True),
    "gpt2 lora, 8 bits, checkpointing": Case("gpt2", LORA, 4, 256, bits=8, checkpointing=True),
    "gpt2 lora, 4 bits": Case("gpt2", LORA, 8, 128, bits=4, peer=True),
    "gpt2 lora, 4 bits, checkpointing": Case("gpt2", LORA, 16, 64, bits=4, checkpointing=True),
    "gpt2 lora, 4 bits, bf16": Case("gpt2", LORA, 8, 128, bits=4, precision="bf16"),
    "gpt2 lora, bf16": Case("gpt2", LORA, 8, 128, precision="bf16", peer=True),
    "gpt2 bias, bf16": Case("gpt2", "{name: bias}", 16, 128, checkpointing=True, precision="bf16"),
    "distilbert full": Case("distilbert", FULL, 16, 64, peer=True),
    "distilbert full, checkpointing": Case("distilbert", FULL, 8, 256, checkpointing=True),
    "distilbert full, long": Case("distilbert", FULL, 4, 512),
    "distilbert last block": Case("distilbert", LAST, 64, 128),
    "distilbert lora": Case("distilbert", LORA, 16, 128, peer=True),
    "distilbert lora, checkpointing": Case("distilbert", LORA, 8, 512, checkpointing=True),
    "distilbert lora, 8 bits": Case("distilbert", LORA, 16, 128, bits=8),
    "distilbert lora, 4 bits": Case("distilbert", LORA, 32, 64, bits=4),
    "gpt2 lora, 40 batches": Case("gpt2", LORA, 8, 64, batches=40),
    "gpt2 lora, 40 batches, oneDNN": Case("gpt2", LORA, 8, 64, batches=40, gemm="onednn"),
    "gpt2 lora, 40 batches, bf16": Case("gpt2", LORA, 8, 64, batches=40, precision="bf16"),
    "gpt2 last block, 40 batches": Case("gpt2", LAST, 8, 64, batches=40),
    "gpt2 last block, by tokens": Case("gpt2", LAST, 40, 64, batches=40, max_tokens=1024),
    "gpt2 last block, by tokens, oneDNN": Case("gpt2", LAST, 40, 64, batches=40, max_tokens=1024, gemm="onednn"),
    "gpt2 last block, by tokens, bf16": Case("gpt2", LAST, 40, 64, batches=40, max_tokens=1024, precision="bf16"),
    "distilbert full, 40 batches": Case("distilbert", FULL, 16, 64, batches=40),
}
RECIPE = """
model: {{base: '{base}', max_length: {longest}}}
data: {{train: '{folder}/train.npy', validation: '{folder}/held.npy', test: '{folder}/held.npy', duplicates: allow}}
method: {method}
quantization: {quantization}
training: {{epochs: 2, {size}, gradient_checkpointing: {checkpointing}, precision: {precision}, gemm: {gemm},
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
        callbacks=[Watch()], gradient_checkpointing=checkpointing, bf16=case["precision"] == "bf16",
    )  # fmt: skip
    return found


def prepare(name: str, root: pathlib.Path) -> pathlib.Path:
    """Write rows, recipe and description of a case, and its base where it is missing; return its folder."""
    import peers

    case = CASES[name]
    base, folder = root / case.family, root / "case"
    if not base.exists():
        peers.save_base(base, case.family, **DROPOUT[case.family])
    folder.mkdir(exist_ok=True)
    peers.save_array(folder / "train.npy", *draw_texts(case.rows, case.longest, 1))
    peers.save_array(folder / "held.npy", *draw_texts(2, case.longest, 2))
    (folder / "case.json").write_text(json.dumps({**dataclasses.asdict(case), "base": str(base)}))
    text = RECIPE.format(
        base=base, folder=folder, method=case.method, longest=case.longest, precision=case.precision, gemm=case.gemm,
        quantization="null" if case.bits is None else f"{{bits: {case.bits}}}",
        size=f"max_tokens_per_batch: {case.max_tokens}" if case.max_tokens else f"batch_size: {case.batch}",
        checkpointing=str(case.checkpointing).lower(),
        updates="optimizer_in_backward: true, max_grad_norm: null" if case.in_backward else "max_grad_norm: 1.0",
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
    record["tokens"] = sum(map(len, draw_texts(CASES[name].rows, CASES[name].longest, 1)[0]))
    record["plan_core_seconds"] = round(seconds, 2)
    record["predicted"] = {key: planned[key] for key in ("allocated_bytes", "peak_bytes", "breakdown", "moment")}
    for who in sides if CASES[name].peer else [side for side in sides if side == "toolkit"]:
        # The events of many steps would be larger than what they count.
        allocated = measure(who, "allocated") if CASES[name].batches == 1 else {}
        record[who] = {**allocated, **measure(who, "resident"), "cpu": cpu}
    return record


def main(names: list[str], sides: list[str]) -> None:
    import peers

    path = peers.RESULTS / f"{RESULT}.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            started = time.perf_counter()
            record = cases[name] = {**cases.get(name, {}), **compare(name, pathlib.Path(folder), sides)}
            if sides:
                record["seconds"] = round(time.perf_counter() - started, 1)
            for kind, key in (("allocated", "allocated_bytes"), ("resident", "peak_bytes")):
                if kind not in record.get("toolkit", {}):
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
