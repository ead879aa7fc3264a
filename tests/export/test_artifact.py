"""The folder contract: what is written is found again, and whatever was touched is named."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from subprocess import run as run_process
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import AdapterError
from toolkit.export.artifact import (
    ArtifactFacts,
    BaseReference,
    find_artifact,
    read_manifest,
    verify_files,
    write_manifest,
)

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
FACTS = ArtifactFacts(
    kind="adapter",
    base=BaseReference(
        requested="openai-community/gpt2",
        used="gpt2-mini",
        name_or_path="/x/gpt2-mini",
        fingerprint="sha256:" + "ab" * 32,
    ),
    method={"name": "lora", "r": 8},
    quantization=None,
    labels=["no", "größer"],
    max_length=128,
    model_type="gpt2",
)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "run" / "adapter"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    (path / "adapter_config.json").write_text("{}")
    (path / ".staging").write_text("left by a kill")
    write_manifest(path, FACTS)
    return path


def edit(folder: pathlib.Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(folder: pathlib.Path) -> None:
    manifest = read_manifest(folder)
    assert {name: getattr(manifest, name) for name in ArtifactFacts.model_fields} == dict(FACTS)
    assert sorted(manifest.files) == ["adapter_config.json", "adapter_model.safetensors"]
    verify_files(folder, manifest)


def test_found_by_run_and_by_folder(folder: pathlib.Path) -> None:
    by_run, by_folder = find_artifact(folder.parent), find_artifact(str(folder))
    assert (by_run.folder, by_run.run) == (folder, folder.parent)
    assert (by_folder.folder, by_folder.run) == (folder, None)
    assert by_run.kind == by_folder.kind == "adapter"


def test_every_altered_file_is_named(folder: pathlib.Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"wEights")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_text("added by hand")
    with pytest.raises(AdapterError) as caught:
        verify_files(folder, read_manifest(folder))
    lines = str(caught.value).splitlines()
    assert [line.rpartition("/")[2].split(":")[0] for line in lines] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
    ]
    assert ["missing" in lines[0], "altered: sha256" in lines[1], "does not list" in lines[2]] == [True] * 3


def test_another_size_and_a_link_out(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    manifest = read_manifest(folder)
    (folder / "adapter_config.json").write_text("{} ")
    target = tmp_path / "elsewhere"
    shutil.move(folder / "adapter_model.safetensors", target)
    (folder / "adapter_model.safetensors").symlink_to(target)
    with pytest.raises(AdapterError, match=r"altered: 3 bytes \(2 bytes\)\n.*is a link"):
        verify_files(folder, manifest)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": 2}, "format: "),
        ({"labels": "no"}, "labels: "),
        ({"max_length": 0}, "max_length: "),
        ({"max_length": "8"}, "max_length: "),
        ({"surprise": 1}, "surprise: "),
        ({"kind": "pickle"}, "kind: "),
        ({"files": {"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}, "files"),
        ({"files": {"..": {"sha256": "0" * 64, "bytes": 1}}}, "files"),
        ({"files": {"a": {"sha256": "zz", "bytes": 1}}}, "files"),
        ({"base": {"requested": "a"}}, "base.fingerprint"),
    ],
)
def test_a_broken_contract_is_refused(folder: pathlib.Path, changes: dict[str, Any], match: str) -> None:
    edit(folder, **changes)
    with pytest.raises(AdapterError, match=match):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "a key occurs twice"),
        (b" " * (1 << 21), "larger than"),
        (b"3", "manifest.json"),
    ],
)
def test_a_broken_file_is_refused(folder: pathlib.Path, content: bytes, match: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(AdapterError, match=match):
        read_manifest(folder)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(["files", "format"]), inner)
        ),
        max_leaves=12,
    )
)
def test_any_json_gives_the_projects_error(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(AdapterError):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], "no trained model here"),
        (["recipe.yaml"], "the run is not finished"),
        (["adapter_config.json"], "lack the base's fingerprint"),
        (["config.json"], "not a base model"),
        (["adapter/manifest.json", "model/manifest.json"], "holds both"),
    ],
)
def test_what_is_no_artifact_is_told_apart(files: list[str], match: str, tmp_path: pathlib.Path) -> None:
    for name in files:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "folder").mkdir(exist_ok=True)
    with pytest.raises(AdapterError, match=match):
        find_artifact(tmp_path / "folder")


def test_no_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="no such folder"):
        find_artifact(tmp_path / "none")
    with pytest.raises(AdapterError, match="not a folder"):
        find_artifact(tmp_path / "file")


def test_torch_is_not_needed() -> None:
    code = (
        "import sys, toolkit.export.artifact, toolkit.report.run_record; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert run_process([sys.executable, "-c", code], check=False, cwd=REPOSITORY).returncode == 0
