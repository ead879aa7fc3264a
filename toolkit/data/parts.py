"""What loading returns: the parts of a data set, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from toolkit.config.schema import ProblemType
from toolkit.data.labels import LabelMap
from toolkit.data.rows import Origin, Rows
from toolkit.data.splits import Split
from toolkit.data.targets import Targets
from toolkit.data.tokens import TokenTable


@dataclass
class Part:
    """Rows of train, validation or test.

    Attributes:
        texts: Arrow large_string, ``rows`` long; None for token ids, and once they were let go.
        token_ids: Ids read from .npy; None for texts.
        labels: Label ids, int64, shape (rows,); with several labels a text uint8 (rows, labels) of 0 and 1; numbers
            float32 (rows, targets); None without supervision.
        row_numbers: int64, shape (rows,), 0-based rows of the table the part was taken from.
        responses: Arrow large_string, ``rows`` long, where ``texts`` are prompts; else None.
    """

    texts: pa.ChunkedArray | None
    token_ids: TokenTable | None
    labels: Targets | None
    row_numbers: NDArray[np.int64]
    responses: pa.ChunkedArray | None = None

    def __len__(self) -> int:
        return len(self.row_numbers)

    @staticmethod
    def from_rows(rows: Rows, labels: Targets | None, indices: NDArray[np.int64]) -> Part:
        """Copy the rows at ``indices``, int64, shape (n,), with their targets out of ``labels`` of all rows."""
        taken = rows.take(indices)
        return Part(taken.texts, taken.token_ids, None if labels is None else labels[indices], indices)


@dataclass(frozen=True)
class LoadedData:
    """All that a run reads.

    Attributes:
        train: Rows trained on.
        validation: Rows that pick the best checkpoint; empty only if its fraction is 0.
        test: Rows used once, at the end; empty only if its fraction is 0.
        label_map: Names of the labels, or of the targets of a regression, in id order; None without supervision.
        origins: Where each table came from, in the order train, validation, test.
        warnings: Sentences a user should see; each is one line.
        counts: Rows of each label by part; empty without labels.
        split: The cut as ``save_split`` keeps it; None where every part has its own file.
        problem_type: What the labels are.
    """

    train: Part
    validation: Part
    test: Part
    label_map: LabelMap | None
    origins: list[Origin]
    warnings: list[str]
    counts: dict[str, dict[str, int]]
    split: Split | None = None
    problem_type: ProblemType = "single_label_classification"

    @property
    def parts(self) -> dict[str, Part]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}
