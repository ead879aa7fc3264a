"""P1, P2, P3: runs killed and stopped for real, started again by the same command, compared with an untouched one."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from forked import ROOT, Server
from world import Setting, Trial, difference, problems, strays, write_world

from toolkit.training.checkpoint import load_checkpoint

TRAIN = ("train", "recipe.yaml")
LAUNCHER = (
    sys.executable, "-m", "accelerate.commands.launch",
    "--config_file", str(ROOT / "recipes" / "accelerate" / "cpu.yaml"),
    str(ROOT / "scripts" / "train.py"), "recipe.yaml",
)  # fmt: skip
# A launch that takes longer than this hangs.
PATIENCE = 240


def half_checkpoints(run: Path) -> str:
    """Return which checkpoint of a killed run is not whole."""
    for folder in run.glob("checkpoints/step-*"):
        try:
            load_checkpoint(folder)
        except ValueError as error:
            return f"{folder.name}: {error}"
    return ""


def injected_kills(server: Server, world: Path, setting: Setting, *, points: slice) -> list[Trial]:
    """Kill a run before each of its changes on disk (files opened, flushed, renamed, deleted), and start it again."""
    write_world(world, setting)
    plain = server.run(*TRAIN, "output.dir=plain", cwd=world, watch=world / "plain")
    assert plain.code == 0, plain.output
    trials = []
    for at in range(len(plain.events) + 1)[points]:
        if not at:
            continue
        run = world / f"killed-{at}"
        killed = server.run(*TRAIN, f"output.dir={run.name}", cwd=world, watch=run, at=at, signals=[signal.SIGKILL])
        case = f"{setting.name}: SIGKILL before event {at}, {plain.events[at - 1]}"
        failure = "" if killed.code == -signal.SIGKILL else f"was not killed: {killed.code} {killed.output[-300:]}"
        failure = failure or half_checkpoints(run)
        again = server.run(*TRAIN, f"output.dir={run.name}", cwd=world)
        failure = failure or ("" if again.code == 0 else f"exit {again.code}: {again.output[-500:]}")
        failure = failure or difference(world / "plain", run, artifact=setting.artifact) or strays(run)
        trials.append(Trial("P2", case, failure))
    return trials


def killed_merges(server: Server, world: Path, setting: Setting, *, points: slice) -> list[Trial]:
    """Kill a merge before each of its changes on disk, and give the same command again."""
    write_world(world, setting)
    assert server.run(*TRAIN, cwd=world).code == 0
    plain = server.run("merge", "run", "-o", "out/plain", cwd=world, watch=world)
    assert plain.code == 0, plain.output
    trials = []
    for at in range(1, len(plain.events) + 1)[points]:
        command = ("merge", "run", "-o", f"out/killed-{at}")
        killed = server.run(*command, cwd=world, watch=world, at=at, signals=[signal.SIGKILL])
        whole = (world / "out" / f"killed-{at}").exists()
        again = server.run(*command, cwd=world)
        failure = "" if killed.code == -signal.SIGKILL else f"was not killed: {killed.code} {killed.output[-300:]}"
        # Killed behind the rename it is there, and the command says so.
        failure = failure or ("" if again.code == (2 if whole else 0) else f"exit {again.code}: {again.output[-500:]}")
        if not failure and _files(world / "out" / f"killed-{at}") != _files(world / "out" / "plain"):
            failure = "differs from a merge that was not killed"
        if left := [path.name for path in (world / "out").glob(f".killed-{at}-*")]:
            failure = failure or f"left {left}"
        case = f"{setting.name}: SIGKILL in a merge before event {at}, {plain.events[at - 1]}"
        trials.append(Trial("P2", case, failure))
    return trials


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def injected_signals(
    server: Server, world: Path, setting: Setting, *, cases: list[tuple[float, int, int]]
) -> list[Trial]:
    """Send a signal, or two, at a place in the run given as a share of its changes on disk."""
    write_world(world, setting)
    plain = server.run(*TRAIN, "output.dir=plain", cwd=world, watch=world / "plain")
    assert plain.code == 0, plain.output
    trials = []
    for number, (share, first, count) in enumerate(cases):
        at = 1 + int(share * (len(plain.events) - 1))
        run, sent = world / f"stopped-{number}", [first] * count
        stopped = server.run(*TRAIN, f"output.dir={run.name}", cwd=world, watch=run, at=at, signals=sent)
        again = server.run(*TRAIN, f"output.dir={run.name}", cwd=world)
        name = signal.Signals(first).name
        failure = _stopped_well(stopped.code, stopped.output, first) or half_checkpoints(run)
        failure = failure or ("" if again.code == 0 else f"exit {again.code}: {again.output[-500:]}")
        failure = failure or difference(world / "plain", run, artifact=setting.artifact) or strays(run)
        trials.append(
            Trial("P3", f"{setting.name}: {count} x {name} before event {at}, {plain.events[at - 1]}", failure)
        )
    return trials


def early_signals(world: Path, setting: Setting, *, cases: Sequence[tuple[float, int]]) -> list[Trial]:
    """Send a signal some seconds after the start of the interpreter, while libraries are imported and files read."""
    write_world(world, setting)
    trials = []
    for delay, number in cases:
        command = [sys.executable, "-m", "toolkit", *TRAIN, f"output.dir=early-{delay}-{number}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, cwd=world, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        time.sleep(delay)
        process.send_signal(number)
        told = process.communicate(timeout=PATIENCE)[1].decode()
        # Before the command line has begun, the signal itself ends the process; a shell says 128 and its number, too.
        failure = "" if process.returncode == -number else _stopped_well(process.returncode, told, number)
        case = f"{setting.name}: {signal.Signals(number).name} {delay} s after the start"
        trials.append(Trial("P3", case, failure or strays(world / f"early-{delay}-{number}")))
    return trials


def _stopped_well(code: int, output: str, number: int) -> str:
    if code == 0:
        return ""  # It came with the last file; there was nothing left to stop.
    if code != 128 + number:
        return f"exit {code}: {output[-500:]}"
    said = problems(output)
    known = ("terminated", "interrupted", f"stopped by {signal.Signals(number).name} after step")
    return "" if len(said) == 1 and said[0].startswith(known) else f"said {said}"


@contextlib.contextmanager
def launched(world: Path, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start the run under ``accelerate launch``, in a process group of its own that is gone afterwards."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
    }
    process = subprocess.Popen(
        [*LAUNCHER, *overrides], cwd=world, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _await(process: subprocess.Popen[bytes], run: Path, *, inside_save: bool, chance: random.Random) -> bool:
    """Wait for training to go on and then for a random moment, or for a save to be under way; False if it ended."""
    begun, deadline = _size(run / "metrics.jsonl"), time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        # A resumed run first cuts its log to the checkpoint, which may move its size either way.
        if _size(run / "metrics.jsonl") != begun and not inside_save:
            time.sleep(chance.random() * 0.5)
            return process.poll() is None
        if inside_save and chance.random() < 0.5 and any(_staged(run)):
            return True
        time.sleep(0 if inside_save else 0.005)
    return False


def _staged(run: Path) -> Iterator[str]:
    folder = run / "checkpoints"
    return (name for name in (os.listdir(folder) if folder.is_dir() else ()) if name.startswith(".staging-"))


def random_kills(server: Server, world: Path, setting: Setting, *, count: int, seed: int) -> list[Trial]:
    """SIGKILL the whole process group of ``accelerate launch`` at random moments, every second one inside a save."""
    write_world(world, setting, steps=60, save_every=3)
    plain = server.run(*TRAIN, "output.dir=plain", cwd=world)
    assert plain.code == 0, plain.output
    chance, kills, number, trials = random.Random(seed), 0, 0, []
    while kills < count:
        run = world / f"killed-{number}"
        before, inside = kills, 0
        # Five kills or so in one run, then it may end.
        while kills < min(count, before + 5) and not (run / "result.json").exists():
            with launched(world, f"output.dir={run.name}") as process:
                if _await(process, run, inside_save=kills % 2 == 0, chance=chance):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    kills += 1
                    inside += any(_staged(run))
        failure = half_checkpoints(run)
        with launched(world, f"output.dir={run.name}") as process:
            output = process.communicate(timeout=PATIENCE)[0].decode()
            failure = failure or ("" if process.returncode == 0 else output[-500:])
        failure = failure or difference(world / "plain", run, artifact=setting.artifact) or strays(run)
        case = f"{setting.name}: {kills - before} SIGKILLs under accelerate launch, {inside} inside a save, seed {seed}"
        trials += [Trial("P1", case, failure)] * (kills - before)
        number += 1
    return trials


def timed_kills(server: Server, world: Path, setting: Setting, *, count: int, seed: int) -> list[Trial]:
    """SIGKILL at random moments, up to five in one run: cheaper than a launch, so there can be many."""
    write_world(world, setting, steps=30, save_every=3)
    plain = server.run(*TRAIN, "output.dir=plain", cwd=world)
    assert plain.code == 0, plain.output
    chance, kills, number, trials = random.Random(seed), 0, 0, []
    while kills < count:
        run, before = world / f"timed-{number}", kills
        while kills < min(count, before + 5) and not (run / "result.json").exists():
            # On a machine that others use, a moment may fall after the run's end; then the next run has its chance.
            after = chance.uniform(0.02, plain.seconds)
            killed = server.run(*TRAIN, f"output.dir={run.name}", cwd=world, kill_after=after)
            kills += killed.code == -signal.SIGKILL
        failure = half_checkpoints(run)
        again = server.run(*TRAIN, f"output.dir={run.name}", cwd=world)
        failure = failure or ("" if again.code == 0 else again.output[-500:])
        failure = failure or difference(world / "plain", run, artifact=setting.artifact) or strays(run)
        case = f"{setting.name}: {kills - before} SIGKILLs at random moments, seed {seed}"
        trials += [Trial("P1", case, failure)] * (kills - before)
        number += 1
    return trials


def launcher_signal(world: Path, setting: Setting, number: int) -> Trial:
    """Send a signal to ``accelerate launch`` alone: its child must save, end and leave no orphan."""
    write_world(world, setting, steps=2000, save_every=1000)
    run = world / "signalled"
    failure = ""
    with launched(world, f"output.dir={run.name}") as process:
        _await(process, run, inside_save=False, chance=random.Random(0))
        group = process.pid
        process.send_signal(number)
        output = process.communicate(timeout=PATIENCE)[0].decode()
        deadline = time.monotonic() + 60
        while _alive(group) and time.monotonic() < deadline:
            time.sleep(0.05)
        if _alive(group):
            failure = "an orphan is left"
    saved = list(run.glob("checkpoints/step-*"))
    if not failure and len(saved) != 1:
        failure = f"{len(saved)} checkpoints: {output[-500:]}"
    case = f"{setting.name}: {signal.Signals(number).name} to the launcher alone"
    return Trial("P3", case, failure or half_checkpoints(run))


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
