"""From the recipe's data section to train, validation and test, with every row accounted for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import DataSettings
from toolkit.data.grouping import cut_rows, left_out, shared_groups, split_columns
from toolkit.data.labels import LabelMap, check_held_out_labels, check_training_labels
from toolkit.data.parts import LoadedData, Part
from toolkit.data.repeats import first_of_groups, leaking_rows, repeat_warnings, repeats_of
from toolkit.data.rows import Origin, Rows
from toolkit.data.sources import read_rows
from toolkit.data.splits import (
    PARTS,
    Split,
    oversample,
    read_split,
    sample,
    save_split,
    undersample,
)
from toolkit.data.targets import TargetFormat, Targets, check_targets, counts, strata
from toolkit.errors import DataError, Problem

__all__ = ["LoadedData", "Part", "load_data", "load_part"]

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class _Table:
    rows: Rows
    origin: Origin
    labels: Targets | None

    @property
    def strata(self) -> NDArray[np.int64]:
        return np.zeros(len(self.rows), dtype=np.int64) if self.labels is None else strata(self.labels)


def load_data(settings: DataSettings, *, supervised: bool = True, split_file: Path | None = None) -> LoadedData:
    """Read, check, balance, sample and split the data of a run.

    A part without a file of its own is cut from the training table. Repeated texts are removed (if asked), then labels
    balanced, then ``max_rows`` sampled, then the table is cut; given validation and test files are used whole. Of the
    training part ``train_rows`` are sampled, and then rare labels oversampled.

    Args:
        settings: The recipe's data section.
        supervised: Read labels; False for language modelling.
        split_file: Where the cut is kept: written if absent, else used if it is of the same data and settings.

    Raises:
        DataError: The data cannot be read exactly or do not fit the settings, or ``split_file`` is of other data.
        CapabilityError: A hub data set without the ``datasets`` library.
    """
    tables, label_map = _read_tables(settings, supervised)
    rows = {name: table.rows for name, table in tables.items()}
    repeats = repeats_of(rows, near=settings.near_duplicates)
    dropped = leaking_rows(rows, repeats, settings.duplicates)
    if settings.split.group_column is not None:
        shared_groups(rows, settings.split.group_column)
    main, groups = tables["train"], repeats["train"]
    indices = {name: np.delete(np.arange(len(table.rows)), dropped[name]) for name, table in tables.items()}
    split = _split(settings, tables, indices["train"], groups, split_file)
    indices |= split.parts if split else {"train": _select(settings, main, indices["train"], None)}
    if settings.train_rows is not None and len(indices["train"]):
        own = indices["train"]
        indices["train"] = own[sample(main.strata[own], settings.train_rows, seed=settings.split.seed)]
    if settings.balance == "oversample" and main.labels is not None and len(indices["train"]):
        # Behind the cut: no repeat may leave the training part.
        own = indices["train"]
        indices["train"] = own[oversample(main.labels[own], seed=settings.split.seed)]
    data = _assemble(settings, tables, indices, label_map, split)
    spell = TargetFormat.of(settings).spell
    data.warnings.extend(repeat_warnings(main.rows, groups, main.labels, spell=lambda row: spell(main.rows, row)))
    if settings.split.time_column is not None and split is not None and settings.duplicates != "allow":
        data.warnings.extend(left_out(main.rows, groups, split))
    _check_parts(data, settings, tables)
    if split is not None and split_file is not None and not split_file.exists():
        save_split(split_file, split)
    return data


def load_part(where: str, *, text_column: str, targets: TargetFormat, label_map: LabelMap) -> tuple[Part, Origin]:
    """Read a whole file, set or hub id as one part, for evaluation of a trained model.

    Args:
        where: What ``read_rows`` takes.
        text_column: Column of the text.
        targets: Where the file keeps the labels.
        label_map: Labels of the model.

    Raises:
        DataError: It cannot be read exactly, or has a label the model does not know.
    """
    rows, origin = read_rows(where, text_column=text_column, label_column=targets.label_column, others=targets.fields)
    return Part.from_rows(rows, targets.encode(rows, label_map), np.arange(len(rows))), origin


def _read_tables(settings: DataSettings, supervised: bool) -> tuple[dict[str, _Table], LabelMap | None]:
    """Read the files in the order train, validation, test; problems of all labels are raised together."""
    given = {"train": settings.source or settings.train, "validation": settings.validation, "test": settings.test}
    if given["train"] is None:
        raise DataError(Problem("", "data.train", "no data", "data.source or data.train"))
    targets = TargetFormat.of(settings)
    label, others = (targets.label_column, targets.fields) if supervised else (None, {})
    further = {name: {**others, **split_columns(settings, name)} for name in PARTS}
    read: dict[str, tuple[Rows, Origin]] = {}
    problems: list[Problem] = []
    for name, where in given.items():
        if where is not None:
            try:
                read[name] = read_rows(
                    where, text_column=settings.text_column, label_column=label, others=further[name]
                )
            except DataError as error:
                problems += error.problems
    if problems:
        raise DataError(problems)
    _check_same_kind(read)
    label_map = targets.label_map([rows for rows, _ in read.values()], settings.labels) if supervised else None
    return _encoded(read, targets, label_map), label_map


def _encoded(
    read: dict[str, tuple[Rows, Origin]], targets: TargetFormat, label_map: LabelMap | None
) -> dict[str, _Table]:
    tables: dict[str, _Table] = {}
    problems: list[Problem] = []
    for name, (rows, origin) in read.items():
        try:
            tables[name] = _Table(rows, origin, None if label_map is None else targets.encode(rows, label_map))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return tables


def _check_same_kind(read: dict[str, tuple[Rows, Origin]]) -> None:
    texts = read["train"][0].texts is not None
    for name, (rows, _) in read.items():
        if (rows.texts is not None) != texts:
            kinds = ("token ids", "texts") if texts else ("texts", "token ids")
            raise DataError(Problem(rows.where, f"data.{name}", f"holds {kinds[0]}, data.train {kinds[1]}", "one kind"))


def _fractions(settings: DataSettings, tables: dict[str, _Table]) -> dict[str, float]:
    """Return the share of each part that is cut from the training table; with a file given, they fill the rest."""
    split = settings.split
    shares = {"train": split.train, "validation": split.validation, "test": split.test}
    shares = {name: share for name, share in shares.items() if name == "train" or name not in tables}
    total = sum(shares.values())
    if len(shares) == len(PARTS):
        if total > 1 + 1e-9:
            raise DataError(Problem("", "data.split", f"the fractions sum to {total:g}", "at most 1"))
        return shares
    return {name: share / total for name, share in shares.items()}


def _split(
    settings: DataSettings,
    tables: dict[str, _Table],
    indices: Indices,
    groups: NDArray[np.int64],
    split_file: Path | None,
) -> Split | None:
    """Return how the training table is cut, or None where every part has its own file."""
    main = tables["train"]
    fractions = _fractions(settings, tables)
    if len(fractions) == 1:
        return None
    plan = _plan(settings, tables, fractions)
    if split_file is not None and split_file.exists():
        return read_split(split_file, plan, rows=len(main.rows))
    chosen = _select(settings, main, indices, groups if settings.duplicates == "remove" else None)
    alike = main.strata[chosen] if settings.split.stratify else np.zeros(len(chosen), dtype=np.int64)
    cuts = cut_rows(settings, main.rows, chosen, alike, None if settings.duplicates == "allow" else groups, fractions)
    return replace(plan, parts={name: chosen[rows] for name, rows in cuts.items()})


def _plan(settings: DataSettings, tables: dict[str, _Table], fractions: dict[str, float]) -> Split:
    """Return all that the cut depends on, with empty parts."""
    made_with: dict[str, object] = {
        "split": {**fractions, "stratify": settings.split.stratify},
        **settings.model_dump(include={"balance", "duplicates", "max_rows", "text_column", "label_column"}),
    }
    # What is not asked for is not named: a split made before there was such a wish stays valid.
    wishes = settings.split.model_dump(include={"group_column", "time_column", "folds"}, exclude_none=True)
    if "folds" in wishes:
        wishes["fold"] = settings.split.fold
    made_with |= {f"split.{name}": value for name, value in wishes.items()}
    if settings.near_duplicates is not None:
        made_with["near_duplicates"] = settings.near_duplicates
    if settings.problem_type != "single_label_classification":
        made_with |= settings.model_dump(include={"problem_type", "label_columns", "label_separator"})
    if settings.duplicates == "remove":
        made_with |= {name: table.origin.sha256 for name, table in tables.items() if name != "train"}
    empty = np.empty(0, dtype=np.int64)
    return Split(tables["train"].origin.sha256, settings.split.seed, made_with, dict.fromkeys(fractions, empty))


def _select(settings: DataSettings, table: _Table, indices: Indices, groups: NDArray[np.int64] | None) -> Indices:
    """Remove repeats (where groups are given), balance the labels, then sample ``max_rows``."""
    if groups is not None:
        indices = indices[first_of_groups(groups[indices])]
    if not len(indices):
        return indices
    labels = table.strata
    if settings.balance == "undersample":
        indices = indices[undersample(labels[indices], seed=settings.split.seed)]
    if settings.max_rows is not None:
        indices = indices[sample(labels[indices], settings.max_rows, seed=settings.split.seed)]
    return indices


def _assemble(
    settings: DataSettings,
    tables: dict[str, _Table],
    indices: dict[str, Indices],
    label_map: LabelMap | None,
    split: Split | None,
) -> LoadedData:
    parts = {}
    for name in PARTS:
        table = tables.get(name, tables["train"])
        parts[name] = Part.from_rows(table.rows, table.labels, indices[name])
    found = {}
    if label_map is not None:
        found = {name: counts(part.labels, label_map) for name, part in parts.items() if part.labels is not None}
    return LoadedData(
        **parts,
        label_map=label_map,
        origins=[table.origin for table in tables.values()],
        warnings=[],
        counts={name: of_part for name, of_part in found.items() if of_part},
        split=split,
        problem_type=settings.problem_type,
    )


def _check_parts(data: LoadedData, settings: DataSettings, tables: dict[str, _Table]) -> None:
    """Refuse empty parts and labels that training lacks; warn of a listed label without rows."""
    where = {name: tables.get(name, tables["train"]).rows.where for name in PARTS}
    fractions = _fractions(settings, tables)
    for name, part in data.parts.items():
        if not len(part) and fractions.get(name, 1):
            raise DataError(Problem(where[name], f"data.{name}", "no rows are left for this part", "more rows"))
    train = data.train.labels
    if data.label_map is None or train is None:
        return
    if settings.problem_type != "single_label_classification":
        targets = {name: part.labels for name, part in data.parts.items() if part.labels is not None}
        data.warnings.extend(check_targets(targets, data.label_map, where=where))
        return
    check_training_labels(train, data.label_map, where=where["train"])
    for name in PARTS[1:]:
        labels = data.parts[name].labels
        if labels is not None:
            check_held_out_labels(train, labels, data.label_map, part=name, where=where[name])
    absent = [name for name, count in data.counts["train"].items() if not count]
    if absent:
        data.warnings.append(f"{where['train']}: label {', '.join(absent)} has no training rows")
