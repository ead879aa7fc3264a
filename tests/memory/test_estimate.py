"""The prediction against the allocator: real steps of small models, both families, all methods."""

from __future__ import annotations

import numpy as np
import pytest
from ladder import LADDER, stands_on
from measured import CONFIGS, DROPPING, measure

from toolkit.config.schema import QuantizationSettings
from toolkit.memory.batches import largest_micro_batches, training_counts, training_row_counts
from toolkit.memory.estimate import estimate, resident
from toolkit.memory.microbatch import MicroBatch
from toolkit.memory.shape import model_shape
from toolkit.models.cpu_kernels import stepped
from toolkit.training.plan import build_plan

FULL = {"name": "full"}
HEAD = {"name": "head"}
LAST = {"name": "last_n", "n": 1}
LORA = {"name": "lora", "r": 8}
TOP = {"name": "lora", "r": 8, "layers": "last_1"}
WIDE = {"name": "lora", "r": 8, "target_modules": "all-linear"}
LENGTHS = {2: [90, 41], 5: [128, 100, 90, 128, 60], 8: [12, 30, 30, 77, 50, 64, 9, 41]}
WIDER = {"gpt2": {"n_embd": 384, "n_head": 6}, "distilbert": {"dim": 384, "hidden_dim": 1536, "n_heads": 6}}
# Found: at most 0.7 % of the peak, but 1.7 % too much for DistilBERT with LoRA at its queries and values, dropping.
TOLERANCE = 0.02

CASES = [
    (method, rows, checkpointing, accumulation, dropping)
    for method, rows, accumulation, dropping in [
        (FULL, 5, 1, False), (FULL, 8, 2, True), (HEAD, 2, 1, True), (LAST, 8, 1, False), (LORA, 5, 1, True),
        (WIDE, 2, 2, False), (TOP, 8, 1, True),
    ]
    for checkpointing in (False, True, 1)
]  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize(("method", "rows", "checkpointing", "accumulation", "dropping"), CASES)
def test_a_step_needs_what_was_predicted(recipe, family, method, rows, checkpointing, accumulation, dropping):
    config = {**CONFIGS[family], **(DROPPING[family] if dropping else {})}
    checked = recipe(method, gradient_checkpointing=checkpointing, gradient_accumulation_steps=accumulation)
    shape = model_shape(config, checked, labels=2)
    real = measure(config, checked, LENGTHS[rows])
    predicted = estimate(
        shape,
        batches=[MicroBatch.of(LENGTHS[rows])],
        evaluation=[],
        training=checked.training,
        quantization=None,
        device="cpu",
        low_precision=False,
    )
    assert shape.trainable == real.trainable
    held = sum(resident(shape, training=checked.training, quantization=None, device="cpu").values())
    assert held == pytest.approx(real.held, rel=0.001)
    assert predicted.allocated_bytes == pytest.approx(real.peak, rel=TOLERANCE)
    # What comes and goes within the step, which the weights would hide.
    assert predicted.allocated_bytes - held == pytest.approx(real.peak - real.held, rel=2 * TOLERANCE)


# Found: at most 2 % of the peak for most, 5 % too much for VeRA, 12 % too little for a prefix, which runs padded.
RUNGS = {
    "bias": 0.02, "dora": 0.02, "lora_fa": 0.02, "lora_last": 0.03, "adalora": 0.03, "vera": 0.07, "ia3": 0.02,
    "ia3_all": 0.02, "ln_tuning": 0.02, "prefix": 0.15,
}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("name", RUNGS)
def test_a_step_of_every_rung_needs_about_what_was_predicted(recipe, family, name):
    if not stands_on(name, family=family):
        pytest.skip(f"no {name} on {family}")
    checked = recipe(LADDER[name].model_dump())
    config = CONFIGS[family] | ({"n_positions": 160} if name == "prefix" else {})
    shape = model_shape(config, checked, labels=2)
    real = measure(config, checked, LENGTHS[5])
    predicted = estimate(
        shape,
        batches=[MicroBatch.of(LENGTHS[5])],
        evaluation=[],
        training=checked.training,
        quantization=None,
        device="cpu",
        low_precision=False,
    )
    assert shape.trainable == real.trainable
    held = sum(resident(shape, training=checked.training, quantization=None, device="cpu").values())
    assert held == pytest.approx(real.held, rel=0.001)
    assert predicted.allocated_bytes == pytest.approx(real.peak, rel=RUNGS[name])


