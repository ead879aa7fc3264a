"""Runs command lines under an audit hook; writes what it heard as JSON. ``audited.py REPORT JOBS``.

A job is ``{"words": [...], "stop_after": path or null}``; with ``stop_after``, SIGTERM is sent once that path appears.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
heard: dict[str, list[Any]] = {"pickle": [], "sockets": [], "writes": [], "reads": [], "loads": [], "codes": []}
stop_at: list[str] = []


def callers() -> list[str]:
    return [frame.filename for frame in traceback.extract_stack(limit=40)]


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        heard["pickle"].append({"what": [str(part) for part in arguments], "stack": callers()})
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
        heard["sockets"].append({"event": event, "what": [str(part) for part in arguments], "stack": callers()})
    elif event == "open":
        path, mode, flags = arguments
        if isinstance(path, str | bytes | os.PathLike):
            kind = "writes" if _writes(mode, flags) else "reads"
            heard[kind].append(os.path.abspath(os.fsdecode(path)))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate"):
        paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
        at = arguments[1] if event in ("os.remove", "os.rmdir") and len(arguments) > 1 else -1
        # A name relative to an open folder (shutil.rmtree) stands below a path that was heard already.
        if at in (-1, None):
            heard["writes"].extend(os.path.abspath(os.fsdecode(path)) for path in paths if not isinstance(path, int))
        if event == "os.rename" and stop_at and str(arguments[1]).endswith(stop_at[0]):
            stop_at.clear()
            os.kill(os.getpid(), signal.SIGTERM)


def _writes(mode: str | None, flags: int) -> bool:
    return bool(flags & WRITING) if mode is None else bool(set(mode) & set("wax+"))


def main() -> None:
    report, jobs = sys.argv[1], json.loads(sys.argv[2])
    sys.addaudithook(listen)
    # torch.load unpickles by itself, which pickle's event does not tell; it is watched from the first import on.
    import torch

    from toolkit.cli import main as toolkit

    def refuse(*arguments: object, **options: object) -> None:
        heard["loads"].append(callers())
        raise AssertionError("torch.load was called")

    torch.load = refuse
    for job in jobs:
        stop_at[:] = [job["stop_after"]] if job["stop_after"] else []
        heard["codes"].append(toolkit(job["words"]))
    answer = json.dumps(heard)
    with open(report, "w", encoding="utf-8") as file:
        file.write(answer)


if __name__ == "__main__":
    main()
