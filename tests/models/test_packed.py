"""Blocks whose weights are packed for oneDNN answer as they did, and are themselves again afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ladder import FAMILY_NAMES
from pico import BaseOf, PicoFolder, build_pico
from torch import nn
from transformers.pytorch_utils import Conv1D

from toolkit.adapters.apply import apply_method
from toolkit.config.schema import LoraMethod
from toolkit.models.flat import prefix_states
from toolkit.models.forward import classify, unwrapped
from toolkit.models.load import load_classifier
from toolkit.models.packed import PackedLinear, pack_blocks, packed_block
from toolkit.training import gemm
from toolkit.training.gemm import choose_packing

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not gemm._works(), reason="this build of torch lacks oneDNN's linear layer")
needs_bf16 = pytest.mark.skipif(
    choose_packing("default", "bf16", CPU) is None, reason="this processor does not multiply bf16"
)
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16", marks=needs_bf16)]


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 21, (7,), generator=generator).sort().values
    mask = (torch.arange(20) < lengths[:, None]).long()
    return {"input_ids": torch.randint(5, 60, (7, 20), generator=generator), "attention_mask": mask}


def load(base: Any, *, streamed: int | None = None) -> Any:
    return load_classifier(base, labels=("a", "b"), quantization=None, seed=1, device=CPU, streamed=streamed).eval()


@torch.no_grad()
def states(model: Any, dtype: torch.dtype, *, packed: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = prefix_states(model, [batch(0), batch(1)], blocks=2, packed=dtype if packed else None)
    return torch.cat(found).float()


@pytest.mark.parametrize("streamed", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_frozen_blocks_make_the_same_states(
    family: str, dtype: torch.dtype, streamed: int | None, pico_cache: PicoFolder, base_of: BaseOf
) -> None:
    base = base_of(pico_cache(family))
    model = load(base, streamed=streamed)
    exact = states(load(base), torch.float32, packed=False)
    twin = states(model, dtype, packed=False)
    layers = dict(model.named_modules())
    found = states(model, dtype, packed=True)
    if dtype == torch.float32:
        torch.testing.assert_close(found, twin, rtol=1e-5, atol=3e-6 * float(twin.abs().max()))
    else:
        # GELU sees a product before it is rounded: nearer to float32 than autocast, if anything.
        assert (found - exact).abs().mean() <= 1.05 * (twin - exact).abs().mean()
    assert dict(model.named_modules()) == layers
    assert torch.equal(states(model, dtype, packed=False), twin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_model_packed_for_good_keeps_its_adapters_and_its_head(
    family: str, dtype: torch.dtype, tmp_path: Path, base_of: BaseOf
) -> None:
    base = base_of(build_pico(tmp_path / "base", family, width=128))
    method = LoraMethod(r=4, target_modules="all-linear", lora_dropout=0.0)
    model = apply_method(load(base), method, family=base.family, base_name="x", seed=2).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)

    @torch.no_grad()
    def logits() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return classify(model, batch(3)).float()

    twin = logits()
    core = unwrapped(model)
    pack_blocks(core, base.family, dtype)
    plain = [type(layer) for layer in core.get_submodule(base.family.blocks).modules()]
    assert plain.count(PackedLinear) == 2 * len(base.family.linear)
    # What is left are the halves of the adapters.
    assert plain.count(nn.Linear) == 2 * plain.count(PackedLinear)
    assert Conv1D not in plain
    found = logits()
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, twin, rtol=0, atol=bound * max(1.0, float(twin.abs().max())))


@pytest.mark.parametrize("layer", [Conv1D(96, 64), nn.Linear(64, 96), nn.Linear(64, 96, bias=False)])
@needs_bf16
def test_a_packed_product_has_the_bits_of_autocast(layer: Any) -> None:
    hidden = torch.randn(3, 5, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PackedLinear(layer, torch.bfloat16)(hidden), layer(hidden))


def test_layers_return_when_the_block_fails(pico_cache: PicoFolder, base_of: BaseOf) -> None:
    base = base_of(pico_cache("gpt2"))
    model = load(base)
    block = model.transformer.h[0]
    layers = dict(block.named_modules())
    found: list[type] = []

    def fail() -> None:
        with packed_block(block, base.family, torch.float32):
            found.extend(type(layer) for layer in (block.mlp.c_fc, block.mlp.act))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert found == [PackedLinear, nn.Identity]
    assert dict(block.named_modules()) == layers


def test_weights_are_packed_where_onednn_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_packing("onednn", "no", CPU) == choose_packing("onednn", "fp32", CPU) == torch.float32
    assert choose_packing("default", "fp32", CPU) is choose_packing("onednn", "fp16", CPU) is None
    assert choose_packing("onednn", "bf16", torch.device("meta")) is None
    state = torch.get_rng_state()
    gemm._packs.cache_clear()
    assert gemm._packs(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    gemm._packs.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(PackedLinear, "forward", lambda *_: torch.zeros(3, 66))
        assert choose_packing("onednn", "fp32", CPU) is None
    gemm._packs.cache_clear()
    monkeypatch.setattr("toolkit.training.gemm._works", lambda: False)
    assert choose_packing("onednn", "fp32", CPU) is choose_packing("onednn", "bf16", CPU) is None
