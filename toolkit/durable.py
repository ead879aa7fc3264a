"""Files that are whole or absent: atomic writes, flushes to disk, and the hash of a file's bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import tempfile

CHUNK_BYTES = 1 << 20


def write_file_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content``: staged beside it, flushed to disk, renamed, folder flushed.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the old file is untouched.
    """
    raw = content.encode("utf-8") if isinstance(content, str) else content
    handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; these follow the user's umask like any other.
        pathlib.Path(staged).chmod(0o666 & ~umask())
        os.replace(staged, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(staged)
        raise
    flush(path.parent)


def flush(path: pathlib.Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """Return the permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hex digits, in constant memory.

    Raises:
        OSError: If it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()
