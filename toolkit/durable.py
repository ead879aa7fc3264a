"""Files that are whole or absent: atomic writes, flushes to disk, full disks said so, the hash of a file's bytes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from toolkit.errors import OutputError, Problem

CHUNK_BYTES = 1 << 20
# No room on the disk, in the quota, or in the size that a file may have.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_file_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content``: staged beside it, flushed to disk, renamed, folder flushed.

    Raises:
        OutputError: If the disk is full; the old file is untouched.
        OSError: If the folder cannot be written; the old file is untouched.
    """
    raw = content.encode("utf-8") if isinstance(content, str) else content
    with room_on_disk(path.parent, needed=len(raw)):
        _replace(path, raw)


def _replace(path: pathlib.Path, raw: bytes) -> None:
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


@contextlib.contextmanager
def room_on_disk(folder: pathlib.Path, *, needed: int) -> Iterator[None]:
    """Say of a write below ``folder`` that found no room how many bytes it needs, and how many are free.

    Args:
        folder: Lies on the disk that is written; it need not exist.
        needed: Bytes of the write, at least.

    Raises:
        OutputError: In the place of an OSError for want of room; every other error passes through.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        wrong = f"{os.strerror(error.errno)}: {shutil.disk_usage(parent).free:,} bytes free"
        raise OutputError(Problem(str(folder), "output", wrong, f"at least {needed:,} bytes needed")) from error


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
