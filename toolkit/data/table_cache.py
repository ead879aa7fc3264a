"""Large text files kept as Arrow tables by their content, read back memory-mapped: parsed once, not at every start."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from toolkit.cache import cache_folder, put_folder
from toolkit.data.files import sha256_of
from toolkit.data.labels import LabelColumn
from toolkit.data.repeats import content_keys
from toolkit.data.rows import Rows
from toolkit.errors import DataError

logger = logging.getLogger(__name__)

FORMAT = 1
# Smaller files are parsed within a second.
CACHE_BYTES = 8 << 20
TEXTS, CODES, LINES, KEYS = "texts.arrow", "codes.npy", "lines.npy", "keys.npy"


def cached_rows(
    path: Path, where: str, *, sha256: str, columns: tuple[str | None, ...], parse: Callable[[], Rows]
) -> Rows:
    """Return the rows of a file, from the cache where it holds them whole.

    Args:
        path: The file.
        where: The file as given, for messages.
        sha256: Hash of its content.
        columns: Names of the text and label column, and of the other ones.
        parse: Reads the file; its errors pass through, and nothing is kept of a file that has any.
    """
    if path.stat().st_size < CACHE_BYTES:
        return parse()
    facts = json.dumps([FORMAT, sha256, path.suffix.lower(), *columns])
    folder = cache_folder() / "tables" / hashlib.sha256(facts.encode()).hexdigest()
    found = _read(folder, where)
    if found is not None:
        return found
    rows = parse()
    if rows.texts is None:
        return rows
    try:
        shutil.rmtree(folder, ignore_errors=True)
        put_folder(folder, lambda staging: _write(staging, replace(rows, keys=content_keys(rows))))
    except OSError as error:
        logger.warning("table cache %s not written: %s", folder, error)
        return rows
    return _read(folder, where) or rows


def _other(place: int) -> str:
    return f"other-{place}.npy"


def _write(folder: Path, rows: Rows) -> None:
    assert rows.texts is not None
    table = pa.table({"text": rows.texts})
    with pa.OSFile(str(folder / TEXTS), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    arrays = {KEYS: rows.keys, LINES: rows.lines, CODES: None if rows.labels is None else rows.labels.codes}
    arrays |= {_other(place): column.codes for place, column in enumerate(rows.others.values())}
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / name, array, allow_pickle=False)
    record = {
        "names": None if rows.labels is None else list(rows.labels.names),
        "others": {name: list(column.names) for name, column in rows.others.items()},
        "sha256": {file.name: sha256_of(file, file.name) for file in sorted(folder.iterdir())},
    }
    (folder / "facts.json").write_text(json.dumps(record), encoding="utf-8")


def _read(folder: Path, where: str) -> Rows | None:
    try:
        record = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        if any(sha256_of(folder / name, name) != digest for name, digest in record["sha256"].items()):
            raise ValueError("its checksum differs")
        arrays = {
            name: np.load(folder / name, mmap_mode="r", allow_pickle=False)
            for name in record["sha256"]
            if name.endswith(".npy")
        }
        names = record["names"]
        texts = pa.ipc.open_file(pa.memory_map(str(folder / TEXTS))).read_all().column("text")
        labels = None if names is None else LabelColumn(tuple(names), arrays[CODES])
        others = {
            name: LabelColumn(tuple(values), arrays[_other(place)])
            for place, (name, values) in enumerate(record.get("others", {}).items())
        }
        return Rows(where, texts, None, labels, arrays.get(LINES), arrays[KEYS], others)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError, pa.ArrowException) as error:
        logger.warning("table cache %s is damaged and made anew: %s", folder, error)
        return None
