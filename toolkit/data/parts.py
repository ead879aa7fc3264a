"""What loading returns: the parts of a data set, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from toolkit.data.labels import LabelMap
from toolkit.data.rows import Origin, Rows
from toolkit.data.splits import Split
from toolkit.data.tokens import TokenTable


@dataclass
class Part:
    """Rows of train, validation or test.

    Attributes:
        texts: Arrow large_string, ``rows`` long; None for token ids, and once they were let go.
        token_ids: Ids read from .npy; None for texts.
        labels: Label ids, int64, shape (rows,); None without supervision.
        row_numbers: int64, shape (rows,), 0-based rows of the table the part was taken from.
    """

    texts: pa.ChunkedArray | None
    token_ids: TokenTable | None
    labels: NDArray[np.int64] | None
    row_numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row_numbers)

    @staticmethod
    def from_rows(rows: Rows, labels: NDArray[np.int64] | None, indices: NDArray[np.int64]) -> Part:
        """Copy the rows at ``indices``, int64, shape (n,), with their label ids out of ``labels``, shape (rows,)."""
        taken = rows.take(indices)
        return Part(taken.texts, taken.token_ids, None if labels is None else labels[indices], indices)


@dataclass(frozen=True)
class LoadedData:
    """All that a run reads.

    Attributes:
        train: Rows trained on.
        validation: Rows that pick the best checkpoint; empty only if its fraction is 0.
        test: Rows used once, at the end; empty only if its fraction is 0.
        label_map: Label names in id order; None without supervision.
        origins: Where each table came from, in the order train, validation, test.
        warnings: Sentences a user should see; each is one line.
        counts: Rows of each label by part; empty without supervision.
        split: The cut as ``save_split`` keeps it; None where every part has its own file.
    """

    train: Part
    validation: Part
    test: Part
    label_map: LabelMap | None
    origins: list[Origin]
    warnings: list[str]
    counts: dict[str, dict[str, int]]
    split: Split | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}
