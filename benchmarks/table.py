"""Writes docs/performance.md from benchmarks/results/*.json.

python benchmarks/table.py
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
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

Made by `make bench` from `benchmarks/results/`; every file there names its machine and date. The scripts' first lines say
what is compared with what. All arms of a row ran in turns in one process, on the same rows, with random weights of full
size; a ratio is of two arms of the same round, given as median (smallest to largest). "defaults" is the peer's own
setting, "tuned" what its best user would set.

{machine}

| question | toolkit's arm | times the peer's defaults | times the tuned peer | aim |
|---|---|---|---|---|
"""
REASONS = """
## Where an aim is missed, and why

- **The matrix products are the limit.** Four fifths of a LoRA step on short texts are spent inside MKL (profile of GPT-2,
  batch 8: `mm` 41 %, `addmm` 41 %, attention 5 %, GELU 4 %). The last column of the next table is how much of the machine's
  fastest product, measured in the same run, the arithmetic reaches that the step cannot do without.
- **oneDNN does not help here.** On this processor (AVX2, no AVX-512) MKL multiplies fp32 as fast or faster, so
  `training.gemm: auto` chooses torch's default; on a processor where oneDNN wins, it chooses that. bf16 has no hardware here
  either.
- **The last block pays for one pass over the frozen blocks.** Five epochs of a peer are five such passes and the backward
  pass of one block; one pass is what the toolkit cannot avoid in a first run, so the ratio is bounded near the number of
  epochs, times what padding costs. A second run on the same texts finds the states ("states found").
- Tried without gain: a fused LoRA function, block masks, torch.compile on a CPU.
- The tuned peer pads long texts of like length more than it gains: with 24 rows, batches of like length are few.

Not measured: anything on a GPU.
"""


def load(name: str) -> dict[str, Any] | None:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def cell(ratio: dict[str, float]) -> str:
    return f"**{ratio['median']:g}** ({ratio['min']:g} to {ratio['max']:g})"


def main() -> None:
    machines = set()
    lines, shares = [], []
    for question, name, defaults, tuned in ROWS:
        record = load(name)
        if record is None:
            continue
        machine = record["machine"]
        machines.add(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "
                     f"transformers {machine['transformers']}, peft {machine['peft']}, {record['date'][:10]}")  # fmt: skip
        for arm, ratio in record["ratio_to_defaults"].items():
            aim = f"{defaults} x / {tuned:g} x"
            lines.append(f"| {question} | {arm} | {cell(ratio)} | {cell(record['ratio_to_tuned'][arm])} | {aim} |")
        for arm, share in record.get("share_of_peak", {}).items():
            shares.append(f"| {question} | {arm} | {100 * share['median']:.0f} % |")
    page = HEAD.format(machine="Machine: " + "; ".join(sorted(machines)) + ".") + "\n".join(lines) + "\n" + REASONS
    page += (
        "\n## Distance to the limit\n\nLinear layers' arithmetic that the step needs, over its time, over the fastest"
    )
    page += " fp32 product of the machine.\n\n| question | arm | share |\n|---|---|---|\n" + "\n".join(shares) + "\n"
    growth = load("growth")
    if growth is not None:
        page += "\n## Growth\n\nA whole run on a csv of short texts with a tiny model, so that the data's path is most of it."
        page += "\n\n| rows | first run, s | to its first step, s | second run, to its first step, s | peak, MiB |\n"
        page += "|---|---|---|---|---|\n"
        for run in growth["runs"]:
            first, second = run["first"], run["second"]
            page += (
                f"| {run['rows']:,} | {first['seconds']:.1f} | {first['to_first_step']:.1f} | "
                f"{second['to_first_step']:.1f} | {max(first['peak_bytes'], second['peak_bytes']) / 2**20:.0f} |\n"
            )
        pairs = ", ".join(f"{pair:g}" for pair in growth["time_ratio_over_row_ratio"])
        page += f"\nTime over rows, from one line to the next (1 is linear): {pairs}.\n"
    PAGE.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
