from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from pico import BaseOf, Batch, Change, LoadModel, Tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from toolkit.adapters.apply import apply_method, trainable_state
from toolkit.adapters.save import load_adapter, save_adapter
from toolkit.config.schema import LoraMethod
from toolkit.errors import AdapterError, ToolkitError
from toolkit.models.base import Base
from toolkit.models.forward import classify

STORAGES = ["fp32", "nf4", "int8"]
# peft 0.21 itself reads a property that transformers 5.23 deprecates.
STOCK_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def trained(model: Any, base: Base, *, targets: str = "auto", r: int = 4) -> Any:
    """An adapter as training leaves it: every trained tensor has moved."""
    method = LoraMethod(r=r, lora_alpha=2 * r, target_modules="auto" if targets == "auto" else "all-linear")
    adapted = apply_method(model, method, family=base.family, base_name=base.name_or_path, seed=3).eval()
    generator = torch.Generator().manual_seed(6)
    for tensor in trainable_state(adapted).values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return adapted


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return classify(model, batch)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_saved_and_loaded_the_logits_are_identical(
    base: Base, load_model: LoadModel, batch: Batch, tmp_path: Path, storage: str, targets: str
) -> None:
    plain = logits_of(load_model(base, storage=storage), batch)
    model = trained(load_model(base, storage=storage), base, targets=targets)
    expected = logits_of(model, batch)
    assert (expected - plain).abs().max() > 1e-2
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(load_model(base, storage=storage, seed=77), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded, batch), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = load_adapter(load_model(base, storage=storage, seed=77), tmp_path / "adapter", trainable=True)
    assert trainable_state(again).keys() == trainable_state(model).keys()


@STOCK_PEFT
def test_stock_peft_loads_it_with_the_same_logits(
    base: Base, load_model: LoadModel, batch: Batch, tmp_path: Path
) -> None:
    model = trained(load_model(base), base, targets="all-linear")
    expected = logits_of(model, batch)
    save_adapter(model, tmp_path / "adapter")
    stock = AutoModelForSequenceClassification.from_pretrained(base.name_or_path, num_labels=2, pad_token_id=0)
    loaded = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-6, rtol=1e-5)


@STOCK_PEFT
@pytest.mark.parametrize("count", [2, 3])
def test_stock_peft_finds_the_base_by_itself(
    base: Base, load_model: LoadModel, batch: Batch, tmp_path: Path, count: int
) -> None:
    labels = ("ham", "spam", "other")[:count]
    model = trained(load_model(base, labels=labels), base)
    expected = logits_of(model, batch)
    save_adapter(model, tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=count, pad_token_id=0
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-6, rtol=1e-5)


@STOCK_PEFT
def test_what_stock_peft_saves_loads_here(base: Base, load_model: LoadModel, batch: Batch, tmp_path: Path) -> None:
    model = trained(load_model(base), base)
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert torch.equal(logits_of(load_adapter(load_model(base, seed=5), tmp_path / "adapter"), batch), expected)
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == saved(model, tmp_path).keys()


def saved(model: Any, tmp_path: Path) -> Tensors:
    save_adapter(model, tmp_path / "ours")
    return load_file(tmp_path / "ours" / "adapter_model.safetensors")


def test_the_files_hold_the_adapter_and_the_head_and_nothing_else(
    base: Base, load_model: LoadModel, tmp_path: Path
) -> None:
    model = trained(load_model(base), base)
    tensors = saved(model, tmp_path)
    names = {name.replace(".default.", ".").replace(".modules_to_save.", ".") for name in trainable_state(model)}
    assert set(tensors) == names
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name_or_path
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "SEQ_CLS", True)
    assert config["modules_to_save"] == list(base.family.head)
    assert config["target_modules"] == sorted(base.family.lora_auto)
    first = {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
    save_adapter(model, tmp_path / "ours")
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}


