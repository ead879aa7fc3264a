"""Every method: what trains, that the planner knows it, and that stock peft reads what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ladder import ADAPTERS, LADDER, LORA, cases
from peft import PeftModel
from pico import BaseOf, Batch, LoadModel, PicoFolder
from transformers import AutoModelForSequenceClassification

from toolkit.adapters.apply import apply_method, load_trainable_state, parameter_report, trainable_state
from toolkit.adapters.save import load_adapter, save_adapter
from toolkit.config.methods import Ia3Method, Method, PrefixMethod
from toolkit.config.schema import DataSettings, ModelSettings, Recipe
from toolkit.errors import AdapterError, ToolkitError
from toolkit.memory.shape import model_shape
from toolkit.models.base import Base
from toolkit.models.forward import classify, frozen_blocks

# peft 0.21 itself reads a property that transformers 5.23 deprecates, and knows no width of a layer norm.
STOCK_PEFT = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]


def tuned(model: Any, method: Method, base: Base, *, noise: float = 0.1) -> Any:
    adapted = apply_method(model, method, family=base.family, base_name=base.name_or_path, seed=3).eval()
    generator = torch.Generator().manual_seed(6)
    for tensor in trainable_state(adapted).values():
        tensor.add_(noise * torch.randn(tensor.shape, generator=generator))
    return adapted


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return classify(model, batch)


@pytest.fixture
def base_named(pico_cache: PicoFolder, base_of: BaseOf) -> Any:
    return lambda family: base_of(pico_cache(family))


@pytest.mark.parametrize(("name", "family", "storage"), cases(adapters=True))
def test_saved_and_loaded_the_logits_are_the_same(
    base_named: Any, load_model: LoadModel, batch: Batch, tmp_path: Path, name: str, family: str, storage: str
) -> None:
    base = base_named(family)
    plain = logits_of(load_model(base, storage=storage), batch)
    model = tuned(load_model(base, storage=storage), LADDER[name], base)
    expected = logits_of(model, batch)
    assert (expected - plain).abs().max() > 1e-2
    save_adapter(model, tmp_path)
    loaded = load_adapter(load_model(base, storage=storage, seed=77), tmp_path)
    # What is written as plain LoRA is the same up to the order of sums.
    tolerance = 2e-6 if name in ("pissa", "adalora") else 0.0
    torch.testing.assert_close(logits_of(loaded, batch), expected, atol=tolerance, rtol=tolerance)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    save_adapter(model, tmp_path)
    assert again == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


@pytest.mark.parametrize(("name", "family", "storage"), cases(adapters=True, storages=("fp32",)))
def test_stock_peft_loads_it_with_the_same_logits(
    base_named: Any, load_model: LoadModel, batch: Batch, tmp_path: Path, name: str, family: str, storage: str
) -> None:
    base = base_named(family)
    model = tuned(load_model(base), LADDER[name], base)
    expected = logits_of(model, batch)
    save_adapter(model, tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(base.name_or_path, num_labels=2, pad_token_id=0)
    loaded = PeftModel.from_pretrained(stock, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=2e-6, rtol=1e-5)


test_stock_peft_loads_it_with_the_same_logits.pytestmark += STOCK_PEFT  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "family", "storage"), cases(storages=("fp32",)))
def test_the_planner_counts_what_trains(
    base_named: Any, load_model: LoadModel, name: str, family: str, storage: str
) -> None:
    base = base_named(family)
    model = apply_method(load_model(base), LADDER[name], family=base.family, base_name="x", seed=3)
    recipe = Recipe(model=ModelSettings(base="x"), data=DataSettings(source="x"), method=LADDER[name])
    shape, report = model_shape(base.config, recipe, labels=2), parameter_report(model)
    assert (shape.trainable, shape.frozen) == (report.trainable, frozen_blocks(model))
    # peft keeps the norms that it copies, and prefixes are no part of the base.
    assert shape.total == report.total
    assert report.trainable == sum(tensor.numel() for tensor in trainable_state(model).values())


@pytest.mark.parametrize(("name", "family", "storage"), cases(storages=("fp32",)))
def test_the_trained_state_goes_over_to_a_fresh_model(
    base_named: Any, load_model: LoadModel, batch: Batch, name: str, family: str, storage: str
) -> None:
    """What a resumed run does: everything that does not train is built anew from the base and the seed."""
    base = base_named(family)
    model = tuned(load_model(base), LADDER[name], base)
    fresh = apply_method(load_model(base), LADDER[name], family=base.family, base_name=base.name_or_path, seed=3)
    load_trainable_state(fresh, trainable_state(model))
    assert torch.equal(logits_of(fresh.eval(), batch), logits_of(model, batch))


@pytest.mark.parametrize("name", ["dora", "vera", "ia3", "ln_tuning", "prefix", "pissa"])
def test_a_missing_or_extra_tensor_and_a_nan_are_refused(
    base_named: Any, load_model: LoadModel, tmp_path: Path, name: str
) -> None:
    from safetensors.torch import load_file, save_file

    base = base_named("gpt2")
    save_adapter(tuned(load_model(base), LADDER[name], base), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    own = next(key for key in sorted(tensors, reverse=True) if "score" not in key)
    damaged = {
        "absent": {key: value for key, value in tensors.items() if key != own},
        "an unexpected tensor": {**tensors, "base_model.model.more": tensors[own].clone()},
        "NaN": tensors | {own: torch.full_like(tensors[own], float("nan"))},
        "shape": tensors | {own: tensors[own][..., :1].clone()} if name != "ia3" else {},
        "the trained head is absent": {key: value for key, value in tensors.items() if "score" not in key},
    }
    for said, changed in damaged.items():
        if not changed:
            continue
        save_file(changed, file)
        with pytest.raises(AdapterError, match=said):
            load_adapter(load_model(base), tmp_path)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("vera", {"projection_prng_key": "1"}, "projection_prng_key"),
        ("vera", {"save_projection": "no"}, "save_projection"),
        ("vera", {"bias": "all"}, "bias: 'all'"),
        ("ia3", {"feedforward_modules": "mlp.*"}, "feedforward_modules"),
        ("ia3", {"target_modules": ["score"]}, "target_modules: score matches no layer"),
        ("ln_tuning", {"target_modules": "ln.*"}, "target_modules"),
        ("prefix", {"num_layers": 1}, "num_layers: 1 .2 by the base"),
        ("prefix", {"prefix_projection": True}, "prefix_projection: True is not supported"),
        ("prefix", {"num_virtual_tokens": 5}, "prompt_embeddings: shape"),
        ("rslora", {"use_rslora": 1}, "use_rslora: 1 .true or false"),
    ],
)
def test_a_changed_config_is_refused(
    base_named: Any, load_model: LoadModel, tmp_path: Path, name: str, values: dict[str, Any], said: str
) -> None:
    base = base_named("gpt2")
    save_adapter(tuned(load_model(base), LADDER[name], base), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(AdapterError, match=said):
        load_adapter(load_model(base), tmp_path)


def test_pissa_starts_where_the_base_is_and_at_its_largest_singular_values(
    base_named: Any, load_model: LoadModel, batch: Batch
) -> None:
    base = base_named("gpt2")
    plain = load_model(base)
    weight = plain.transformer.h[0].attn.c_attn.weight.detach().clone()
    before = logits_of(plain, batch)
    model = apply_method(plain, LADDER["pissa"], family=base.family, base_name="x", seed=3).eval()
    torch.testing.assert_close(logits_of(model, batch), before, atol=1e-5, rtol=1e-5)
    layer = model.get_base_model().transformer.h[0].attn.c_attn
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    values = torch.linalg.svdvals(weight)[:4]
    torch.testing.assert_close(torch.linalg.svdvals(delta)[:4], values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("storage", ["fp32", "nf4", "int8"])
def test_lora_fa_leaves_a_as_it_was_drawn(base_named: Any, load_model: LoadModel, storage: str) -> None:
    base = base_named("distilbert")
    models = [
        apply_method(load_model(base, storage=storage), method, family=base.family, base_name="x", seed=3)
        for method in (LADDER["lora_fa"], LORA)
    ]
    frozen, drawn = (dict(model.named_parameters()) for model in models)
    names = [name for name in frozen if ".lora_A." in name]
    assert names
    for name in names:
        assert not frozen[name].requires_grad
        assert torch.equal(frozen[name], drawn[name])
    assert not any(".lora_A." in name for name in trainable_state(models[0]))


def test_ia3_tells_the_two_layers_named_c_proj_apart(base_named: Any, load_model: LoadModel) -> None:
    base = base_named("gpt2")
    method = Ia3Method(name="ia3", target_modules=["c_proj"])
    model = apply_method(load_model(base), method, family=base.family, base_name="x").get_base_model()
    block = model.transformer.h[0]
    assert block.attn.c_proj.ia3_l["default"].shape == (64, 1)
    assert block.mlp.c_proj.ia3_l["default"].shape == (1, 256)


def test_a_prefix_acts_before_every_token_and_rows_do_not_mix(
    base_named: Any, load_model: LoadModel, batch: Batch
) -> None:
    base = base_named("gpt2")
    model = tuned(load_model(base), PrefixMethod(name="prefix", num_virtual_tokens=2), base)
    together = logits_of(model, batch)
    lengths = batch["attention_mask"].sum(1)
    for row, length in enumerate(lengths):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
        torch.testing.assert_close(logits_of(model, alone)[0], together[row], atol=2e-6, rtol=1e-5)


def test_an_adapter_without_its_head_is_not_saved(base_named: Any, load_model: LoadModel, tmp_path: Path) -> None:
    base = base_named("gpt2")
    for name in ADAPTERS:
        model = tuned(load_model(base), LADDER[name], base)
        head = model.get_base_model().score
        with torch.no_grad():
            head.modules_to_save["default"].weight[0, 0] = float("nan")
        with pytest.raises(ToolkitError, match="trained head score"):
            save_adapter(model, tmp_path / name)
