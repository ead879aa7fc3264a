from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import BaseOf, Change, PicoFolder, Tensors
from safetensors.torch import load_file, save_file

from toolkit.config.schema import QuantizationSettings
from toolkit.errors import ModelError
from toolkit.models.base import Base
from toolkit.models.load import load_classifier, load_language_model

CPU = torch.device("cpu")
LABELS = ("ham", "spam", "other")
FAMILY_NAMES = ["gpt2", "distilbert"]


def load(
    base: Base,
    *,
    labels: tuple[str, ...] = LABELS,
    quantization: QuantizationSettings | None = None,
    seed: int = 1,
    **more: Any,
) -> Any:
    return load_classifier(base, labels=labels, quantization=quantization, seed=seed, device=CPU, **more)


def rewrite(folder: Path, change: Change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def head_of(model: Any, base: Base) -> Tensors:
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if any(name.startswith(f"{path}.") for path in base.family.head)
    }


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_the_body_is_the_bases_and_the_head_depends_on_the_seed_alone(
    pico_cache: PicoFolder, base_of: BaseOf, model_type: str
) -> None:
    base = base_of(pico_cache(model_type))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    model = load(base)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    again, other = load(base), load(base, seed=2)
    stored = load_file(base.path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in stored:
            assert torch.equal(tensor, stored[name])
    assert set(model.state_dict()) - set(stored) == set(head_of(model, base))
    for name, tensor in head_of(model, base).items():
        assert torch.equal(tensor, again.state_dict()[name])
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other.state_dict()[name])
            assert tensor.std().item() == pytest.approx(0.02, rel=0.25)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_the_config_a_stock_reader_needs(pico_cache: PicoFolder, base_of: BaseOf, model_type: str) -> None:
    base = base_of(pico_cache(model_type))
    model = load(base)
    config = model.config
    assert config.id2label == {0: "ham", 1: "spam", 2: "other"}
    assert config.label2id == {"ham": 0, "spam": 1, "other": 2}
    assert (config.num_labels, config.use_cache) == (3, False)
    assert config.problem_type == "single_label_classification"
    assert config.pad_token_id == 0
    assert model.name_or_path == config.name_or_path == base.name_or_path
    assert not model.training


def test_gpt2_without_a_pad_token_gets_its_eos(pico_folder: PicoFolder, base_of: BaseOf) -> None:
    folder = pico_folder("gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 3, "pad_token_id": None}))
    assert load(base_of(folder)).config.pad_token_id == 3


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_half_precision_files_are_trained_in_fp32(pico_folder: PicoFolder, base_of: BaseOf, model_type: str) -> None:
    folder = pico_folder(model_type)
    rewrite(folder, lambda t: t.update({name: value.half() for name, value in t.items()}))
    model = load(base_of(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = load_file(folder / "model.safetensors")
    body = [name for name in stored if name in model.state_dict()]
    assert len(body) > 20
    assert all(torch.equal(model.state_dict()[name], stored[name].float()) for name in body)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_files_saved_from_the_bare_body_load_too(pico_folder: PicoFolder, base_of: BaseOf, model_type: str) -> None:
    folder = pico_folder(model_type)
    expected = load(base_of(folder)).state_dict()
    prefix = f"{base_of(folder).family.backbone}."

    def strip(tensors: Tensors) -> None:
        for name in list(tensors):
            value = tensors.pop(name)
            if name.startswith(prefix):
                tensors[name.removeprefix(prefix)] = value

    rewrite(folder, strip)
    found = load(base_of(folder)).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_a_head_for_the_same_labels_is_kept_and_any_other_is_drawn_anew(
    pico_cache: PicoFolder, base_of: BaseOf, tmp_path: Path, model_type: str
) -> None:
    first = load(base_of(pico_cache(model_type)), labels=("ham", "spam"))
    folder = tmp_path / "classifier"
    first.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((pico_cache(model_type) / "tokenizer.json").read_bytes())
    base = base_of(folder)
    assert base.config["architectures"] == [type(first).__name__]
    kept = head_of(load(base, labels=("ham", "spam"), seed=9), base)
    assert all(torch.equal(kept[name], value) for name, value in head_of(first, base).items())
    for labels in (("spam", "ham"), LABELS):
        drawn = head_of(load(base, labels=labels, seed=9), base)
        assert not torch.equal(drawn[f"{base.family.head[0]}.weight"][:2], kept[f"{base.family.head[0]}.weight"][:2])


def poison(tensors: Tensors) -> None:
    next(value for name, value in tensors.items() if name.endswith("bias"))[0] = float("nan")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("transformer.h.1.attn.c_attn.bias"), "h.1.attn.c_attn.bias: the tensor is missing"),
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), "extra.weight: an unexpected tensor"),
        (lambda t: t.update({"transformer.wpe.weight": torch.zeros(47, 64)}), r"wpe.weight: shape \[47, 64\]"),
        (lambda t: t.update({"transformer.wpe.weight": torch.zeros(48, 64).long()}), "wpe.weight: dtype I64"),
        (poison, "holds NaN or infinity"),
        (lambda t: t.clear() or t.update({"a": torch.zeros(1)}), "and 21 more tensors"),
    ],
)
def test_every_tensor_is_accounted_for(pico_folder: PicoFolder, base_of: BaseOf, change: Change, said: str) -> None:
    folder = pico_folder("gpt2")
    rewrite(folder, change)
    for loader in (load, lambda base: load_language_model(base, seed=0, device=CPU)):
        with pytest.raises(ModelError, match=said):
            loader(base_of(folder))


