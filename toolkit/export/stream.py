"""safetensors files written tensor by tensor: the header first, as all shapes are known, then the bytes.

Format: 8 bytes of header length (little endian), the header as JSON, the tensors' bytes one after another
(huggingface.co/docs/safetensors). No more than one tensor is ever held.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO

import torch

from toolkit.errors import ToolkitError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPELLINGS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MAX_SHARD_BYTES = 2 * 10**9

Shapes = Mapping[str, tuple[int, ...]]


def write_tensors(
    folder: pathlib.Path,
    shapes: Shapes,
    read: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write ``model.safetensors``, or shards and their index, as transformers names them.

    Args:
        folder: Where to write.
        shapes: Shape of every tensor by name.
        read: Name to tensor, float32 of that shape; called once per name.
        dtype: Storage type: float32, bfloat16 or float16; cast once, here.
        max_shard_bytes: Largest file, unless a single tensor is larger.

    Returns:
        Bytes of all tensors.

    Raises:
        ToolkitError: If a tensor has another shape, or is not finite before or after the cast.
        OSError: If the disk is full.
    """
    shards = plan_shards(shapes, dtype=dtype, max_shard_bytes=max_shard_bytes)
    files = {_shard_name(place, len(shards)): names for place, names in enumerate(shards, start=1)}
    for name, names in files.items():
        with _safetensors(folder / name, {key: shapes[key] for key in names}, dtype) as file:
            for key in names:
                _write(file, _cast(key, read(key), shape=shapes[key], dtype=dtype))
    total = sum(_size(shape, dtype) for shape in shapes.values())
    if len(files) > 1:
        weight_map = {key: name for name, names in files.items() for key in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def plan_shards(shapes: Shapes, *, dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    """Cut the names, in their order, into files of at most ``max_shard_bytes``."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        needed = _size(shape, dtype)
        if shards[-1] and filled + needed > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += needed
    return shards


@contextmanager
def _safetensors(path: pathlib.Path, shapes: Shapes, dtype: torch.dtype) -> Iterator[IO[bytes]]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _size(shape, dtype)
        header[name] = {"dtype": SPELLINGS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    # The format asks for data that starts at a multiple of 8.
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        yield file


def _cast(name: str, tensor: torch.Tensor, *, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise ToolkitError(f"{name}: shape {tuple(tensor.shape)} where {shape} was planned")
    cast = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    if not bool(torch.isfinite(cast).all()):
        raise ToolkitError(f"{name}: not finite as {SPELLINGS[dtype]}; choose fp32 or bf16")
    return cast


def _write(file: IO[bytes], tensor: torch.Tensor) -> None:
    # A view of the tensor's own memory: no copy of a large embedding is made.
    tensor.reshape(-1).view(torch.uint8).numpy().tofile(file)


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _shard_name(place: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{place:05d}-of-{count:05d}.safetensors"
