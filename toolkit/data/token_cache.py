"""Token tables kept on disk by their content, read back memory-mapped."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from toolkit.data.cache import cache_folder, put_folder
from toolkit.data.files import sha256_of
from toolkit.data.tokens import TokenTable
from toolkit.errors import DataError

logger = logging.getLogger(__name__)

FILES = ("ids.npy", "offsets.npy")


def texts_sha256(texts: pa.ChunkedArray) -> str:
    """Return a hash of an Arrow large_string column that does not depend on its chunks, hex digits."""
    data, lengths = hashlib.sha256(), hashlib.sha256()
    for chunk in texts.chunks:
        _, offset_bytes, value_bytes = chunk.buffers()
        offsets = np.frombuffer(offset_bytes, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        lengths.update(np.diff(offsets).tobytes())
        if value_bytes is not None:
            data.update(memoryview(value_bytes)[offsets[0] : offsets[-1]])
    return hashlib.sha256(data.digest() + lengths.digest()).hexdigest()


def cache_key(texts: str, tokenizer: str, *, max_length: int) -> str:
    """Return the key of a token table, hex digits.

    Args:
        texts: ``texts_sha256`` of the texts.
        tokenizer: ``sha256`` of the tokenizer.
        max_length: Tokens kept of each text.
    """
    return hashlib.sha256(f"1 {texts} {tokenizer} {max_length}".encode()).hexdigest()


def cached_table(key: str, build: Callable[[], tuple[TokenTable, dict[str, int]]]) -> tuple[TokenTable, dict[str, int]]:
    """Return the table and the facts under ``key``, building and keeping them where they are absent or damaged.

    Args:
        key: From ``cache_key``.
        build: Makes the table and a few whole numbers about it.
    """
    folder = cache_folder() / "tokens" / key
    found = _read(folder)
    if found is not None:
        return found
    table, facts = build()
    try:
        shutil.rmtree(folder, ignore_errors=True)
        put_folder(folder, lambda staging: _write(staging, table, facts))
    except OSError as error:
        logger.warning("token cache %s not written: %s", folder, error)
        return table, facts
    return _read(folder) or (table, facts)


def _write(folder: Path, table: TokenTable, facts: dict[str, int]) -> None:
    np.save(folder / FILES[0], table.ids, allow_pickle=False)
    np.save(folder / FILES[1], table.offsets, allow_pickle=False)
    hashes = {name: sha256_of(folder / name, name) for name in FILES}
    (folder / "facts.json").write_text(json.dumps({"sha256": hashes, "facts": facts}), encoding="utf-8")


def _read(folder: Path) -> tuple[TokenTable, dict[str, int]] | None:
    try:
        record = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        if any(sha256_of(folder / name, name) != record["sha256"][name] for name in FILES):
            raise ValueError("its checksum differs")
        ids, offsets = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in FILES)
        return TokenTable(ids, offsets), dict(record["facts"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        logger.warning("token cache %s is damaged and made anew: %s", folder, error)
        return None
