"""The run folder: one writer, a resolved recipe, and what is already there. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolkit.config.load import dump_recipe, load_recipe
from toolkit.config.schema import Recipe
from toolkit.durable import room_on_disk, write_file_atomically
from toolkit.errors import InputError, OutputError, Problem, RecipeError

# Settings that may differ between a run and its resumption: they change no weight.
FREE = ("output",)
# What the atomic writers of files and folders stage beside their target, by the names that a run holds.
STAGED = (
    "recipe.yaml", "result.json", "metrics.jsonl", "split.json", "report.html", "README.md", "curves.png",
    "confusion.png", "memory.png", "predictions.csv", "adapter", "model",
)  # fmt: skip
# Of a file, and of a folder.
LEFTOVER = re.compile(rf"\.({'|'.join(map(re.escape, STAGED))})(-staged)?-[a-z0-9_]{{8}}")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    Attributes:
        path: ``runs/<name>``.
    """

    path: pathlib.Path

    @property
    def recipe(self) -> pathlib.Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def result(self) -> pathlib.Path:
        """The finished run's record; its presence says that the run is finished."""
        return self.path / "result.json"

    @property
    def metrics(self) -> pathlib.Path:
        """One JSON line per log step and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def predictions(self) -> pathlib.Path:
        """What the run said of every test row."""
        return self.path / "predictions.csv"

    @property
    def split(self) -> pathlib.Path:
        """Row numbers of train, validation and test."""
        return self.path / "split.json"

    @property
    def checkpoints(self) -> pathlib.Path:
        """Folder of ``step-N`` checkpoints."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run's record was written, which is the last thing that a run does."""
        return self.result.is_file()

    def state(self, recipe: Recipe) -> str:
        """Return ``new``, ``unfinished`` or ``finished``, writing nothing.

        Raises:
            OutputError: If the folder cannot hold the run, or holds another one.
        """
        where = str(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(Problem(where, "output.dir", "is a file", "a folder for the run"))
        parent = next(folder for folder in (self.path, *self.path.resolve().parents) if folder.exists())
        if not parent.is_dir():
            raise OutputError(Problem(where, "output.dir", f"{parent} is a file", "a folder for the run"))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(Problem(where, "output.dir", "is not writable", "a folder you may write to"))
        if not self.path.exists() or all(entry.name == ".lock" or _is_leftover(entry) for entry in self.path.iterdir()):
            return "new"
        if not self.recipe.is_file():
            raise OutputError(
                Problem(where, "output.dir", "holds other files and no run", "an empty or new folder for the run")
            )
        if recipe.output.overwrite:
            return "new"
        self._refuse_changes(recipe)
        return "finished" if self.finished else "unfinished"

    def _refuse_changes(self, recipe: Recipe) -> None:
        try:
            before = load_recipe(self.recipe)
        except RecipeError as error:
            raise OutputError(error.problems) from error
        changed = differences(_comparable(before), _comparable(recipe))
        if changed:
            raise OutputError(
                Problem(
                    str(self.path),
                    name,
                    f"was {old!r} when this run began, is {new!r} now",
                    "the old value, another output.dir, or output.overwrite=true",
                )
                for name, (old, new) in changed.items()
            )

    @contextlib.contextmanager
    def claimed(self, recipe: Recipe) -> Iterator[None]:
        """Hold the folder for this process alone, cleared first where the recipe says overwrite.

        A folder that is new, and in which the input is refused before the first step, is removed again.

        Raises:
            OutputError: If it cannot be made, or another process holds it (its pid is named).
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            wrong = f"cannot be made: {error.strerror}"
            raise OutputError(Problem(str(self.path), "output.dir", wrong, "a folder you may write to")) from error
        with _locked(self.path / ".lock", str(self.path)):
            self._sweep()
            if recipe.output.overwrite:
                self._clear()
            new = not self.recipe.exists()
            if not new:
                # Another run may have begun, and even ended, since ``state`` looked.
                self._refuse_changes(recipe)
                if self.finished:
                    wrong, right = "another process has just finished this run", "the same command shows its result"
                    raise OutputError(Problem(str(self.path), "output.dir", wrong, right))
            if new:
                write_file_atomically(self.recipe, dump_recipe(recipe))
            try:
                yield
            except InputError:
                if new and not self.checkpoints.exists() and not self.metrics.exists():
                    self._withdraw(made)
                raise

    def _withdraw(self, made: list[pathlib.Path]) -> None:
        """Take back what a refused start wrote."""
        self._clear()
        if made:
            (self.path / ".lock").unlink()
        for folder in made:
            with contextlib.suppress(OSError):  # Another run may live beside this one by now.
                folder.rmdir()

    def _sweep(self) -> None:
        """Delete what killed writers left half-written."""
        for entry in self.path.iterdir():
            if _is_leftover(entry):
                _remove(entry)

    def _clear(self) -> None:
        # The record goes first and the recipe last: killed in between, the folder is an unfinished run, never a
        # finished one without its model, and never a stranger's.
        others = [entry for entry in self.path.iterdir() if entry not in (self.result, self.recipe)]
        for entry in (self.result, *others, self.recipe):
            if entry.name != ".lock" and entry.exists():
                _remove(entry)


def _is_leftover(entry: pathlib.Path) -> bool:
    """Whether this is a file or folder that was staged and never renamed (``.recipe.yaml-x1y2z3w4``)."""
    return bool(LEFTOVER.fullmatch(entry.name))


def _remove(entry: pathlib.Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _comparable(recipe: Recipe) -> dict[str, Any]:
    data = recipe.model_dump(mode="json")
    return {name: value for name, value in data.items() if name not in FREE}


def differences(before: Any, after: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the dotted names of the fields that differ, with both values."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return {} if before == after else {prefix: (before, after)}
    changed: dict[str, tuple[Any, Any]] = {}
    for name in {**before, **after}:
        dotted = f"{prefix}.{name}" if prefix else name
        changed |= differences(before.get(name), after.get(name), dotted)
    return changed


@contextlib.contextmanager
def _locked(path: pathlib.Path, where: str) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there the folder is not guarded.
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise OutputError(
                Problem(where, "output.dir", f"is in use by process {holder}", "wait for it, or another output.dir")
            ) from None
        with room_on_disk(path.parent, needed=len(pid := str(os.getpid()).encode())):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, pid)
            os.fsync(descriptor)
        yield
    finally:
        os.close(descriptor)
