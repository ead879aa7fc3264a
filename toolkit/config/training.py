"""The `training` section of a recipe: steps, optimizer, precision, memory and loss, with every default and bound."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toolkit.config.section import Fraction, PositiveFloat, PositiveInt, Section, Seed

# Bytes from which on a saved tensor leaves a GPU: what a bus of 12 GB/s carries while a copy is launched, in 5 us.
# A guess, not measured. Smaller ones are statistics of norms and the like.
OFFLOADED_FROM = 64 << 10


class PrefixCacheSettings(Section):
    """Hidden states of the frozen first blocks, kept between epochs and runs (head, last_n, lora with layers)."""

    enabled: bool = Field(default=True, description="Run the frozen blocks once instead of in every epoch.")
    dtype: Literal["fp16", "fp32"] = Field(
        default="fp16", description="Of the kept states. fp16 moves gradients by about 3e-5; fp32 keeps them exact."
    )
    max_gib: Annotated[float, Field(gt=0)] = Field(
        default=8.0, description="GiB of disk for all caches; a run whose states need more goes without."
    )


class LossSettings(Section):
    """The loss of a classifier; validation is judged by the plain one whatever this says.

    Plain: cross entropy; binary cross entropy, averaged over labels, where a text may have several; squared error of
    numbers.
    """

    class_weights: Literal["balanced"] | Annotated[list[PositiveFloat], Field(min_length=2)] | None = Field(
        default=None,
        description="Weight of each label's rows, in id order. balanced: rows / (labels * rows of the label). Where a "
        "text may have several labels: weight of the rows that have the label; balanced: rows without / rows with it.",
    )
    label_smoothing: Fraction = Field(
        default=0.0, description="Share of the target that is spread over all labels (arXiv:1512.00567)."
    )
    focal_gamma: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Focal loss: rows that are right already count less, by (1 - p) ** gamma."
    )


class TrainingSettings(Section):
    """The optimisation itself."""

    epochs: PositiveInt | None = Field(default=None, description="Passes over the rows; 5 if max_steps is null too.")
    max_steps: PositiveInt | None = Field(default=None, description="Optimizer steps, instead of epochs.")
    batch_size: PositiveInt = Field(default=8, description="Texts per device and micro-step.")
    max_tokens_per_batch: PositiveInt | None = Field(
        default=None,
        description="Instead of batch_size: batches of texts of like length, rows times the longest at most this.",
    )
    balanced_batches: bool = Field(
        default=False,
        description="Every batch holds the labels in equal shares, as near as can be: rows of rarer labels come more "
        "often, those of commoner ones take turns over the epochs. An epoch has as many rows as before.",
    )
    gradient_accumulation_steps: PositiveInt = Field(default=1, description="Micro-steps per optimizer step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=2e-4, description="Peak learning rate.")
    embedding_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Peak learning rate of trained embeddings; null: learning_rate."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="Decoupled decay of matrices; none on biases and norms."
    )
    warmup_ratio: Fraction = Field(default=0.06, description="Fraction of the steps that warm up.")
    scheduler: Literal["linear", "cosine", "constant"] = Field(default="linear", description="Shape after warm-up.")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"] = Field(
        default="adamw", description="adamw (fused), its bitsandbytes 8-bit forms, or sgd with momentum 0.9."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(default=1.0, description="Clip; null: no clip.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="auto: bf16 on CUDA that has it, fp16 with a scaler on older CUDA, fp32 on CPU."
    )
    gradient_checkpointing: bool | PositiveInt = Field(
        default=False,
        description="Recompute each block in the backward pass: less memory, about 30 % more time. A number: so many "
        "blocks, from the first.",
    )
    activation_offload: bool = Field(
        default=False,
        description="On CUDA, keep what the backward pass will read in the machine's memory: the same gradients to the "
        "bit; the time that copying takes was not measured. With gradient_checkpointing, that is the inputs of "
        "recomputed blocks. Nothing changes on a CPU.",
    )
    optimizer_in_backward: bool = Field(
        default=False,
        description="Update each weight as soon as its gradient is there, and let that go: the same steps without a "
        "copy of all that trains in gradients. Needs max_grad_norm: null and one micro-step.",
    )
    gemm: Literal["auto", "default", "onednn"] = Field(
        default="auto",
        description="Library of fp32 matrix products on a CPU: torch's default, oneDNN, or the one measured faster.",
    )
    allocator: Literal["auto", "fast", "compact"] = Field(
        default="auto",
        description="Of a CPU's memory, where glibc hands it out. fast keeps what is freed for later. compact gives "
        "tensors of 1 MiB and more back to the system: the process holds little beside its tensors, where blocks are "
        "recomputed a third less, and a step takes 1.0 to 1.5 times as long, most with quantised weights. auto: "
        "compact where blocks are recomputed.",
    )
    loss: LossSettings = Field(default_factory=LossSettings, description="What is minimised.")
    prefix_cache: PrefixCacheSettings = Field(
        default_factory=PrefixCacheSettings, description="Used where the first blocks are frozen."
    )
    seed: Seed = Field(default=123, description="Seed of the head, the batch order and dropout.")

    def recomputed_blocks(self, blocks: int) -> int:
        """Return how many of a model's blocks, from the first, are recomputed in the backward pass."""
        wanted = self.gradient_checkpointing
        return (blocks if wanted else 0) if isinstance(wanted, bool) else min(wanted, blocks)

    @property
    def compact(self) -> bool:
        """Whether freed tensors go back to the system at once, on a CPU."""
        return self.allocator == "compact" or (self.allocator == "auto" and self.gradient_checkpointing is not False)

    def offloads(self, device: str) -> bool:
        """Return whether activations leave a device of this type: MPS shares the machine's memory."""
        return self.activation_offload and device == "cuda"


def no_offload(device: str) -> str:
    """Return the line of a recipe with ``activation_offload`` on a device that has no memory of its own."""
    return f"training.activation_offload does nothing on {device}, whose memory is the machine's"
