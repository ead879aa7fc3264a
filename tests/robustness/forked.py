"""Runs command lines in forked children of one warm process: ``Server().run(words, cwd=...)``.

As a script it is that process: jobs as JSON lines on stdin, an answer line each. Torch is imported once and every child
starts in milliseconds, so that a run may be killed at each of its hundreds of writes, for real.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate")


@dataclass(frozen=True)
class Job:
    """One command line.

    Attributes:
        words: After ``toolkit``.
        cwd: Folder to run in.
        watch: Folder whose changes are counted as events; empty counts none.
        at: Number of the event, from 1, before which ``signals`` are sent; 0 sends none.
        signals: Sent to the child by itself, the second right after the first.
        kill_after: Seconds until SIGKILL; 0 sends none.
        file_bytes: Largest file that may be written (RLIMIT_FSIZE).
        twin: File for the answer of the same command line, started once more in the place of a signal.
        inject: ``module:function`` called in the child with ``argument``, before the command; a number it returns is
            the exit code, and there is no command.
        argument: What it is called with.
        environment: Variables to set.
    """

    words: Sequence[str]
    cwd: str
    watch: str = ""
    at: int = 0
    signals: Sequence[int] = ()
    kill_after: float = 0.0
    file_bytes: int | None = None
    twin: str = ""
    inject: str = ""
    argument: Any = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """How it ended.

    Attributes:
        code: Exit code, or minus the signal that killed it.
        output: What it wrote to stdout and stderr.
        events: Names of the watched changes, in order; empty if it was killed.
        seconds: Wall time.
        peak_bytes: Largest resident set of the child, the warm start included.
    """

    code: int
    output: str
    events: list[str]
    seconds: float
    peak_bytes: int = 0


class Server:
    """A warm process that forks a child for each job; use it as a context manager."""

    def __init__(self, **environment: str) -> None:
        whole = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**whole, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def run(self, *words: str, cwd: Path, **options: Any) -> Answer:
        """Run one command line to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = Job(words, str(cwd), **{name: str(v) if isinstance(v, Path) else v for name, v in options.items()})
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))


class Events:
    """Counts the changes below a folder, and before one of them sends signals or starts the job's twin."""

    def __init__(self, job: Job) -> None:
        self._watch, self._job = os.path.abspath(job.watch), job
        self.names: list[str] = []

    def happen(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self._job.at:
            for number in self._job.signals:
                os.kill(os.getpid(), number)
            if self._job.twin:
                answer = fork(Job(self._job.words, self._job.cwd))
                Path(self._job.twin).write_text(json.dumps(asdict(answer)))

    def inside(self, path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self._watch)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & WRITING) if mode is None else bool(set(mode) & set("wax+"))
            if writes and self.inside(path):
                self.happen(f"open {os.path.basename(os.fsdecode(path))}")
        elif event in CHANGES:
            # shutil.rmtree names what it deletes by a name and an open folder.
            relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1
            if relative or self.inside(arguments[0]):
                self.happen(f"{event} {os.path.basename(os.fsdecode(arguments[0]))}")

    def install(self) -> None:
        """Hear of changes through the audit hook, and of fsync and safetensors, which it does not tell, by wrapping."""
        import toolkit.training.checkpoint as checkpoint

        fsync, save_file = os.fsync, checkpoint.save_file

        def heard_fsync(descriptor: int) -> None:
            # Files of the cache do not count: another run may have left them there.
            if self.inside(os.readlink(f"/proc/self/fd/{descriptor}")):
                self.happen("fsync")
            fsync(descriptor)

        def heard_save(tensors: Any, path: Any) -> None:
            self.happen(f"save {os.path.basename(path)}")
            save_file(tensors, path)
            self.happen(f"saved {os.path.basename(path)}")

        os.fsync, checkpoint.save_file = heard_fsync, heard_save
        sys.addaudithook(self.hear)


def child(job: Job, answer: int) -> None:
    """Run the job in this process and end it."""
    from toolkit.cli import main

    os.chdir(job.cwd)
    os.environ.update(job.environment)
    events = Events(job)
    if job.watch:
        events.install()
    if job.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_bytes, job.file_bytes))
    code = 1
    try:
        done = None
        if job.inject:
            module, _, name = job.inject.partition(":")
            inject: Callable[[Any], int | None] = getattr(__import__(module, fromlist=[name]), name)
            done = inject(job.argument)
        code = main(list(job.words)) if done is None else done
    finally:
        os.write(answer, json.dumps(events.names).encode())
        if sys.exc_info()[0] is not None:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork(job: Job) -> Answer:
    """Run the job in a child and say how it ended."""
    reader, writer = os.pipe()
    # No file: its size would be limited with the others.
    output_reader, output = os.pipe()
    started = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        for descriptor in (reader, output_reader):
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        child(job, writer)
    for descriptor in (writer, output):
        os.close(descriptor)
    killer = threading.Timer(job.kill_after, os.kill, (pid, signal.SIGKILL))
    if job.kill_after:
        killer.start()
    told, text = _read_all(reader, output_reader)
    # Before its number is free for another process.
    killer.cancel()
    _, status, used = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    code = os.waitstatus_to_exitcode(status)
    return Answer(code, text.decode(errors="replace"), json.loads(told or b"[]"), seconds, used.ru_maxrss * 1024)


def _read_all(*descriptors: int) -> list[bytes]:
    """Read several pipes to their ends at once, so that none fills up and blocks."""
    found = dict.fromkeys(descriptors, b"")
    with selectors.DefaultSelector() as open_ones:
        for descriptor in descriptors:
            open_ones.register(descriptor, selectors.EVENT_READ)
        while open_ones.get_map():
            for key, _ in open_ones.select():
                block = os.read(key.fd, 1 << 16)
                found[key.fd] += block
                if not block:
                    open_ones.unregister(key.fd)
                    os.close(key.fd)
    return list(found.values())


WARM = (
    "accelerate", "bitsandbytes", "matplotlib.figure", "matplotlib.backends.backend_agg", "peft", "pyarrow.parquet",
    "sklearn.metrics", "tiktoken_ext.openai_public", "torch", "transformers", "toolkit.export.merge",
    "toolkit.inference.predict", "toolkit.outcome", "toolkit.tasks", "toolkit.training.trainer",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.distilbert.modeling_distilbert",
)  # fmt: skip


def rehearse() -> None:
    """Train, predict and merge once, so that what the libraries compile and cache at first use is there in each child.

    It takes a run from 3.3 to about a second of processor time.
    """
    from world import SETTINGS, write_world

    from toolkit.cli import main

    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        write_world(Path(folder), SETTINGS[0], steps=1)
        os.chdir(folder)
        try:
            for words in (["train", "recipe.yaml"], ["merge", "run", "-o", "merged"], ["predict", "run", "texts.txt"]):
                assert main(words) == 0, words
        finally:
            os.chdir(here)


def serve() -> None:
    """Import what every run needs, then fork a child a line."""
    for name in WARM:
        __import__(name)
    import torch

    # A pool of threads would not live through a fork.
    torch.set_num_threads(1)
    # Answers alone go to stdout.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        rehearse()
    for line in sys.stdin:
        answer = fork(Job(**json.loads(line)))
        sys.stdout.write(json.dumps(asdict(answer)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
