"""The folder contract: the manifest of a trained adapter or model, and how a path leads to one."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from toolkit.config.schema import ForestHead, HeadSettings, ProblemType
from toolkit.durable import sha256, write_file_atomically
from toolkit.errors import AdapterError, Problem

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
KINDS = ("adapter", "model")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")

Text = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BaseReference(_Part):
    """The base that an artifact was trained on.

    Attributes:
        requested: ``model.base`` of the recipe.
        used: What served.
        name_or_path: Hub id or folder that loads it.
        fingerprint: ``sha256:`` and 64 hex digits.
    """

    requested: Text
    used: Text
    name_or_path: Text
    fingerprint: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class FileFacts(_Part):
    """Content hash and size of one file."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class ArtifactFacts(_Part):
    """What is known of an artifact beside its files.

    Attributes:
        kind: ``adapter`` or ``model``.
        base: The base it was trained on.
        method: The recipe's method section.
        quantization: The recipe's quantization section, or None.
        labels: Names of the labels, or of the targets of a regression, in id order; empty for a language model.
        max_length: Tokens of a text that are read.
        model_type: ``gpt2`` or ``distilbert``.
        merge: Figures of the merge that made this model, or None if it was trained as it stands.
        problem_type: What the labels are, as transformers spells it.
        temperature: Logits are divided by it for calibrated probabilities; 1 where none was fitted.
        thresholds: Calibrated probability from which a label is given, by name; none where none was tuned.
        head: The head where it is the toolkit's own, as config.json holds it; None for a stock one.
        template: What stood around the prompts of objective instruction, ``{prompt}`` in their place; else None.
    """

    kind: Literal["adapter", "model"]
    base: BaseReference
    method: dict[str, Any]
    quantization: dict[str, Any] | None
    labels: list[str]
    max_length: Annotated[int, Field(ge=1)]
    model_type: Text
    merge: dict[str, Any] | None = None
    problem_type: ProblemType = "single_label_classification"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    head: HeadSettings | ForestHead | None = None
    template: str | None = None


class Manifest(ArtifactFacts):
    """The content of ``manifest.json``: the facts, and every file's hash.

    Attributes:
        format: Version of the contract, 1.
        files: Hash and size by file name.
        toolkit_version: Version that wrote it.
    """

    format: Literal[1]
    files: dict[FileName, FileFacts]
    toolkit_version: str

    @model_validator(mode="after")
    def _names_stay_inside(self) -> Manifest:
        if any(name in (".", "..", MANIFEST) for name in self.files):
            raise ValueError("files: names a folder or the manifest itself")
        # Of two labels that exclude each other, the second has the threshold.
        single = self.problem_type == "single_label_classification"
        having = (self.labels[1:] if len(self.labels) == 2 else []) if single else self.labels
        if not set(self.thresholds) <= set(having):
            raise ValueError("thresholds: of labels that have none")
        return self


@dataclass(frozen=True)
class Artifact:
    """A trained adapter or model on disk.

    Attributes:
        kind: ``adapter`` or ``model``.
        folder: Holds the files and their manifest.
        run: The run folder around it, if the path named one.
        manifest: Its manifest, read and checked.
    """

    kind: Literal["adapter", "model"]
    folder: pathlib.Path
    run: pathlib.Path | None
    manifest: Manifest


def write_manifest(folder: pathlib.Path, facts: ArtifactFacts) -> Manifest:
    """Hash every file of ``folder`` and write its manifest; call it last.

    Raises:
        OSError: If a file cannot be read or the manifest not written.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    visible = [name for name in names if not name.startswith(".")]
    with ThreadPoolExecutor() as threads:  # the shards of a large model, one on each core
        hashes = threads.map(lambda name: sha256(folder / name), visible)
        files = {
            name: FileFacts(sha256=found, bytes=(folder / name).stat().st_size)
            for name, found in zip(visible, hashes, strict=True)
        }
    manifest = Manifest(**facts.model_dump(), format=1, files=files, toolkit_version=_version())
    content = manifest.model_dump(exclude={"head"} if manifest.head is None else None)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_file_atomically(folder / MANIFEST, text + "\n")
    return manifest


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        AdapterError: If it is missing, too large, not JSON, or breaks the contract; every problem, one line each.
    """
    path = folder / MANIFEST
    where, right = str(path), "the folder as toolkit train or merge wrote it"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise AdapterError(Problem(where, "", f"cannot be read: {error.strerror}", right)) from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise AdapterError(Problem(where, "", f"larger than {MAX_MANIFEST_BYTES} bytes", right))
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise AdapterError(Problem(where, "", f"not valid JSON: {error}", right)) from error
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise AdapterError(_problems(error, where)) from None


