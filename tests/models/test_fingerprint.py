from __future__ import annotations

import json

import pytest
from pico import PicoFolder
from safetensors.torch import load_file, save_file

from toolkit.models.fingerprint import fingerprint


def test_sharding_labels_and_library_versions_do_not_count(pico_folder: PicoFolder) -> None:
    folder = pico_folder("distilbert")
    before = fingerprint(folder)
    assert before.startswith("sha256:")
    assert len(before) == 71
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in reversed(part)}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "x"}, "transformers_version": "9"}))
    assert fingerprint(folder) == before


@pytest.mark.parametrize("change", ["bit", "name", "dtype", "heads"])
def test_any_change_of_the_model_counts(pico_folder: PicoFolder, change: str) -> None:
    folder = pico_folder("gpt2")
    before = fingerprint(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.h.1.mlp.c_fc.bias"
    if change == "bit":
        tensors[name][0] += 1e-7
    elif change == "name":
        tensors["transformer.h.9.mlp.c_fc.bias"] = tensors.pop(name)
    elif change == "dtype":
        tensors[name] = tensors[name].half()
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"n_head": 4}))
    save_file(tensors, file)
    assert fingerprint(folder) != before
