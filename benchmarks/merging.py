"""How fast and how small is a merge, beside load, merge_and_unload and save of peft?

    python benchmarks/merging.py [--size xl] [--rounds 1] [--in-memory] [--last-block]

GPT-2 (small 124M, xl 1.5B) with random weights stored in bf16, and a LoRA adapter that the toolkit trained for two
steps. Each merge runs in a process of its own, by turns, and writes bf16. "seconds" are those of the whole command:
imports and, of the toolkit alone, checksums of base and output, a wait for the disk, and the proof that the written
model gives the live model's logits. "weights_seconds" are those of what both do: read, change, write. Peak: resident
set of the process. Writes results/merging_SIZE.json. ``--in-memory``: all files lie in a file system in memory, so that
no disk is measured. With ``--last-block`` the last block of the same base is trained instead, two epochs of 70
messages, in batches of 8, and the process measured: results/last_block_SIZE.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import peers
import torch
import transformers

SHAPES = {"small": (12, 12, 768), "xl": (48, 25, 1600)}
RECIPE = """
model: {{base: '{base}', max_length: 64}}
data: {{source: sms_spam, max_rows: 60}}
method: {{name: lora}}
training: {{max_steps: 2, batch_size: 2}}
evaluation: {{every: end}}
output: {{dir: '{run}', save_every: end}}
"""
LAST_BLOCK = RECIPE.replace("name: lora", "name: last_n").replace("max_steps: 2, batch_size: 2", "epochs: 2")
TRAIN = """
import sys
from toolkit.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""
OURS = """
import sys
from toolkit.cli import main
sys.exit(main(["merge", sys.argv[1], "--output", sys.argv[2], "--dtype", "bf16"]))
"""
PEFT = """
import sys, time, torch, transformers
from peft import PeftModel
started = time.perf_counter()
base, adapter, output = sys.argv[3], sys.argv[1] + "/adapter", sys.argv[2]
model = transformers.AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16, num_labels=2)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
transformers.AutoTokenizer.from_pretrained(adapter).save_pretrained(output)
print(f"weights {time.perf_counter() - started} s")
"""
MEASURED = """
import resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.call(sys.argv[1:])
print(code, time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def save_base(folder: pathlib.Path, size: str) -> pathlib.Path:
    """Write a GPT-2 of random weights in bf16, in shards as the hub would hold it."""
    layers, heads, width = SHAPES[size]
    config = transformers.GPT2Config(n_layer=layers, n_head=heads, n_embd=width, pad_token_id=50256)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    for file in peers.VOCABULARY.iterdir():
        if file.name.startswith(("vocab", "merges", "tokenizer")):
            shutil.copy(file, folder)
    return folder


def measured(code: str, *words: str) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURED, sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rc, seconds, peak = done.stdout.split()[-3:]
    if rc != "0":
        raise SystemExit(done.stderr)
    weights = re.search(r"weights ([\d.]+) s", done.stdout)
    alone = {} if weights is None else {"weights_seconds": round(float(weights[1]), 2)}
    return {"seconds": round(float(seconds), 2), **alone, "peak_mib": round(float(peak) / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, default="xl")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--last-block", action="store_true")
    parser.add_argument("--in-memory", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if chosen.in_memory else None) as name:
        folder = pathlib.Path(name)
        base, run = folder / "base", folder / "run"
        subprocess.run([sys.executable, __file__, "--make", str(base), chosen.size], check=True)
        recipe = folder / "recipe.yaml"
        if chosen.last_block:
            recipe.write_text(LAST_BLOCK.format(base=base, run=run).replace("max_rows: 60", "max_rows: 100"))
            found = measured(TRAIN, str(recipe))
            print(f"{chosen.size}, last block: {found}", flush=True)
            peers.write(f"last_block_{chosen.size}", found)
            return
        recipe.write_text(RECIPE.format(base=base, run=run))
        subprocess.run([sys.executable, "-m", "toolkit", "train", str(recipe)], check=True)
        arms: dict[str, list[dict[str, float]]] = {"peft": [], "toolkit": []}
        # A round that does not count: a virtual machine gets pages that it never used before from its host, slowly.
        for number in range(-1, chosen.rounds):
            for arm in list(arms) if number % 2 else list(reversed(arms)):
                output = folder / "merged"
                found = measured({"peft": PEFT, "toolkit": OURS}[arm], str(run), str(output), str(base))
                if number >= 0:
                    arms[arm].append(found)
                print(f"{chosen.size} round {number + 1} {arm}: {found}", flush=True)
                if arm == "toolkit":
                    parity = json.loads((output / "manifest.json").read_text())["merge"]["parity"]
                shutil.rmtree(output)
    ratios = {
        kind: peers.spread([p[kind] / t[kind] for p, t in zip(arms["peft"], arms["toolkit"], strict=True)])
        for kind in ("seconds", "weights_seconds")
    }
    case = {"size": chosen.size, "dtype": "bf16", "in_memory": chosen.in_memory}
    result: dict[str, Any] = {"case": case, "arms": arms, "parity": parity}
    peers.write(
        f"merging_{chosen.size}", {**result, "ratio": ratios["seconds"], "ratio_weights": ratios["weights_seconds"]}
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        save_base(pathlib.Path(sys.argv[2]), sys.argv[3])
    else:
        main()
