from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pico import PicoFolder

from toolkit.errors import ModelError
from toolkit.models.folder import check_model_folder, read_tensor_headers
from toolkit.models.headers import read_header

TYPES = ["distilbert", "gpt2"]


def check(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_model_folder(folder, family_types=TYPES)
    return str(caught.value)


def edit(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.update(values)
    file.write_text(json.dumps(config))


def raw_safetensors(file: Path, header: bytes, data: bytes = b"") -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_good_folder_passes_and_its_headers_are_those_of_safetensors(pico_cache: PicoFolder, model_type: str) -> None:
    from safetensors import safe_open

    folder = pico_cache(model_type)
    assert check_model_folder(folder, family_types=TYPES)["model_type"] == model_type
    headers = read_tensor_headers(folder)
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert sorted(headers) == sorted(file.keys())
        for name in headers:
            piece = file.get_slice(name)
            assert (list(headers[name].shape), headers[name].dtype) == (piece.get_shape(), piece.get_dtype())


def test_the_real_distilbert_passes(minilm: Path) -> None:
    assert check_model_folder(minilm, family_types=TYPES)["dim"] == 384


def damage_config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: missing"),
        (damage_config("{"), "not valid JSON"),
        (damage_config("[]"), "not a JSON object"),
        (damage_config('{"model_type": "gpt2", "model_type": "gpt2"}'), "the key model_type is there twice"),
        (lambda f: edit(f, model_type="gpt"), "model_type: 'gpt' is not supported (supported: distilbert, gpt2; did"),
        (lambda f: edit(f, auto_map={"AutoModel": "x.Y"}), "auto_map: asks for code"),
        (lambda f: edit(f, quantization_config={"bits": 4}), "quantised already"),
        (lambda f: edit(f, n_layer=0), "n_layer: 0 (a whole number above 0)"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights (a model.safetensors)"),
        (only_pickle, "only pytorch_model.bin, which is never unpickled"),
        (truncate, "truncated"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer: missing"),
        (lambda f: edit(f, vocab_size=7), "token ids, but the embeddings have 7 rows"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "this is an adapter"),
        (lambda f: edit(f, id2label={"0": "a", "2": "b"}), "id2label: its ids have gaps"),
        (lambda f: edit(f, id2label={"0": "a", "1": "a"}), "id2label: a label is there twice"),
        (lambda f: edit(f, id2label={"0": "a", "1": "b"}, label2id={"a": 1, "b": 0}), "label2id: disagrees"),
    ],
)
def test_each_damage_has_its_line(pico_folder: PicoFolder, damage: Any, said: str) -> None:
    folder = pico_folder("gpt2")
    damage(folder)
    assert said in check(folder)


def test_all_problems_are_reported_together(pico_folder: PicoFolder) -> None:
    folder = pico_folder("gpt2")
    edit(folder, auto_map={}, n_positions="48")
    truncate(folder)
    (folder / "tokenizer.json").unlink()
    assert len(check(folder).splitlines()) == 4


def test_missing_folder_and_file(tmp_path: Path) -> None:
    assert check(tmp_path / "none").endswith("no such folder")
    (tmp_path / "file").write_text("")
    assert check(tmp_path / "file").endswith("not a folder")


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234", ""),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"1234", "4 bytes for F32 [2]"),
        (b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"1234", "malformed"),
        (b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', b"1234", "malformed"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234", "malformed"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}', b"1234", "malformed"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"12345678", "leave a hole"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"12345678", "too long"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"12", "truncated"),
        (b'{"a":1}', b"", "malformed"),
        (b'{"a":{},"a":{}}', b"", "the key a is there twice"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b"\xff{}", b"", "not valid JSON"),
        (b"", b"", "truncated"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: bytes, data: bytes, said: str) -> None:
    file = tmp_path / "model.safetensors"
    raw_safetensors(file, header, data)
    if not said:
        assert read_header(file)["a"].stop - read_header(file)["a"].start == 4
        return
    with pytest.raises(ModelError, match=said.replace("[", r"\[")):
        read_header(file)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40))
    with pytest.raises(ModelError, match="at most 16777216"):
        read_header(file)


@pytest.mark.parametrize("name", ["../o.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "..\\x"])
def test_shards_stay_inside_the_folder(pico_folder: PicoFolder, name: str) -> None:
    folder = pico_folder("gpt2")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "not a plain .safetensors file name" in check(folder)


def test_a_symlink_out_is_refused_but_not_the_hub_caches_own(pico_folder: PicoFolder, tmp_path: Path) -> None:
    folder = pico_folder("gpt2")
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    assert "symlink out" in check(folder)
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    check_model_folder(snapshot, family_types=TYPES)


def test_index_and_shards_must_agree(pico_folder: PicoFolder) -> None:
    folder = pico_folder("gpt2")
    names = list(read_tensor_headers(folder))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    check_model_folder(folder, family_types=TYPES)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names[1:], "model-00001-of-00001.safetensors")}))
    assert "the index and the shards disagree" in check(folder)


def test_a_manifest_is_held_to(pico_folder: PicoFolder) -> None:
    folder = pico_folder("gpt2")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    facts: dict[str, Any] = {"labels": ["ham", "spam"], "files": {"model.safetensors": {"sha256": digest}}}
    edit(folder, id2label={"0": "ham", "1": "spam"}, label2id={"ham": 0, "spam": 1})
    (folder / "manifest.json").write_text(json.dumps(facts))
    check_model_folder(folder, family_types=TYPES)
    facts["labels"] = ["spam", "ham"]
    facts["files"]["model.safetensors"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(facts))
    said = check(folder)
    assert "its checksum differs from the manifest" in said
    assert "differ from config.json's id2label" in said


def test_checking_needs_neither_torch_nor_transformers(pico_cache: PicoFolder) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from toolkit.models.base import resolve_base; from toolkit.config.schema import ModelSettings;"
        f"resolve_base(ModelSettings(base={str(pico_cache('gpt2'))!r}, max_length=8)).fingerprint;"
        "sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
