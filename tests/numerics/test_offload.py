"""Activations that leave their device: the same bits, and which tensors travel."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from ladder import LADDER
from pico import BaseOf, PicoFolder
from test_flat import INT8, NF4
from test_flat import build as build_model
from torch import nn

from toolkit.config.training import TrainingSettings
from toolkit.data.tokens import TokenTable
from toolkit.models.forward import checkpoint_activations
from toolkit.training import offload
from toolkit.training.objectives import ClassificationObjective
from toolkit.training.offload import offloaded, offloading

LENGTHS = (7, 40, 1, 22, 7, 3, 40, 13, 1, 18, 29, 7)
SMALL = 1 << 10
STORED = {None: None, 4: NF4, 8: INT8}


@pytest.fixture
def travelled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was moved, in order; of pico models already what has a kilobyte."""
    monkeypatch.setattr(offload, "OFFLOADED_FROM", SMALL)
    found: list[Any] = []

    class Seen(offload._Moved):
        def __init__(self, storage: torch.UntypedStorage) -> None:
            super().__init__(storage)
            self.place, self.size, self.reads = storage.data_ptr(), storage.nbytes(), 0
            found.append(self)

        def back(self) -> torch.UntypedStorage:
            self.reads += 1
            return super().back()

    monkeypatch.setattr(offload, "_Moved", Seen)
    return found


def build(base: Any, method: str, *, dropout: float, bits: int | None) -> ClassificationObjective:
    tuned = build_model(base, LADDER[method], STORED[bits], dropout=dropout)
    ids = np.random.default_rng(0).integers(5, 60, sum(LENGTHS)).astype(np.int32)
    table = TokenTable.from_lengths(ids, np.array(LENGTHS, dtype=np.int64))
    labels = np.arange(len(LENGTHS), dtype=np.int64) % 3
    objective = ClassificationObjective(tuned, table=table, labels=labels, pad_id=0)
    objective.train()
    return objective


def step(objective: ClassificationObjective, *, moving: bool, low: bool = False) -> dict[str, torch.Tensor]:
    """Return the loss and every gradient of one batch."""
    objective.zero_grad()
    torch.manual_seed(7)
    batch = objective.batch(np.arange(len(LENGTHS)), step=0)
    context: Any = offloaded((*objective.parameters(), *objective.buffers(), *batch.values()))
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        if moving:
            with context:
                loss = objective(batch)
        else:
            loss = objective(batch)
    loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def recompute(objective: ClassificationObjective, blocks: bool | int) -> None:
    if blocks:
        checkpoint_activations(objective.model, None if blocks is True else blocks)


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("blocks", [False, 1, True], ids=["kept", "one recomputed", "recomputed"])
@pytest.mark.parametrize(
    ("method", "bits"), [("full", None), ("lora", None), ("last_n", None), ("lora", 8), ("lora", 4)]
)
@pytest.mark.parametrize("model_type", ["gpt2", "distilbert"])
def test_loss_and_gradients_are_the_same_bits(
    pico_cache: PicoFolder, base_of: BaseOf, travelled: list[Any], model_type: str, method: str,
    bits: int | None, blocks: bool | int, dropout: float, low: bool,
) -> None:  # fmt: skip
    objective = build(base_of(pico_cache(model_type)), method, dropout=dropout, bits=bits)
    recompute(objective, blocks)
    plain = step(objective, moving=False, low=low)
    assert not travelled
    moved = step(objective, moving=True, low=low)
    assert travelled
    assert all(one.reads for one in travelled)
    assert moved.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(moved[name], plain[name])] == []


def test_each_storage_travels_once_and_weights_never(
    pico_cache: PicoFolder, base_of: BaseOf, travelled: list[Any]
) -> None:
    objective = build(base_of(pico_cache("gpt2")), "full", dropout=0.1, bits=None)
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    step(objective, moving=True)
    assert not own & {one.place for one in travelled}
    assert min(one.size for one in travelled) >= SMALL
    # Queries, keys and values are views of one matrix, read by an attention call for each of the lengths; of each of
    # two blocks.
    joined = 3 * sum(LENGTHS) * 64 * 4
    assert [one.reads > 2 for one in travelled if one.size == joined] == [True, True]


