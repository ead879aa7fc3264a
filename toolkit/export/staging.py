"""Output folders that appear whole or not at all: staged beside the target, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from toolkit.durable import flush, umask
from toolkit.errors import OutputError, Problem

# Between the name of the output and what makes a staging folder's name its own.
STAGED = "-staged-"


def check_output(output: pathlib.Path, *, inside_of: pathlib.Path | None = None) -> None:
    """Refuse an output folder that exists, or lies inside the input.

    An empty folder is accepted.

    Raises:
        OutputError: With the reason.
    """
    where = str(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputError(Problem(where, "output", "exists already", "a new folder"))
    if inside_of is not None and inside_of.resolve() in (output.resolve(), *output.resolve().parents):
        raise OutputError(Problem(where, "output", f"lies inside the input {inside_of}", "a folder beside it"))
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(Problem(where, "output", f"{parent} cannot be written", "a folder that you may write"))


def check_space(output: pathlib.Path, *, needed: int) -> None:
    """Refuse to begin where the disk lacks the bytes.

    Raises:
        OutputError: With needed and free bytes.
    """
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(Problem(str(output), "output", f"{free:,} bytes free", f"{needed:,} bytes needed"))


@contextlib.contextmanager
def staged_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield an empty folder beside ``output``; when the block ends well it becomes ``output``, else it is removed.

    What a killed process left under the same name, gigabytes of a merge perhaps, goes first.

    Raises:
        OutputError: If the folder cannot be made, or ``output`` appeared meanwhile.
        OSError: If the disk is full.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        staging = pathlib.Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}{STAGED}"))
    except OSError as error:
        wrong, right = f"cannot be made: {error.strerror}", "a folder that you may write"
        raise OutputError(Problem(str(output), "output", wrong, right)) from error
    try:
        staging.chmod(0o777 & ~umask())
        with _held(staging):
            yield staging
        for path in staging.iterdir():
            flush(path)
        flush(staging)
        try:
            # rename(2) replaces an empty folder and refuses any other.
            staging.rename(output)
        except OSError as error:
            raise OutputError(Problem(str(output), "output", f"cannot be made: {error.strerror}")) from error
        flush(output.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _remove_abandoned(output: pathlib.Path) -> None:
    """Remove the staging folders of an output that no living process holds."""
    for folder in output.parent.glob(f".{glob.escape(output.name)}{STAGED}*"):
        with contextlib.suppress(OSError), _held(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a folder, which ends with the process.

    Raises:
        BlockingIOError: If another process holds it, or nothing can be locked here.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there nothing counts as abandoned.
        raise BlockingIOError from None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