def test_a_misshapen_language_head_has_its_line(pico_folder: PicoFolder, base_of: BaseOf) -> None:
    folder = pico_folder("distilbert")
    rewrite(folder, lambda t: t.update({"vocab_transform.weight": torch.zeros(3, 3)}))
    load(base_of(folder))
    with pytest.raises(ModelError, match=r"vocab_transform.weight: shape \[3, 3\]"):
        load_language_model(base_of(folder), seed=0, device=CPU)


def test_what_old_files_carry_beside_the_weights_is_let_pass(pico_folder: PicoFolder, base_of: BaseOf) -> None:
    folder = pico_folder("gpt2")
    expected = load(base_of(folder)).state_dict()
    old = {"transformer.h.0.attn.bias": torch.ones(1, 1, 48, 48), "lm_head.weight": torch.ones(300, 64)}
    rewrite(folder, lambda t: t.update(old))
    found = load(base_of(folder)).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_random_init_takes_the_shape_and_the_seed_alone(
    pico_cache: PicoFolder, base_of: BaseOf, model_type: str
) -> None:
    base = base_of(pico_cache(model_type))
    model, again = (load(base, seed=4, random_init=True) for _ in range(2))
    other = load(base, seed=5, random_init=True)
    pretrained = load(base, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    embedded = model.get_input_embeddings().weight
    assert not torch.equal(embedded, other.get_input_embeddings().weight)
    assert not torch.equal(embedded, pretrained.get_input_embeddings().weight)
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in pretrained.named_parameters()
    ]


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_language_models(pico_cache: PicoFolder, base_of: BaseOf, model_type: str) -> None:
    base = base_of(pico_cache(model_type))
    model = load_language_model(base, seed=0, device=CPU)
    stored = load_file(base.path / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    output = model.get_output_embeddings().weight
    assert output.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert model.config.use_cache is False
    fresh, again = (load_language_model(base, seed=3, random_init=True, device=CPU) for _ in range(2))
    assert torch.equal(fresh.get_input_embeddings().weight, again.get_input_embeddings().weight)
    assert not torch.equal(fresh.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_masked_head_that_the_base_lacks_is_drawn_from_the_seed(pico_folder: PicoFolder, base_of: BaseOf) -> None:
    folder = pico_folder("distilbert")
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("vocab_")])
    one, two, three = (load_language_model(base_of(folder), seed=s, device=CPU) for s in (1, 1, 2))
    assert torch.equal(one.vocab_transform.weight, two.vocab_transform.weight)
    assert not torch.equal(one.vocab_transform.weight, three.vocab_transform.weight)


def test_nothing_is_printed_while_loading(
    pico_cache: PicoFolder, base_of: BaseOf, capfd: pytest.CaptureFixture[str]
) -> None:
    load(base_of(pico_cache("gpt2")))
    load(base_of(pico_cache("distilbert")), quantization=QuantizationSettings())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_real_distilbert(minilm: Path, base_of: BaseOf) -> None:
    model = load(base_of(minilm))
    stored = load_file(minilm / "model.safetensors")
    body = model.distilbert.state_dict()
    assert body.keys() == stored.keys()
    assert all(torch.equal(body[name], stored[name].float()) for name in stored)
