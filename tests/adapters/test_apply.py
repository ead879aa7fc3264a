from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import Batch, LoadModel

from toolkit.adapters.apply import apply_method, load_trainable_state, parameter_report, trainable_state
from toolkit.adapters.freeze import trained_prefixes
from toolkit.config.schema import FullMethod, HeadMethod, LastNMethod, LoraMethod
from toolkit.errors import CapabilityError, CheckpointError, RecipeError
from toolkit.models.base import Base
from toolkit.models.forward import classify

STORAGES = ["fp32", "nf4", "int8"]
LORA = LoraMethod(r=4, lora_alpha=8, lora_dropout=0.0)


def apply(model: Any, method: Any, base: Base, *, seed: int = 3) -> Any:
    return apply_method(model, method, family=base.family, base_name=base.name_or_path, seed=seed)


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def head_names(base: Base) -> set[str]:
    return {f"{path}.{kind}" for path in base.family.head for kind in ("weight", "bias")} - {"score.bias"}


def last_block_names(base: Base, model: Any, first: int) -> set[str]:
    return {
        name
        for name, _ in model.named_parameters()
        if name.startswith(tuple(f"{base.family.blocks}.{i}." for i in range(first, 2)))
    }


def test_full_trains_everything(base: Base, load_model: LoadModel) -> None:
    model = apply(load_model(base), FullMethod(name="full"), base)
    assert trained_names(model) == {name for name, _ in model.named_parameters()}
    report = parameter_report(model)
    assert report.total == report.trainable == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("storage", STORAGES)
def test_head_trains_the_head_alone(base: Base, load_model: LoadModel, storage: str) -> None:
    model = apply(load_model(base, storage=storage), HeadMethod(name="head"), base)
    assert trained_names(model) == head_names(base)


@pytest.mark.parametrize("n", [1, 2])
def test_last_n_trains_the_last_blocks_the_final_norm_and_the_head(base: Base, load_model: LoadModel, n: int) -> None:
    model = apply(load_model(base), LastNMethod(name="last_n", n=n), base)
    norm = {"transformer.ln_f.weight", "transformer.ln_f.bias"} if base.family.model_type == "gpt2" else set()
    blocks = last_block_names(base, model, first=2 - n)
    assert len(blocks) == n * (12 if base.family.model_type == "gpt2" else 16)
    assert trained_names(model) == blocks | norm | head_names(base)


def test_last_n_of_twelve_blocks_does_not_mistake_1_for_11(base: Base) -> None:
    method = LastNMethod(name="last_n", n=1)
    assert f"{base.family.blocks}.11" in trained_prefixes(method, base.family, blocks=12)
    assert f"{base.family.blocks}.1" not in trained_prefixes(method, base.family, blocks=12)
    assert f"{base.family.blocks}.1" in trained_prefixes(method, base.family, blocks=2)


def test_last_n_beyond_the_blocks(base: Base, load_model: LoadModel) -> None:
    with pytest.raises(RecipeError, match=r"method.n: 3 blocks, but the base has 2 \(1 to 2\)"):
        apply(load_model(base), LastNMethod(name="last_n", n=3), base)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("method", [FullMethod(name="full"), LastNMethod(name="last_n", n=1)])
