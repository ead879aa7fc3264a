from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pico import PicoFolder

from toolkit.config.schema import ModelSettings
from toolkit.errors import ModelError
from toolkit.models import base as base_module
from toolkit.models.base import embedded_names, resolve_base


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOOLKIT_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def fails(name: str, *, max_length: int = 16) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_base(ModelSettings(base=name, max_length=max_length))
    return str(caught.value)


def test_a_local_folder_is_named_by_its_absolute_path(pico_cache: PicoFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pico_cache("gpt2")
    monkeypatch.chdir(folder.parent)
    base = resolve_base(ModelSettings(base="./gpt2", max_length=48))
    assert base.name_or_path == str(folder.resolve())
    assert (base.requested, base.used, base.offline) == ("./gpt2", "./gpt2", False)
    assert base.config["n_layer"] == 2


def test_an_embedded_base_is_found_by_name(
    pico_cache: PicoFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(base_module, "EMBEDDED", tmp_path / "embedded")
    assert embedded_names() == []
    shutil.copytree(pico_cache("gpt2"), tmp_path / "embedded" / "gpt2-pico")
    assert embedded_names() == ["gpt2-pico"]
    base = resolve_base(ModelSettings(base="gpt2-pico", max_length=48))
    assert base.name_or_path == str((tmp_path / "embedded" / "gpt2-pico").resolve())
    assert "did you mean gpt2-pico?" in fails("gpt2-pic")


def test_every_shipped_base_resolves() -> None:
    for name in embedded_names():
        assert resolve_base(ModelSettings(base=name, max_length=16)).family.model_type in name


def test_a_mistyped_path_is_not_looked_up_on_the_hub(pico_cache: PicoFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pico_cache("gpt2").parent.parent)
    parent = pico_cache("gpt2").parent.name
    assert f"did you mean {parent}/gpt2?" in fails(f"{parent}/gpt22")
    assert "model.base: no such folder" in fails("./none")
    assert "model.base: no such folder" in fails(str(Path("/") / "no" / "such" / "folder"))


def test_more_tokens_than_positions(pico_cache: PicoFolder) -> None:
    said = fails(str(pico_cache("gpt2")), max_length=49)
    assert said.endswith("model.max_length: 49 tokens, but the model has 48 positions (at most 48)")


def test_a_shape_without_weights_serves_random_init_alone(pico_folder: PicoFolder) -> None:
    import torch

    from toolkit.models.load import load_language_model

    folder = pico_folder("gpt2")
    (folder / "model.safetensors").unlink()
    assert "no weights" in fails(str(folder))
    base = resolve_base(ModelSettings(base=str(folder), random_init=True, max_length=16))
    assert set(base.as_dict()) == {"requested", "used", "offline", "fingerprint"}
    assert load_language_model(base, seed=0, random_init=True, device=torch.device("cpu")).config.n_layer == 2
