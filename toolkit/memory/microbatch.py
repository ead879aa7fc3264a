"""What decides the bytes of one pass beside the model: the sizes of a micro-batch, and how it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from toolkit.models.cpu_kernels import stepped


@dataclass(frozen=True)
class MicroBatch:
    """Sizes of one micro-batch.

    Attributes:
        rows: Texts.
        tokens: Real tokens of all rows.
        squares: Sum over the rows of squared lengths: entries of one head's attention weights.
        largest_run: The same sum over the largest run of equally long rows, which one attention call serves.
        repeated: Tokens of rows that share their length with another one.
        longest: Tokens of the longest row.
        targets: Tokens that a language model predicts; 0 for a classifier.
        classes: Tokens its softmax runs over.
    """

    rows: int
    tokens: int
    squares: int
    largest_run: int
    repeated: int
    longest: int
    targets: int = 0
    classes: int = 0

    def padded(self, before: int) -> MicroBatch:
        """Return the sizes as the stock forward sees them, with ``before`` keys more before each row."""
        tokens = self.rows * self.longest
        squares = tokens * (self.longest + before)
        return replace(self, tokens=tokens, squares=squares, largest_run=squares, repeated=tokens)

    def in_steps(self) -> MicroBatch:
        """Return the sizes with the filler that oneDNN's kernels want (``models.cpu_kernels``)."""
        return replace(self, tokens=stepped(self.tokens))

    @staticmethod
    def of(lengths: Sequence[int], *, targets: int = 0, classes: int = 0) -> MicroBatch:
        """Return the sizes of a batch of rows of these lengths."""
        counts = Counter(lengths)
        return MicroBatch(
            rows=len(lengths),
            tokens=sum(lengths),
            squares=sum(length * length for length in lengths),
            largest_run=max(count * length * length for length, count in counts.items()),
            repeated=sum(count * length for length, count in counts.items() if count > 1),
            longest=max(lengths),
            targets=targets,
            classes=classes,
        )


@dataclass(frozen=True)
class Setting:
    """What decides bytes beside the model.

    Attributes:
        device: ``cpu`` or ``cuda``.
        low_precision: Autocast to 2 bytes.
        checkpointing: Blocks, from the first, that are recomputed in the backward pass.
        bits: 4, 8, or None for full-precision frozen weights.
        training: False runs without gradients and dropout.
        kept: Blocks whose states are read instead of computed.
        kept_bytes: Bytes of an element of these states.
        low_frozen: Whether frozen linear weights need no copy for autocast.
    """

    device: str = "cpu"
    low_precision: bool = False
    checkpointing: int = 0
    bits: int | None = None
    training: bool = True
    kept: int = 0
    kept_bytes: int = 2
    low_frozen: bool = False
