"""A run in a process of its own: its memory peak is its own, and its failure ends nobody else's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence

from toolkit.errors import StoppedError
from toolkit.listener import Listener
from toolkit.runtime import LAUNCHER

STOPPED = {128 + number: number for number in (signal.SIGINT, signal.SIGTERM)}
# Lines of a failed run that are kept as its reason: an error has one for each problem.
REASON_LINES = 3


def train_apart(recipe: str, overrides: Sequence[str], *, name: str, listener: Listener) -> str | None:
    """Run ``toolkit train`` in a process of its own and wait for it.

    Args:
        recipe: The YAML file.
        overrides: ``dotted.path=value`` each.
        name: What the run's lines are marked with.
        listener: Hears what the run says.

    Returns:
        None, or why the run failed.

    Raises:
        StoppedError: If a signal stopped the run; it saved a checkpoint first.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "toolkit", "train", recipe, *overrides],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, LAUNCHER: str(os.getpid())},
        # Ctrl-C reaches this process alone, which passes it on once.
        start_new_session=True,
    )
    said: deque[str] = deque(maxlen=REASON_LINES)
    with child:
        assert child.stderr is not None
        try:
            for line in child.stderr:
                said.append(line.rstrip())
                listener.say(f"{name}: {line.rstrip()}")
            code = child.wait()
        except BaseException:
            child.terminate()
            child.communicate()
            raise
    if code in STOPPED:
        raise StoppedError(f"{name} was stopped; the same command goes on", signal_number=STOPPED[code])
    if code < 0:
        return f"killed by signal {-code}"
    return None if code == 0 else _reason(said, code)


def _reason(said: Sequence[str], code: int) -> str:
    """Return the error lines at the end of what a run said."""
    # Input errors alone may be several lines, and each begins with a place; the others end with one.
    lines = [line for line in said if line] if code == 2 else [line for line in said if line][-1:]
    return f"exit code {code}: " + " | ".join(lines or ["it said nothing"])
