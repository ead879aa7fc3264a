"""A training step without its numbers: operations that only take and give back bytes, in autograd's order.

Every operation allocates its result, keeps what its backward pass will read, and lets go as PyTorch does. Walking
the tape forwards and backwards therefore meets the allocator's peak, and knows what it consists of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

# glibc takes what is larger straight from the system and gives it straight back.
MAPPED = 32 << 20


@dataclass
class Storage:
    """Allocated bytes, freed with their last reference."""

    size: int
    part: str
    references: int = 1


@dataclass(eq=False)
class Value:
    """A tensor: its storage (shared by views), its own bytes, and whether a gradient flows to it."""

    storage: Storage
    size: int
    needs_grad: bool


@dataclass
class Node:
    """What the backward pass of one operation does.

    Attributes:
        output: Its result.
        inputs: Values that receive a gradient.
        saved: Storages it kept.
        moved: Storages that left the device, and are there again while it runs.
        workspace: Bytes it takes beside its results while it runs.
        parameters: Bytes of the gradients of the parameters it uses, one entry a tensor.
        shared: Whether the inputs receive the very gradient of the output.
        replay: Forward pass of a checkpointed section, run again instead of what was not kept.
    """

    output: Value
    inputs: tuple[Value, ...]
    saved: tuple[Storage, ...] = ()
    moved: tuple[Storage, ...] = ()
    workspace: int = 0
    parameters: tuple[int, ...] = ()
    shared: bool = False
    replay: Callable[[Value], Value] | None = None


@dataclass
class Tape:
    """Counts bytes while operations run.

    Attributes:
        accumulating: Gradients of parameters are freed at once: added to those of earlier micro-batches, or used.
        offloaded_from: Saved storages of so many bytes leave the device (``training.offload``); None: all stay.
        parts: Bytes held now, by part.
        peak: The most bytes held at once.
        widest: The largest result of an operation, unpacked weight or gradient of a block's weight, of at most
            ``MAPPED``. What comes once a step, such as an embedding's gradient, leaves one hole, not one a block.
        at_peak: What they were.
    """

    accumulating: bool = False
    offloaded_from: int | None = None
    parts: Counter[str] = field(default_factory=Counter)
    held: int = 0
    peak: int = 0
    widest: int = 0
    at_peak: Counter[str] = field(default_factory=Counter)
    moment: str = ""
    peak_moment: str = ""
    part: str = "embeddings"
    _nodes: list[Node] = field(default_factory=list)
    _recording: bool = True
    _pinned: list[Storage] = field(default_factory=list)
    _cached: list[Storage] = field(default_factory=list)

    def take(self, size: int, part: str) -> Storage:
        """Allocate bytes."""
        self.parts[part] += size
        self.held += size
        self._note(0)
        return Storage(size, part)

    def drop(self, storage: Storage) -> None:
        """Give up one reference."""
        storage.references -= 1
        if storage.references == 0:
            self.parts[storage.part] -= storage.size
            self.held -= storage.size

    def free(self, *values: Value) -> None:
        """End the life of local variables."""
        for value in values:
            self.drop(value.storage)

    def touch(self, size: int) -> None:
        """Use bytes for a moment."""
        self._note(size)

    def _note(self, workspace: int) -> None:
        if self.held + workspace > self.peak:
            self.peak, self.peak_moment = self.held + workspace, self.moment
            self.at_peak = Counter({part: size for part, size in self.parts.items() if size})
            self.at_peak["workspace"] += workspace

    def record(
        self,
        size: int,
        inputs: tuple[Value, ...],
        *,
        saves: tuple[Value, ...] = (),
        saves_output: bool = False,
        pinned: tuple[Value, ...] = (),
        extra: int = 0,
        cached: int = 0,
        parameters: tuple[int, ...] = (),
        workspace: int = 0,
        shared: bool = False,
    ) -> Value:
        """Run one operation forwards.

        Args:
            size: Bytes of its result.
            inputs: Its operands.
            saves: Operands that its backward pass reads.
            saves_output: Whether its backward pass reads the result.
            pinned: Operands that it keeps by itself, so that checkpointing cannot let them go.
            extra: Bytes it keeps beside them (statistics, masks).
            cached: Bytes of these that autocast holds, too, until the forward pass ends.
            parameters: Bytes of its trained parameters.
            workspace: Bytes taken for a moment, in either direction.
            shared: The backward pass hands its own gradient on.
        """
        flows = bool(parameters) or any(value.needs_grad for value in inputs)
        self.widen(size)
        result = Value(self.take(size, self.part), size, flows)
        self.touch(workspace + (0 if flows and self._recording else extra))
        if flows:
            self._pin(pinned)
        if flows and self._recording:
            saved = [value.storage for value in saves] + ([result.storage] if saves_output else [])
            own = [self.take(size, self.part) for size in (extra - cached, cached) if size]
            kept, moved = self._save([*saved, *own], [value.storage for value in pinned])
            if cached and self.offloaded_from is not None:
                # Its reference ends with the forward pass, also where the copy has left.
                self._cached.append(own.pop())
            for storage in own:
                self.drop(storage)
            receiving = tuple(value for value in inputs if value.needs_grad)
            self._nodes.append(Node(result, receiving, kept, moved, workspace, parameters, shared))
        return result

    def _save(self, saved: list[Storage], pinned: list[Storage]) -> tuple[tuple[Storage, ...], tuple[Storage, ...]]:
        """Keep a reference to what stays on the device; return that, and what leaves it."""
        limit = self.offloaded_from
        # Views of one storage travel together.
        moved = {id(storage): storage for storage in saved if limit is not None and storage.size >= limit}
        kept = [*(storage for storage in saved if id(storage) not in moved), *pinned]
        for storage in kept:
            storage.references += 1
        return tuple(kept), tuple(moved.values())

    def widen(self, *sizes: int) -> None:
        """Take notice of tensors that come and go."""
        self.widest = max(self.widest, *(size for size in sizes if size <= MAPPED), 0)

    def _pin(self, values: tuple[Value, ...]) -> None:
        if not self._recording:
            for value in values:
                value.storage.references += 1
                self._pinned.append(value.storage)

    def view(self, value: Value, size: int) -> Value:
        """Return a part of a value that shares its storage; its gradient is as large as the whole value's."""
        value.storage.references += 1
        result = Value(value.storage, size, value.needs_grad)
        if value.needs_grad and self._recording:
            self._nodes.append(Node(result, (value,)))
        return result

    def checkpointed(self, section: Callable[[Value], Value], value: Value) -> Value:
        """Run a section of which nothing but its input is kept."""
        recording, self._recording = self._recording, False
        result = section(value)
        self._recording = recording
        pinned, self._pinned = self._pinned, []
        if result.needs_grad and recording:
            kept, moved = self._save([value.storage], [])
            receiving = (value,) if value.needs_grad else ()
            self._nodes.append(Node(result, receiving, (*kept, *pinned), moved, replay=section))
        return result

    def backward(self, result: Value) -> None:
        """Run the whole tape backwards from a result."""
        for storage in self._cached:
            self.drop(storage)
        gradients = {id(result): self.take(result.size, "workspace")}
        nodes, self._nodes = self._nodes, []
        self._walk(nodes, gradients)

    def _walk(self, nodes: list[Node], gradients: dict[int, Storage]) -> None:
        while nodes:
            node = nodes.pop()
            incoming = gradients.pop(id(node.output), None)
            if incoming is not None:
                if node.replay is not None:
                    self._replay(node, incoming, gradients)
                else:
                    self._step_back(node, incoming, gradients)
            for storage in node.saved:
                self.drop(storage)

    def _step_back(self, node: Node, incoming: Storage, gradients: dict[int, Storage]) -> None:
        back = [self.take(storage.size, storage.part) for storage in node.moved]
        outgoing = []
        for value in node.inputs:
            if node.shared and incoming.size == value.size:
                incoming.references += 1
                outgoing.append(incoming)
            else:
                outgoing.append(self.take(value.size, "workspace"))
        own = [self.take(size, "gradients") for size in node.parameters]
        self.touch(node.workspace)
        self.drop(incoming)
        for storage in (*back, *(own if self.accumulating else ())):
            self.drop(storage)
        for value, storage in zip(node.inputs, outgoing, strict=True):
            self._add(gradients, value, storage)

    def _add(self, gradients: dict[int, Storage], value: Value, storage: Storage) -> None:
        """Add to a gradient that is there already, as autograd does: in place."""
        if id(value) in gradients:
            self.drop(storage)
        else:
            gradients[id(value)] = storage

    def _replay(self, node: Node, incoming: Storage, gradients: dict[int, Storage]) -> None:
        assert node.replay is not None
        outer, self._nodes = self._nodes, []
        # What is recomputed stays.
        limit, self.offloaded_from = self.offloaded_from, None
        back = [self.take(storage.size, storage.part) for storage in node.moved]
        stored = (*back, *node.saved)[0]
        source = Value(stored, stored.size, bool(node.inputs))
        result = node.replay(source)
        self.free(result)
        for storage in back:
            self.drop(storage)
        self.offloaded_from = limit
        nodes, self._nodes = self._nodes, outer
        inner = {id(result): incoming}
        self._walk(nodes, inner)
        if node.inputs:
            self._add(gradients, node.inputs[0], inner.pop(id(source)))
