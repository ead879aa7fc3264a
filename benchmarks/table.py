"""Writes docs/performance.md, docs/memory.md or docs/methods.md from benchmarks/results/*.json.

python benchmarks/table.py performance|memory|methods
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from memory_page import memory_page
from methods_page import methods_page
from peers import WITHOUT_BF16

HERE = pathlib.Path(__file__).parent
DOCS = HERE.parent / "docs"
# Question, result, and what was aimed at: times the peer's defaults, times the best-tuned peer.
ROWS = (
    ("LoRA (c_attn, r 16), GPT-2, short texts", "training_lora_gpt2_short", 5, 1.5),
    ("LoRA, GPT-2, long texts", "training_lora_gpt2_long", 4, 1.5),
    ("last block, GPT-2, 5 epochs end to end, short", "training_last_block_gpt2_short", 25, 9),
    ("last block, GPT-2, 5 epochs end to end, long", "training_last_block_gpt2_long", 25, 9),
    ("full fine-tuning, DistilBERT, short texts", "training_full_distilbert_short", 5, 1.5),
    ("prediction, GPT-2, short texts", "prediction_gpt2", 4, 1.5),
    ("prediction, DistilBERT, short texts", "prediction_distilbert", 4, 1.5),
)
HEAD = """# Performance

Made by `make bench` from `benchmarks/results/`; every file there names its machine and date. The scripts' first lines
say what is compared with what. All arms of a row ran in turns on the same rows, each run in a process of its own, with
random weights of full size; a ratio is of two arms of the same round, given as median (smallest to largest).
"defaults" is the peer's own setting, "tuned" what its best user would set: the fastest of several batch sizes, texts of
like length together, and bf16 autocast where the processor multiplies bf16 faster.
"""
COLUMNS = """
| question | toolkit's arm | times the peer's defaults | times the tuned peer | aim | the peer, tuned |
|---|---|---|---|---|---|
"""
PLAIN = """
On a processor that has no instructions for bf16, where fp32 is compared with fp32:
"""
LIMIT_PLAIN = """
On the processor without bf16:

| question | arm | share |
|---|---|---|
"""
REASONS = """
## Where an aim is missed, and why

- **The matrix products are the limit.** On short texts four fifths of a LoRA step in fp32 are spent in them (profile of
  GPT-2, batch 8: `mm` 41 %, `addmm` 41 %, attention 5 %, GELU 4 %). The next table says how much of the machine's
  fastest fp32 product, measured in the same run, the arithmetic reaches that a step cannot do without.
- **bf16 is what pays where the processor has it**: 400 GFLOP/s here beside 200 in fp32. The tuned peer runs under bf16
  autocast; the toolkit's fp32 arms, which keep full precision, are near it or below. Like against like is the arm with
  `bf16`. Of a first last-block run in bf16, most of it the pass over frozen blocks, products were 58 % by the profiler,
  copies and casts 10 %, GELU 6 %, attention row by row 6 %. Since then oneDNN is given packed weights and GELU in such
  passes: they take 5 to 12 % less in bf16. In fp32 by oneDNN it is a quarter less, and 70 MiB more, so that it is done
  where `training.gemm` is oneDNN. Weights stay as they are where gradients flow: packed both ways, they would lie in
  memory twice.
- **Without bf16, fp32 meets fp32, by the same MKL.** What is left to gain is padding, which the peer loses (least in
  batches of like length), attention, GELU and what the last block spends on tokens that no answer depends on.
- **oneDNN helps in fp32 by the day.** Its products were 1.08 to 1.28 times as fast as MKL's on processors with AVX-512,
  on one with AVX2 they took 1.16 times as long. This machine, a virtual one, gave 1.11 to 1.23 when LoRA and full
  fine-tuning were measured; when the last block was, frozen blocks took half as long by oneDNN (6.5 against 12.5 s).
  `training.gemm: auto` takes it where it wins by a fifth: it keeps a kernel of 0.6 MiB for every size of batch, 105 MiB
  after 200 steps of LoRA on gpt2-mini. A bound on them was tried (ONEDNN_PRIMITIVE_CACHE_CAPACITY=64): 22 MiB less, and
  15 % more time. The rows of a last block come in few sizes since its rows here were measured, and in fp32 a last
  block that trains alone is left to MKL.
