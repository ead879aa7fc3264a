"""Prompts and responses: two columns of a table, read together and put behind one another as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from toolkit.config.objectives import PROMPT
from toolkit.config.schema import DataSettings
from toolkit.data.load import load_data
from toolkit.data.parts import LoadedData, Part
from toolkit.data.rows import Rows
from toolkit.data.sources import read_rows
from toolkit.data.tokenize import Tokenizer
from toolkit.data.tokens import Encoded, TokenTable
from toolkit.errors import DataError, Problem

# Without columns to tell the two apart.
SINGLE = (".txt", ".npy")
# Predicted tokens whose logits are held together where no backward pass needs them: 98 MiB of GPT-2's vocabulary.
TARGETS_AT_ONCE = 512


@dataclass(frozen=True)
class PairTable(TokenTable):
    """Token ids of prompts with their responses.

    Attributes:
        prompts: int64, shape (rows,), tokens of each row that stand before its response.
    """

    prompts: NDArray[np.int64]

    @property
    def targets(self) -> NDArray[np.int64]:
        """Tokens of each row that carry loss, int64, shape (rows,): the response and the end of text."""
        return self.lengths - self.prompts


def load_rows(settings: DataSettings, *, objective: str, split_file: Path | None = None) -> LoadedData:
    """Read what an objective trains on: texts with labels, texts alone, or prompts with responses.

    Args:
        settings: The recipe's data section.
        objective: The recipe's.
        split_file: Where the cut is kept, as for ``load_data``.

    Raises:
        DataError: As ``load_data`` and ``load_pairs``.
        CapabilityError: A hub data set without the ``datasets`` library.
    """
    if objective == "instruction":
        return load_pairs(settings, split_file=split_file)
    return load_data(settings, supervised=objective == "classification", split_file=split_file)


def load_pairs(settings: DataSettings, *, split_file: Path | None = None) -> LoadedData:
    """Read, sample and split prompts as ``load_data`` does texts, each with its response.

    Args:
        settings: The recipe's data section.
        split_file: Where the cut is kept, as for ``load_data``.

    Raises:
        DataError: The data cannot be read exactly, lack one of the columns, or have none.
        CapabilityError: A hub data set without the ``datasets`` library.
    """
    given = [where for where in (settings.source, settings.train, settings.validation, settings.test) if where]
    for where in given:
        _check_columns_exist(where)
    responses: dict[str, Rows] = {}
    with _called("data.response_column"):
        for where in given:
            responses[where], _ = read_rows(where, text_column=settings.response_column, label_column=None)
    with _called("data.prompt_column"):
        named = settings.model_copy(update={"text_column": settings.prompt_column})
        data = load_data(named, supervised=False, split_file=split_file)
    for name, part in data.parts.items():
        own = str(getattr(settings, name) or settings.source or settings.train)
        part.responses = responses[own].take(part.row_numbers).texts
    return data


def read_pairs(where: str, *, prompt_column: str, response_column: str) -> Part:
    """Read a whole file, set or hub id as one part, for evaluation of a trained model.

    Args:
        where: What ``read_rows`` takes.
        prompt_column: Column of the prompt.
        response_column: Column of the response.

    Raises:
        DataError: It cannot be read exactly, or lacks one of the columns.
    """
    _check_columns_exist(where)
    with _called("data.prompt_column"):
        prompts, _ = read_rows(where, text_column=prompt_column, label_column=None)
    with _called("data.response_column"):
        responses, _ = read_rows(where, text_column=response_column, label_column=None)
    return Part(prompts.texts, None, None, np.arange(len(prompts)), responses.texts)


def _check_columns_exist(where: str) -> None:
    if Path(where).suffix.lower() in SINGLE:
        wrong = f"a {Path(where).suffix} file has no columns for prompts and responses"
        raise DataError(Problem(where, "data.prompt_column", wrong, "csv, tsv, jsonl or parquet"))


@contextmanager
def _called(field: str) -> Iterator[None]:
    """Give problems of the text column the name that this column has in the recipe."""
    try:
        yield
    except DataError as error:
        raise DataError(
            replace(problem, field=field) if problem.field == "data.text_column" else problem
            for problem in error.problems
        ) from error


def encode_pairs(part: Part, tokenizer: Tokenizer, *, template: str, max_length: int, name: str) -> Encoded:
    """Return prompts in their template, responses and an end of text behind each, cut at the end to ``max_length``.

    Prompt and response are tokenised apart, as they are when the model is asked.

    Args:
        part: Rows with texts and responses.
        tokenizer: GPT-2's.
        template: Holds ``{prompt}`` once.
        max_length: Tokens kept of a row.
        name: Of the part, for messages.

    Returns:
        Its table is a ``PairTable``.

    Raises:
        DataError: A prompt leaves no room for a response.
    """
    prompts = tokenizer.encode((template.replace(PROMPT, text) for text in _strings(part.texts)), max_length=None).table
    responses = tokenizer.encode(_strings(part.responses), max_length=None).table
    long = np.flatnonzero(prompts.lengths >= max_length)
    if len(long):
        wrong = (
            f"{len(long)} prompts leave no room for a response: that of row {int(part.row_numbers[long[0]]) + 1} and "
            f"its template are {int(prompts.lengths[long[0]])} tokens, model.max_length is {max_length}"
        )
        right = f"model.max_length above {int(prompts.lengths.max())}, or shorter prompts"
        raise DataError(Problem("", f"data.{name}", wrong, right))
    end = np.array([tokenizer.special["eos"]], dtype=np.int32)
    pieces = [piece for row in range(len(part)) for piece in (prompts[row], responses[row], end)]
    lengths = prompts.lengths + responses.lengths + 1
    whole = TokenTable.from_lengths(np.concatenate(pieces), lengths)
    cut = whole.truncate(max_length) if lengths.max() > max_length else whole
    dropped = int((lengths - cut.lengths).sum())
    table = PairTable(cut.ids, cut.offsets, prompts.lengths)
    return Encoded(table, truncated=int((lengths > max_length).sum()), dropped_tokens=dropped)


def _strings(texts: pa.ChunkedArray | None) -> Iterator[str]:
    assert texts is not None
    return (text.as_py() for text in texts)
