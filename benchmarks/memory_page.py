"""The text of docs/memory.md: predicted beside measured, and what the planner says of model sizes and of an example."""

from __future__ import annotations

import collections
import statistics
from typing import Any

from toolkit.config.schema import Recipe
from toolkit.memory.estimate import estimate, resident
from toolkit.memory.microbatch import MicroBatch
from toolkit.memory.shape import model_shape

MIB = 2**20
# Width, blocks and heads, as on the models' cards on the hub; the smaller family in its own spelling.
SIZES: dict[str, dict[str, Any]] = {
    "distilbert-base": {"model_type": "distilbert", "vocab_size": 30522, "max_position_embeddings": 512, "dim": 768,
                        "hidden_dim": 3072, "n_layers": 6, "n_heads": 12},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
# 8 texts, 61 tokens on average, the longest with 128.
LENGTHS = [128, 96, 80, 61, 48, 35, 24, 16]

HEAD = """# Memory

Made by `make memory` from `benchmarks/results/memory_plan.json`, which names its machine and date, and from the
planner's own arithmetic. The first lines of `benchmarks/memory_plan.py` say how each figure was taken.

{machine}

## How to read a plan

`toolkit plan RECIPE` reads the recipe, the base's config.json and the lengths of your texts; no weight is loaded
and no GPU is needed. It walks through the largest micro-batch of the run, operation by operation, and takes and
gives back bytes as PyTorch does. What it prints is what was held at the highest moment:

| line | what it is | what makes it smaller |
|---|---|---|
| weights | what the model holds; blocks and embeddings that stay on disk do not count | a smaller base, quantization |
| quantisation state | scales beside 8- or 4-bit codes | |
| gradients, optimizer | one and two floats a trained weight | a method that trains less; `adamw_8bit`, `sgd` |
| activations | what the backward pass will read | smaller batches, `gradient_checkpointing`, `activation_offload` |
| logits, batch | the head's output, token ids, kept states | |
| workspace | gradients on their way, unpacked weights | smaller batches |
| allocator | memory that is free in the heap's hands and not given back (CPU) | `allocator: compact` |
| framework | Python, torch, the libraries | |

The first nine are tensors (`allocated_bytes` in `--json`), all together are the process (`peak_bytes`). With
`--budget` the changes are listed one by one with what each saves and costs; where nothing fits, the last lines say
what would. `result.json` repeats it after the run: `memory.peak_bytes` is measured, `memory.predicted_bytes` is the
plan's figure of the same thing, named by `memory.kind`. On a CPU that is the resident set up to the end of
training, with the framework's share as the process itself found it; on CUDA it is what the allocator handed out,
without the driver's own share. `rss_bytes` is the resident set of the whole run, `phases` the peaks of tokenise,
load, frozen blocks, train, evaluate, export and baselines; `report.html` draws them.
"""
MEASURED = """
## Predicted and measured

Full-size models with random weights, real training steps, in MiB. "tensors" is what torch's allocator handed out,
"process" the resident set. The peer is the Trainer of transformers with peft on the same rows, padded to the longest of
the batch; its figures were taken by the same code. Batches are rows x longest text. Most cases are two steps on one
batch; the last ones are two epochs of many. fp32 is multiplied by MKL, unless oneDNN stands in the name, bf16 always by
oneDNN: that one keeps kernels for every size of batch it meets, which a plan counts. Rows of short batches come in few
sizes for it; heads, folded attention and, in fp32, a last block that trains alone multiply little, and do without it.
"4 bits, bf16" was measured when weights were unpacked into new tensors.

| recipe | batch | tensors: predicted | measured | error | peer | process: predicted | measured | error | peer |
|---|---|---|---|---|---|---|---|---|---|
"""
REST = """
## From a 4 GB card and ten thousand texts to a running training

1. Write a recipe: your table as `data.source`, a base, `method: {name: full}` if that is what you would like best.
2. `toolkit plan recipe.yaml --device cuda --budget 4GiB`. It reads all texts, so it knows how long the longest
   batch will be. If the recipe fits as written, start. If it fits with changes, `--write small.yaml` writes them
   down: the batch is cut into micro-batches of the same sum before anything is changed that alters the arithmetic.
3. If nothing fits, the last lines name the next rung that does: LoRA, then the last block, then the head, or
   shorter texts.
4. `toolkit train small.yaml`. At the end it prints the measured peak beside the predicted one.
5. If the card has other tenants, plan with what is free, not with what is printed on the box.

On a machine without a GPU the same holds with `--device cpu` and the memory you have. There, `last_n` and `head` need
least by far: frozen blocks are read from disk one by one and run once.

## Not measured yet

Anything on a GPU: the figures of `--device cuda` are the same arithmetic with CUDA's kernels, never compared with a
card. The 500 MiB of the driver and of cuBLAS are a guess. What `activation_offload` costs in time is not known.
Several processes are not predicted.
"""


def memory_page(
    record: dict[str, Any], machine: str, *, largest: dict[str, Any] | None, allocators: dict[str, Any]
) -> str:
    """Return the page.

    Args:
        record: Of ``memory_plan.py``.
        machine: Where it was made.
        largest: What the last block of GPT-2 XL took, where it was measured.
        allocators: Of ``allocator.py``.
    """
    lines, errors = [], {"allocated": [], "resident": []}
    for name, case in record["cases"].items():
        if "toolkit" in case:
            lines.append(case_row(name, case, errors))
    found = ", ".join(
        f"{what}: median {statistics.median(map(abs, errors[kind])):.1%}, largest {max(map(abs, errors[kind])):.1%}"
        for kind, what in (("allocated", "tensors"), ("resident", "process"))
    )
    within = sum(abs(error) <= 0.05 for error in errors["resident"])
    seconds = statistics.median(
        case["plan_core_seconds"] for case in record["cases"].values() if "plan_core_seconds" in case
    )
    summary = (
        f"\n{len(lines)} recipes. Errors, {found}; within 5 %: {within} of {len(lines)} processes. "
        f"A plan took {seconds:.1f} s of a core (median).\n\n{REASONS.format(allocators=allocator_table(allocators))}"
    )
    head = HEAD.format(machine=f"Machine: {machine}.\n{processors(record)}")
    xl = "" if largest is None else LARGEST.format(peak=largest["peak_mib"], seconds=largest["seconds"])
    return head + MEASURED + "\n".join(lines) + "\n" + summary + xl + sizes_table() + offload_table() + REST


REASONS = """The process is harder to predict than its tensors: glibc's heap keeps what is free between things that
are still needed. `training.allocator` decides about that. `compact` lets every tensor of 1 MiB and more lie in pages
of its own, which go back to the system when it ends: the process then holds what the tensors take and the framework.
New pages have to be zeroed, at 0.1 to 0.4 ms a MiB on the virtual machines that this was tried on. `fast` leaves them
to the heap. `auto`, the default, is compact where blocks are recomputed, which is where most holes are, and where time
is paid for memory anyway.
Quantised weights are unpacked into one piece of memory, which stays. Runs by turns, of LoRA on GPT-2 where nothing else
is said (`benchmarks/allocator.py`):

{allocators}

With `fast`, the line "allocator" is a rule fitted to these runs: as many bytes as 14 of the widest tensors, twice that
with adapters in the MLP, fewer where only some blocks have a backward pass, none where weights are updated in the
backward pass, which gives memory back as it goes. Where batches come in 20 sizes and more, gradients are counted beside
all activations, since they do not fit into the places that these leave: all weights of DistilBERT take 1,435 MiB with
one batch, and 1,622 with 40. Most holes arise within one forward pass, between small tensors that are kept and large
ones that are not, and the same recipe, run again, finds others: LoRA on all layers once took 1,475 to 1,536 MiB in five
runs.

Weights are read and quantised one at a time, so loading a base is never the highest moment: GPT-2 in 4 bits took 47 MiB
for weights whose file has 475, and the process peaked at 470 MiB while it was read (697 where the heap kept its holes).

Between its phases a run gives back what it has freed, and the pages of program code that only its start needed: 60 to
70 MiB of the resident set. Those the system would have taken itself where memory is short, since it can read them
again; the rest of what the process shrank by against the peer's is memory that nobody else could have had.
"""


LARGEST = """
GPT-2 XL (1.5 B parameters, 6 GB in fp32, stored in bf16) with its last block training, 70 messages, two epochs: the
whole process, from start to saved model, peaked at {peak:,} MiB and took {seconds:.0f} s
(`benchmarks/merging.py --size xl --last-block`). Blocks below lie in the base's files and are read one at a time.
"""


def processors(record: dict[str, Any]) -> str:
    """Return on which processor how many rows were measured."""
    lines = []
    for who in ("toolkit", "peer"):
        found = collections.Counter(case[who]["cpu"] for case in record["cases"].values() if who in case)
        lines.append(f"{who} " + ", ".join(f"{count} on {cpu}" for cpu, count in sorted(found.items())))
    return f"Rows: {'; '.join(lines)}."


def case_row(name: str, case: dict[str, Any], errors: dict[str, list[float]]) -> str:
    facts, ours, predicted = case["case"], case["toolkit"], case["predicted"]
    batch = f"{facts['max_tokens']:,} tokens" if facts["max_tokens"] else f"{facts['batch']} x {facts['longest']}"
    cells = [name, batch]
    for kind, key in (("allocated", "allocated_bytes"), ("resident", "peak_bytes")):
        cells.append(f"{predicted[key] / MIB:,.0f}")
        if kind not in ours:
            cells += ["", "", ""]
            continue
        error = predicted[key] / ours[kind] - 1
        errors[kind].append(error)
        peer = f"{case['peer'][kind] / MIB:,.0f}" if "peer" in case else ""
        cells += [f"{ours[kind] / MIB:,.0f}", f"{error:+.1%}", peer]
    return "| " + " | ".join(cells) + " |"


def allocator_table(record: dict[str, Any]) -> str:
    """Return what either allocator took, and how much longer a compact step is."""
    lines = [
        "| | batch | fast: MiB, predicted | compact: MiB, predicted | saves | time of a step, compact over fast |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in record["cases"].items():
        peaks = {arm: statistics.median(run["mib"] for run in case[arm]) for arm in ("fast", "compact")}
        shown = [f"{peaks[arm]:,.0f}, {case[arm][0]['predicted_mib']:,}" for arm in peaks]
        slower = case["slower"]
        lines.append(
            f"| {name} | {case['batch']} | {' | '.join(shown)} | {1 - peaks['compact'] / peaks['fast']:.0%} "
            f"| **{slower['median']}** ({slower['min']} to {slower['max']}) |"
        )
    return "\n".join(lines)


def sizes_table() -> str:
    """Return what quantised weights save by the planner's own figures, for each size of model."""
    lines = []
    for name in SIZES:
        weights, peaks = zip(*(_figures(_config(name), bits) for bits in (None, 8, 4)), strict=True)
        shown = [f"{size / MIB:,.0f}" for size in (*weights, *peaks)]
        lines.append(f"| {name} | " + " | ".join(shown) + f" | {1 - peaks[2] / peaks[0]:.0%} |")
    return SAVES + "\n".join(lines) + "\n" + SAVES_WORDS


SAVES = """
## What 8 and 4 bits save

By the planner: LoRA, r 16, on a CPU, a batch of 8 texts of 61 tokens on average, in MiB. "weights" holds the embeddings
and the scales; "peak" is of all tensors, without the token embedding, which stays on disk while the base is frozen.

| base | weights: fp32 | 8 bits | 4 bits | peak: fp32 | 8 bits | 4 bits | 4 bits save |
|---|---|---|---|---|---|---|---|
"""
SAVES_WORDS = """
A CPU unpacks all weights into the same memory and keeps no layer's input, which bitsandbytes' own 8-bit product does:
with it GPT-2 took 513 MiB of tensors where 410 do (8 x 128 tokens), and 288 where 166 do (4 x 256, recomputed). Weights
and gradients have the same bits. The process carries some 280 MiB of framework in any case, so that up to 124 M
parameters smaller batches and checkpointing, which are exact, come first; from gpt2-medium up 4 bits halve what is
needed and more.
"""


def offload_table() -> str:
    """Return what leaves a GPU by the planner's own figures."""
    lines = []
    for name in ("distilbert-base", "gpt2", "gpt2-medium"):
        peaks = [_peak_on_cuda(name, recomputing=one, moving=other) for other in (False, True) for one in (False, True)]
        lines.append(f"| {name} | " + " | ".join(f"{peak / MIB:,.0f}" for peak in peaks) + " |")
    return OFFLOAD + "\n".join(lines) + "\n" + OFFLOAD_WORDS


OFFLOAD = """
## Activations in the machine's memory

`training.activation_offload: true` copies what the backward pass will read from the GPU into pinned memory of the
machine, and each operation's share back when its turn comes: the same loss and gradients to the bit. Weights, the batch
and tensors under 64 KiB stay; views of one storage travel once; there 8-bit layers hold on to their inputs. With
`gradient_checkpointing`, the inputs of the recomputed blocks travel: fewer copies, and one whole block on the GPU.
On a CPU or MPS it does nothing, and says so. By the planner: LoRA, r 16, bf16, a batch of 8 texts of 512 tokens, MiB
of all tensors:

| base | as it is | recomputed | moved | both |
|---|---|---|---|---|
"""
OFFLOAD_WORDS = """
Not measured on a GPU, neither the bytes nor the time. Copies run in the stream that computes, so that the peak can be
predicted: the GPU waits for them. `toolkit plan --budget` therefore proposes it last among what keeps the arithmetic,
and gives no time. The machine needs room for what travels, up to twice that where the pinned allocator rounds up.
"""


def _peak_on_cuda(name: str, *, recomputing: bool, moving: bool) -> int:
    training = {"gradient_checkpointing": recomputing, "activation_offload": moving}
    recipe = Recipe.model_validate({"model": {"base": "x"}, "data": {"source": "y"}, "training": training})
    found = estimate(
        model_shape(_config(name), recipe, labels=2),
        batches=[MicroBatch.of([512] * 8)],
        evaluation=[],
        training=recipe.training,
        quantization=None,
        device="cuda",
        low_precision=True,
        low_frozen=True,
    )
    return found.allocated_bytes


def _config(name: str) -> dict[str, Any]:
    config = SIZES[name]
    return config if "model_type" in config else {**GPT2, **config}


def _figures(config: dict[str, Any], bits: int | None) -> tuple[int, int]:
    """Return the bytes of the weights, and of all tensors at the peak."""
    sections: dict[str, Any] = {"model": {"base": "x"}, "data": {"source": "y"}}
    sections["quantization"] = None if bits is None else {"bits": bits}
    recipe = Recipe.model_validate(sections)
    shape = model_shape(config, recipe, labels=2)
    held = resident(shape, training=recipe.training, quantization=recipe.quantization, device="cpu")
    found = estimate(
        shape,
        batches=[MicroBatch.of(LENGTHS)],
        evaluation=[],
        training=recipe.training,
        quantization=recipe.quantization,
        device="cpu",
        low_precision=False,
        embedding_on_disk=True,
    )
    return held["weights"] + held["quantisation state"], found.allocated_bytes