WIDE_HEAD = {"pooling": "max", "hidden": [3000, 500]}
HEADS = {
    "mean": (LORA, {"pooling": "mean"}, 0),
    "max": (FULL, {"pooling": "max", "hidden": [128]}, 0),
    "last": (LAST, {"pooling": "last", "hidden": [128]}, 0),
    "wide": (WIDE, WIDE_HEAD, 0),
    "kept": (HEAD, WIDE_HEAD, 3),
    "kept_blocks": (LAST, {"pooling": "mean"}, 2),
}


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("case", HEADS)
def test_a_step_with_a_head_of_the_toolkits_own_needs_what_was_predicted(recipe, family, case):
    method, head, kept = HEADS[case]
    checked = recipe(method, head=head, prefix_cache={"dtype": "fp16"})
    config = {**CONFIGS[family], **DROPPING[family]}
    shape = model_shape(config, checked, labels=2)
    batch = MicroBatch.of(LENGTHS[8])
    real = measure(config, checked, LENGTHS[8], kept=kept)
    predicted = estimate(
        shape,
        batches=[batch],
        evaluation=[],
        training=checked.training,
        quantization=None,
        device="cpu",
        low_precision=False,
        prefix=[MicroBatch.of([2])] if kept else [],
        chunk_tokens=2 if kept else 0,
    )
    assert shape.frozen >= kept
    assert shape.trainable == real.trainable
    held = sum(resident(shape, training=checked.training, quantization=None, device="cpu").values())
    assert held == pytest.approx(real.held, rel=0.001)
    unseen = (batch.rows if kept == shape.layers else batch.tokens) * shape.width * 2 if kept else 0
    # Found: at most 2 % too little, on kept states.
    assert predicted.allocated_bytes == pytest.approx(real.peak + unseen, rel=0.03)


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_gradients_that_are_used_at_once_do_not_add_up(recipe, family):
    # So few tokens that gradients, not activations, make the peak.
    config, few = CONFIGS[family], [5, 3]
    settings = {"optimizer_in_backward": True, "max_grad_norm": None}
    checked = recipe(FULL, **settings)
    plain = recipe(FULL)
    real = measure(config, checked, few)
    predicted, usual = (
        estimate(
            model_shape(config, one, labels=2),
            batches=[MicroBatch.of(few)],
            evaluation=[],
            training=one.training,
            quantization=None,
            device="cpu",
            low_precision=False,
        )
        for one in (checked, plain)
    )
    assert predicted.allocated_bytes == pytest.approx(real.peak, rel=TOLERANCE)
    assert predicted.allocated_bytes < 0.9 * usual.allocated_bytes


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
# With one block's adapters alone in memory, the pass over the frozen blocks is the peak, which no step shows.
@pytest.mark.parametrize(
    ("method", "streamed"), [(LAST, False), (TOP, False), (LAST, True)], ids=["last_n", "lora", "last_n_streamed"]
)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_step_on_kept_states_needs_what_was_predicted(recipe, family, method, dtype, streamed):
    checked = recipe(method, prefix_cache={"dtype": dtype})
    # Wide enough that weights outweigh the states, as at full size.
    config = {**CONFIGS[family], **WIDER[family]}
    shape = model_shape(config, checked, labels=2)
    batch = MicroBatch.of(LENGTHS[8])
    real = measure(config, checked, LENGTHS[8], kept=shape.frozen, streamed=streamed)
    predicted = estimate(
        shape,
        batches=[batch],
        evaluation=[],
        training=checked.training,
        quantization=None,
        device="cpu",
        low_precision=False,
        # So small that training is the peak.
        prefix=[MicroBatch.of([2])],
        chunk_tokens=2,
        streamed=streamed,
    )
    assert predicted.moment.startswith("training")
    assert shape.frozen == 2
    # States that are read as they are, in fp32, belong to numpy: the allocator does not see them.
    unseen = batch.tokens * shape.width * (4 if dtype == "fp32" else 2)
    # Found: at most 2.3 % too little, DistilBERT with LoRA on fp32 states.
    assert predicted.allocated_bytes == pytest.approx(real.peak + unseen, rel=0.03)