def test_weights_would_travel_if_nobody_named_them(
    pico_cache: PicoFolder, base_of: BaseOf, travelled: list[Any]
) -> None:
    objective = build(base_of(pico_cache("gpt2")), "full", dropout=0.0, bits=None)
    batch = objective.batch(np.arange(len(LENGTHS)), step=0)
    with offloaded(()):
        objective(batch)
    assert {p.untyped_storage().data_ptr() for p in objective.parameters()} & {one.place for one in travelled}


@pytest.mark.parametrize("model_type", ["gpt2", "distilbert"])
def test_of_recomputed_blocks_the_inputs_travel(
    pico_cache: PicoFolder, base_of: BaseOf, travelled: list[Any], model_type: str
) -> None:
    objective = build(base_of(pico_cache(model_type)), "full", dropout=0.1, bits=None)
    step(objective, moving=True)
    everything = len(travelled)
    travelled.clear()
    checkpoint_activations(objective.model)
    step(objective, moving=True)
    states = [one for one in travelled if one.size == sum(LENGTHS) * 64 * 4]
    # Of two blocks; DistilBERT's norm behind the embeddings reads their sum, and dropout there keeps a mask.
    assert 2 <= len(states) <= 4
    assert len(travelled) < everything / 3


def test_views_come_back_as_they_were_and_memory_is_given_up(travelled: list[Any]) -> None:
    source = torch.randn(6, 1000, requires_grad=True)
    with offloaded((source,)):
        joined = source.exp()
        left, right = joined[:, ::2].T, joined[1:, 500:]
        loss = (left * left).sum() + (right.sin() * right).sum() + source.square().sum()
    place = joined.untyped_storage().data_ptr()
    alive = [weakref.ref(one) for one in travelled]
    assert [one.place for one in travelled].count(place) == 1
    assert source.data_ptr() not in {one.place for one in travelled}
    travelled.clear()
    del joined, left, right
    loss.backward()
    plain = source.detach().clone().requires_grad_()
    joined = plain.exp()
    left, right = joined[:, ::2].T, joined[1:, 500:]
    ((left * left).sum() + (right.sin() * right).sum() + plain.square().sum()).backward()
    assert torch.equal(source.grad, plain.grad)
    assert not any(one() for one in alive)


def test_what_is_overwritten_in_between_is_two_tensors(travelled: list[Any]) -> None:
    weight = torch.ones(1000, requires_grad=True)
    buffer = torch.ones(1000)
    with offloaded((weight,)):
        first = (weight * buffer).sum()
        buffer.mul_(3)
        second = (weight * buffer).sum()
    (first + second).backward()
    assert len(travelled) == 2
    assert torch.equal(weight.grad, torch.full((1000,), 4.0))


@pytest.mark.parametrize(
    ("device", "wanted", "moves"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False), ("mps", True, False)],
)
def test_activations_leave_cuda_alone(device: str, wanted: bool, moves: bool) -> None:
    assert TrainingSettings(activation_offload=wanted).offloads(device) is moves


def test_a_cpu_keeps_what_it_has(travelled: list[Any]) -> None:
    layer = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    batch = {"x": torch.randn(100, 64)}
    with offloading(TrainingSettings(activation_offload=True), layer, batch):
        layer(batch["x"]).sum().backward()
    assert not travelled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_holds_less_and_finds_the_same(pico_cache: PicoFolder, base_of: BaseOf) -> None:
    """Not to the bit: some of CUDA's kernels add up in any order."""
    objective = build(base_of(pico_cache("gpt2")), "lora", dropout=0.1, bits=None).cuda()
    rows = np.tile(np.arange(len(LENGTHS)), 40)
    found, held = [], []
    for wanted in (False, True):
        objective.zero_grad()
        torch.manual_seed(7)
        batch = {name: tensor.cuda() for name, tensor in objective.batch(rows, step=0).items()}
        before = torch.cuda.memory_allocated()
        with offloading(TrainingSettings(activation_offload=wanted), objective, batch):
            loss = objective(batch)
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in objective.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert held[1] < held[0] / 4
