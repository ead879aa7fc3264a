"""Is prediction faster than the pipeline of transformers, as it comes and as its best user would tune it?

    python benchmarks/prediction_speed.py [--texts 1000] [--rounds 3]

Full-size GPT-2 124M and DistilBERT 66M with random weights and a trained head, on real messages (sms_spam) in a file,
one a line. The arms take turns, and each is timed as a whole command in a process of its own: ``toolkit predict``, and
a script that calls pipeline("text-classification"). "defaults": batch_size=32. "tuned": the texts sorted by length, and
the fastest of the batch sizes 8, 16, 32, 64 and of fp32 and bf16, found on SAMPLE texts. Where that is bf16, the
toolkit runs in bf16 as well; a processor without bf16 is spared it. In fp32 both have to find the same labels. Writes
results/prediction_MODEL.json, or prediction_MODEL_without_bf16.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

import peers
import torch
import transformers

from toolkit.config.load import load_recipe
from toolkit.data.sources import read_rows
from toolkit.finetune import finetune

SAMPLE = 200
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECIPE = """
model: {{base: '{base}', max_length: 256}}
data: {{source: sms_spam, max_rows: 60}}
method: {{name: head}}
training: {{max_steps: 1}}
output: {{dir: '{run}'}}
"""


def messages(count: int) -> list[str]:
    rows, _ = read_rows("sms_spam", text_column="text", label_column="label")
    assert rows.texts is not None
    texts: list[str] = rows.texts.to_pylist()
    return [" ".join(texts[number % len(texts)].split()) for number in range(count)]


def run_peer(model: str, file: pathlib.Path, *, batch_size: int, ordered: bool, precision: str) -> None:
    """Be the process of one run of the pipeline; print a label a line, in the order of the file, then the seconds."""
    texts = file.read_text(encoding="utf-8").splitlines()
    pipe = transformers.pipeline(
        "text-classification", model, device=-1, truncation=True, max_length=256, dtype=DTYPES[precision]
    )
    order = sorted(range(len(texts)), key=lambda n: -len(texts[n])) if ordered else list(range(len(texts)))
    started = time.perf_counter()
    answers = pipe([texts[n] for n in order], batch_size=batch_size)
    seconds = time.perf_counter() - started
    found = {n: answer["label"] for n, answer in zip(order, answers, strict=True)}
    print("\n".join(found[n] for n in range(len(texts))))
    print(seconds)


class Bench:
    """A model and a file of texts. Every run returns the seconds of its command and what it printed."""

    def __init__(self, model: str, file: pathlib.Path) -> None:
        self.model, self.file = model, file

    def toolkit(self, precision: str) -> tuple[float, list[str]]:
        return self._time("-m", "toolkit", "predict", self.model, str(self.file), "--precision", precision)

    def peer(self, **settings: Any) -> tuple[float, list[str]]:
        return self._time(__file__, "--peer", json.dumps({"model": self.model, "file": str(self.file), **settings}))

    def _time(self, *command: str) -> tuple[float, list[str]]:
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stderr}")
        return round(time.perf_counter() - started, 3), done.stdout.splitlines()


def compare(family: str, count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(base=peers.save_base(folder / "base", family), run=folder / "run"))
        finetune(load_recipe(recipe))
        texts = messages(count)
        (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
        (folder / "sample.txt").write_text("\n".join(texts[:: max(1, count // SAMPLE)]), encoding="utf-8")
        bench, sample = (Bench(str(folder / "run" / "model"), folder / f"{part}.txt") for part in ("texts", "sample"))
        *theirs, _ = sample.peer(batch_size=32, ordered=False, precision="fp32")[1]
        assert [json.loads(line)["label"] for line in sample.toolkit("fp32")[1]] == theirs
        # The seconds of the loop: loading would hide what the settings are worth on so few texts.
        trial = {
            (size, precision): float(sample.peer(batch_size=size, ordered=True, precision=precision)[1][-1])
            for size in (8, 16, 32, 64)
            for precision in (DTYPES if peers.multiplies_bf16() else ("fp32",))
        }
        tuned, low = min(trial, key=lambda one: trial[one])
        arms: dict[str, Any] = {
            "pipeline, batch_size 32": partial(bench.peer, batch_size=32, ordered=False, precision="fp32"),
            f"pipeline, tuned: sorted, batches of {tuned}{', bf16' if low == 'bf16' else ''}": partial(
                bench.peer, batch_size=tuned, ordered=True, precision=low
            ),
            "toolkit": partial(bench.toolkit, "fp32"),
        }
        if low == "bf16":
            arms["toolkit, bf16"] = partial(bench.toolkit, "bf16")
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(rounds):
            for arm in arms if number % 2 == 0 else reversed(arms):
                seconds[arm].append(arms[arm]()[0])
                print(f"{family} round {number + 1} {arm}: {seconds[arm][-1]:.2f} s", flush=True)
    defaults, best, *own = seconds
    peers.write(
        f"prediction_{family}{peers.kind_of_processor()}",
        {
            "case": {"family": family, "texts": count, "timed": "whole commands"},
            "seconds": seconds,
            "ratio_to_defaults": {arm: peers.ratios(seconds[defaults], seconds[arm]) for arm in own},
            "ratio_to_tuned": {arm: peers.ratios(seconds[best], seconds[arm]) for arm in own},
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    peers.quiet()
    torch.set_num_threads(os.cpu_count() or 1)
    if arguments.peer:
        run_peer(arguments.peer.pop("model"), pathlib.Path(arguments.peer.pop("file")), **arguments.peer)
    else:
        for chosen in peers.CONFIGS:
            compare(chosen, arguments.texts, arguments.rounds)