def test_quantised_weights_are_not_trained(base: Base, load_model: LoadModel, storage: str, method: Any) -> None:
    with pytest.raises(CapabilityError, match="which is quantised"):
        apply(load_model(base, storage=storage), method, base)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_lora_trains_adapters_and_the_head_in_fp32(
    base: Base, load_model: LoadModel, storage: str, targets: str
) -> None:
    model = apply(load_model(base, storage=storage), LORA.model_copy(update={"target_modules": targets}), base)
    suffixes = base.family.lora_auto if targets == "auto" else base.family.linear
    adapters = {name for name in trained_names(model) if "lora_" in name}
    assert len(adapters) == 2 * 2 * len(suffixes)
    assert all(name.split(".lora_")[0].endswith(suffixes) and base.family.blocks in name for name in adapters)
    heads = {
        f"base_model.model.{path}.modules_to_save.default.{kind}"
        for path, kind in (name.rsplit(".", 1) for name in head_names(base))
    }
    assert trained_names(model) == adapters | heads
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_lora_on_a_bf16_body_trains_fp32(base: Base) -> None:
    from toolkit.models.load import load_classifier

    raw = load_classifier(
        base, labels=("a", "b"), quantization=None, seed=1, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    model = apply(raw, LORA, base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("storage", STORAGES)
def test_a_fresh_adapter_changes_nothing_and_a_step_changes_only_what_trains(
    base: Base, load_model: LoadModel, batch: Batch, storage: str
) -> None:
    plain = load_model(base, storage=storage)
    with torch.no_grad():
        before = classify(plain, batch)
    model = apply(plain, LORA, base).eval()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        assert torch.equal(classify(model, batch), before)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(classify(model, batch), torch.tensor([0, 1, 0, 1]))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        assert (classify(model, batch) - before).abs().max() > 1e-3
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)


def test_the_adapters_start_depends_on_the_seed_alone(base: Base, load_model: LoadModel) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one = trainable_state(apply(load_model(base), LORA, base, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    two = trainable_state(apply(load_model(base), LORA, base, seed=3))
    other = trainable_state(apply(load_model(base), LORA, base, seed=4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("storage", STORAGES)
def test_quantised_weights_are_counted_by_their_real_number(base: Base, load_model: LoadModel, storage: str) -> None:
    plain = load_model(base)
    expected = sum(parameter.numel() for parameter in plain.parameters())
    adapters = sum(
        4 * sum(module.weight.shape)
        for name, module in plain.named_modules()
        if name.startswith(base.family.blocks) and name.endswith(base.family.lora_auto)
    )
    head = sum(parameter.numel() for path in base.family.head for parameter in plain.get_submodule(path).parameters())
    report = parameter_report(apply(load_model(base, storage=storage), LORA, base))
    assert report.total == expected + adapters
    assert report.trainable == adapters + head


def test_targets_that_this_model_lacks(base: Base, load_model: LoadModel) -> None:
    name = f"{base.family.blocks}.7.{base.family.linear[0]}"
    with pytest.raises(RecipeError, match="matches no layer of this model"):
        apply(load_model(base), LoraMethod(target_modules=[name]), base)


@pytest.mark.parametrize("method", [LORA, HeadMethod(name="head"), LastNMethod(name="last_n", n=1)])
def test_the_trainable_state_goes_out_and_comes_back(
    base: Base, load_model: LoadModel, batch: Batch, method: Any
) -> None:
    model = apply(load_model(base), method, base, seed=3).eval()
    with torch.no_grad():
        for tensor in trainable_state(model).values():
            tensor.add_(0.01)
        moved = classify(model, batch)
    tensors = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    assert set(tensors) == trained_names(model)
    fresh = apply(load_model(base, seed=8), method, base, seed=9).eval()
    load_trainable_state(fresh, tensors)
    with torch.no_grad():
        assert torch.equal(classify(fresh, batch), moved)
    assert trained_names(fresh) == set(tensors)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t, name: t.pop(name), "the tensor is missing"),
        (lambda t, name: t.update(more=torch.zeros(1)), "ckpt: more: an unexpected tensor"),
        (lambda t, name: t.update({name: torch.zeros(1, 1)}), r"shape \[1, 1\]"),
        (lambda t, name: t.update({name: t[name].double()}), "dtype torch.float64"),
        (lambda t, name: t[name].fill_(float("inf")), "holds NaN or infinity"),
    ],
)
def test_a_wrong_trainable_state_changes_nothing(base: Base, load_model: LoadModel, damage: Any, said: str) -> None:
    model = apply(load_model(base), LORA, base)
    before = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    damage(tensors, sorted(tensors)[-1])
    with pytest.raises(CheckpointError, match=said):
        load_trainable_state(model, tensors, where="ckpt")
    assert all(torch.equal(before[name], tensor) for name, tensor in trainable_state(model).items())