- **The last block pays for one pass over the frozen blocks.** Five epochs of the peer are five such passes and the
  backward pass of one block. One pass is what a first run cannot avoid, nine tenths of it products at the machine's
  peak in fp32, so its ratio is bounded near the number of epochs, times what padding costs, times what the peer loses.
  A second run on the same texts finds the states ("states found"), since the rows without bf16 also those of the rows
  that are judged. What is left then: imports, checksums, export and report, and steps that are bound by memory: one of
  8 short texts takes 22 ms, in which, by arithmetic, 28 MB of weights are read twice, their gradients written and read
  three times, and AdamW moves 200 MB. `max_tokens_per_batch` takes fewer steps. Of 14 s without bf16: steps 4, imports
  3 (they were 4.5), export 2 (half a GB, to disk), report 1.5, base read and hashed 1.
- Memory that glibc gives back between steps, and gets anew, costs little: kept (`mmap_max=0`, `trim_threshold` of 4
  GiB), LoRA on long texts took 10 instead of 12.5 s of system time in runs of 75 s of processor time, and last-block
  steps a twentieth less, for 10 MiB more. It is left to glibc.
- Whole commands ("end to end", and prediction of 10,000 messages) hold their imports and loading. Prediction in fp32 is
  at MKL's speed; the tuned peer predicts in bf16. Its best batch size is found on 200 texts and varied from run to run
  (8 or 16, 211 or 184 s for GPT-2).

Not measured: anything on a GPU.
"""
LIMIT = """
## Distance to the limit

The linear layers' arithmetic that a step needs, over its time, over the fastest fp32 product that the machine gave
between the rounds; an arm in bf16 may exceed it.

| question | arm | share |
|---|---|---|
"""
GROWTH = """
## Growth

A whole run on a csv of short texts with a tiny model, so that the data's path is most of it.

| rows | first run, s | to its first step, s | second run, to its first step, s | peak, MiB |
|---|---|---|---|---|
"""
MERGING = """
## Merging an adapter, to bf16

"command" is the whole of it, imports included: the toolkit's holds checksums of base and output, a wait for the disk,
and the proof that the file gives the live model's logits; the peer is `merge_and_unload` of peft, loaded and saved in
bf16, which does none of these. "weights" is what both do: read, change, write. Aimed at were, for XL, 600 MiB, which
holds, and a third of the peer's time, which does not. Untouched tensors go from file to file as they are, three
quarters of XL, and a piece is written while the next one is read and checked. XL's files lay in memory (`--in-memory`):
this virtual machine's disk took 0.24 GB/s of 3.1 GB, and both then waited for it (weights 0.9 to 1.1 times the peer).
Of a command of 22 s on a faster processor: imports 4, fingerprint of the base 2, proof 8 (both models in fp32 on 9
texts; products 5), weights 4 to 6, checksums 1. On the one without bf16, three quarters of the time of the weights is a
wait for write(2), which has to find 3.1 GB of new pages, for the peer as well.

