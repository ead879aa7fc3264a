"""Texts that may be more than memory holds: a column that goes to a nameless file once it is large, memory-mapped."""

from __future__ import annotations

import logging
import mmap
import tempfile
from typing import IO, Any

import pyarrow as pa

from toolkit.cache import cache_folder
from toolkit.durable import room_on_disk

logger = logging.getLogger(__name__)

# Smaller columns stay in memory: most data sets are read within it.
MEMORY_BYTES = 64 << 20
SCHEMA = pa.schema([("text", pa.large_string())])


class TextSpool:
    """Collects Arrow strings chunk by chunk; beyond ``MEMORY_BYTES`` they wait on the disk of the cache.

    The file has no name, so nothing is left of it, whatever ends the process.
    """

    def __init__(self) -> None:
        self._chunks: list[pa.Array] = []
        self._held = 0
        self._file: IO[bytes] | None = None
        self._writer: Any = None

    def __del__(self) -> None:
        # Of a table that was refused half-way.
        if self._file is not None:
            self._file.close()

    def add(self, chunk: pa.Array) -> None:
        """Append a chunk of large_string.

        Raises:
            OutputError: The disk of the cache is full.
        """
        self._chunks.append(chunk)
        self._held += chunk.nbytes
        if self._held > MEMORY_BYTES:
            self._spill()

    def column(self) -> pa.ChunkedArray:
        """Return all chunks; call it last."""
        if self._file is None:
            return pa.chunked_array(self._chunks, type=pa.large_string())
        self._spill()
        self._writer.close()
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()
        return pa.ipc.open_file(pa.py_buffer(mapped)).read_all().column("text")

    def _spill(self) -> None:
        if self._file is None:
            try:
                cache_folder().mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=cache_folder())  # noqa: SIM115
            except OSError as error:
                logger.warning("texts stay in memory: no file in %s: %s", cache_folder(), error)
                self._held = -(1 << 62)
                return
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), SCHEMA)
        with room_on_disk(cache_folder(), needed=self._held):
            for chunk in self._chunks:
                self._writer.write_batch(pa.record_batch([chunk], schema=SCHEMA))
        self._chunks, self._held = [], 0
