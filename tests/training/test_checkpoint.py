"""Checkpoints are complete or absent, and no damaged one is ever used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from toolkit.errors import CheckpointError, OutputError
from toolkit.training import checkpoint as module
from toolkit.training.checkpoint import (
    discard,
    load_best,
    load_checkpoint,
    newest_valid,
    rotate,
    save_checkpoint,
    steps_on_disk,
)


def save(root: Path, step: int) -> Path:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "trainable": {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(2, generator=generator)},
        "optimizer": {"0.exp_avg": torch.randn(3, 4, generator=generator)},
    }
    return save_checkpoint(root, step, tensors=tensors, state={"progress": {"step": step}})


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, 7)
    checkpoint = load_checkpoint(path)
    assert path.name == "step-7"
    assert checkpoint.step == 7
    assert checkpoint.state == {"progress": {"step": 7}}
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(checkpoint.tensors["trainable"]["a"], torch.randn(3, 4, generator=generator))
    assert set(checkpoint.tensors) == {"trainable", "optimizer"}
    assert not list(tmp_path.glob(".staging*"))


def damages(path: Path, other: Path) -> dict[str, bytes | None]:
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    return {
        "deleted": None,
        "empty": b"",
        "half": data[: len(data) // 2],
        "one bit": bytes(flipped),
        "zeros": bytes(len(data)),
        "longer": data + b"\0",
        "another checkpoint's": (other / path.name).read_bytes(),
    }


FILES = ["trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_noticed_and_the_older_one_serves(tmp_path, name):
    save(tmp_path, 1)
    newest, other = save(tmp_path, 2), save(tmp_path / "elsewhere", 3)
    original = (newest / name).read_bytes()
    for damage, data in damages(newest / name, other).items():
        if data is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(data)
        found, skipped = newest_valid(tmp_path)
        assert found is not None, damage
        assert found.step == 1, damage
        assert list(skipped) == ["step-2"], damage
        assert skipped["step-2"], damage
        (newest / name).write_bytes(original)
    assert newest_valid(tmp_path)[1] == {}


def test_a_renamed_checkpoint_is_not_another_step(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-9")
    found, skipped = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 1
    assert skipped == {"step-9": "manifest.json belongs to step 2"}


def test_all_bad_gives_every_reason(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    found, skipped = newest_valid(tmp_path)
    assert found is None
    assert list(skipped) == ["step-2", "step-1"]


def test_a_manifest_cannot_point_outside(tmp_path):
    path = save(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = "0"
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="missing"):
        load_checkpoint(path)


def test_staging_folders_are_never_read(tmp_path):
    path = save(tmp_path, 5)
    shutil.copytree(path, tmp_path / ".staging-6-1")
    shutil.copytree(path, tmp_path / "step-6.part")
    assert steps_on_disk(tmp_path) == [5]


@pytest.mark.parametrize("call", ["save_file", "flush", "sha256"])
def test_a_failing_save_leaves_the_older_one_and_no_half(tmp_path, monkeypatch, call):
    save(tmp_path, 1)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, call, fail)
        with pytest.raises(
            OutputError, match=r"No space left on device: [\d,]+ bytes free .at least [\d,]+ bytes needed"
        ):
            save(tmp_path, 2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-1"]
    assert newest_valid(tmp_path)[0].step == 1


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    (save(tmp_path, 1) / "state.json").write_text("{}")
    save(tmp_path, 1)
    assert newest_valid(tmp_path)[1] == {}


def test_rotation_keeps_the_newest_and_the_protected(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    (tmp_path / ".staging-9-1").mkdir()
    rotate(tmp_path, keep=2, protected={3})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-3", "step-5", "step-6"]


def test_rotation_deletes_nothing_before_the_newest_verifies(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    (tmp_path / "step-4" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-4: was written and .* checksum"):
        rotate(tmp_path, keep=1, protected=set())
    assert steps_on_disk(tmp_path) == [4, 3, 2, 1]


def test_a_damaged_best_one_makes_the_newer_ones_useless(tmp_path):
    """The run would end without the weights it promised; an older start finds them again."""
    for step, best in ((1, None), (2, 2), (3, 2)):
        save_checkpoint(
            tmp_path, step, tensors={"trainable": {}}, state={"progress": {"step": step, "best_step": best}}
        )
    assert newest_valid(tmp_path)[0].step == 3
    (tmp_path / "step-2" / "state.json").write_text("{}")
    found, skipped = newest_valid(tmp_path)
    assert found.step == 1
    assert skipped == {
        "step-3": "the best one until then, step-2, cannot be used: state.json does not match its checksum",
        "step-2": "state.json does not match its checksum",
    }
    with pytest.raises(CheckpointError, match="step-2: the best checkpoint was damaged"):
        load_best(tmp_path / "step-2")


def test_discarded_ones_are_out_of_the_way_and_go_with_the_next_rotation(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for _ in range(2):
        discard(tmp_path, ["step-3"])
        assert steps_on_disk(tmp_path) == [2, 1]
        save(tmp_path, 3)
    rotate(tmp_path, keep=5, protected=set())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-1", "step-2", "step-3"]


def test_rotation_keeps_the_best_one_that_an_older_checkpoint_needs(tmp_path):
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4)):
        state = {"progress": {"step": step, "best_step": best}}
        save_checkpoint(tmp_path, step, tensors={"trainable": {}}, state=state)
    rotate(tmp_path, keep=2, protected={4})
    assert steps_on_disk(tmp_path) == [4, 3, 1]
    (tmp_path / "step-4" / "state.json").unlink()
    assert newest_valid(tmp_path)[0].step == 3


@pytest.mark.parametrize(
    "manifest",
    [
        "[" * 100_000,
        json.dumps({"format": 1, "step": 2, "files": {"state.json": "", "x" * 5000 + ".json": ""}}),
        json.dumps({"format": 1, "step": 2, "files": {"state.json": "", "../step-1/state.json": ""}}),
    ],
    ids=["deep", "a long name", "a name outside"],
)
def test_a_hostile_manifest_is_skipped(tmp_path, manifest):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-2" / "manifest.json").write_text(manifest)
    found, skipped = newest_valid(tmp_path)
    assert found.step == 1
    assert list(skipped) == ["step-2"]
