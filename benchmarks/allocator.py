"""What does a compact allocator save, and what does it cost?

    python benchmarks/allocator.py [--rounds 3]

GPT-2 124M with random weights trains a LoRA adapter for some steps, and DistilBERT 66M all its weights, by turns with
``training.allocator`` fast and compact, each run a process of its own as the command line starts it. Seconds are those
of the steps, MiB the process's peak until training ends, and what the plan said of it. A ratio compares runs of one
round. Writes results/allocator.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import peers
from memory_plan import CASES, FULL, LORA, ROOT, Case, prepare

HERE = {
    "recomputed": Case("gpt2", LORA, 16, 256, checkpointing=True, batches=2),
    "4 bits, recomputed": Case("gpt2", LORA, 16, 64, bits=4, checkpointing=True, batches=2),
    "4 bits": Case("gpt2", LORA, 8, 128, bits=4, batches=2),
    "adapters on all layers": Case("gpt2", "{name: lora, target_modules: all-linear}", 8, 128, batches=2),
    "long texts": Case("gpt2", LORA, 8, 512),
    "short texts": Case("gpt2", LORA, 8, 64, batches=6),
    "DistilBERT, all weights": Case("distilbert", FULL, 16, 64, batches=6),
}


def run(recipe: pathlib.Path, allocator: str, cache: pathlib.Path) -> dict[str, Any]:
    """Train the recipe; return seconds of the steps, and the peak that was measured and predicted."""
    command = [sys.executable, "-m", "toolkit", "train", str(recipe), f"training.allocator={allocator}"]
    environment = {**os.environ, "TOOLKIT_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("GLIBC_TUNABLES", None)
    subprocess.run([*command, "evaluation.baselines=false"], env=environment, capture_output=True, check=True)
    record = json.loads((recipe.parent / "run" / "result.json").read_text(encoding="utf-8"))
    memory = record["memory"]
    return {
        "seconds": record["timing"]["train_seconds"],
        "mib": memory["peak_bytes"] >> 20,
        "predicted_mib": memory["predicted_bytes"] >> 20,
    }


def main(rounds: int) -> None:
    CASES.update(HERE)
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name, case in HERE.items():
            recipe = prepare(name, root) / "recipe.yaml"
            arms: dict[str, list[dict[str, Any]]] = {"fast": [], "compact": []}
            for number in range(rounds):
                for allocator, runs in arms.items():
                    runs.append(run(recipe, allocator, root / "cache"))
                    print(f"{name}, round {number + 1}, {allocator}: {runs[-1]}", flush=True)
            slower = [two["seconds"] / one["seconds"] for one, two in zip(*arms.values(), strict=True)]
            batch = f"{case.batch} x {case.longest}"
            cases[name] = {"batch": batch, **arms, "slower": peers.spread(slower)}
    peers.write("allocator", {"cases": cases})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args().rounds)