| base in bf16 | by | command, s | weights, s | peak of the process, MiB |
|---|---|---|---|---|
"""


def load(name: str) -> dict[str, Any] | None:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def cell(ratio: dict[str, float]) -> str:
    return f"**{ratio['median']:g}** ({ratio['min']:g} to {ratio['max']:g})"


def growth_table() -> str:
    growth = load("growth")
    if growth is None:
        return ""
    lines = []
    for run in growth["runs"]:
        first, second = run["first"], run["second"]
        peak = max(first["peak_bytes"], second["peak_bytes"]) / 2**20
        seconds = (first["seconds"], first["to_first_step"], second["to_first_step"])
        lines.append(f"| {run['rows']:,} | " + " | ".join(f"{one:.1f}" for one in seconds) + f" | {peak:.0f} |")
    pairs = ", ".join(f"{pair:g}" for pair in growth["time_ratio_over_row_ratio"])
    return GROWTH + "\n".join(lines) + f"\n\nTime over rows, from one line to the next (1 is linear): {pairs}.\n"


def tokenizing_table() -> str:
    record = load("tokenizing")
    if record is None:
        return ""
    lines = [f"| {kind} | {cell(ratio)} |" for kind, ratio in record["ratio"].items()]
    head = "\n## Tokenising GPT-2 text\n\nTimes the fast tokenizer of tokenizers, "
    head += f"{record['case']['texts']:,} real messages.\n\n| with | times faster |\n|---|---|\n"
    return head + "\n".join(lines) + "\n"


def merging_table() -> str:
    lines = []
    for size, name in (("small", "GPT-2 124M"), ("xl", "GPT-2 XL 1.5B")):
        record = load(f"merging_{size}")
        if record is None:
            continue
        for arm, runs in record["arms"].items():
            peak = max(run["peak_mib"] for run in runs)
            whole, weights = (between([run[kind] for run in runs]) for kind in ("seconds", "weights_seconds"))
            lines.append(f"| {name} | {arm} | {whole} | {weights} | {peak:,} |")
        lines.append(f"| | times the peer | {cell(record['ratio'])} | {cell(record['ratio_weights'])} | |")
    return MERGING + "\n".join(lines) + "\n" if lines else ""


def between(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def machine_line(record: dict[str, Any]) -> str:
    machine = record["machine"]
    libraries = ", ".join(f"{library} {machine[library]}" for library in ("torch", "transformers", "peft"))
    return f"{machine['cpu']}, {machine['cores']} cores, {libraries}, {record['date'][:10]}"


def ratio_table(kind: str) -> tuple[str, list[str]]:
    """Return the table of one kind of processor behind its machines, and the rows of the distance to the limit."""
    machines = set()
    lines, shares = [], []
    for question, name, defaults, tuned in ROWS:
        record = load(name + kind)
        if record is None:
            continue
        machines.add(machine_line(record))
        best = list(record["seconds"])[1].partition("tuned: ")[2]
        for arm, ratio in record["ratio_to_defaults"].items():
            aim = f"{defaults} x / {tuned:g} x"
            cells = (question, arm, cell(ratio), cell(record["ratio_to_tuned"][arm]), aim, best)
            lines.append("| " + " | ".join(cells) + " |")
        for arm, share in record.get("share_of_peak", {}).items():
            shares.append(f"| {question} | {arm} | {100 * share['median']:.0f} % |")
    if not lines:
        return "", []
    return "\nMachine: " + "; ".join(sorted(machines)) + ".\n" + COLUMNS + "\n".join(lines) + "\n", shares


def performance_page() -> str:
    table, shares = ratio_table("")
    without, more = ratio_table(WITHOUT_BF16)
    parts = (HEAD, table, PLAIN + without if without else "", REASONS, LIMIT, "\n".join(shares), "\n")
    again = LIMIT_PLAIN + "\n".join(more) + "\n" if more else ""
    return "".join(parts) + again + growth_table() + tokenizing_table() + merging_table()


if __name__ == "__main__":
    [name] = sys.argv[1:]
    memory, methods = load("memory_plan"), load("methods")
    if name == "memory" and memory:
        page = memory_page(
            memory, machine_line(memory), largest=load("last_block_xl"), allocators=load("allocator") or {"cases": {}}
        )
    elif name == "methods" and methods:
        page = methods_page(methods, machine_line(methods))
    else:
        page = performance_page()
    (DOCS / f"{name}.md").write_text(page, encoding="utf-8")
    print(page)
