"""Cutting a table into parts: stratified, seeded, the same text never on both sides of a cut, kept on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.data.shuffle import permutation
from toolkit.durable import write_file_atomically
from toolkit.errors import DataError, Problem

FORMAT = 1
PARTS = ("train", "validation", "test")
Indices = NDArray[np.int64]

# One independent permutation per use of the seed.
STREAM_CUT, STREAM_BALANCE, STREAM_SAMPLE = 1 << 32, 2 << 32, 3 << 32


def undersample(codes: NDArray[np.integer], *, seed: int) -> Indices:
    """Return a seeded subset with as many rows of every label as the rarest has, ascending.

    Args:
        codes: shape (rows,), label ids that all occur.
        seed: Picks the rows.
    """
    _, codes, counts = np.unique(codes, return_inverse=True, return_counts=True)
    return _draw(codes, np.full(len(counts), counts.min()), seed, STREAM_BALANCE)


def oversample(codes: NDArray[np.integer], *, seed: int) -> Indices:
    """Return row numbers in which every label occurs as often as the commonest, ascending.

    Every row occurs; those of a label differ by one repeat at most.

    Args:
        codes: shape (rows,), label ids that all occur.
        seed: Picks the rows that are repeated once more.
    """
    _, codes, counts = np.unique(codes, return_inverse=True, return_counts=True)
    whole = counts.max() // counts
    again = _draw(codes, counts.max() - whole * counts, seed, STREAM_BALANCE)
    return np.sort(np.concatenate([np.repeat(np.arange(len(codes)), whole[codes]), again]))


def sample(codes: NDArray[np.integer], size: int, *, seed: int) -> Indices:
    """Return a seeded subset of ``size`` rows with every label's share kept, ascending.

    Args:
        codes: shape (rows,), label ids.
        size: Rows wanted; all rows if there are not more.
        seed: Picks the rows.
    """
    if size >= len(codes):
        return np.arange(len(codes))
    _, codes, counts = np.unique(codes, return_inverse=True, return_counts=True)
    return _draw(codes, _shares(counts / counts.sum(), size), seed, STREAM_SAMPLE)


def _draw(codes: NDArray[np.integer], quotas: NDArray[np.int64], seed: int, stream: int) -> Indices:
    order = permutation(len(codes), seed=seed, stream=stream)
    ranked = codes[order]
    kept = [order[ranked == code][:quota] for code, quota in enumerate(quotas)]
    return np.sort(np.concatenate(kept))


def _shares(fractions: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Return whole numbers near ``fractions * size``, by largest remainder; fractions that sum to 1 give ``size``."""
    exact = fractions * size
    whole = np.floor(exact + 1e-9).astype(np.int64)
    missing = round(float(exact.sum())) - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:missing]] += 1
    return whole


def cut(
    strata: NDArray[np.integer], groups: NDArray[np.integer] | None, fractions: Mapping[str, float], *, seed: int
) -> dict[str, Indices]:
    """Cut rows into parts, in each stratum by largest remainder.

    Args:
        strata: shape (rows,), the label id of each row; all equal for a cut that does not stratify.
        groups: shape (rows,), rows with equal numbers stay in one part; None: every row on its own.
        fractions: Share of each part; what is missing to 1 stays unused.
        seed: Picks the rows.

    Returns:
        Ascending row numbers of each part, int64. A stratum with any rows has one in the first part.
    """
    n = len(strata)
    if groups is None:
        groups = np.arange(n)
    _, first, inverse, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    shares = np.array([*fractions.values(), max(0.0, 1 - sum(fractions.values()))])
    part_of_group = np.empty(len(first), dtype=np.int8)
    order = permutation(len(first), seed=seed, stream=STREAM_CUT)
    for stratum in np.unique(strata):
        mine = order[strata[first[order]] == stratum]
        part_of_group[mine] = _assign(sizes[mine], shares, seed)
    part = part_of_group[inverse]
    return {name: np.flatnonzero(part == index) for index, name in enumerate(fractions)}


