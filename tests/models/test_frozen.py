"""Frozen weights that lie in bf16 train what autocast trains from float32, and are judged and saved in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ladder import FAMILY_NAMES, LADDER, stands_on
from pico import BaseOf, PicoFolder

from toolkit.adapters.apply import apply_method
from toolkit.config.schema import Recipe
from toolkit.memory.prefix import through_frozen
from toolkit.memory.prefix_rule import frozen_in_low_precision
from toolkit.models.forward import classify, unwrapped
from toolkit.models.load import load_classifier
from toolkit.parameters import trained_parameters

CPU = torch.device("cpu")


def fits(name: str) -> bool:
    recipe = Recipe.model_validate(
        {"model": {"base": "x"}, "data": {"source": "x.csv"}, "method": LADDER[name].model_dump()}
    )
    return frozen_in_low_precision(recipe, low_precision=True)


METHODS = [name for name in LADDER if fits(name)]


def batch(*, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 21, (7,), generator=generator)
    mask = (torch.arange(20) < lengths[:, None]).long()
    return {"input_ids": torch.randint(5, 60, (7, 20), generator=generator), "attention_mask": mask}


def build(base: Any, name: str, *, later: bool) -> Any:
    model = load_classifier(
        base, labels=("ham", "spam"), quantization=None, seed=3, device=CPU, streamed=0, frozen_later=later
    )
    adapted = apply_method(model, LADDER[name], family=base.family, base_name="here", seed=0)
    core = unwrapped(adapted)
    if core.frozen is not None:
        core.frozen.load(core, torch.bfloat16)
    return adapted.eval()


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = classify(model, batch(seed=1)).square().sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trained_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", METHODS)
def test_loss_gradients_and_final_logits_are_the_very_bits(
    name: str, family: str, pico_cache: PicoFolder, base_of: BaseOf
) -> None:
    if not stands_on(name, family=family):
        pytest.skip(f"{name} is refused on {family}")
    base = base_of(pico_cache(family))
    plain, low = build(base, name, later=False), build(base, name, later=True)
    assert [n for n, _ in trained_parameters(plain)] == [n for n, _ in trained_parameters(low)]
    frozen = [p for n, p in low.named_parameters() if p.dtype == torch.bfloat16]
    assert frozen
    assert not any(parameter.requires_grad for parameter in frozen)
    (loss, gradients), (expected, twins) = step(low), step(plain)
    assert torch.equal(loss, expected)
    assert gradients.keys() == twins.keys()
    assert all(torch.equal(gradient, twins[n]) for n, gradient in gradients.items())
    core = unwrapped(low)
    core.frozen.leave(core)
    with torch.no_grad():
        exact = classify(plain, batch(seed=2))
        assert torch.equal(classify(low, batch(seed=2)), exact)
        [waved] = through_frozen(low, [batch(seed=2)], blocks=core.streamed.count)
        assert torch.equal(classify(low, waved, blocks=core.streamed.count), exact)


def test_methods_that_read_weights_keep_them_whole() -> None:
    assert {"lora", "ia3", "bias", "head", "ln_tuning"} <= set(METHODS)
    assert not {"dora", "pissa", "prefix", "full", "gradual"} & set(METHODS)
