"""Goes on where an interrupted run stopped, or refuses to: other data or another base are another run."""

from __future__ import annotations

import pathlib

from toolkit.errors import CheckpointError, Problem
from toolkit.listener import Listener
from toolkit.runtime import process_rank
from toolkit.training.checkpoint import discard, newest_valid
from toolkit.training.trainer import Trainer


def resume_newest(trainer: Trainer, checkpoints: pathlib.Path, listener: Listener) -> None:
    """Go on from the newest valid checkpoint, if there is one.

    Raises:
        CheckpointError: If there are checkpoints and none is valid, or data or base are others than before.
    """
    checkpoint, skipped = newest_valid(checkpoints)
    for name, reason in skipped.items():
        listener.say(f"warning: checkpoint {name} is skipped: {reason}")
    if checkpoint is None:
        if skipped:
            raise CheckpointError(
                Problem(str(checkpoints / name), "", reason, "output.overwrite=true starts anew")
                for name, reason in skipped.items()
            )
        return
    changed = [name for name, value in trainer.inputs.items() if checkpoint.state["inputs"].get(name) != value]
    if changed:
        raise CheckpointError(
            Problem(str(checkpoint.path), name, "is not what this run began with", "the old one, or another output.dir")
            for name in changed
        )
    if process_rank() == 0:
        discard(checkpoints, skipped)
    trainer.resume(checkpoint)
    listener.say(f"resuming after step {checkpoint.step}")
