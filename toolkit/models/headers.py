"""Reads safetensors headers by itself, so that a damaged or hostile file is refused before its bytes are used."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ModelError, Problem

# GPT-2 XL's header is 60 kB; 16 MiB bounds the parser's memory long before the library's own 100 MB.
MAX_HEADER_BYTES = 16 << 20
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    Attributes:
        dtype: safetensors spelling, such as ``F32``.
        shape: Sizes of its dimensions.
        file: The file that holds it.
        start: First byte in the file.
        stop: One past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


def read_tensor_headers(path: Path) -> dict[str, TensorInfo]:
    """Return every tensor of a model folder, or of one safetensors file, by name; no tensor data is read.

    Raises:
        ModelError: No weights, an unsafe or incomplete shard index, or a damaged file.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in [path] if path.is_file() else weight_files(path):
        for name, info in read_header(file).items():
            if name in tensors:
                raise ModelError(Problem(str(file), name, f"is also in {tensors[name].file.name}", "each tensor once"))
            tensors[name] = info
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, after checking that none lies outside it."""
    if (folder / WEIGHTS).is_file():
        return [_inside(folder, WEIGHTS, where=str(folder / WEIGHTS))]
    if not (folder / INDEX).is_file():
        raise ModelError(_no_weights(folder))
    where = str(folder / INDEX)
    index = parse_json((folder / INDEX).read_bytes(), where=where)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(Problem(where, "weight_map", "is not a table of tensor names to file names"))
    files = [_inside(folder, name, where=where) for name in sorted(set(weight_map.values()))]
    _check_index(weight_map, files, where=where)
    return files


def _check_index(weight_map: dict[str, str], files: list[Path], *, where: str) -> None:
    held = {name: file.name for file in files for name in read_header(file)}
    wrong = sorted(set(weight_map.items()) ^ set(held.items()))
    if wrong:
        raise ModelError(Problem(where, wrong[0][0], "the index and the shards disagree", "download the folder again"))


def _no_weights(folder: Path) -> Problem:
    pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5") for file in folder.glob(kind))
    wrong = f"only {pickles[0]}, which is never unpickled" if pickles else "no weights"
    return Problem(str(folder), "", wrong, f"a {WEIGHTS}")


def _inside(folder: Path, name: str, *, where: str) -> Path:
    """Return the file, unless its name or a symlink leads out of the folder (a hub cache's blobs are allowed)."""
    if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
        raise ModelError(Problem(where, name, "is not a plain .safetensors file name", "shards lie beside the index"))
    file = folder / name
    if not file.is_file():
        raise ModelError(Problem(where, name, "the file is missing", "download the folder again"))
    target, root = file.resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs"
    if root not in target.parents and not (root.parent.name == "snapshots" and blobs in target.parents):
        raise ModelError(Problem(str(file), "", "is a symlink out of the model folder", "a copy of the file"))
    return file


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file.

    Raises:
        ModelError: Truncated, too large a header, broken JSON, duplicate names, or offsets that do not add up.
    """
    where = str(file)
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length > MAX_HEADER_BYTES:
            raise ModelError(Problem(where, "", f"a header of {length} bytes", f"at most {MAX_HEADER_BYTES}"))
        if not length or 8 + length > size:
            raise ModelError(Problem(where, "", f"truncated: {size} bytes", "download it again"))
        header = parse_json(handle.read(length), where=where)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, file=file, base=8 + length) for name, entry in header.items()}
    _check_layout(tensors, file=file, base=8 + length, size=size)
    return tensors


def _tensor(name: str, entry: object, *, file: Path, base: int) -> TensorInfo:
    facts: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (facts.get(key, "") for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and dtype in DTYPE_BYTES and _naturals(shape) and _naturals(offsets)):
        raise ModelError(Problem(str(file), name, "a malformed header entry", "dtype, shape and data_offsets"))
    if len(offsets) != 2:
        raise ModelError(Problem(str(file), name, "a malformed header entry", "dtype, shape and data_offsets"))
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ModelError(
            Problem(str(file), name, f"{stop - start} bytes for {dtype} {shape}", "shape times dtype size")
        )
    return TensorInfo(dtype=dtype, shape=tuple(shape), file=file, start=base + start, stop=base + stop)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _check_layout(tensors: dict[str, TensorInfo], *, file: Path, base: int, size: int) -> None:
    """Refuse overlaps, holes, bytes beyond the last tensor and a file that ends too early."""
    position = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position:
            raise ModelError(Problem(str(file), name, "its bytes overlap another tensor's or leave a hole"))
        position = info.stop
    if position != size:
        kind = "truncated" if size < position else "too long"
        raise ModelError(Problem(str(file), "", f"{kind}: {size} bytes for {position}", "download it again"))


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no duplicate keys, no NaN.

    Raises:
        ModelError: It is anything else.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(Problem(where, "", f"not valid JSON: {error}", "download it again")) from error
    if not isinstance(value, dict):
        raise ModelError(Problem(where, "", "not a JSON object", "download it again"))
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice} is there twice")
    return table


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
