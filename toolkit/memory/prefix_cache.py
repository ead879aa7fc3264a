"""Hidden states of the frozen first blocks, computed once and kept on disk, memory-mapped.

Blocks below the first one that trains give every epoch the same states. Kept, they turn an epoch of training the last
blocks into work on those blocks alone. A cache is keyed by all that decides its numbers, so a second run finds it; its
rows are computed chunk by chunk, each with a checksum, so a killed pass goes on and a damaged chunk is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from toolkit.cache import cache_folder
from toolkit.data.batching import collate, target_tensor
from toolkit.data.targets import Targets
from toolkit.data.tokens import TokenTable
from toolkit.durable import room_on_disk
from toolkit.evaluation.evaluate import length_sorted_batches
from toolkit.memory.prefix_rule import BATCH_TOKENS, CHUNK_TOKENS

FORMAT = 2
DTYPES: dict[str, Any] = {"fp16": np.float16, "fp32": np.float32}
# How much of a GPU's free memory a cache may take to stay there.
DEVICE_SHARE = 0.3

States = NDArray[np.floating[Any]]
Compute = Callable[[list[dict[str, torch.Tensor]]], list[torch.Tensor]]


class PrefixOverflowError(Exception):
    """A state is too large for fp16."""


@dataclass(frozen=True)
class PrefixCache:
    """The states of the rows of one table.

    Attributes:
        states: (N, width): the tokens of all rows one after another; (rows, width) if no block is left to train.
        table: Token ids the states belong to.
        blocks: Blocks that the states have behind them.
        pooled: Whether there is one state a row.
        seconds: Time it took to compute what was missing; 0.0 for a cache that was found whole.
        key: Under which it is kept.
    """

    states: States | torch.Tensor
    table: TokenTable
    blocks: int
    pooled: bool
    seconds: float
    key: str

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return int(self.states.nbytes)

    def batch(self, rows: NDArray[np.int64], labels: Targets | None = None) -> dict[str, torch.Tensor]:
        """Return what ``models.forward.classify`` takes: ``states``, ``lengths`` (B,), and ``labels`` if given."""
        lengths = self.table.lengths_of(rows)
        index = rows if self.pooled else self._positions(rows, lengths)
        if isinstance(self.states, torch.Tensor):
            states = self.states[torch.from_numpy(index).to(self.states.device)]
        else:
            states = torch.from_numpy(self.states[index])
            _let_go(self.states)
        batch = {"states": states, "lengths": torch.from_numpy(lengths)}
        if labels is not None:
            batch["labels"] = target_tensor(labels, rows)
        return batch

    def _positions(self, rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the tokens of ``rows`` lie, those of the shortest row first."""
        order = np.argsort(lengths, kind="stable")
        starts, lengths = self.table.offsets[:-1][rows[order]], lengths[order]
        ends = np.cumsum(lengths)
        return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)

    def to(self, device: torch.device) -> PrefixCache:
        """Return the cache on the device, where a GPU has room for it; else itself."""
        if device.type != "cuda" or self.nbytes > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            return self
        states = torch.from_numpy(np.asarray(self.states)).to(device)
        return replace(self, states=states)


def prefix_key(**facts: object) -> str:
    """Return the key of a cache, hex digits, from everything that decides its numbers."""
    return hashlib.sha256(repr((FORMAT, sorted(facts.items()))).encode()).hexdigest()[:32]


def table_sha256(table: TokenTable) -> str:
    """Return a hash of a table's ids and row lengths, hex digits."""
    digest = hashlib.sha256(np.ascontiguousarray(table.ids).data)
    digest.update(table.lengths.data)
    return digest.hexdigest()


def lacks_room(needed: int, *, limit: int, keep: set[str]) -> str | None:
    """Return why a cache of ``needed`` bytes may not be written, or None; caches unused for longest make room first.

    Args:
        needed: Bytes of the caches of this run.
        limit: Bytes that all caches together may take.
        keep: Keys of this run.
    """
    root = cache_folder() / "prefix"
    if needed > limit:
        return f"{needed / 2**30:.1f} GiB of states, over training.prefix_cache.max_gib"
    root.mkdir(parents=True, exist_ok=True)
    others = sorted((p for p in root.iterdir() if p.is_dir() and p.name not in keep), key=lambda p: p.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in others}
    while others and sum(sizes[path] for path in others) + needed > limit:
        shutil.rmtree(others.pop(0), ignore_errors=True)
    have = sum(f.stat().st_blocks * 512 for key in keep if (root / key).is_dir() for f in (root / key).iterdir())
    free = shutil.disk_usage(root).free
    if needed - have > free:
        return f"{needed / 2**30:.1f} GiB of states, but the disk of {root} has {free / 2**30:.1f} GiB free"
    return None