RESPONSES = [20, 41, 7, 100, 30]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", [FULL, LORA, WIDE], ids=["full", "lora", "wide"])
def test_a_step_on_prompts_and_responses_needs_what_was_predicted(recipe, method, checkpointing):
    checked = recipe(method, gradient_checkpointing=checkpointing).model_copy(update={"objective": "instruction"})
    config = CONFIGS["gpt2"]
    shape = model_shape(config, checked, labels=2)
    real = measure(config, checked, LENGTHS[5], responses=RESPONSES)
    predicted = estimate(
        shape,
        batches=[MicroBatch.of(LENGTHS[5], targets=sum(RESPONSES), classes=config["vocab_size"])],
        evaluation=[],
        training=checked.training,
        quantization=None,
        device="cpu",
        low_precision=False,
    )
    assert shape.trainable == real.trainable
    held = sum(resident(shape, training=checked.training, quantization=None, device="cpu").values())
    assert held == pytest.approx(real.held, rel=0.001)
    assert predicted.allocated_bytes == pytest.approx(real.peak, rel=TOLERANCE)


def test_the_batch_with_the_most_predicted_tokens_is_looked_at(recipe):
    lengths = np.random.default_rng(3).integers(30, 90, 103)
    targets = np.random.default_rng(4).integers(1, 30, 103)
    training = recipe(LORA, epochs=2, batch_size=4, seed=5).training
    plan = build_plan(training, lengths=lengths, processes=1)
    seen = [rows for step in range(plan.total_steps) for rows in plan.micro_batches(step, rank=0)]
    found = largest_micro_batches(lengths, training, targets=targets, classes=9)
    assert max(batch.targets for batch in found) == max(targets[rows].sum() for rows in seen)
    assert {batch.tokens for batch in found} <= {lengths[rows].sum() for rows in seen}


# MB of weights and of quantisation state of the real shapes, as toolkit.models.load loads them. DistilBERT in 8 bits is
# 138.6 only by transformers' default, which quantises pre_classifier as well: 3 bytes less
# for each of 768 * 768 weights. The toolkit leaves the head in float32: 140.4.
STORED = {
    "gpt2": {None: (497.8, 0.0), 8: (243.0, 0.3), 4: (200.5, 1.4)},
    "distilbert": {None: (267.8, 0.0), 8: (140.4, 0.2), 4: (119.2, 0.7)},
}
REAL = {
    "gpt2": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "distilbert": {
        "vocab_size": 30522, "max_position_embeddings": 512, "dim": 768, "hidden_dim": 3072, "n_layers": 6,
        "n_heads": 12,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_stored_weights_are_those_of_the_real_models(recipe, family, bits):
    checked = recipe({"name": "lora", "r": 1}, bits=bits)
    shape = model_shape({**REAL[family], "model_type": family}, checked, labels=2)
    quantization = None if bits is None else QuantizationSettings.model_validate({"bits": bits})
    held = resident(shape, training=checked.training, quantization=quantization, device="cpu")
    beside = 4 * (shape.adapters + shape.head)
    weights, state = STORED[family][bits]
    assert (held["weights"] - beside) / 1e6 == pytest.approx(weights, rel=0.005)
    assert held["quantisation state"] / 1e6 == pytest.approx(state, abs=0.06)


@pytest.mark.parametrize(("max_tokens", "balanced"), [(None, False), (300, False), (None, True)])
@pytest.mark.parametrize(("epochs", "max_steps"), [(3, None), (None, 7), (None, 40)])
def test_the_largest_micro_batch_is_the_plans(recipe, epochs, max_steps, max_tokens, balanced):
    lengths = np.random.default_rng(3).integers(3, 90, 103)
    labels = np.arange(103) // 80
    training = recipe(
        LORA,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=4,
        gradient_accumulation_steps=3,
        seed=5,
        max_tokens_per_batch=max_tokens,
        balanced_batches=balanced,
    ).training
    plan = build_plan(training, lengths=lengths, processes=1, labels=labels)
    seen = [lengths[rows] for step in range(plan.total_steps) for rows in plan.micro_batches(step, rank=0)]
    found = largest_micro_batches(lengths, training, labels=labels)
    assert max(batch.tokens for batch in found) == max(row.sum() for row in seen)
    assert max(batch.squares for batch in found) == max((row**2).sum() for row in seen)
    assert training_counts(lengths, training, labels=labels) == {stepped(int(row.sum())) for row in seen}
    assert training_row_counts(lengths, training, labels=labels) == {stepped(len(row)) for row in seen}
