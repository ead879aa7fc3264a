"""What a process holds beside its tensors: Python, torch and libraries, and memory that the allocator has free."""

from __future__ import annotations

from collections.abc import Collection

from toolkit.config.methods import leaves_adapter
from toolkit.config.schema import Recipe
from toolkit.memory.layers import FULL
from toolkit.memory.shape import ModelShape
from toolkit.resident import COMPACT

MIB = 2**20
# Resident when recipe, data and base have been read and nothing of them is in memory yet; found by benchmarks/
# memory_plan.py, without torch's compiler (``toolkit.lean``): a program that imports the toolkit has 75 MiB more. CUDA:
# the driver's context and cuBLAS, which max_memory_allocated does not count; not measured by us.
FRAMEWORK = {"cpu": 226 * MIB, "cuda": 500 * MIB}
ADAPTERS, QUANTISED = 6 * MIB, 6 * MIB
# What oneDNN keeps for each shape of a product and each count of rows that it meets, in fp32 and in bf16: found in runs
# of 20 and 200 steps of LoRA on the embedded bases. It keeps no more than so many, and rearranged copies of a weight.
KERNEL, KERNEL_LOW = MIB * 6 // 10, MIB * 72 // 100
MOST_KERNELS, COPIES = 1024, 2
# Code and tables that loading a model and the first step bring, given back code (``toolkit.resident``) included.
LATER = {"cpu": 54 * MIB, "cuda": 0}
# What glibc's heap has free and cannot give back, in tensors of the widest kind that comes and goes: so many a block
# with a backward pass, at most so many, twice that with adapters in the MLP, and so many of a pass without gradients.
# Found by benchmarks/memory_plan.py.
HOLES_A_BLOCK, MOST_HOLES, HOLES_WITHOUT_GRADIENT = 3, 14, 2
# Batches of so many sizes until gradients lie in none of the places that activations leave.
MANY_KINDS = 20


def framework_bytes(recipe: Recipe, *, device: str, found: int | None = None) -> int:
    """Return the bytes beside tensors and holes.

    Args:
        recipe: Its method decides which libraries are there.
        device: ``cpu`` or ``cuda``.
        found: Bytes that the process held before tokens and weights were there; None takes what is usual.
    """
    usual = FRAMEWORK[device]
    if device == "cpu":
        usual += (ADAPTERS if leaves_adapter(recipe.method) else 0) + (QUANTISED if recipe.quantization else 0)
    return (usual if found is None or device == "cuda" else found) + LATER[device]


def onednn_bytes(
    shape: ModelShape,
    *,
    trained: Collection[int],
    evaluated: Collection[int],
    rows: Collection[int],
    alone: bool,
    low_precision: bool,
) -> int:
    """Return the bytes of oneDNN's kernels, where it multiplies in blocks with a backward pass.

    Args:
        shape: The model.
        trained: Token counts of the products in its training steps.
        evaluated: Token counts of its evaluations.
        rows: Row counts of training steps, where the last block answers for one token a row.
        alone: Whether that block is all that runs in them.
        low_precision: Under autocast it multiplies in adapters, too.
    """
    products = {(linear.fan_in, linear.fan_out) for linear in shape.linears}
    # Keys and values, which every token has, come first.
    pooled = {(linear.fan_in, linear.fan_out) for linear in shape.linears[1:]}
    halves = {
        half
        for linear in shape.linears
        if linear.rank and low_precision
        for half in ((linear.fan_in, linear.rank), (linear.rank, linear.fan_out))
    }
    if alone:
        trained = ()
    updates = shape.first_trained < shape.layers
    forward = 1 if alone else len(products) + len(halves)
    # The gradients of inputs, and of the weights that train.
    backward = forward + len(halves) + (len(products) if updates else 0)
    kernels = forward * len({*trained, *evaluated}) + backward * len(trained)
    kernels += len(pooled) * (3 if updates else 2) * len(rows)
    each = KERNEL_LOW if low_precision else KERNEL
    widest = max(linear.weight for linear in shape.linears)
    return each * min(kernels, MOST_KERNELS) + COPIES * widest * (2 if low_precision else FULL)


def holes(
    *, widest: int, blocks: int | None, adapted: bool = False, compact: bool = False, apart: int = 0, kinds: int = 1
) -> int:
    """Return the bytes that are free in glibc's hands at the peak.

    CUDA's allocator reserves more than it hands out as well; that was not measured.

    Args:
        widest: Bytes of the largest tensor that comes and goes.
        blocks: Blocks that have a backward pass; None for a pass without gradients.
        adapted: Whether there are adapters in the MLP, where tensors are widest.
        compact: Whether tensors go back to the system when they end (``resident.map_tensors``).
        apart: Bytes by which activations and gradients exceed the peak where no gradient lies in an activation's place.
        kinds: How many micro-batches differ in size: the places that one leaves do not fit another's gradients.
    """
    if blocks is None:
        count = HOLES_WITHOUT_GRADIENT
    else:
        count = min(HOLES_A_BLOCK * blocks, MOST_HOLES) * (2 if adapted else 1)
    # Compact, the heap has the small ones alone, and one large one is on its way out.
    if compact:
        return widest + count * min(widest, COMPACT)
    return count * widest + apart * min(kinds - 1, MANY_KINDS) // MANY_KINDS