def _assign(sizes: NDArray[np.int64], shares: NDArray[np.float64], seed: int) -> NDArray[np.int8]:
    """Return the part of each group, int8, shape (groups,): repeated texts first, by chance; single rows fill up."""
    room = _shares(shares, int(sizes.sum()))
    if not room[0]:
        room[np.argmax(room)] -= 1
        room[0] = 1
    parts = np.empty(len(sizes), dtype=np.int8)
    repeated = np.flatnonzero(sizes > 1)
    repeated = repeated[np.argsort(-sizes[repeated], kind="stable")]
    chances = np.random.Philox(key=[seed, STREAM_CUT + len(sizes)]).random_raw(len(repeated)) / 2.0**64
    for group, chance in zip(repeated, chances, strict=True):
        fits = np.where(room >= sizes[group], room, 0)
        weights = np.cumsum(fits)
        index = int(np.searchsorted(weights, chance * weights[-1], side="right")) if weights[-1] else np.argmax(room)
        parts[group] = index
        room[index] -= sizes[group]
    singles = np.flatnonzero(sizes == 1)
    ends = np.cumsum(np.maximum(room, 0))
    parts[singles] = np.minimum(np.searchsorted(ends, np.arange(len(singles)), side="right"), len(room) - 1)
    return parts


@dataclass(frozen=True)
class Split:
    """A cut as it is kept on disk.

    Attributes:
        origin_sha256: Hash of the table that was cut.
        seed: Seed of the cut.
        settings: Everything else the cut depends on.
        parts: Row numbers of each part, 0-based, ascending.
    """

    origin_sha256: str
    seed: int
    settings: dict[str, object]
    parts: dict[str, Indices]


def save_split(path: Path, split: Split) -> None:
    """Write a split as JSON, complete or not at all."""
    parts = {name: rows.tolist() for name, rows in split.parts.items()}
    record = {
        "format": FORMAT,
        "origin_sha256": split.origin_sha256,
        "seed": split.seed,
        "settings": split.settings,
        "parts": parts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, json.dumps(record, separators=(",", ":")))


def read_split(path: Path, expected: Split, *, rows: int) -> Split:
    """Read a split and prove that it is of this table, cut this way.

    Args:
        path: File that ``save_split`` wrote.
        expected: What would be cut now; its ``parts`` name the parts and are otherwise unused.
        rows: Rows of the table.

    Raises:
        DataError: Not a split file, the data or the settings changed, or the row numbers are impossible.
    """
    right = "delete the file to cut anew, or use another output folder"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: _row_numbers(numbers) for name, numbers in record["parts"].items()}
        found = Split(str(record["origin_sha256"]), record["seed"], dict(record["settings"]), parts)
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError, RecursionError) as error:
        raise DataError(Problem(str(path), "", "not a split file", right)) from error
    problems = _differences(path, found, expected)
    if not problems and not _possible(found, expected, rows):
        problems = [Problem(str(path), "parts", f"the row numbers are no cut of {rows} rows", right)]
    if problems:
        raise DataError(problems)
    return found


def _row_numbers(numbers: list[object]) -> Indices:
    if any(type(number) is not int for number in numbers):
        raise ValueError("row numbers must be integers")
    return np.array(numbers, dtype=np.int64)


def _differences(path: Path, found: Split, expected: Split) -> list[Problem]:
    right = "the same value as when the split was made; or delete the file to cut anew"
    if found.origin_sha256 != expected.origin_sha256:
        wrong = f"the data changed since: {found.origin_sha256[:12]} then, {expected.origin_sha256[:12]} now"
        return [Problem(str(path), "origin_sha256", wrong, "the same data; or delete the file to cut anew")]
    then = {"split.seed": found.seed, **found.settings}
    now = {"split.seed": expected.seed, **expected.settings}
    return [
        Problem(str(path), f"data.{name}", f"{then.get(name)!r} when the split was made, {now.get(name)!r} now", right)
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]


def _possible(found: Split, expected: Split, rows: int) -> bool:
    if list(found.parts) != list(expected.parts):
        return False
    every = np.concatenate(list(found.parts.values()))
    inside = bool(len(every)) and every.min() >= 0 and every.max() < rows
    return bool(inside and len(np.unique(every)) == len(every) and len(found.parts[next(iter(found.parts))]))
