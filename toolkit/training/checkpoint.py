"""Checkpoints: complete or absent, checksummed, free of pickles; the newest valid one wins.

A checkpoint is staged in a folder whose name no reader matches, its files and the folder are flushed to disk, and one
rename makes it visible. Old ones go only after the new one was read back and verified.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from toolkit.durable import flush, room_on_disk, sha256
from toolkit.errors import CheckpointError, Problem

STEP_FOLDER = re.compile(r"step-(\d+)$")
FILE_NAME = re.compile(r"[a-z_]{1,64}\.(safetensors|json)")
OS_ERROR = re.compile(r"\(os error (\d+)\)")
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, loaded.

    Attributes:
        path: Its folder.
        step: Optimizer steps done.
        tensors: Tensors by file stem and name, on the CPU.
        state: Everything that is not a tensor.
    """

    path: pathlib.Path
    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    root: pathlib.Path, step: int, *, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
) -> pathlib.Path:
    """Write ``root/step-N`` atomically and return it.

    Args:
        root: The run's ``checkpoints`` folder.
        step: Optimizer steps done.
        tensors: Tensors by file stem and name; one safetensors file per stem.
        state: JSON data.

    Raises:
        OutputError: If the disk is full; older checkpoints are untouched and no half folder is left.
    """
    needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    with room_on_disk(root, needed=needed):
        return _save(root, step, tensors, state)


def _save(
    root: pathlib.Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
) -> pathlib.Path:
    root.mkdir(parents=True, exist_ok=True)
    target, staging = root / f"step-{step}", root / f".staging-{step}-{os.getpid()}"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    try:
        for stem, named in tensors.items():
            _save_tensors(named, staging / f"{stem}.safetensors")
        (staging / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files = {path.name: sha256(path) for path in sorted(staging.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": files}
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in staging.iterdir():
            flush(path)
        flush(staging)
        if target.exists():
            # Only a damaged checkpoint of the same step can stand here: a valid one would have been resumed from.
            shutil.rmtree(target)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    flush(root)
    return target


def _save_tensors(named: Mapping[str, torch.Tensor], path: pathlib.Path) -> None:
    # safetensors refuses tensors that share memory or are not contiguous.
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    try:
        save_file(whole, path)
    except SafetensorError as error:
        number = OS_ERROR.search(str(error))
        if number is None:
            raise
        # safetensors hides what the system said, a full disk among it.
        raise OSError(int(number.group(1)), os.strerror(int(number.group(1))), str(path)) from error


def load_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Verify every byte of a checkpoint against its manifest and load it.

    Raises:
        ValueError: With the reason it cannot be used.
    """
    manifest = _verified(path)
    files = manifest["files"]
    try:
        tensors = {file[: -len(".safetensors")]: load_file(path / file) for file in files if file != "state.json"}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return Checkpoint(path, int(manifest["step"]), tensors, _read_json(path / "state.json"))


def _verified(path: pathlib.Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose every byte matches it."""
    manifest = _read_json(path / "manifest.json")
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict) or "state.json" not in files:
        raise ValueError("manifest.json is not a checkpoint manifest")
    if path.name != f"step-{manifest.get('step')}":
        raise ValueError(f"manifest.json belongs to step {manifest.get('step')}")
    for name, digest in files.items():
        file = path / name
        if not FILE_NAME.fullmatch(name) or not file.is_file():
            raise ValueError(f"{name} is missing")
        if sha256(file) != digest:
            raise ValueError(f"{name} does not match its checksum")
    return manifest


def load_best(path: pathlib.Path) -> Checkpoint:
    """Load the checkpoint whose weights a run ends with.

    Raises:
        CheckpointError: If it was damaged since it was saved; ``newest_valid`` then finds an older start.
    """
    try:
        return load_checkpoint(path)
    except ValueError as error:
        right = "the same command goes on from an older one"
        raise CheckpointError(Problem(str(path), "", f"the best checkpoint was damaged: {error}", right)) from error


def steps_on_disk(root: pathlib.Path) -> list[int]:
    """Return the step numbers of all complete-looking checkpoints, newest first."""
    if not root.is_dir():
        return []
    matches = (STEP_FOLDER.match(path.name) for path in root.iterdir())
    return sorted((int(match.group(1)) for match in matches if match), reverse=True)


def newest_valid(root: pathlib.Path) -> tuple[Checkpoint | None, dict[str, str]]:
    """Return the newest checkpoint that verifies, as does the best one it names, and why each newer one was skipped."""
    skipped: dict[str, str] = {}
    for step in steps_on_disk(root):
        path = root / f"step-{step}"
        try:
            checkpoint = load_checkpoint(path)
            _check_best(root, checkpoint)
            return checkpoint, skipped
        except ValueError as reason:
            skipped[path.name] = str(reason)
    return None, skipped


def _check_best(root: pathlib.Path, checkpoint: Checkpoint) -> None:
    best = _best_of(checkpoint.state)
    if best is None or best == checkpoint.step:
        return
    try:
        _verified(root / f"step-{best}")
    except ValueError as error:
        raise ValueError(f"the best one until then, step-{best}, cannot be used: {error}") from error


def discard(root: pathlib.Path, names: Collection[str]) -> None:
    """Take damaged checkpoints out of the way; ``rotate`` deletes them once a new one is proven to load."""
    for name in names:
        doomed = root / f".staging-damaged-{name}"
        if doomed.exists():
            shutil.rmtree(doomed)
        (root / name).rename(doomed)


def rotate(root: pathlib.Path, *, keep: int, protected: Collection[int]) -> None:
    """Delete old checkpoints and leftovers of killed saves, once the newest is proven to load.

    Args:
        root: The run's ``checkpoints`` folder.
        keep: How many of the newest to keep.
        protected: Steps to keep in any case (the best one). The best ones that kept checkpoints name stay too: without
            them an older checkpoint could not serve where the newest is damaged.

    Raises:
        CheckpointError: If the newest reads back other than it was written; nothing was deleted.
    """
    steps = steps_on_disk(root)
    newest = root / f"step-{steps[0]}"
    try:
        load_checkpoint(newest)
    except ValueError as error:
        right = "a disk that keeps what is written to it"
        raise CheckpointError(Problem(str(newest), "", f"was written and {error}", right)) from error
    stay = {*protected, *_best_named_by(root, steps[:keep])}
    for step in steps[keep:]:
        if step not in stay:
            doomed = root / f".staging-old-{step}"
            # Renamed first, so that a kill in the middle leaves no half checkpoint under a readable name.
            (root / f"step-{step}").rename(doomed)
    for leftover in root.glob(".staging-*"):
        shutil.rmtree(leftover)


def _best_named_by(root: pathlib.Path, steps: Collection[int]) -> set[int]:
    named = set()
    for step in steps:
        try:
            named.add(_best_of(_read_json(root / f"step-{step}" / "state.json")))
        except ValueError:  # A damaged one serves nobody, so it needs nothing.
            continue
    return named - {None}


def _best_of(state: Mapping[str, Any]) -> Any:
    return state.get("progress", {}).get("best_step")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} is not a mapping")
    return data
