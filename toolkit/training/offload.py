"""Keeps what a step saves for its backward pass in the machine's memory instead of on the GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from toolkit.config.training import OFFLOADED_FROM, TrainingSettings


def offloading(
    training: TrainingSettings, model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> AbstractContextManager[Any]:
    """Return what a forward pass of ``batch`` runs in: ``offloaded`` where the recipe and the device ask for it."""
    device = next(iter(batch.values())).device
    if not training.offloads(device.type):
        return nullcontext()
    return offloaded((*model.parameters(), *model.buffers(), *batch.values()))


def offloaded(staying: Iterable[torch.Tensor]) -> saved_tensors_hooks:
    """Return a context in which saved tensors leave their device until the backward pass reads them.

    Like ``torch.autograd.graph.save_on_cpu``, for one storage at a time: views travel together and once, and weights
    never, unless FSDP gathers them. Of a checkpointed block its input leaves; what is recomputed stays.

    Args:
        staying: Tensors that lie on the device anyway, with all that share their storage.
    """
    # A weak reference keeps a storage's identity, not its bytes, from being given to another one.
    there = {_weak(tensor.untyped_storage()) for tensor in staying}
    known: WeakValueDictionary[tuple[StorageWeakRef, int], _Moved] = WeakValueDictionary()

    def pack(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.nbytes() < OFFLOADED_FROM or _weak(storage) in there:
            return tensor
        key = _weak(storage), tensor._version
        moved = known.get(key)
        if moved is None:
            moved = known[key] = _Moved(storage)
        return moved, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()

    def unpack(packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else _view(packed[0].back(), *packed[1:])

    return saved_tensors_hooks(pack, unpack)


def machine_memory(size: int, *, pinned: bool) -> torch.Tensor:
    """Return so many bytes, (size,) uint8; pinned ones are filled by a GPU while the program goes on."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


class _Moved:
    """The bytes of a storage, copied away, and back for as long as somebody reads them.

    Copies run in the stream that computes: each is whole before it is read, and memory that was left is used again in
    the order of the program, so that a step's peak can be predicted. What is computed meanwhile waits.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._device = storage.device
        self._bytes = machine_memory(storage.nbytes(), pinned=self._device.type == "cuda")
        self._bytes.copy_(_view(storage, torch.uint8, 0, self._bytes.shape, (1,)), non_blocking=True)
        self._back: StorageWeakRef | None = None

    def back(self) -> torch.UntypedStorage:
        """Return a storage of these bytes on their device, the same to all who read at the same time."""
        storage = None if self._back is None else torch.UntypedStorage._new_with_weak_ptr(self._back.cdata)
        if storage is None:
            storage = self._bytes.to(self._device, non_blocking=True, copy=True).untyped_storage()
            self._back = _weak(storage)
        return storage


def _view(storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, *layout: Any) -> torch.Tensor:
    """Return the tensor of this dtype, offset, shape and strides."""
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, *layout)


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]
