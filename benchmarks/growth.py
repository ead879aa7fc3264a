"""Does twice the data take twice the time, and how much memory do many rows cost?

    python benchmarks/growth.py [--rows 125000 250000 500000 1000000]

A whole run (read, check, split, tokenise, train one epoch, evaluate) of a one-block GPT-2 of width 32, so that the
data's path is most of the work, on a csv of distinct short texts, in a process of its own for each size; then the same
run again, which finds its tokens. Writes results/growth.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import peers
import transformers

RECIPE = """
model: {{base: '{base}', max_length: 64}}
data: {{source: '{data}', split: {{train: 0.9, validation: 0.05, test: 0.05}}}}
method: {{name: head}}
training: {{epochs: 1, max_tokens_per_batch: 8192, learning_rate: 1e-3}}
evaluation: {{every: end}}
output: {{dir: '{run}', save_every: end, log_every: 1000}}
"""
RUN = """
import json, sys, time
import psutil
from toolkit.config.load import load_recipe
from toolkit.data.tokenize import Tokenizer
from toolkit.training.trainer import Trainer
from toolkit import runtime
start = time.perf_counter()
from toolkit.finetune import finetune
first = {}
step = Trainer._timed_step
def timed(self):
    first.setdefault("seconds", time.perf_counter() - start)
    return step(self)
Trainer._timed_step = timed
record = finetune(load_recipe(sys.argv[1]))
print(json.dumps({"seconds": time.perf_counter() - start, "to_first_step": first["seconds"],
                  "peak_bytes": record["memory"]["peak_bytes"], "train_seconds": record["timing"]["train_seconds"]}))
"""
WORDS = [
    "the",
    "a",
    "free",
    "call",
    "you",
    "to",
    "now",
    "win",
    "we",
    "and",
    "is",
    "it",
    "on",
    "at",
    "me",
    "home",
    "dinner",
    "prize",
    "claim",
    "urgent",
    "ok",
    "see",
    "later",
    "love",
]


def write_base(folder: pathlib.Path) -> pathlib.Path:
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64, pad_token_id=50256)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(peers.VOCABULARY / name, folder / name)
    return folder


def write_rows(path: pathlib.Path, rows: int) -> None:
    chance = np.random.default_rng(0)
    with path.open("w") as file:
        file.write("label,text\n")
        for low in range(0, rows, 10_000):
            picks = chance.integers(0, len(WORDS), (min(10_000, rows - low), 9))
            for place, row in enumerate(picks):
                file.write(f"{'ham' if row[0] % 2 else 'spam'},{' '.join(WORDS[n] for n in row)} {low + place}\n")


def run(recipe: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    environment = {**os.environ, "TOOLKIT_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(recipe)], env=environment, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(sizes: list[int]) -> None:
    found = []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            write_rows(folder / "rows.csv", rows)
            recipe = folder / "recipe.yaml"
            entry: dict[str, Any] = {"rows": rows}
            for arm in ("first", "second"):
                settings = {"base": write_base(folder / "base") if arm == "first" else folder / "base"}
                recipe.write_text(RECIPE.format(data=folder / "rows.csv", run=folder / arm, **settings))
                started = time.perf_counter()
                entry[arm] = {**run(recipe, folder), "process_seconds": round(time.perf_counter() - started, 2)}
            found.append(entry)
            print(json.dumps(entry), flush=True)
    pairs = [
        round(large["first"]["seconds"] / small["first"]["seconds"] / (large["rows"] / small["rows"]), 3)
        for small, large in itertools.pairwise(found)
    ]
    peers.write("growth", {"runs": found, "time_ratio_over_row_ratio": pairs})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[125_000, 250_000, 500_000, 1_000_000])
    main(parser.parse_args().rows)
