"""Gives back to the system what a process holds and does not need: freed memory, and code that has run.

Importing torch touches 100 MiB of libraries, of which a training step needs a third. A page of a library counts as
resident from its first use on, and start-up uses most of them once. Given back, those that run again come from the
system's file cache, 16 at a time: all together a hundredth of a second a phase.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pathlib
import platform
import re
import sys
from collections.abc import Iterator

# mallopt(3): sizes from which on memory is mapped for itself, and from which on what is free at the heap's end goes.
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
# Bytes from which on a tensor lies in pages of its own. Left alone, glibc ends up at the larger, once large ones were
# freed. Tried, one round of benchmarks/allocator.py: from 256 KiB on short texts took a fifth longer, and 43 MiB less.
COMPACT, LARGEST = 1 << 20, 32 << 20
SMAPS = pathlib.Path("/proc/self/smaps")
# Code is mapped privately and is not written to; what lies in no file, or a loader has yet to change, is left alone.
CODE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ [1-9]\d*\s+/")
HEADER = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")

_compact = False


def give_back() -> None:
    """Return freed memory and code that has run."""
    return_freed_memory()
    return_code_pages()


def map_tensors(compact: bool) -> bool:
    """Choose how glibc hands out tensors, and return whether they are compact from now on.

    Compact: a tensor of 1 MiB and more lies in pages of its own, which go back to the system when it ends. Else it
    lies in the heap, which keeps what is free between tensors that are still needed; the system zeroes new pages, which
    takes time that the heap's need not. A threshold in GLIBC_TUNABLES, the user's own, is left alone.
    """
    global _compact
    if platform.libc_ver()[0] != "glibc" or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if compact != _compact:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, COMPACT if compact else LARGEST)
        libc.mallopt(TRIM_THRESHOLD, 8 * LARGEST if compact else 2 * LARGEST)
        _compact = compact
    return compact


def describe_allocator() -> str:
    """Return how memory is handed out on a CPU, for the record of a run."""
    return ("compact, " if _compact else "fast, ") + os.environ.get("GLIBC_TUNABLES", "as the system sets it")


def return_freed_memory() -> None:
    """Hand memory that was freed back to the system; glibc and Arrow keep 70 MiB of it after reading 2 million rows."""
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()


def return_code_pages() -> None:
    """Unmap the pages of the libraries' code, on Linux; the next call of a function brings its own back."""
    if platform.system() != "Linux" or not SMAPS.exists():
        return
    libc = ctypes.CDLL(None)
    for start, stop in code_mappings(SMAPS.read_text(encoding="utf-8", errors="replace")):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def code_mappings(smaps: str) -> Iterator[tuple[int, int]]:
    """Yield the addresses, from and to, of code that is as its file has it (proc(5), smaps).

    A debugger's breakpoint, or a library that patches others, makes a page of the process's own of it, which would be
    lost.
    """
    found: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if HEADER.match(line):
            code = CODE.match(line)
            found = None if code is None else (int(code[1], 16), int(code[2], 16))
        elif found is not None and line.startswith("Swap:"):
            # The last of the three; a page of its own may have been swapped out.
            if line.split()[1] == "0":
                yield found
            found = None
        elif line.startswith("Anonymous:") and line.split()[1] != "0":
            found = None
