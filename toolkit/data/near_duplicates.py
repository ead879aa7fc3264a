"""Texts that are nearly the same: found by MinHash (Broder 1997), proven by the words of their characters.

Two texts are alike by the share of five-byte pieces that they have in common (Jaccard similarity), case and white space
aside. Texts of a high share fall together in one of many bands of hashes with near certainty; only such pairs are
compared. Memory is 128 to 168 bytes a row beside the texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from toolkit.data.rows import Rows

Indices = NDArray[np.int64]
PIECE = 5
# Bytes of text that are hashed at once: some 40 MiB of arrays.
BLOCK_BYTES = 1 << 20
MULTIPLIERS = np.random.Philox(key=[5, 5]).random_raw(64) | np.uint64(1)


def bands_of(similarity: float) -> tuple[int, int]:
    """Return how many bands of how many hashes: a pair just alike enough is missed with less than 2 % (7 % below 0.7).

    That is (1 - similarity ** hashes) ** bands.
    """
    return (16, 4) if similarity >= 0.7 else (21, 3)


def near_groups(tables: Sequence[Rows], first: Sequence[Indices], *, similarity: float) -> list[Indices]:
    """Return a number per row of each table, int64 (rows,), equal where texts are alike, in any chain.

    Args:
        tables: Rows with texts.
        first: Number per row of each table, equal where texts are the same; the result joins these groups further.
        similarity: Share of pieces in common from which two texts are alike, 0 to 1.
    """
    exact = np.concatenate(list(first))
    _, distinct, codes = np.unique(exact, return_index=True, return_inverse=True)
    texts = _Texts(tables, distinct)
    bands, hashes = bands_of(similarity)
    keys = np.concatenate([_band_keys(block, bands, hashes) for block in texts.blocks()])
    parent = np.arange(len(distinct))
    for band in range(bands):
        order = np.argsort(keys[:, band], kind="stable")
        ranked = keys[order, band]
        same = np.flatnonzero(ranked[1:] == ranked[:-1])
        # Each text is held against its neighbour in the bucket and against the bucket's first.
        starts = np.searchsorted(ranked, ranked[same], side="left")
        for place, start in zip(same.tolist(), starts.tolist(), strict=True):
            late = int(order[place + 1])
            for early in {int(order[place]), int(order[start])}:
                one, other = _root(parent, early), _root(parent, late)
                if one != other and texts.similarity(early, late) >= similarity:
                    parent[max(one, other)] = min(one, other)
    roots = np.array([_root(parent, index) for index in range(len(parent))], dtype=np.int64)
    joined = roots[codes.reshape(-1)]
    return np.split(joined, np.cumsum([len(rows) for rows in tables])[:-1])


def _root(parent: Indices, index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = int(parent[index])
    return index


class _Texts:
    """The distinct texts of some tables, folded."""

    def __init__(self, tables: Sequence[Rows], chosen: Indices) -> None:
        self._tables, self._chosen = tables, chosen
        self._starts = np.cumsum([0, *(len(rows) for rows in tables)])

    def blocks(self) -> Iterator[list[bytes]]:
        """Yield the texts in their order, about ``BLOCK_BYTES`` at a time."""
        block: list[bytes] = []
        size = 0
        for index in range(len(self._chosen)):
            text = self._folded(index)
            block.append(text)
            size += len(text)
            if size >= BLOCK_BYTES:
                yield block
                block, size = [], 0
        if block:
            yield block

    def similarity(self, one: int, other: int) -> float:
        """Return the share of pieces that two texts have in common."""
        a, b = (np.unique(_pieces([self._folded(index)])[0]) for index in (one, other))
        both = len(np.intersect1d(a, b, assume_unique=True))
        return both / (len(a) + len(b) - both)

    def _folded(self, index: int) -> bytes:
        row = int(self._chosen[index])
        table = int(np.searchsorted(self._starts, row, side="right")) - 1
        texts = self._tables[table].texts
        assert texts is not None
        text = str(texts[row - int(self._starts[table])])
        return " ".join(text.lower().split()).encode().ljust(PIECE)


def _pieces(texts: list[bytes]) -> tuple[NDArray[np.uint64], Indices]:
    """Return the five-byte pieces of all texts as numbers, and where each text's begin."""
    data = np.frombuffer(b"".join(texts), dtype=np.uint8).astype(np.uint64)
    count = len(data) - PIECE + 1
    values = np.zeros(count, dtype=np.uint64)
    for place in range(PIECE):
        values |= data[place : place + count] << np.uint64(8 * place)
    ends = np.cumsum([len(text) for text in texts])
    # The last four places of a text, but for the last text's, begin pieces that reach into the next one.
    keep = np.ones(count, dtype=bool)
    for end in range(1, PIECE):
        keep[ends[:-1] - end] = False
    lengths = np.array([len(text) - PIECE + 1 for text in texts])
    return values[keep], np.cumsum(lengths) - lengths


def _band_keys(texts: list[bytes], bands: int, hashes: int) -> NDArray[np.uint64]:
    """Return the key of every band of every text, (texts, bands)."""
    values, starts = _pieces(texts)
    # Spread over 64 bits first, so that multiplying and keeping the high half is a hash.
    values = (values ^ (values >> np.uint64(23))) * np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(32)
    keys = np.zeros((len(texts), bands), dtype=np.uint64)
    for number in range(bands * hashes):
        hashed = (values * MULTIPLIERS[number]) >> np.uint64(32)
        keys[:, number // hashes] = keys[:, number // hashes] * np.uint64(0x100000001B3) + np.minimum.reduceat(
            hashed, starts
        )
    return keys


def chance_of_missing(similarity: float, *, threshold: float) -> float:
    """Return the chance that a pair of this similarity shares no band."""
    bands, hashes = bands_of(threshold)
    return float((1 - similarity**hashes) ** bands)
