"""Which heads stock transformers has too, how the others are loaded, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import PicoFolder
from safetensors.torch import load_file
from trained import LABELS, build_run

from toolkit.config.schema import FullMethod, HeadSettings, ModelSettings
from toolkit.errors import ModelError
from toolkit.families import FAMILIES
from toolkit.models.base import Base, resolve_base
from toolkit.models.heads import own_head
from toolkit.models.load import load_classifier, load_language_model

CPU = torch.device("cpu")
FULL = FullMethod(name="full")
MEAN = HeadSettings(pooling="mean", hidden=[24, 8], activation="tanh", dropout=0.25)
SIZES = {"gpt2": {"model_type": "gpt2", "n_embd": 64}, "distilbert": {"model_type": "distilbert", "dim": 64}}


def base_of(folder: Path, head: HeadSettings | None) -> Base:
    return resolve_base(ModelSettings(base=str(folder), max_length=16, head=head))


def load(base: Base, *, seed: int = 1, labels: tuple[str, ...] = LABELS) -> Any:
    return load_classifier(base, labels=labels, quantization=None, seed=seed, device=CPU)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("gpt2", {}),
        ("gpt2", {"pooling": "last", "dropout": 0.5, "activation": "tanh"}),
        ("distilbert", {"hidden": [64]}),
        ("distilbert", {"pooling": "first", "hidden": [64], "dropout": 0.0}),
    ],
)
def test_what_the_architecture_has_stays_stock(pico_cache: PicoFolder, family: str, head: dict[str, Any]) -> None:
    settings = HeadSettings(**head)
    assert own_head(settings, SIZES[family]) is None
    base = base_of(pico_cache(family), settings)
    assert base.family == FAMILIES[family]
    model, plain = load(base), load(base_of(pico_cache(family), None))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    # Its dropout acts all the same.
    pooled = torch.ones(4, 64)
    with torch.no_grad():
        kept = model.head_logits(pooled)
        torch.manual_seed(0)
        dropped = model.train().head_logits(pooled)
    assert torch.equal(kept, dropped) == (settings.dropout == 0)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("gpt2", {"pooling": "first"}),
        ("gpt2", {"pooling": "mean"}),
        ("gpt2", {"hidden": [64]}),
        ("distilbert", {}),
        ("distilbert", {"hidden": [63]}),
        ("distilbert", {"hidden": [64, 64]}),
        ("distilbert", {"hidden": [64], "activation": "gelu"}),
        ("distilbert", {"pooling": "max", "hidden": [64]}),
    ],
)
def test_what_it_lacks_is_the_toolkits_own(family: str, head: dict[str, Any]) -> None:
    described = own_head(HeadSettings(**head), SIZES[family])
    assert described is not None
    assert described["pooling"] == head.get("pooling", FAMILIES[family].pooling)


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_an_own_head_is_drawn_from_the_seed_alone(pico_cache: PicoFolder, family: str) -> None:
    base = base_of(pico_cache(family), MEAN)
    state = torch.get_rng_state()
    model, again, other = load(base), load(base), load(base, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.classification_head.state_dict().items()}
    assert shapes == {
        "hidden.0.weight": (24, 64), "hidden.0.bias": (24,), "hidden.1.weight": (8, 24), "hidden.1.bias": (8,),
        "out_proj.weight": (3, 8), "out_proj.bias": (3,),
    }  # fmt: skip
    for name, tensor in model.classification_head.state_dict().items():
        assert torch.equal(tensor, again.classification_head.state_dict()[name])
        if name.endswith("weight"):
            spread = 0.02 if name.startswith("out_proj") else (2 / tensor.shape[1]) ** 0.5
            assert float(tensor.std()) == pytest.approx(spread, rel=0.4)
            assert not torch.equal(tensor, other.classification_head.state_dict()[name])
        else:
            assert not tensor.any()
    assert {"score", "classifier"} & set(dict(model.named_modules())) == set(base.family.head[1:])
    assert not hasattr(model, "pre_classifier")
    streamed = load_classifier(base, labels=LABELS, quantization=None, seed=1, device=CPU, streamed=1)
    assert torch.equal(streamed.classification_head.out_proj.weight, model.classification_head.out_proj.weight)


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_a_model_with_an_own_head_is_a_base_with_that_head(pico_cache: PicoFolder, tmp_path: Path, family: str) -> None:
    folder = build_run(tmp_path / "run", pico_cache(family), method=FULL, head=MEAN) / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == f"toolkit_{family}"
    assert config["classification_head"] == MEAN.model_dump()
    found = base_of(folder, None)
    assert found.head == MEAN
    assert found.family == base_of(pico_cache(family), MEAN).family
    stored = load_file(folder / "model.safetensors")
    model = load(found)
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    # Other labels want another head of the same kind.
    other = load(found, labels=("a", "b"))
    assert other.classification_head.out_proj.weight.shape == (2, 8)
    assert not torch.equal(other.classification_head.hidden[0].weight, model.classification_head.hidden[0].weight)
    spoken = load_language_model(found, seed=0, device=CPU)
    assert not hasattr(spoken.config, "classification_head")
    assert base_of(folder, MEAN.model_copy(update={"dropout": 0.5})).head.dropout == 0.5  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="the base has another one of its own"):
        base_of(folder, HeadSettings(pooling="mean"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2' beside classification_head"),
        ({"classification_head": None}, "classification_head: "),
        ({"classification_head": {"pooling": "mean", "hidden": [0]}}, "classification_head: "),
        ({"classification_head": {"pooling": "mean", "auto_map": "x.py"}}, "classification_head: "),
        ({"classification_head": {"pooling": "max", "n_estimators": 9, "max_depth": 10**9}}, "classification_head: "),
        ({"classification_head": {"pooling": "max", "n_estimators": 9, "max_depth": 3}}, "classification_head.feature"),
        ({"classification_head": {"n_estimators": 9, "max_depth": 3}}, "classification_head: "),
        ({"classification_head": {"hidden": []}}, "classification_head.pooling: missing"),
        ({"classification_head": {"pooling": "mean", "hidden": [24]}}, "classification_head.out_proj.weight"),
        ({"model_type": "toolkit_bert"}, "model_type: 'toolkit_bert'"),
    ],
)
def test_a_config_that_describes_another_head_is_refused(
    pico_cache: PicoFolder, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    folder = build_run(tmp_path / "run", pico_cache("gpt2"), method=FULL, head=MEAN) / "model"
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError) as caught:
        load(base_of(folder, None))
    assert line in str(caught.value)
    assert "Traceback" not in str(caught.value)
