"""Opening data files: what must hold of the bytes before anything is parsed."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import IO, TextIO

from toolkit.errors import DataError, Problem

MAX_LINE_CHARACTERS = 8_000_000
CHUNK_BYTES = 1 << 20
FOREIGN = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PAR1": "parquet",
    b"\x93NUMPY": "npy",
    b"\x89HDF": "HDF5",
    b"SQLite format": "SQLite",
}
WIDE = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def open_bytes(path: Path, where: str) -> IO[bytes]:
    """Open a regular, non-empty file.

    Raises:
        DataError: It is missing, a folder, empty or not readable.
    """
    if path.is_dir():
        raise DataError(Problem(where, "", "a folder", "a data file"))
    if not path.exists():
        raise DataError(Problem(where, "", "no such file", _neighbour(path)))
    if not path.is_file():
        raise DataError(Problem(where, "", "not a regular file", "a data file"))
    try:
        handle = path.open("rb")
    except OSError as error:
        raise DataError(Problem(where, "", f"cannot be read: {error.strerror}")) from error
    if not path.stat().st_size:
        handle.close()
        raise DataError(Problem(where, "", "the file is empty", "a header and rows"))
    return handle


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    close = get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1, cutoff=0.6)
    return f"did you mean {path.parent / close[0]}?" if close else "a path relative to the current folder, or absolute"


def sha256_of(path: Path, where: str) -> str:
    """Return the SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with open_bytes(path, where) as handle:
        while chunk := handle.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_text_file(path: Path, where: str) -> str:
    """Prove that a file is UTF-8 text without NUL bytes; return its SHA-256 as hex digits.

    Raises:
        DataError: Another format, another encoding (with the byte offset and line), or a NUL byte.
    """
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = line = 0
    with open_bytes(path, where) as handle:
        while chunk := handle.read(CHUNK_BYTES):
            if not offset:
                _check_head(chunk, where)
            digest.update(chunk)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                start = error.start - pending
                _not_utf8(where, offset + start, line + chunk[: max(start, 0)].count(b"\n") + 1)
            nul = chunk.find(b"\0")
            if nul >= 0:
                number = line + chunk[:nul].count(b"\n") + 1
                raise DataError(Problem(f"{where}:{number}", "", f"a NUL byte at offset {offset + nul}", "plain text"))
            offset += len(chunk)
            line += chunk.count(b"\n")
        left = len(decoder.getstate()[0])
        if left:
            _not_utf8(where, offset - left, line + 1)
    return digest.hexdigest()


def _check_head(chunk: bytes, where: str) -> None:
    for magic, name in FOREIGN.items():
        if chunk.startswith(magic):
            right = "unpack it first" if name in {"gzip", "zip", "bzip2", "xz", "zstandard"} else "the right suffix"
            raise DataError(Problem(where, "", f"the content is {name}, not text", right))
    for mark, name in WIDE.items():
        if chunk.startswith(mark):
            raise DataError(Problem(f"{where}:1", "", f"{name} text (mark at byte offset 0)", "save it as UTF-8"))


def _not_utf8(where: str, offset: int, line: int) -> None:
    raise DataError(Problem(f"{where}:{line}", "", f"not UTF-8 at byte offset {offset}", "save it as UTF-8"))


def open_text(path: Path) -> TextIO:
    """Open a checked file as text: a byte order mark is dropped, line ends are kept as they are."""
    return path.open(encoding="utf-8-sig", newline="")


def bounded_lines(handle: TextIO, where: str) -> Iterator[str]:
    r"""Yield lines with their ends (``\n``, ``\r\n`` or ``\r``), never holding more than one in memory.

    Raises:
        DataError: A line is longer than eight million characters.
    """
    number = 0
    while line := handle.readline(MAX_LINE_CHARACTERS):
        number += 1
        if len(line) == MAX_LINE_CHARACTERS:
            wrong = f"a line of {MAX_LINE_CHARACTERS} characters or more"
            raise DataError(Problem(f"{where}:{number}", "", wrong, "shorter lines; is this a text file?"))
        yield line