def test_saving_opens_no_socket(
    base: Base, load_model: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    model = trained(load_model(base), base)
    model.peft_config["default"].base_model_name_or_path = "someone/not-cached"

    def refuse(*arguments: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    save_adapter(model, tmp_path / "adapter")


def test_a_model_without_an_adapter_or_a_name_is_not_saved(base: Base, load_model: LoadModel, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="has no adapter to save"):
        save_adapter(load_model(base), tmp_path / "adapter")
    model = trained(load_model(base), base)
    model.peft_config["default"].base_model_name_or_path = None
    with pytest.raises(ToolkitError, match="names no base model"):
        save_adapter(model, tmp_path / "adapter")


@pytest.fixture
def adapter(base: Base, load_model: LoadModel, tmp_path: Path) -> Path:
    save_adapter(trained(load_model(base), base), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_tensors(folder: Path, change: Change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def first(tensors: Tensors, part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def drop(part: str) -> Change:
    return lambda tensors: tensors.pop(first(tensors, part))


def replace(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({first(tensors, part): change(tensors[first(tensors, part)])})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("lora_A"), "half of a LoRA pair is absent"),
        (drop("lora_B"), "half of a LoRA pair is absent"),
        (lambda t: drop("lora_A")(t) is None or drop("lora_B")(t), ": a LoRA pair is absent"),
        (lambda t: [t.pop(n) for n in list(t) if "lora_" not in n], "the trained head is absent"),
        (
            lambda t: t.update({"base_model.model.extra": torch.zeros(1)}),
            "base_model.model.extra: an unexpected tensor",
        ),
        (replace("lora_A", lambda t: torch.full_like(t, float("nan"))), "holds NaN or infinity"),
        (replace("lora_B", lambda t: t.long()), "dtype torch.int64"),
        (replace("lora_A", lambda t: t[:2].clone()), "adapter_config.json and the base"),
    ],
)
def test_damaged_tensors_are_refused(
    base: Base, load_model: LoadModel, adapter: Path, change: Change, said: str
) -> None:
    edit_tensors(adapter, change)
    with pytest.raises(AdapterError, match=said):
        load_adapter(load_model(base), adapter)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "BONE_OF_CONTENTION"}, "peft_type: 'BONE_OF_CONTENTION' is not supported"),
        ({"peft_type": None}, "peft_type: None is not supported"),
        ({"task_type": "CAUSAL_LM"}, "task_type: 'CAUSAL_LM'"),
        ({"r": 8}, "adapter_config.json and the base"),
        ({"r": "4"}, "r: '4'"),
        ({"lora_alpha": True}, "lora_alpha: True"),
        ({"modules_to_save": None}, "modules_to_save: None .the head"),
        ({"target_modules": ".*(a|a)*$"}, "target_modules: .* .a list of module names"),
        ({"target_modules": ["nowhere"]}, "target_modules: nowhere matches no layer of the base"),
        ({"use_dora": True}, "lora_magnitude_vector: a part of the adapter is absent"),
        ({"use_qalora": True}, "use_qalora: True is not supported"),
        ({"peft_type": "BOFT"}, "peft_type: 'BOFT' is not supported .one of LORA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_core: 'os' is not supported"),
        ({"rank_pattern": {"x": 3}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' is not supported"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
    ],
)
def test_foreign_configs_are_refused(
    base: Base, load_model: LoadModel, adapter: Path, values: dict[str, Any], said: str
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(AdapterError, match=said):
        load_adapter(load_model(base), adapter)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10_000, "\ud800".encode("utf-16", "surrogatepass")])
def test_a_broken_config_is_refused(base: Base, load_model: LoadModel, adapter: Path, text: str | bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AdapterError, match=r"adapter_config.json: not "):
        load_adapter(load_model(base), adapter)


def test_missing_truncated_and_pickled_files(base: Base, load_model: LoadModel, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: damaged"):
        load_adapter(load_model(base), adapter)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"only adapter_model.bin, which is never unpickled"):
        load_adapter(load_model(base), adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: missing"):
        load_adapter(load_model(base), adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config.json: missing"):
        load_adapter(load_model(base), adapter)


def test_another_number_of_labels_is_refused(base: Base, load_model: LoadModel, adapter: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config.json and the base"):
        load_adapter(load_model(base, labels=("a", "b", "c")), adapter)


@STOCK_PEFT
def test_the_real_distilbert(
    minilm: Path, base_of: BaseOf, load_model: LoadModel, batch: Batch, tmp_path: Path
) -> None:
    base = base_of(minilm)
    model = trained(load_model(base), base, targets="all-linear", r=8)
    expected = logits_of(model, batch)
    save_adapter(model, tmp_path / "adapter")
    stock = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, expected, atol=1e-5, rtol=1e-5)
