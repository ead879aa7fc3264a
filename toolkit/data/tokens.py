"""Token ids of many rows in two flat arrays: no Python object per row."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DataError, Problem


@dataclass(frozen=True)
class TokenTable:
    """Ragged rows of token ids; both arrays may be memory-mapped.

    Attributes:
        ids: int32, shape (tokens,), the rows one after another.
        offsets: int64, shape (rows + 1,); row i is ``ids[offsets[i]:offsets[i + 1]]``.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @staticmethod
    def from_lengths(ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> TokenTable:
        """Build a table from flat ids, shape (tokens,), and row lengths, shape (rows,)."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return TokenTable(ids, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int32]]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64, shape (rows,)."""
        return np.diff(self.offsets)

    def lengths_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens of some rows, int64, shaped like ``rows``."""
        lengths: NDArray[np.int64] = self.offsets[rows + 1] - self.offsets[rows]
        return lengths

    def take(self, indices: NDArray[np.int64]) -> TokenTable:
        """Return the rows at ``indices``, int64, shape (n,), copied in that order."""
        return gather(self.ids, self.offsets[:-1][indices], self.lengths[indices])

    def truncate(self, max_length: int, *, keep_last: bool = False) -> TokenTable:
        """Cut rows to ``max_length`` tokens.

        Args:
            max_length: Tokens kept of each row.
            keep_last: A cut row ends with its own last token, as [SEP] must.
        """
        lengths = self.lengths
        kept = np.minimum(lengths, max_length)
        table = gather(self.ids, self.offsets[:-1], kept)
        if keep_last:
            long = np.flatnonzero(lengths > max_length)
            table.ids[table.offsets[1:][long] - 1] = self.ids[self.offsets[1:][long] - 1]
        return table

    def check_vocabulary(self, size: int, *, where: str, row_numbers: NDArray[np.int64] | None = None) -> None:
        """Refuse ids that the model has no embedding for.

        Args:
            size: Rows of the embedding.
            where: File the table was read from.
            row_numbers: int64, shape (rows,), the file's rows from 0; None where row i is row i.

        Raises:
            DataError: An id is negative or not below ``size``; names the first row.
        """
        bad = np.flatnonzero((self.ids < 0) | (self.ids >= size))
        if not len(bad):
            return
        row = int(np.searchsorted(self.offsets, bad[0], side="right"))
        row = row if row_numbers is None else int(row_numbers[row - 1]) + 1
        wrong = f"token id {int(self.ids[bad[0]])} is outside the vocabulary; {len(bad)} ids are"
        raise DataError(Problem(f"{where}:{row}", "token ids", wrong, f"ids from 0 to {size - 1}"))


def gather(ids: NDArray[np.int32], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> TokenTable:
    """Copy the runs ``ids[start : start + length]`` one after another into a new table.

    Args:
        ids: int32, shape (tokens,).
        starts: int64, shape (rows,).
        lengths: int64, shape (rows,).
    """
    table = TokenTable.from_lengths(np.empty(int(lengths.sum()), dtype=np.int32), lengths)
    # In runs of rows: the int64 index array of a whole table would be twice the table itself.
    for low in range(0, len(lengths), 65_536):
        high = min(low + 65_536, len(lengths))
        base = int(table.offsets[low])
        shift = np.repeat(starts[low:high] - (table.offsets[low:high] - base), lengths[low:high])
        table.ids[base : int(table.offsets[high])] = ids[shift + np.arange(len(shift))]
    return table


@dataclass(frozen=True)
class Encoded:
    """Token ids and what truncation cost.

    Attributes:
        table: One row per text.
        truncated: Texts that were cut.
        dropped_tokens: Tokens cut off, of all texts together.
    """

    table: TokenTable
    truncated: int
    dropped_tokens: int

    @staticmethod
    def join(pieces: Iterable[Encoded]) -> Encoded:
        """Return consecutive pieces as one."""
        ids, lengths = array("i"), array("q")
        truncated = dropped = 0
        for piece in pieces:
            ids.frombytes(piece.table.ids.tobytes())
            lengths.frombytes(piece.table.lengths.tobytes())
            truncated, dropped = truncated + piece.truncated, dropped + piece.dropped_tokens
        table = TokenTable.from_lengths(np.frombuffer(ids, dtype=np.int32), np.frombuffer(lengths, dtype=np.int64))
        return Encoded(table, truncated, dropped)

    def warning(self, *, part: str, max_length: int) -> str | None:
        """Return a line on what was cut, or None."""
        if not self.truncated:
            return None
        wrong = f"{self.truncated} of {len(self.table)} texts were cut to {max_length} tokens"
        return str(Problem("", f"data.{part}", f"{wrong}, {self.dropped_tokens} tokens dropped", "model.max_length"))
