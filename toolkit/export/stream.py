"""safetensors files written tensor by tensor: the header first, as all shapes are known, then the bytes.

Format: 8 bytes of header length (little endian), the header as JSON, the tensors' bytes one after another
(huggingface.co/docs/safetensors). No more than one tensor is ever held, and of a large one no more than a piece has to.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO

import torch

from toolkit.errors import ToolkitError
from toolkit.models.stored import all_finite

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPELLINGS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MAX_SHARD_BYTES = 2 * 10**9
# 8 MiB of float32: what a check or a cast copies at a time.
PIECE_ELEMENTS = 2 << 20

Shapes = Mapping[str, tuple[int, ...]]
# A tensor, or slices of its first dimension one after another.
Content = torch.Tensor | Iterable[torch.Tensor]
Read = Callable[[str], Content]
# Takes bytes that stay as they are until the next call.
Append = Callable[[memoryview], None]


def write_tensors(
    folder: pathlib.Path,
    shapes: Shapes,
    read: Read,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write ``model.safetensors``, or shards and their index, as transformers names them.

    Args:
        folder: Where to write.
        shapes: Shape of every tensor by name.
        read: Name to tensor of that shape, whole or in slices of its first dimension; called once per name.
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
        with _safetensors(folder / name, {key: shapes[key] for key in names}, dtype) as append:
            for key in names:
                _write(append, key, read(key), shape=shapes[key], dtype=dtype)
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
def _safetensors(path: pathlib.Path, shapes: Shapes, dtype: torch.dtype) -> Iterator[Append]:
    """Open a file behind its header; what is appended is written while the next piece is made."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _size(shape, dtype)
        header[name] = {"dtype": SPELLINGS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    # The format asks for data that starts at a multiple of 8.
    raw += b" " * (-len(raw) % 8)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as thread:
        pending: Future[None] = thread.submit(_write_all, file, memoryview(len(raw).to_bytes(8, "little") + raw))

        def append(data: memoryview) -> None:
            nonlocal pending
            pending.result()
            pending = thread.submit(_write_all, file, data)

        yield append
        pending.result()


def _write_all(file: FileIO, data: memoryview) -> None:
    # A system writes at most 2 GiB at once.
    while len(data):
        data = data[file.write(data) :]


def _write(append: Append, name: str, content: Content, *, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Append a tensor, cast and checked piece by piece."""
    rows, row = 0, tuple(shape[1:])
    for piece in _pieces(content):
        if tuple(piece.shape[1:]) != row:
            raise ToolkitError(f"{name}: rows of shape {tuple(piece.shape[1:])} where {shape} was planned")
        cast = piece.detach().to(device="cpu", dtype=dtype).contiguous()
        if not all_finite(cast):
            raise ToolkitError(f"{name}: not finite as {SPELLINGS[dtype]}; choose fp32 or bf16")
        # A view of the piece's own memory: no copy is made. tofile() raises errors without a number.
        append(cast.reshape(-1).view(torch.uint8).numpy().data)
        rows += len(piece)
    if rows != math.prod(shape[:1]):
        raise ToolkitError(f"{name}: {rows} rows where {shape} was planned")


def _pieces(content: Content) -> Iterable[torch.Tensor]:
    """Return slices of a tensor's first dimension, so that no check or cast needs the whole once more."""
    if not isinstance(content, torch.Tensor):
        return content
    tensor = content if content.dim() else content[None]
    rows = max(1, PIECE_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
    return [tensor[start : start + rows] for start in range(0, len(tensor), rows)]


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _shard_name(place: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{place:05d}-of-{count:05d}.safetensors"
