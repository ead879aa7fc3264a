"""Frozen blocks whose weights stay in the base's files: each is read when it runs, and then makes room for the next.

With their states kept (``memory.prefix_cache``), frozen blocks run once. They need not be in memory for that: a wave of
batches goes through one block after another, so a block is read once for thousands of tokens, and of the token
embedding only the rows that occur are read. What is left of a model in memory is what trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from toolkit.families import Family
from toolkit.models.stored import StoredTensors


class StoredEmbedding(nn.Embedding):
    """A token embedding that reads the rows it is asked for; its weight has a shape and no memory.

    Args:
        stored: Where the rows lie.
        name: Of the weight.
        plain: The embedding it stands for, on the meta device.
    """

    def __init__(self, stored: StoredTensors, name: str, plain: nn.Embedding) -> None:
        size = plain.num_embeddings, plain.embedding_dim
        super().__init__(*size, plain.padding_idx, _weight=torch.empty(size, device="meta"))
        self._stored, self._name = stored, name

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (..., width) of ids (...)."""
        numbers, places = torch.unique(input.cpu(), return_inverse=True)
        return self._stored.rows(self._name, numbers)[places].to(input.device)


class StreamedBlocks:
    """The first blocks of a model, of which one at a time has weights.

    Args:
        model: A classifier whose first blocks are on the meta device.
        stored: Where their weights lie.
        family: The architecture.
        count: How many blocks.
        device: Where they run.
    """

    def __init__(
        self, model: nn.Module, stored: StoredTensors, *, family: Family, count: int, device: torch.device
    ) -> None:
        self._blocks, self._prefix = list(model.get_submodule(family.blocks).children()), family.blocks
        self._stored, self._device = stored, device
        self.count = count
        self._weights: dict[str, torch.Tensor] = {}

    @contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """Give one block its weights; they go to the next one that is asked for. Adapters inside have their own."""
        block = self._blocks[number]
        absent = {name: tensor for name, tensor in block.state_dict().items() if tensor.is_meta}
        weights = {}
        for name, tensor in absent.items():
            # An adapter wraps the layer whose weight this is.
            plain = name.replace(".base_layer.", ".")
            if plain not in self._weights:
                self._weights[plain] = torch.empty(tensor.shape, device=self._device)
            weights[name] = self._weights[plain]
            self._stored.read_into(f"{self._prefix}.{number}.{plain}", weights[name])
        block.load_state_dict(weights, assign=True, strict=False)
        try:
            yield
        finally:
            block.load_state_dict(absent, assign=True, strict=False)

    def hook(self) -> None:
        """Load each block around its own ``forward``, for a model that knows nothing of streaming."""
        for number, block in enumerate(self._blocks[: self.count]):
            held = ExitStack()
            block.register_forward_pre_hook(
                lambda *_, held=held, number=number: held.enter_context(self.loaded(number))
            )
            block.register_forward_hook(lambda *_, held=held: held.close(), always_call=True)

    def rest(self) -> None:
        """Let the memory of the last block go."""
        self._weights.clear()


def stream_blocks(model: Any, stored: StoredTensors, *, family: Family, count: int, device: torch.device) -> None:
    """Make a classifier on the meta device read its token embedding and first blocks when they run.

    Args:
        model: The classifier; changed in place, and its ``streamed`` is set if any block is.
        stored: Tensors of its base.
        family: The architecture.
        count: Blocks that are streamed.
        device: Where they run.
    """
    plain = model.get_input_embeddings()
    table = next(f"{name}.weight" for name, module in model.named_modules() if module is plain)
    model.set_input_embeddings(StoredEmbedding(stored, table, plain))
    if count:
        model.streamed = StreamedBlocks(model, stored, family=family, count=count, device=device)


def load_body(
    model: Any,
    stored: StoredTensors,
    *,
    family: Family,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    store: Callable[[str, torch.Tensor], torch.Tensor | None] | None = None,
) -> None:
    """Give a classifier on the meta device its body's weights, one after another; streamed ones stay where they are.

    Those that ``model.frozen`` will load get a stand-in.

    Args:
        model: The classifier; changed in place.
        stored: Tensors of its base.
        family: The architecture; its head is left out.
        device: Where the weights are put.
        dtype: Of the weights.
        store: Takes a weight's name and value and returns what is kept instead, or None where that is the value.
    """
    blocks: StreamedBlocks | None = getattr(model, "streamed", None)
    streamed = 0 if blocks is None else blocks.count
    left = (*(f"{family.blocks}.{number}." for number in range(streamed)), *family.head)
    later = model.frozen.names if getattr(model, "frozen", None) is not None else ()
    on_disk = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, StoredEmbedding)}
    for name in dict(model.named_parameters()):
        if name.startswith(left) or name in on_disk:
            continue
        owner, _, leaf = name.rpartition(".")
        if name in later:
            setattr(model.get_submodule(owner), leaf, nn.Parameter(model.frozen.stand_in(name)))
            continue
        value = torch.empty(stored.shape(name), dtype=dtype, device=device)
        stored.read_into(name, value)
        kept = None if store is None else store(name, value)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value) if kept is None else kept)
    for name, buffer in list(model.named_buffers()):
        # DistilBERT numbers its positions in a buffer that no file holds.
        if buffer.is_meta and not name.startswith(left):
            owner, _, leaf = name.rpartition(".")
            numbers = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            model.get_submodule(owner).register_buffer(leaf, numbers, persistent=False)


def load_head(
    model: nn.Module, stored: StoredTensors | None, *, family: Family, device: torch.device | None = None
) -> None:
    """Give a classifier on the meta device its head.

    Args:
        model: Changed in place.
        stored: Where the head lies; None leaves its values to be drawn.
        family: The architecture.
        device: Where it is put; None: the CPU.
    """
    for path in family.head:
        head = model.get_submodule(path)
        names = head.state_dict()
        values = {n: torch.empty(w.shape) if stored is None else stored.read(f"{path}.{n}") for n, w in names.items()}
        head.load_state_dict(values, assign=True)
        head.to(device or "cpu")
