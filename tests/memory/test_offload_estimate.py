"""The prediction of a step whose activations leave the device, against the allocator: on a CPU that counts as a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from measured import CONFIGS, DROPPING, measure

from toolkit.config.training import TrainingSettings
from toolkit.memory.estimate import estimate, resident
from toolkit.memory.microbatch import MicroBatch
from toolkit.memory.shape import model_shape
from toolkit.memory.tape import Tape, Value
from toolkit.training import offload

# Two attention calls a block, as large as the one of a GPU: the many small ones of a CPU would keep what a GPU moves.
LENGTHS = [128, 100, 128, 100, 128, 100]
PLAIN_ATTENTION = {"attn_pdrop": 0.0, "attention_dropout": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "last_n": {"name": "last_n", "n": 2},
    "lora": {"name": "lora", "r": 8},
    "lora_wide": {"name": "lora", "r": 8, "target_modules": "all-linear"},
}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose CPU has another memory: numpy's, which torch's allocator does not count."""

    def uncounted(size: int, *, pinned: bool) -> torch.Tensor:
        return torch.from_numpy(np.empty(size, np.uint8))

    monkeypatch.setattr(offload, "machine_memory", uncounted)
    monkeypatch.setattr(TrainingSettings, "offloads", lambda self, device: self.activation_offload)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("dropping", [False, True], ids=["plain", "dropping"])
@pytest.mark.parametrize("checkpointing", [False, 1, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_a_step_needs_what_was_predicted(recipe, family, method, checkpointing, dropping):
    config = {**CONFIGS[family], **(DROPPING[family] if dropping else {}), **PLAIN_ATTENTION}
    real, predicted = {}, {}
    for moving in (False, True):
        checked = recipe(METHODS[method], gradient_checkpointing=checkpointing, activation_offload=moving)
        shape = model_shape(config, checked, labels=2)
        real[moving] = measure(config, checked, LENGTHS, offload=moving)
        found = estimate(
            shape,
            batches=[MicroBatch.of(LENGTHS)],
            evaluation=[],
            training=checked.training,
            quantization=None,
            device="cpu",
            low_precision=False,
        )
        held = sum(resident(shape, training=checked.training, quantization=None, device="cpu").values())
        # What comes and goes within the step, which the weights would hide.
        predicted[moving] = found.allocated_bytes - held
    comes = {moving: one.peak - one.held for moving, one in real.items()}
    # Found: at most 0.1 % too little, and 0.9 % too much for most; 5.3 % for LoRA on all layers of GPT-2.
    assert 0.99 * comes[True] < predicted[True] < 1.06 * comes[True]
    # Of what the forward pass leaves, small tensors and logits stay.
    assert real[True].saved < 0.1 * real[False].saved
    if not checkpointing and method != "last_n":
        assert comes[True] < 0.75 * comes[False]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_kept_states_that_are_the_batch_itself_stay(recipe, family, dtype):
    method = {"name": "lora", "r": 8, "layers": "last_2"}
    checked = recipe(method, prefix_cache={"dtype": dtype}, activation_offload=True)
    shape = model_shape(CONFIGS[family], checked, labels=2)
    batch = MicroBatch.of(LENGTHS)
    real = measure(CONFIGS[family], checked, LENGTHS, kept=1, offload=True)
    predicted = estimate(
        shape,
        batches=[batch],
        evaluation=[],
        training=checked.training,
        quantization=None,
        device="cpu",
        low_precision=False,
        prefix=[MicroBatch.of([2])],
        chunk_tokens=2,
    )
    held = sum(resident(shape, training=checked.training, quantization=None, device="cpu").values())
    # What was read from the disk belongs to numpy.
    unseen = batch.tokens * shape.width * (4 if dtype == "fp32" else 2)
    assert predicted.allocated_bytes - held == pytest.approx(real.peak - real.held + unseen, rel=0.02)


def test_what_leaves_and_what_is_held_by_others():
    tape = Tape(offloaded_from=10)
    source = Value(tape.take(100, "batch"), 100, True)
    # Its input and 30 bytes leave, as do 20 bytes that autocast holds until the forward pass ends; 5 are too few.
    wide = tape.record(50, (source,), saves=(source,), extra=50, cached=20)
    result = tape.record(8, (wide,), saves=(wide,), extra=5)
    tape.free(source, wide)
    assert tape.held == 20 + 8 + 5
    tape.backward(result)
    # The result; the gradient of the middle; what came back; and the gradient that is being made.
    assert tape.peak == 8 + 50 + (100 + 30 + 20) + 100
    assert tape.held == 8 + 100


def test_an_input_that_its_layer_holds_stays():
    tape = Tape(offloaded_from=10)
    source = Value(tape.take(100, "batch"), 100, True)
    tape.record(50, (source,), pinned=(source,))
    tape.free(source)
    assert tape.held == 100 + 50
