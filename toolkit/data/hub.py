"""Data sets of the Hugging Face hub, through the ``datasets`` library where it is installed."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from toolkit.cache import offline
from toolkit.data.arrays import rows_of_table
from toolkit.data.rows import NONE, Origin, Rows, missing_columns, wanted_columns
from toolkit.errors import CapabilityError, DataError, Problem

if TYPE_CHECKING:
    from datasets import Dataset

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w.\[\]:%+-]+)?", flags=re.ASCII)
SECONDS = 3.0


def read_hub_dataset(
    where: str, *, text_column: str, label_column: str | None, others: Mapping[str, str] = NONE
) -> tuple[Rows, Origin]:
    """Read ``owner/name[:config][@split]``; without a split, ``train``.

    Raises:
        CapabilityError: The ``datasets`` library is not installed.
        DataError: The hub or the data set cannot be reached, or the columns do not fit.
    """
    if find_spec("datasets") is None:
        wrong = "a hub data set needs the datasets library"
        raise CapabilityError(Problem(where, "data.source", wrong, "pip install 'classifier-toolkit[hub]'"))
    name, _, split = where.partition("@")
    name, _, config = name.partition(":")
    # datasets retries for minutes where there is no network; offline mode serves its cache at once.
    if not offline() and not _reachable():
        os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        wrong = f"the data set cannot be loaded: {str(error)[:200]}"
        raise DataError(Problem(where, "data.source", wrong, "a reachable hub id, or a data file")) from error
    rows = rows_of_dataset(dataset, where, text_column=text_column, label_column=label_column, others=others)
    licence = dataset.info.license or None
    return rows, Origin(where, f"hub data set {where}", content_sha256(rows), len(rows), licence)


def rows_of_dataset(
    dataset: Dataset, where: str, *, text_column: str, label_column: str | None, others: Mapping[str, str] = NONE
) -> Rows:
    """Return the rows of a loaded data set; class ids become their class names.

    Raises:
        DataError: A column is missing or has another type, or a row is wrong.
    """
    wanted = wanted_columns(text_column, label_column, others)
    problems = missing_columns(where, dataset.column_names, wanted)
    if problems:
        raise DataError(problems)
    flat = dataset.select_columns(list(dict.fromkeys(column for _, column in wanted))).with_format("arrow")
    table: pa.Table = flat[:]
    classes: list[str] | None = getattr(dataset.features.get(label_column), "names", None)
    if label_column is not None and classes:
        table = _named(table, label_column, classes)
    for name in others:
        # Lists of class ids, or one id, become the names.
        feature = dataset.features[name]
        classes = getattr(getattr(feature, "feature", feature), "names", None)
        if classes:
            table = _named_lists(table, name, classes)
    return rows_of_table(table, where, text_column=text_column, label_column=label_column, others=others)


def _named(table: pa.Table, column: str, classes: list[str]) -> pa.Table:
    ids = table.column(column).fill_null(-1).to_numpy()
    known = (ids >= 0) & (ids < len(classes))
    named = np.where(known, np.array(classes, dtype=object)[np.where(known, ids, 0)], "")
    return table.set_column(table.column_names.index(column), column, pa.array(named, type=pa.large_string()))


def _named_lists(table: pa.Table, column: str, classes: list[str]) -> pa.Table:
    named = [
        value if value is None else classes[value] if isinstance(value, int) else [classes[one] for one in value]
        for value in table.column(column).to_pylist()
    ]
    return table.set_column(table.column_names.index(column), column, pa.array(named))


def content_sha256(rows: Rows) -> str:
    """Return the SHA-256 of texts and labels, which has no file to be taken from."""
    digest = hashlib.sha256()
    texts = rows.texts if rows.texts is not None else ()
    for row, text in enumerate(texts):
        label = "" if rows.labels is None else rows.labels[row]
        further = "".join(f"{column[row]}\0" for column in rows.others.values())
        digest.update(f"{label}\0{text.as_py()}\0{further}".encode())
    return digest.hexdigest()


def _reachable() -> bool:
    """Return whether the hub (or HF_ENDPOINT, or a proxy) accepts a connection within three seconds."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    parts = urlsplit(proxy or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    done: list[bool] = []
    worker = threading.Thread(target=_connect, args=(parts.hostname or "", port, done), daemon=True)
    worker.start()
    worker.join(SECONDS)
    return bool(done)


def _connect(host: str, port: int, done: list[bool]) -> None:
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError:
        return
    done.append(True)
