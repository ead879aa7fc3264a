"""The exception tree; every error the toolkit raises on purpose is one of these.

    ToolkitError               1   a bug, or a caller's misuse of the Python API
    ├── InputError             2   the input is wrong; nothing was written
    │   ├── RecipeError            the YAML recipe or an override of it
    │   ├── DataError              a data file or a data set
    │   ├── ModelError             a base model folder or hub id
    │   ├── AdapterError           a trained adapter, or its fit to a base
    │   ├── CheckpointError        no checkpoint of a run can be used
    │   ├── OutputError            a folder that cannot be written, or is in use
    │   └── CapabilityError        this machine or installation cannot do it
    ├── DivergedError          3   a non-finite loss, gradient or weight
    ├── OutOfMemoryError       4   memory ran out; names the setting to change
    └── StoppedError     130/143   SIGINT or SIGTERM, after a checkpoint was saved

The number is the process's exit code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input, as one line of text.

    Attributes:
        where: ``FILE``, ``FILE:LINE`` or ``FILE:LINE:COLUMN``.
        field: Dotted name of the field, column or tensor; may be empty.
        wrong: What is wrong, with the value received.
        right: What would be right; may be empty.
    """

    where: str
    field: str
    wrong: str
    right: str = ""

    def __str__(self) -> str:
        parts = [part for part in (self.where, self.field, self.wrong) if part]
        line = ": ".join(parts) + (f" ({self.right})" if self.right else "")
        return " ".join(line.split())


class ToolkitError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class InputError(ToolkitError):
    """The input is wrong; carries every problem found, one line each.

    Args:
        problems: One problem, or several found in one pass.
    """

    exit_code = 2

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(InputError):
    """The recipe or a command-line override is wrong."""


class DataError(InputError):
    """A data file cannot be read exactly, or does not fit the recipe."""


class ModelError(InputError):
    """A base model cannot be reached, read or used."""


class AdapterError(InputError):
    """A trained adapter is damaged or belongs to another base."""


class CheckpointError(InputError):
    """No checkpoint of the run can be resumed from."""


class OutputError(InputError):
    """An output folder cannot be used."""


class CapabilityError(InputError):
    """This machine or installation lacks what the recipe asks for."""


class DivergedError(ToolkitError):
    """Training met a non-finite loss, gradient or weight and stopped."""

    exit_code = 3


class OutOfMemoryError(ToolkitError):
    """Memory ran out; the message names the setting to change."""

    exit_code = 4


class StoppedError(ToolkitError):
    """A signal stopped training after a checkpoint was saved.

    Args:
        message: What was saved and how to go on.
        signal_number: The signal received (2 or 15).
    """

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ``did you mean X?`` for the closest candidate, or an empty string."""
    close = get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""
