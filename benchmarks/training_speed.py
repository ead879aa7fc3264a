"""Is training faster than the Trainer of transformers with peft, by its defaults and as its best user would tune it?

    python benchmarks/training_speed.py [CASE ...] [--rounds 3]

Full-size GPT-2 124M and DistilBERT 66M with random weights. The arms take turns, round by round, on the same rows, each
run in a process of its own, so that none finds the memory that another left; a ratio compares arms of one round.
"steps" cases time the training loop (the peer's Trainer.train, the toolkit's sum of steps); "end to end" cases time
the whole command: imports, load, training for 5 epochs, evaluation and save. bf16 is tried where the processor
multiplies it faster than fp32. Writes results/training_CASE.json, or training_CASE_without_bf16.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

import peers
import torch

CASES: dict[str, dict[str, Any]] = {
    "lora_gpt2_short": {"family": "gpt2", "method": "lora", "lengths": "short", "rows": 192, "epochs": 1},
    "lora_gpt2_long": {"family": "gpt2", "method": "lora", "lengths": "long", "rows": 48, "epochs": 1},
    "last_block_gpt2_short": {"family": "gpt2", "method": "last_n", "lengths": "short", "rows": 600, "epochs": 5},
    "last_block_gpt2_long": {"family": "gpt2", "method": "last_n", "lengths": "long", "rows": 80, "epochs": 5},
    "full_distilbert_short": {"family": "distilbert", "method": "full", "lengths": "short", "rows": 384, "epochs": 1},
}
RECIPE = """
model: {{base: '{base}', max_length: 512}}
data: {{train: '{root}/train.npy', validation: '{root}/held.npy', test: '{root}/held.npy', duplicates: allow}}
method: {method}
training: {{epochs: {epochs}, learning_rate: 1e-4, {batch}}}
evaluation: {{every: end, baselines: false}}
output: {{dir: '{run}', save_every: end, keep: 1}}
"""
METHODS = {"lora": "{name: lora, r: 16, lora_alpha: 32, lora_dropout: 0.0}", "last_n": "{name: last_n}",
           "full": "{name: full}"}  # fmt: skip
TOKENS = {"short": 1024, "long": 4096}


class Bench:
    """One case: its rows on disk, and a run of each arm. Every run returns seconds of the steps and of the command."""

    def __init__(self, case: dict[str, Any], root: pathlib.Path) -> None:
        self.case, self.root = case, root
        self.base = peers.save_base(root / "base", case["family"])
        self.texts, labels = peers.draw_rows(case["lengths"], case["rows"], 0)
        peers.save_array(root / "train.npy", self.texts, labels)
        held, labels = peers.draw_rows(case["lengths"], 8, 7)
        peers.save_array(root / "held.npy", held, [n % 2 for n in range(len(labels))])

    def toolkit(self, batch: str, *, fresh: bool = True) -> tuple[float, float]:
        run = self.root / "run"
        shutil.rmtree(run, ignore_errors=True)
        if fresh:
            shutil.rmtree(self.root / "cache", ignore_errors=True)
        text = RECIPE.format(base=self.base, root=self.root, run=run, batch=batch, epochs=self.case["epochs"],
                             method=METHODS[self.case["method"]])  # fmt: skip
        (self.root / "recipe.yaml").write_text(text)
        everything = self._time("-m", "toolkit", "train", str(self.root / "recipe.yaml"))
        return json.loads((run / "result.json").read_text())["timing"]["train_seconds"], everything

    def peer(self, batch_size: int, **settings: Any) -> tuple[float, float]:
        wanted = {"case": self.case, "batch_size": batch_size, **settings}
        everything = self._time(__file__, "--peer", json.dumps(wanted), "--root", str(self.root))
        return float((self.root / "seconds.txt").read_text()), everything

    def _time(self, *command: str) -> float:
        started = time.perf_counter()
        kept = {**os.environ, "TOOLKIT_CACHE": str(self.root / "cache")}
        done = subprocess.run([sys.executable, *command], env=kept, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stderr}")
        return time.perf_counter() - started

    def tune(self) -> tuple[int, bool]:
        """Return the batch size with which the peer is fastest, and whether it then runs under bf16 autocast.

        Found on an epoch of a quarter of the rows, or as many as fill a batch of the largest size.
        """
        rows = max(32, self.case["rows"] // 4)
        sizes = [size for size in (8, 16, 32) if size <= self.case["rows"]]
        seconds = {
            (size, bf16): self.peer(size, grouped=True, bf16=bf16, rows=rows, epochs=1)[0]
            for bf16 in ((False, True) if peers.multiplies_bf16() else (False,))
            for size in sizes
        }
        return min(seconds, key=lambda chosen: seconds[chosen])


def run_peer(wanted: dict[str, Any], root: pathlib.Path) -> None:
    """Be the process of one run of the peer; leave the seconds of its steps in seconds.txt."""
    case = wanted["case"]
    texts, labels = peers.draw_rows(case["lengths"], case["rows"], 0)
    rows = wanted.get("rows")
    with contextlib.redirect_stdout(io.StringIO()):
        model = peers.peer_model(root / "base", case["family"], case["method"])
        steps = peers.peer_train(
            model,
            texts[:rows],
            labels[:rows],
            folder=root / "peer",
            batch_size=wanted["batch_size"],
            grouped=wanted["grouped"],
            epochs=wanted.get("epochs", case["epochs"]),
            bf16=wanted.get("bf16", False),
        )
        model.save_pretrained(root / "peer" / "saved")
    (root / "seconds.txt").write_text(str(steps))


def compare(name: str, rounds: int) -> None:
    case = dict(CASES[name])
    whole = case["epochs"] > 1
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(case, pathlib.Path(folder))
        bench.toolkit("batch_size: 8")  # warms up the page cache
        tuned, low = bench.tune()
        tokens = TOKENS[case["lengths"]]
        arms: dict[str, Any] = {
            "peer, defaults": lambda: bench.peer(8, grouped=False),
            f"peer, tuned: batches of {tuned} of like length{', bf16' if low else ''}": lambda: bench.peer(
                tuned, grouped=True, bf16=low
            ),
        }
        sizes = ["batch_size: 8", f"max_tokens_per_batch: {tokens}"]
        for batch in sizes + ([f"{sizes[-1]}, precision: bf16"] if low else []):
            arm = f"toolkit, {batch.replace('precision: ', '').replace(':', '')}"
            arms[arm] = partial(bench.toolkit, batch)
            if whole:
                # Right behind the arm that leaves them: the next one throws them away.
                arms[f"{arm}, states found"] = partial(bench.toolkit, batch, fresh=False)
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        peaks = []
        for number in range(rounds):
            peaks.append(peers.peak_gflops())
            # Every other round runs backwards, but for arms that find what the one before left.
            order = list(arms) if number % 2 == 0 or whole else list(reversed(arms))
            for arm in order:
                steps, everything = arms[arm]()
                seconds[arm].append(round(everything if whole else steps, 3))
                print(f"{name} round {number + 1} {arm}: {seconds[arm][-1]:.2f} s", flush=True)
    defaults, best, *ours = list(seconds)
    real = sum(map(len, bench.texts))
    record: dict[str, Any] = {
        "case": {**case, "real_tokens_an_epoch": real, "timed": "end to end" if whole else "steps"},
        "seconds": seconds,
        "peak_gflops": [round(peak, 1) for peak in peaks],
        "ratio_to_defaults": {arm: peers.ratios(seconds[defaults], seconds[arm]) for arm in ours},
        "ratio_to_tuned": {arm: peers.ratios(seconds[best], seconds[arm]) for arm in ours},
    }
    if not whole:
        needed = peers.needed_flops(case["family"], case["method"], real) / 1e9
        # The machine's best: what else ran beside one measurement must not flatter the arms.
        peak = max(peaks)
        record["share_of_peak"] = {
            arm: peers.spread([needed / second / peak for second in seconds[arm]]) for arm in seconds
        }
    peers.write(f"training_{name}{peers.kind_of_processor()}", record)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    peers.quiet()
    torch.set_num_threads(os.cpu_count() or 1)
    if arguments.peer:
        run_peer(arguments.peer, arguments.root)
    else:
        for chosen in arguments.cases:
            compare(chosen, arguments.rounds)