def verify_files(folder: pathlib.Path, manifest: Manifest) -> None:
    """Check that a folder holds exactly the files that its manifest describes.

    Files that hold no weights (a README, a log) may be added.

    Raises:
        AdapterError: For every file that is missing, altered, a link to elsewhere, or weights the manifest lacks.
    """
    problems = [problem for name in sorted(manifest.files) for problem in _file_problems(folder, name, manifest)]
    strangers = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in WEIGHT_SUFFIXES and path.name not in manifest.files and not path.name.startswith(".")
    )
    problems += [
        Problem(str(folder / name), "", "weights that the manifest does not list", "the folder as it was written")
        for name in strangers
    ]
    if problems:
        raise AdapterError(problems)


def find_artifact(path: str | pathlib.Path) -> Artifact:
    """Find the adapter or model that ``path`` means: itself, or the one inside a run folder.

    Raises:
        AdapterError: If there is none, or its manifest is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        wrong = "not a folder" if path.exists() else "no such folder"
        raise AdapterError(Problem(str(path), "", wrong, "a run folder, or the adapter/ or model/ in it"))
    if (path / MANIFEST).exists():
        return _artifact(path, run=None)
    inside = [path / kind for kind in KINDS if (path / kind / MANIFEST).exists()]
    if len(inside) == 1:
        return _artifact(inside[0], run=path)
    if inside:
        raise AdapterError(Problem(str(path), "", "holds both adapter/ and model/", "name one of the two"))
    raise AdapterError(_nothing_found(path))


def _nothing_found(path: pathlib.Path) -> Problem:
    where = str(path)
    if (path / "checkpoints").is_dir() or (path / "recipe.yaml").is_file():
        return Problem(where, "", "the run is not finished", "run it to its end; it goes on where it stopped")
    if (path / "adapter_config.json").is_file():
        return Problem(where, MANIFEST, "missing", "an adapter of this toolkit; peft's own lack the base's fingerprint")
    if (path / "config.json").is_file():
        return Problem(where, MANIFEST, "missing", "a model that toolkit train or merge wrote, not a base model")
    return Problem(where, "", "no trained model here", "a run folder, or the adapter/ or model/ in it")


def _artifact(folder: pathlib.Path, *, run: pathlib.Path | None) -> Artifact:
    manifest = read_manifest(folder)
    return Artifact(kind=manifest.kind, folder=folder, run=run, manifest=manifest)


def _file_problems(folder: pathlib.Path, name: str, manifest: Manifest) -> Iterable[Problem]:
    path, facts = folder / name, manifest.files[name]
    right = "the file as it was written"
    if not path.is_file():
        return [Problem(str(path), "", "missing", right)]
    if path.resolve().parent != folder.resolve():
        return [Problem(str(path), "", "is a link to a file elsewhere", right)]
    if path.stat().st_size != facts.bytes:
        return [Problem(str(path), "", f"altered: {path.stat().st_size} bytes", f"{facts.bytes} bytes")]
    if (found := sha256(path)) != facts.sha256:
        return [Problem(str(path), "", f"altered: sha256 {found[:12]}…", f"{facts.sha256[:12]}…")]
    return []


def _problems(error: ValidationError, where: str) -> list[Problem]:
    return [
        Problem(where, ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")[:200])
        for item in error.errors(include_url=False, include_input=False, include_context=False)[:10]
    ]


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key occurs twice")
    return data


def _version() -> str:
    try:
        return importlib.metadata.version("classifier-toolkit")
    except importlib.metadata.PackageNotFoundError:
        # A checkout that was never installed.
        return "0+unknown"
