"""Reads single tensors of a model folder, or rows of one, straight from its files: nothing else of it is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from toolkit.errors import ModelError, Problem, ToolkitError
from toolkit.families import Family
from toolkit.models.headers import DTYPE_BYTES, TensorInfo, read_tensor_headers
from toolkit.models.tensors import body_name

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE_BYTES = 4 << 20


class StoredTensors:
    """The tensors of a model folder by the names its classifier gives them, in whichever spelling and shards they lie.

    Files are read, not mapped: pages of a mapped file count as resident for as long as the mapping lives, and for as
    long as anything of it is used.

    Args:
        folder: Holds safetensors files, checked before (``models.tensors.check_tensors``).
        family: Its architecture.
    """

    def __init__(self, folder: Path, family: Family) -> None:
        self._family = family
        self._infos = {body_name(name, family): info for name, info in read_tensor_headers(folder).items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape.

        Raises:
            ToolkitError: If the folder has no such tensor.
        """
        return self._info(name).shape

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in float32."""
        whole = torch.empty(self.shape(name), dtype=torch.float32)
        self.read_into(name, whole)
        return whole

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Copy a tensor, piece by piece, into one of its shape, on any device and of any floating-point dtype."""
        flat = target.view(-1)
        start = 0
        for piece in _flat_pieces(self._info(name)):
            flat[start : start + len(piece)].copy_(piece)
            start += len(piece)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor in the dtype it is stored in, 4 MiB at a time, as slices of its first dimension."""
        info = self._info(name)
        row = math.prod(info.shape[1:])
        for piece in _flat_pieces(info, multiple=row):
            yield piece.view(-1, *info.shape[1:])

    def rows(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        """Return rows (n, ...) of a tensor in float32, on the CPU.

        Args:
            name: Of the tensor.
            numbers: (n,) int64, ascending and distinct.
        """
        info = self._info(name)
        size = math.prod(info.shape[1:]) * DTYPE_BYTES[info.dtype]
        buffer = np.empty((len(numbers), size), dtype=np.uint8)
        # Unbuffered: a row is all that is wanted of its neighbourhood.
        with info.file.open("rb", buffering=0) as file:
            for place, number in enumerate(numbers.tolist()):
                file.seek(info.start + number * size)
                if not _fill(file, buffer[place]):
                    raise ToolkitError(f"{info.file}: became shorter while it was read")
        return torch.from_numpy(buffer).view(TORCH_DTYPES[info.dtype]).float().view(-1, *info.shape[1:])

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._infos[body_name(name, self._family)]
        except KeyError:
            raise ToolkitError(f"{name}: not among the base's tensors") from None


def check_finite(folder: Path) -> None:
    """Read every floating-point tensor of a folder once.

    Raises:
        ModelError: The first tensor that holds NaN or infinity.
    """
    for name, info in read_tensor_headers(folder).items():
        pieces = _flat_pieces(info) if info.dtype in TORCH_DTYPES else ()
        if not all(all_finite(piece) for piece in pieces):
            raise ModelError(Problem(str(info.file), name, "holds NaN or infinity", "finite weights"))


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite: both reach the extremes, which are found 25 x as fast."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _flat_pieces(info: TensorInfo, *, multiple: int = 1) -> Iterator[torch.Tensor]:
    """Yield a floating-point tensor's elements in their order, about 4 MiB at a time.

    A piece's memory is used again for the next but one, so that it may be written while that one is read.

    Args:
        info: Where the tensor lies.
        multiple: Every piece holds a multiple of this many elements.

    Raises:
        ToolkitError: If the file has become shorter.
    """
    width = DTYPE_BYTES[info.dtype]
    step = max(PIECE_BYTES // (width * multiple), 1) * multiple * width
    buffers = [np.empty(min(step, info.stop - info.start), dtype=np.uint8) for _ in range(2)]
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.start)
        for start in range(info.start, info.stop, step):
            buffers.reverse()
            part = buffers[0][: min(step, info.stop - start)]
            if not _fill(file, part):
                raise ToolkitError(f"{info.file}: became shorter while it was read")
            yield torch.from_numpy(part).view(TORCH_DTYPES[info.dtype])


def _fill(file: FileIO, part: NDArray[np.uint8]) -> bool:
    """Read until ``part`` is full; return whether the file held enough."""
    view: memoryview = part.data
    while len(view):
        read = file.readinto(view)
        if not read:
            return False
        view = view[read:]
    return True
