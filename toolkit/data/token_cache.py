"""Token tables kept on disk by their content, read back memory-mapped."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from toolkit.cache import cache_folder, put_folder
from toolkit.data.files import sha256_of
from toolkit.data.tokens import Encoded, TokenTable
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


def cached(key: str, encode: Callable[[], Iterable[Encoded]]) -> Encoded:
    """Return the tokens under ``key``, making and keeping them where they are absent or damaged.

    Args:
        key: From ``cache_key``.
        encode: Makes them piece by piece; each goes to the disk before the next, so that memory holds one.
    """
    folder = cache_folder() / "tokens" / key
    found = _read(folder)
    if found is not None:
        return found
    try:
        shutil.rmtree(folder, ignore_errors=True)
        put_folder(folder, lambda staging: _write(staging, encode()))
    except OSError as error:
        logger.warning("token cache %s not written: %s", folder, error)
        return Encoded.join(encode())
    return _read(folder) or Encoded.join(encode())


def _write(folder: Path, pieces: Iterable[Encoded]) -> None:
    lengths = array("q")
    truncated = dropped = 0
    with (folder / FILES[0]).open("wb") as file:
        # numpy leaves room in a header for the first axis to grow: the count is written when it is known.
        _npy_header(file, 0)
        for piece in pieces:
            file.write(piece.table.ids.data)
            lengths.frombytes(piece.table.lengths.tobytes())
            truncated, dropped = truncated + piece.truncated, dropped + piece.dropped_tokens
        file.seek(0)
        _npy_header(file, sum(lengths))
    offsets = TokenTable.from_lengths(np.empty(0, dtype=np.int32), np.frombuffer(lengths, dtype=np.int64)).offsets
    np.save(folder / FILES[1], offsets, allow_pickle=False)
    hashes = {name: sha256_of(folder / name, name) for name in FILES}
    facts = {"truncated": truncated, "dropped_tokens": dropped}
    (folder / "facts.json").write_text(json.dumps({"sha256": hashes, "facts": facts}), encoding="utf-8")


def _npy_header(file: BinaryIO, count: int) -> None:
    described = {"descr": "<i4", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, described)


def _read(folder: Path) -> Encoded | None:
    try:
        record = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        if any(sha256_of(folder / name, name) != record["sha256"][name] for name in FILES):
            raise ValueError("its checksum differs")
        ids, offsets = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in FILES)
        return Encoded(TokenTable(ids, offsets), **record["facts"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        logger.warning("token cache %s is damaged and made anew: %s", folder, error)
        return None
