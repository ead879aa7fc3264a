"""Predicts the peak of a run, in bytes and by part, from sizes alone: no weights, no torch, no GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from toolkit.config.schema import QuantizationSettings, TrainingSettings
from toolkit.config.training import OFFLOADED_FROM
from toolkit.memory.dryrun import DryRun
from toolkit.memory.framework import holes
from toolkit.memory.layers import FULL
from toolkit.memory.microbatch import MicroBatch, Setting
from toolkit.memory.prefix_rule import BYTES
from toolkit.memory.shape import ModelShape
from toolkit.memory.tape import Tape

PARTS = (
    "weights",
    "quantisation state",
    "gradients",
    "optimizer",
    "activations: embeddings",
    "activations: attention",
    "activations: mlp",
    "activations: head",
    "logits",
    "batch",
    "workspace",
    "allocator",
    "framework",
)
ACTIVATIONS = ("embeddings", "attention", "mlp", "head")
QUANTISED_BLOCK = 64
SCALE_BLOCK = 256


@dataclass(frozen=True)
class Estimate:
    """A predicted peak.

    Attributes:
        breakdown: Bytes held at that moment, by part, in the order of ``PARTS``; they add up to the peak.
        moment: When it happens.
        tokens: Real tokens of the micro-batch that causes it.
        rows: Its rows.
    """

    breakdown: dict[str, int]
    moment: str
    tokens: int
    rows: int

    @property
    def peak_bytes(self) -> int:
        """Everything together; on a CPU the resident set."""
        return sum(self.breakdown.values())

    @property
    def allocated_bytes(self) -> int:
        """What tensors take at the peak; on CUDA ``torch.cuda.max_memory_allocated``."""
        return self.peak_bytes - self.breakdown["framework"] - self.breakdown["allocator"]


def estimate(
    shape: ModelShape,
    *,
    batches: Iterable[MicroBatch],
    evaluation: Iterable[MicroBatch],
    training: TrainingSettings,
    quantization: QuantizationSettings | None,
    device: str,
    low_precision: bool,
    kinds: int = 1,
    prefix: Iterable[MicroBatch] = (),
    chunk_tokens: int = 0,
    streamed: bool = False,
    embedding_on_disk: bool = False,
    low_frozen: bool = False,
    framework: int = 0,
) -> Estimate:
    """Return the largest peak over training steps and evaluations in training.

    Args:
        shape: The model.
        batches: The micro-batches that could be the largest of the run.
        evaluation: The same of evaluation; none without validation rows.
        training: Accumulation, checkpointing and optimizer count.
        quantization: How frozen weights are stored.
        device: ``cpu`` or ``cuda``.
        low_precision: Whether the step runs under bf16 or fp16 autocast.
        kinds: How many micro-batches differ in size.
        prefix: The largest batch of the pass over the frozen blocks, if their states are kept.
        chunk_tokens: Tokens of which that pass holds the states together.
        streamed: Whether blocks whose states are kept, and the token embedding, stay on disk.
        embedding_on_disk: Whether the token embedding does without kept states, too.
        low_frozen: Whether frozen linear weights lie in memory in low precision (``models.frozen``).
        framework: Bytes that the process holds beside tensors (``framework_bytes``).
    """
    found = []
    prefix = list(prefix)
    bits = None if quantization is None else quantization.bits
    accumulating = training.gradient_accumulation_steps > 1
    kept = shape.frozen if prefix else 0
    passes = [("training", batch, kept) for batch in batches] + [("evaluation", batch, kept) for batch in evaluation]
    for name, given, below in passes + [("frozen blocks", batch, 0) for batch in prefix]:
        batch = given.padded(shape.prefix) if shape.prefix else given
        if device == "cpu" and (low_precision or training.gemm == "onednn"):
            batch = batch.in_steps()
        learns = name == "training"
        # Gradients that are added to others, or used at once, do not stay.
        tape = Tape(
            accumulating=accumulating or training.optimizer_in_backward,
            offloaded_from=OFFLOADED_FROM if training.offloads(device) else None,
        )
        held = resident(shape, training=training, quantization=quantization, device=device, low_frozen=low_frozen)
        if kept and streamed:
            held["weights"] -= on_disk(shape, blocks=shape.frozen, low_frozen=low_frozen)
        elif embedding_on_disk:
            held["weights"] -= on_disk(shape, blocks=0)
        if name == "frozen blocks" and streamed:
            held["weights"] += FULL * (shape.block_weights + shape.block_rest)
        if name == "frozen blocks" and device == "cpu" and bits is None:
            # oneDNN is given the block that runs packed.
            held["weights"] += shape.block_weights * (2 if low_precision else FULL * (training.gemm == "onednn"))
        if name == "frozen blocks":
            # The states of a chunk are in memory, and no step has made the optimizer's state yet.
            held |= {"embeddings": FULL * chunk_tokens * shape.width, "optimizer": 0}
        if bits is not None and device == "cpu":
            # One weight at a time lies there unpacked (``models.unpacked``).
            held["workspace"] = max(linear.weight for linear in shape.linears) * (2 if low_precision else FULL)
        for part, size in held.items():
            tape.take(size, part)
        if learns and accumulating:
            tape.take(FULL * shape.trainable, "gradients")
        setting = Setting(
            device=device,
            low_precision=low_precision,
            checkpointing=training.recomputed_blocks(shape.layers),
            bits=bits,
            training=learns,
            kept=below,
            kept_bytes=BYTES[training.prefix_cache.dtype],
            low_frozen=low_frozen and name != "frozen blocks",
        )
        loss = DryRun(shape, batch, setting=setting, tape=tape).forward()
        apart = 0
        if learns:
            side_by_side = tape.held + (0 if accumulating else FULL * shape.trainable)
            tape.backward(loss)
            apart = max(0, side_by_side - tape.peak)
        moment = f"{name}, {tape.peak_moment}"
        # An update in the backward pass gives back what the one before has left free.
        tight = device == "cuda" or (learns and training.optimizer_in_backward)
        # A classifier's last block mostly runs for one token a row.
        single = shape.objective == "classification" and shape.family.pools_one
        learning = max(1, shape.layers - shape.frozen - single) if learns else None
        adapted = shape.linears[-1].rank > 0
        kept_free = holes(
            widest=tape.widest, blocks=learning, adapted=adapted, compact=training.compact, apart=apart, kinds=kinds
        )
        parts = _breakdown(tape, framework=framework, allocator=0 if tight else kept_free)
        found.append(Estimate(parts, moment, batch.tokens, batch.rows))
    return max(found, key=lambda one: one.allocated_bytes)


def _breakdown(tape: Tape, *, framework: int, allocator: int) -> dict[str, int]:
    held = {(f"activations: {part}" if part in ACTIVATIONS else part): size for part, size in tape.at_peak.items()}
    held["allocator"] = allocator
    held["framework"] = framework
    return {part: held.get(part, 0) for part in PARTS}


def resident(
    shape: ModelShape,
    *,
    training: TrainingSettings,
    quantization: QuantizationSettings | None,
    device: str,
    low_frozen: bool = False,
) -> dict[str, int]:
    """Return what lies in memory all the time: weights, quantisation state, optimizer state."""
    keeps = shape.adapters > 0
    # peft keeps the untrained head beside the trained one.
    whole = sum(shape.embedding_tensors) + shape.final_norm + shape.head * (2 if keeps else 1)
    whole += shape.adapters + shape.buffers
    whole += shape.layers * shape.block_rest
    # DistilBERT's position ids are an int64 buffer.
    buffers = 0 if shape.family.final_norm else 8 * shape.positions
    blocks = shape.layers * shape.block_weights
    packed = blocks * FULL if quantization is None else blocks * quantization.bits // 8
    if low_frozen:
        packed -= shape.first_trained * shape.block_weights * FULL // 2
    state = 0 if quantization is None else shape.layers * sum(_scales(shape, quantization))
    # Paged state moves to host memory when the card is full.
    paged = training.optimizer == "paged_adamw_8bit" and device == "cuda"
    moments = 0 if paged else optimizer_bytes(shape.trainable, training.optimizer)
    return {"weights": whole * FULL + packed + buffers, "quantisation state": state, "optimizer": moments}


def on_disk(shape: ModelShape, *, blocks: int, low_frozen: bool = False) -> int:
    """Return the bytes that the token embedding and so many blocks would take in memory."""
    weights = blocks * shape.block_weights
    return FULL * (shape.embedding_tensors[0] + weights + blocks * shape.block_rest) - low_frozen * weights * FULL // 2


def _scales(shape: ModelShape, settings: QuantizationSettings) -> Iterable[int]:
    """Yield the bytes beside the codes of each linear weight.

    8 bits: a float32 a row. 4 bits: a float32 scale for 64 elements, or with double quantisation one byte, a float32
    for 256 of those bytes and a table of 256 float32; and the code of 16 float32 (Dettmers et al. 2023).
    """
    for linear in shape.linears:
        blocks = -(-linear.weight // QUANTISED_BLOCK)
        if settings.bits == 8:
            yield FULL * linear.fan_out
        elif settings.double_quant:
            yield blocks + FULL * (-(-blocks // SCALE_BLOCK) + SCALE_BLOCK + 16 + 1)
        else:
            yield FULL * (blocks + 16)


def optimizer_bytes(trainable: int, optimizer: str) -> int:
    """Return the optimizer's state.

    AdamW keeps two float32 moments an element, SGD one; the 8-bit forms keep two bytes an element and a float32 scale
    for 256 elements of each moment (Dettmers et al. 2021, arXiv:2110.02861).
    """
    if optimizer == "adamw":
        return 2 * FULL * trainable
    return FULL * trainable if optimizer == "sgd" else 2 * trainable + 2 * FULL * trainable // SCALE_BLOCK
