"""What methods do while they train: blocks that join, ranks that are cut, rates that differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ladder import LADDER
from pico import Batch, LoadModel

from toolkit.adapters.apply import apply_method
from toolkit.adapters.eva import principal_directions, start_from_data
from toolkit.adapters.rates import rate_scales
from toolkit.adapters.schedule import build_schedule, orthogonality_penalty
from toolkit.config.methods import AdaloraMethod, GradualMethod, Method
from toolkit.config.schema import TrainingSettings
from toolkit.errors import CapabilityError
from toolkit.models.base import Base
from toolkit.models.forward import classify, frozen_blocks
from toolkit.training.optim import parameter_groups


def tuned(base: Base, load_model: LoadModel, method: Method) -> Any:
    return apply_method(load_model(base), method, family=base.family, base_name=base.name_or_path, seed=3)


def awake(model: Any, base: Base) -> list[bool]:
    """Return for each block whether all its weights get gradients; a block is never half awake."""
    found = []
    for block in model.get_submodule(base.family.blocks):
        states = {parameter.requires_grad for parameter in block.parameters()}
        assert len(states) == 1
        found.append(states.pop())
    return found


@pytest.mark.parametrize(
    ("pace", "when", "expected"),
    [
        (1, {"epoch": 0, "stalls": 9}, [False, False]),
        (1, {"epoch": 1, "stalls": 0}, [False, True]),
        (1, {"epoch": 2, "stalls": 0}, [True, True]),
        (2, {"epoch": 3, "stalls": 0}, [False, True]),
        ("plateau", {"epoch": 7, "stalls": 0}, [False, False]),
        ("plateau", {"epoch": 7, "stalls": 1}, [False, True]),
        ("plateau", {"epoch": 7, "stalls": 5}, [True, True]),
    ],
)
def test_blocks_join_from_the_top(
    base: Base, load_model: LoadModel, pace: Any, when: dict[str, int], expected: list[bool]
) -> None:
    method = GradualMethod(name="gradual", epochs_per_block=pace)
    model = tuned(base, load_model, method)
    schedule = build_schedule(model, method, family=base.family, total_steps=9, processes=1)
    schedule.before_step(**when)
    assert awake(model, base) == expected
    assert all(p.requires_grad for path in base.family.head for p in model.get_submodule(path).parameters())
    assert not any(p.requires_grad for path in base.family.embeddings for p in model.get_submodule(path).parameters())
    # A block that rests will train: no state above it may be kept.
    assert frozen_blocks(model) == 0


def test_blocks_that_never_join_are_frozen(base: Base, load_model: LoadModel) -> None:
    method = GradualMethod(name="gradual", blocks=1)
    model = tuned(base, load_model, method)
    build_schedule(model, method, family=base.family, total_steps=9, processes=1).before_step(epoch=9, stalls=0)
    assert awake(model, base) == [False, True]
    assert frozen_blocks(model) == 1


def test_gradual_in_two_processes_is_refused(base: Base, load_model: LoadModel) -> None:
    model = tuned(base, load_model, LADDER["gradual"])
    with pytest.raises(CapabilityError, match="gradual in 2 processes"):
        build_schedule(model, LADDER["gradual"], family=base.family, total_steps=9, processes=2)


def test_adalora_ends_with_the_ranks_it_was_given(base: Base, load_model: LoadModel, batch: Batch) -> None:
    method = AdaloraMethod(name="adalora", init_r=4, target_r=2, every=1, lora_dropout=0.0, target_modules="all-linear")
    model = tuned(base, load_model, method).train()
    schedule = build_schedule(model, method, family=base.family, total_steps=10, processes=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(10):
        torch.autograd.backward(classify(model, batch).square().sum())
        optimizer.step()
        schedule.after_step(step + 1)
        optimizer.zero_grad()
    values = [layer.lora_E["default"] for layer in model.modules() if hasattr(layer, "lora_E")]
    assert sum(int((value != 0).sum()) for value in values) == 2 * len(values)
    assert len({int((value != 0).sum()) for value in values}) > 1


def test_the_penalty_is_that_of_peft_and_none_for_orthogonal_vectors(
    base: Base, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned(base, load_model, LADDER["adalora"])
    # peft's forward adds its penalty to whatever loss the model returns.
    monkeypatch.setattr(model.get_base_model(), "forward", lambda: SimpleNamespace(loss=torch.zeros(())))
    weight = LADDER["adalora"].orthogonal_weight  # type: ignore[union-attr]
    torch.testing.assert_close(orthogonality_penalty(model, weight), model.base_model.forward().loss)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                torch.nn.init.orthogonal_(parameter)
        assert float(orthogonality_penalty(model, 0.5)) < 1e-5


def test_lower_blocks_learn_more_slowly(base: Base, load_model: LoadModel) -> None:
    method = LADDER["full"].model_copy(update={"layer_decay": 0.5})
    model = tuned(base, load_model, method)
    settings = TrainingSettings(weight_decay=0.1)
    scale_of = rate_scales(method, base.family, blocks=2)
    groups = parameter_groups(model.named_parameters(), settings, scale_of=scale_of)
    scales = {id(parameter): group["rate_scale"] for group in groups for parameter in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        if name.startswith(base.family.embeddings):
            expected = 0.125
        elif name.startswith(base.family.blocks):
            expected = 0.25 if f"{base.family.blocks}.0." in name else 0.5
        else:
            expected = 1.0
        assert scales[id(parameter)] == expected, name


def test_lora_plus_is_for_b_alone(base: Base, load_model: LoadModel) -> None:
    model = tuned(base, load_model, LADDER["lora_plus"])
    scale_of = rate_scales(LADDER["lora_plus"], base.family, blocks=2)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {scale_of(name) for name, _ in named if ".lora_B." in name} == {16.0}
    assert {scale_of(name) for name, _ in named if ".lora_B." not in name} == {1.0}


def test_eva_starts_a_from_the_inputs_of_its_layer(base: Base, load_model: LoadModel, batch: Batch) -> None:
    model = tuned(base, load_model, LADDER["eva"])
    plain = classify(model.eval(), batch).detach()
    layer: Any = next(module for module in model.modules() if hasattr(module, "lora_A"))
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, -2)))
    start_from_data(model, lambda: classify(model, batch), seed=5)
    _, _, right = torch.linalg.svd(seen[0])
    found = layer.lora_A["default"].weight
    # Directions have no sign.
    torch.testing.assert_close((found * right[:4]).sum(1).abs(), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(classify(model, batch).detach(), plain, atol=0, rtol=0)


def test_principal_directions_are_orthonormal_and_as_many_as_there_can_be() -> None:
    states = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    found = principal_directions(states, rank=5)
    torch.testing.assert_close(found @ found.T, torch.eye(5), atol=1e-5, rtol=0)
    assert torch.equal(principal_directions(states[:3], rank=5) != 0, torch.ones(3, 12, dtype=torch.bool))
