"""P4, P5, P13, P14: damaged checkpoints, full disks, two writers, and runs that are not what they were."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from forked import ROOT, Answer, Server
from world import Setting, Trial, copy, difference, newest, problems, strays, write_world

from toolkit.training.checkpoint import load_checkpoint

TRAIN = ("train", "recipe.yaml")
FILES = ("trainable.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json")
REFUSALS = ("is in use by process", "has just finished")
Damage = Callable[[Path, random.Random], None]


def _flip(count: int) -> Damage:
    def damage(path: Path, chance: random.Random) -> None:
        raw = bytearray(path.read_bytes())
        for position in chance.sample(range(8 * len(raw)), count):
            raw[position // 8] ^= 1 << position % 8
        path.write_bytes(raw)

    return damage


def _zeros(path: Path, chance: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    start = chance.randrange(len(raw) // 2)
    raw[start : start + 512] = bytes(len(raw[start : start + 512]))
    path.write_bytes(raw)


def _from_another(path: Path, chance: random.Random) -> None:
    others = [folder for folder in path.parent.parent.glob("step-*") if folder != path.parent]
    shutil.copyfile(chance.choice(others) / path.name, path)


DAMAGES: dict[str, Damage] = {
    "deleted": lambda path, chance: path.unlink(),
    "empty": lambda path, chance: path.write_bytes(b"") and None,
    "cut to half": lambda path, chance: os.truncate(path, path.stat().st_size // 2),
    "one bit flipped": _flip(1),
    "nine bits flipped": _flip(9),
    "512 zeros": _zeros,
    "all zeros": lambda path, chance: path.write_bytes(bytes(path.stat().st_size)) and None,
    "another checkpoint's": _from_another,
    "a byte longer": lambda path, chance: path.write_bytes(path.read_bytes() + b"\0") and None,
}


def unfinished(server: Server, world: Path, setting: Setting) -> Path:
    """Train to the end, and return a copy of the run as a kill just before its end leaves it."""
    write_world(world, setting)
    plain = server.run(*TRAIN, "output.dir=plain", "output.keep=4", cwd=world)
    assert plain.code == 0, plain.output
    return copy(world / "plain", world / "cut", without=["result.json", setting.artifact])


ALL = tuple((file, kind) for file in FILES for kind in DAMAGES)


def damaged_checkpoints(
    server: Server, world: Path, setting: Setting, *, kinds: Sequence[tuple[str, str]] = ALL, seed: int
) -> list[Trial]:
    """Damage one file of the newest checkpoint, each in each way: it must be skipped, and an older one serve."""
    cut, chance, trials = unfinished(server, world, setting), random.Random(seed), []
    for file, kind in kinds:
        run = copy(cut, world / "damaged")
        last = newest(run)
        before = (last / file).read_bytes()
        DAMAGES[kind](last / file, chance)
        if (last / file).exists() and (last / file).read_bytes() == before:
            continue  # Zeros over zeros.
        trials.append(Trial("P4", f"{setting.name}: {file} {kind}", _skipped(server, world, run, last, setting)))
    return trials


def _skipped(server: Server, world: Path, run: Path, last: Path, setting: Setting) -> str:
    again = server.run(*TRAIN, f"output.dir={run.name}", "output.keep=4", cwd=world)
    if again.code != 0:
        return f"exit {again.code}: {again.output[-300:]}"
    if f"warning: checkpoint {last.name} is skipped: " not in again.output:
        return "was used, or skipped without a word"
    return difference(world / "plain", run, artifact=setting.artifact) or strays(run)


def loaded_damage(server: Server, world: Path, setting: Setting, *, count: int, seed: int) -> list[Trial]:
    """Damage any file of any checkpoint at random and load it in this process: an error with its reason, or nothing."""
    cut, chance, trials = unfinished(server, world, setting), random.Random(seed), []
    folders = sorted(cut.glob("checkpoints/step-*"))
    while len(trials) < count:
        folder, file, kind = chance.choice(folders), chance.choice(FILES), chance.choice(list(DAMAGES))
        whole = (folder / file).read_bytes()
        DAMAGES[kind](folder / file, chance)
        changed = not (folder / file).exists() or (folder / file).read_bytes() != whole
        if changed:
            trials.append(Trial("P4", f"{setting.name}: {folder.name} {file} {kind}", _loads(folder)))
        (folder / file).write_bytes(whole)
    return trials


def _loads(folder: Path) -> str:
    try:
        load_checkpoint(folder)
    except ValueError as reason:
        return "" if str(reason) else "no reason given"
    return "was loaded without a word"


def damaged_best(server: Server, world: Path, setting: Setting) -> Trial:
    """The best checkpoint is older than the newest, and is damaged: the run must not end with other weights."""
    cut = unfinished(server, world, setting)
    shutil.rmtree(newest(cut))
    progress = json.loads((newest(cut) / "state.json").read_text())["progress"]
    assert progress["best_step"] < progress["step"]
    best = cut / "checkpoints" / f"step-{progress['best_step']}"
    _flip(1)(best / "trainable.safetensors", random.Random(0))
    again = server.run(*TRAIN, f"output.dir={cut.name}", "output.keep=4", cwd=world)
    failure = "" if again.code == 0 else f"exit {again.code}: {again.output[-300:]}"
    failure = failure or difference(world / "plain", cut, artifact=setting.artifact)
    return Trial("P4", f"{setting.name}: the best checkpoint damaged", failure)


def full_disks(server: Server, world: Path, setting: Setting, *, shares: list[float]) -> list[Trial]:
    """Limit the size of a file to a share of the largest one that the run writes: one line, and resume works."""
    write_world(world, setting)
    plain = server.run(*TRAIN, "output.dir=plain", cwd=world)
    assert plain.code == 0, plain.output
    largest = max(path.stat().st_size for path in (world / "plain").rglob("*") if path.is_file())
    trials = []
    for number, share in enumerate(shares):
        run, limit = world / f"full-{number}", int(share * largest)
        # The limit is met in the middle of a run: the first checkpoint is there already.
        begun = server.run(*TRAIN, f"output.dir={run.name}", cwd=world, watch=run, at=50, signals=[15])
        saved = {folder.name for folder in run.glob("checkpoints/step-*")}
        full = server.run(*TRAIN, f"output.dir={run.name}", cwd=world, file_bytes=limit)
        failure = "" if begun.code == 143 else f"the start ended with {begun.code}: {begun.output[-300:]}"
        failure = failure or _said_full(full) or _whole(run, saved)
        again = server.run(*TRAIN, f"output.dir={run.name}", cwd=world)
        failure = failure or ("" if again.code == 0 else f"exit {again.code}: {again.output[-300:]}")
        failure = failure or difference(world / "plain", run, artifact=setting.artifact) or strays(run)
        trials.append(Trial("P5", f"{setting.name}: files of at most {limit:,} bytes", failure))
    return trials


def full_merges(server: Server, world: Path, setting: Setting, *, shares: list[float]) -> list[Trial]:
    """The same for a merge: nothing is left at the output."""
    write_world(world, setting)
    plain = server.run(*TRAIN, "output.dir=plain", cwd=world)
    assert plain.code == 0, plain.output
    weights = server.run("merge", "plain", "-o", "merged", cwd=world)
    assert weights.code == 0, weights.output
    largest, trials = (world / "merged" / "model.safetensors").stat().st_size, []
    for share in shares:
        limit, before = int(share * largest), sorted(world.iterdir())
        full = server.run("merge", "plain", "-o", "again", cwd=world, file_bytes=limit)
        failure = _said_full(full) or ("" if sorted(world.iterdir()) == before else "something is left")
        trials.append(Trial("P5", f"{setting.name}: merged into files of at most {limit:,} bytes", failure))
    return trials


def _said_full(full: Answer) -> str:
    if full.code == 0:
        return "the limit was not met"
    said = problems(full.output)
    if full.code != 2 or len(said) != 1:
        return f"exit {full.code}: {full.output[-500:]}"
    return "" if "bytes free" in said[0] and "bytes needed" in said[0] else said[0]


def _whole(run: Path, saved: set[str]) -> str:
    left = {folder.name for folder in run.glob("checkpoints/step-*")}
    # Where the limit was met by the report alone, newer checkpoints stand in the place of rotated ones.
    newest = max((_step(name) for name in left), default=-1)
    if saved - left and newest <= max(map(_step, saved)):
        return f"{', '.join(saved - left)} is gone"
    return "".join(_unsound(run / "checkpoints" / name) for name in left)


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _unsound(folder: Path) -> str:
    try:
        load_checkpoint(folder)
    except ValueError as reason:
        return f"{folder.name}: {reason}"
    return ""


def races(world: Path, setting: Setting, *, count: int) -> list[Trial]:
    """Start the same command twice at once: one trains, the other is refused by name, and the run is whole."""
    write_world(world, setting)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    trials = []
    for number in range(count):
        run = world / f"race-{number}"
        command = [sys.executable, "-m", "toolkit", *TRAIN, f"output.dir={run.name}"]
        pair = [
            subprocess.Popen(command, cwd=world, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for _ in range(2)
        ]
        told = [process.communicate(timeout=400)[1].decode() for process in pair]
        one, other = (Answer(p.returncode, text, [], 0.0) for p, text in zip(pair, told, strict=True))
        failure = _one_refused(one, other) or ("" if (run / "result.json").is_file() else "is not finished")
        trials.append(Trial("P13", f"{setting.name}: two starts, race {number}", failure or strays(run)))
    return trials


def forked_races(server: Server, world: Path, setting: Setting, *, count: int, seed: int) -> list[Trial]:
    """The same at exact places: the second starts, and ends, before a change on disk of the first."""
    write_world(world, setting)
    plain = server.run(*TRAIN, "output.dir=plain", cwd=world, watch=world / "plain")
    assert plain.code == 0, plain.output
    chance, trials = random.Random(seed), []
    # The first few are before the lock is taken.
    for at in [1, 2, 3, *(chance.randrange(4, len(plain.events)) for _ in range(count - 3))]:
        run, told = world / f"race-{at}", world / f"race-{at}.json"
        first = server.run(*TRAIN, f"output.dir={run.name}", cwd=world, watch=run, at=at, twin=told)
        second = Answer(**json.loads(told.read_text()))
        failure = _one_refused(first, second)
        failure = failure or difference(world / "plain", run, artifact=setting.artifact) or strays(run)
        case = f"{setting.name}: a second start before event {at}, {plain.events[at - 1]}"
        trials.append(Trial("P13", case, failure))
    return trials


def _one_refused(first: Answer, second: Answer) -> str:
    for one, other in ((first, second), (second, first)):
        refused = other.code == 2 and any(word in other.output for word in REFUSALS)
        shown = other.code == 0 and "is finished" in other.output
        if one.code == 0 and (refused or shown):
            return ""
    return f"exit codes {first.code} and {second.code}: {first.output[-300:]} {second.output[-300:]}"


CHANGES: dict[str, tuple[str, str]] = {
    "seed": ("training.seed=7", "training.seed"),
    "learning rate": ("training.learning_rate=2e-2", "training.learning_rate"),
    "steps": ("training.max_steps=7", "training.max_steps"),
    "batch size": ("training.batch_size=8", "training.batch_size"),
    "accumulation": ("training.gradient_accumulation_steps=1", "training.gradient_accumulation_steps"),
    "rank": ("method.r=8", "method.r"),
    "dropout of the adapter": ("method.lora_dropout=0.5", "method.lora_dropout"),
    "length": ("model.max_length=16", "model.max_length"),
    "evaluation": ("evaluation.every=1", "evaluation.every"),
    "weight decay": ("training.weight_decay=0.5", "training.weight_decay"),
}
Edit = Callable[[Path], None]


def _edit(name: str, change: Callable[[str], str]) -> Edit:
    def edit(world: Path) -> None:
        path = world / name
        path.write_text(change(path.read_text()))

    return edit


def _base_weights(world: Path) -> None:
    path = world / "base" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def _tokenizer(text: str) -> str:
    table = json.loads(text)
    vocabulary = table["model"]["vocab"]
    one, other = sorted(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    return json.dumps(table)


def _dropout(text: str) -> str:
    config = json.loads(text)
    key = "resid_pdrop" if "resid_pdrop" in config else "dropout"
    return json.dumps(config | {key: 0.3})


EDITS: dict[str, tuple[Edit, str]] = {
    "a text": (_edit("data.csv", lambda text: text.replace("dinner", "supper")), "data.csv|split.json"),
    "a label": (_edit("data.csv", lambda text: text.replace("ham,", "spam,", 1)), "data.csv|split.json"),
    "a row more": (_edit("data.csv", lambda text: text + "ham,one more\n"), "data.csv|split.json"),
    "one bit of the base": (_base_weights, "base"),
    "the tokenizer": (_edit("base/tokenizer.json", _tokenizer), "tokenizer"),
    "the base's dropout": (_edit("base/config.json", _dropout), "config.json"),
}


def changed_runs(server: Server, world: Path, setting: Setting) -> list[Trial]:
    """Change one thing of recipe, data or base: resuming is refused, the field is named and nothing is written."""
    cut = unfinished(server, world, setting)
    trials = []
    for what, (override, field) in CHANGES.items():
        before = _snapshot(cut)
        again = server.run(*TRAIN, "output.dir=cut", "output.keep=4", override, cwd=world)
        trials.append(Trial("P14", f"{setting.name}: another {what}", _refused(again, field, before, _snapshot(cut))))
    for what, (edit, field) in EDITS.items():
        other = copy(world, world.parent / f"{world.name}-changed", without=["plain"])
        edit(other)
        before = _snapshot(other / "cut")
        again = server.run(*TRAIN, "output.dir=cut", "output.keep=4", cwd=other)
        trials.append(Trial("P14", f"{setting.name}: {what}", _refused(again, field, before, _snapshot(other / "cut"))))
    return trials


def _refused(answer: Answer, field: str, before: object, after: object) -> str:
    said = problems(answer.output)
    if answer.code != 2 or not said:
        return f"exit {answer.code}: {answer.output[-300:]}"
    named = any(name in line for line in said for name in field.split("|"))
    return ("" if named else f"{field} is not named: {said}") or ("" if before == after else "something was written")


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"
    }