def build_prefix_cache(
    table: TokenTable,
    compute: Compute,
    *,
    key: str,
    width: int,
    blocks: int,
    pooled: bool,
    dtype: str,
    device: torch.device,
    pad_id: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> PrefixCache:
    """Return the cache under ``key``, computing the chunks that are missing or damaged.

    Args:
        table: Rows.
        compute: Padded batches, rows ascending by length, to their states (``models.flat.prefix_states``).
        key: From ``prefix_key``.
        width: Of a state.
        blocks: Blocks that ``compute`` runs.
        pooled: Whether it returns one state a row.
        dtype: ``fp16`` or ``fp32``, of the kept states.
        device: Where ``compute`` wants its batches.
        pad_id: Fills short rows.
        advance: Hears of the rows done and of all rows.

    Raises:
        PrefixOverflowError: A state exceeds fp16.
        OutputError: The disk is full.
    """
    folder = cache_folder() / "prefix" / key
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    offsets = np.arange(len(table) + 1) if pooled else table.offsets
    started = time.perf_counter()
    with _locked(folder / "lock"):
        states = _open(folder / "states", shape=(int(offsets[-1]), width), dtype=DTYPES[dtype])
        chunks = _chunks(table.offsets)
        valid = _valid_chunks(folder / "checksums", states, [(offsets[low], offsets[high]) for low, high in chunks])
        missing = [number for number in range(len(chunks)) if number not in valid]
        for number in missing:
            low, high = chunks[number]
            part = states[offsets[low] : offsets[high]]
            _fill(part, table, compute, rows=(low, high), offsets=offsets, device=device, pad_id=pad_id)
            states.flush()
            _note(folder / "checksums", number, part)
            _let_go(states)
            advance(high, len(table))
    seconds = time.perf_counter() - started if missing else 0.0
    return PrefixCache(states, table, blocks, pooled, seconds, key)


def _open(path: Path, *, shape: tuple[int, int], dtype: Any) -> Any:
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if not path.exists() or path.stat().st_size != size:
        path.with_name("checksums").unlink(missing_ok=True)
        with room_on_disk(path.parent, needed=size), path.open("wb") as file:
            # Reserved, not only promised: a page of a memory-mapped file that finds the disk full kills the process.
            _reserve(file.fileno(), size)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)


def _reserve(descriptor: int, size: int) -> None:
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _chunks(offsets: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return runs of consecutive rows of about ``CHUNK_TOKENS`` tokens."""
    chunks, low = [], 0
    while low < len(offsets) - 1:
        high = int(np.searchsorted(offsets, offsets[low] + CHUNK_TOKENS, side="right")) - 1
        chunks.append((low, max(high, low + 1)))
        low = chunks[-1][1]
    return chunks


def _valid_chunks(path: Path, states: States, bounds: list[tuple[int, int]]) -> set[int]:
    """Return the chunks whose states match their checksum, a line ``number crc32`` each."""
    if not path.exists():
        return set()
    kept: dict[int, int] = {}
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        words = line.split()
        # The last line of a killed pass may be half.
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            kept[int(words[0])] = int(words[1])
    valid = set()
    for number, (low, high) in enumerate(bounds):
        if number in kept and kept[number] == _checksum(states[low:high]):
            valid.add(number)
            _let_go(states)
    return valid


def _let_go(states: States) -> None:
    """Drop the pages that were looked at: as long as they are mapped they count as this process's memory."""
    if isinstance(states.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        states.base.madvise(mmap.MADV_DONTNEED)


def _checksum(part: States) -> int:
    return zlib.crc32(part.data.cast("B")) if part.size else 0


def _note(path: Path, number: int, part: States) -> None:
    with path.open("a", encoding="ascii") as file:
        file.write(f"\n{number} {_checksum(part)}\n")
        file.flush()
        os.fsync(file.fileno())


def _fill(
    part: States,
    table: TokenTable,
    compute: Compute,
    *,
    rows: tuple[int, int],
    offsets: NDArray[np.int64],
    device: torch.device,
    pad_id: int,
) -> None:
    """Compute the states of consecutive rows, in batches of like length."""
    low, high = rows
    numbers = np.arange(low, high)
    budget = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    # A batch's own rows ascending by length, equally long ones in their order.
    chosen = [
        numbers[np.sort(batch)][np.argsort(table.lengths_of(numbers[np.sort(batch)]), kind="stable")]
        for batch in length_sorted_batches(table.lengths_of(numbers), batch_size=budget, max_tokens=budget)
    ]
    batches = [collate(table, None, batch, pad_id=pad_id) for batch in chosen]
    found = compute([{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches])
    for batch_rows, computed in zip(chosen, found, strict=True):
        states = computed.float().cpu().numpy()
        if part.dtype == np.float16 and np.abs(states).max(initial=0) > np.finfo(np.float16).max:
            raise PrefixOverflowError
        sizes = offsets[batch_rows + 1] - offsets[batch_rows]
        ends = np.cumsum(sizes)
        part[np.repeat(offsets[batch_rows] - offsets[low] - (ends - sizes), sizes) + np.arange(ends[-1])] = states


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for another run that fills the same cache."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there two runs compute the same states twice.
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
