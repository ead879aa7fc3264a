"""How often do the promises hold? Tries all of them, and the peer on the same cases; writes docs/reliability.md.

python benchmarks/reliability.py [--only P1 P4 ...] [--share 1.0] [--seed 1]

The cases are those of tests/robustness, in their full number or a share of it. Each section is written as soon as it is
done; sections that are left out keep their figures of an earlier run. All of it is some 40 minutes of processor time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "robustness")]

import torch  # noqa: E402
from damage import (  # noqa: E402
    ALL,
    changed_runs,
    damaged_best,
    damaged_checkpoints,
    forked_races,
    full_disks,
    full_merges,
    loaded_damage,
    races,
)  # fmt: skip
from forked import ROOT, Server  # noqa: E402
from fuzz import TARGETS, fuzzed, write_targets  # noqa: E402
from injections import PLACES, diverged, out_of_memory  # noqa: E402
from kills import (  # noqa: E402
    early_signals,
    injected_kills,
    injected_signals,
    killed_merges,
    launcher_signal,
    random_kills,
    timed_kills,
)
from merging import altered_adapters, forced, merges, wrong_bases  # noqa: E402
from reliability_peer import peer_adapters, peer_bases, peer_damage, peer_divergence, peer_kills  # noqa: E402
from world import SETTINGS, Trial, failures  # noqa: E402

from toolkit.runtime import environment  # noqa: E402

RESULT = HERE / "results" / "reliability.json"
PAGE = HERE.parent / "docs" / "reliability.md"
Section = Callable[["Soak"], list[Trial]]


class Soak:
    """What the sections share: the warm process, a folder, and how much to try."""

    def __init__(self, server: Server, folder: pathlib.Path, *, share: float, seed: int) -> None:
        self.server, self._folder, self.share, self.seed = server, folder, share, seed
        self._made = 0
        self.keep: Callable[[list[Trial]], None] = lambda trials: None

    def count(self, number: int) -> int:
        """Return how many of ``number`` cases are tried."""
        return max(1, round(number * self.share))

    def every(self, step: int) -> slice:
        """Return every ``step``-th point, or fewer."""
        step = round(step / self.share)
        return slice(1 + self.seed % step, None, step)

    def place(self) -> pathlib.Path:
        """Return a new folder."""
        self._made += 1
        return self._folder / str(self._made)


def kills(soak: Soak) -> list[Trial]:
    """An eighth of 200 under the launcher, whose start alone is eight seconds of processor time."""
    trials: list[Trial] = []
    for setting in SETTINGS:
        trials += timed_kills(soak.server, soak.place(), setting, count=soak.count(22), seed=soak.seed)
        soak.keep(trials)
    for setting in SETTINGS:
        trials += random_kills(soak.server, soak.place(), setting, count=soak.count(3), seed=soak.seed)
        soak.keep(trials)
    return trials


def kill_points(soak: Soak) -> list[Trial]:
    trials = injected_kills(soak.server, soak.place(), SETTINGS[0], points=soak.every(1))
    for setting in SETTINGS[1:4]:
        soak.keep(trials)
        trials += injected_kills(soak.server, soak.place(), setting, points=soak.every(8))
    for setting in SETTINGS[:4]:
        soak.keep(trials)
        trials += killed_merges(soak.server, soak.place(), setting, points=soak.every(1))
    return trials


def stops(soak: Soak) -> list[Trial]:
    chance = random.Random(soak.seed)
    both = (signal.SIGTERM, signal.SIGINT)
    trials = []
    for setting in SETTINGS[:3]:
        cases = [(chance.random(), number, n) for number in both for n in (1, 2) for _ in range(soak.count(4))]
        trials += injected_signals(soak.server, soak.place(), setting, cases=cases)
    early = [(chance.uniform(0.1, 5), number) for number in both for _ in range(soak.count(5))]
    trials += early_signals(soak.place(), SETTINGS[0], cases=early)
    return trials + [launcher_signal(soak.place(), SETTINGS[number], both[0]) for number in (0, 2)]


def damage(soak: Soak) -> list[Trial]:
    trials = loaded_damage(soak.server, soak.place(), SETTINGS[0], count=soak.count(2000), seed=soak.seed)
    for setting in (SETTINGS[0], SETTINGS[2]):
        kinds = random.Random(soak.seed).sample(ALL, soak.count(len(ALL)))
        trials += damaged_checkpoints(soak.server, soak.place(), setting, kinds=kinds, seed=soak.seed)
    return [*trials, *(damaged_best(soak.server, soak.place(), setting) for setting in SETTINGS[:4])]


def disks(soak: Soak) -> list[Trial]:
    def shares(number: int) -> list[float]:
        return [0.0, 0.01, *(step / soak.count(number) for step in range(1, soak.count(number)))]

    return [
        *full_disks(soak.server, soak.place(), SETTINGS[2], shares=shares(20)),
        *full_merges(soak.server, soak.place(), SETTINGS[0], shares=shares(10)),
    ]


def refused_merges(soak: Soak) -> list[Trial]:
    return [
        *altered_adapters(soak.server, soak.place()),
        *wrong_bases(soak.server, soak.place()),
        forced(soak.server, soak.place()),
    ]


def parsers(soak: Soak) -> list[Trial]:
    world = soak.place()
    world.mkdir()
    write_targets(world)
    return [trial for name in TARGETS for trial in fuzzed(world, name, count=soak.count(1000), seed=soak.seed)]


def writers(soak: Soak) -> list[Trial]:
    return [
        *forked_races(soak.server, soak.place(), SETTINGS[0], count=3 + soak.count(17), seed=soak.seed),
        *races(soak.place(), SETTINGS[0], count=soak.count(5)),
    ]


# Promise, what was tried, ours, the peer's.
SECTIONS: dict[str, tuple[str, Section, Section | None]] = {
    "P1": (
        "SIGKILL at random moments, an eighth of the process group under `accelerate launch` and half of those inside "
        "saves; the same command resumes and ends bit-equal",
        kills,
        lambda soak: peer_kills(soak.server, soak.place(), count=soak.count(20), seed=soak.seed),
    ),
    "P2": ("SIGKILL before a write, flush, rename or deletion; resumed, bit-equal", kill_points, None),
    "P3": ("SIGTERM and SIGINT, once and twice, anywhere, and to the launcher alone", stops, None),
    "P4": (
        "a checkpoint's file deleted, emptied, cut, flipped, zeroed, or another's",
        damage,
        lambda soak: peer_damage(soak.server, soak.place(), seed=soak.seed),
    ),
    "P5": ("the disk is full while training or merging", disks, None),
    "P6": (
        "a merge, or a prediction, with an altered adapter or another base",
        refused_merges,
        lambda soak: [*peer_adapters(soak.server, soak.place()), *peer_bases(soak.server, soak.place())],
    ),
    "P7": (
        "a merge gives the live adapter's probabilities, for 2 families in 3 storages",
        lambda soak: merges(soak.server, soak.place()),
        None,
    ),
    "P11": ("changed bytes into a parser: the project's errors only, 1 s, 200 MB", parsers, None),
    "P12": (
        "NaN or infinity in a loss, gradient, weight, moment, rate, state: exit 3, finite checkpoints",
        lambda soak: diverged(soak.server, soak.place(), places=list(PLACES)),
        lambda soak: peer_divergence(soak.server, soak.place()),
    ),
    "P13": ("two writers start at once", writers, None),
    "P14": (
        "a run goes on with another recipe, data or base",
        lambda soak: [trial for one in SETTINGS[:2] for trial in changed_runs(soak.server, soak.place() / "w", one)],
        None,
    ),
    "P17": (
        "the address space ends in the middle of a run",
        lambda soak: [out_of_memory(soak.server, soak.place(), SETTINGS[number]) for number in (3, 7)],
        None,
    ),
}
HEAD = """# Reliability

Made by `make soak` (`benchmarks/reliability.py`); figures, seeds and failed cases stand in
`benchmarks/results/reliability.json`. The default test suite tries a part of every row. The peer is the Trainer of
transformers with peft, on the same kind of model and of case; "-" where it makes no such promise.

{machine}

| promise | cases | tried | failed | peer: tried | peer: failed | share of all cases | seconds | seed |
|---|---|---|---|---|---|---|---|---|
"""
FOOT = """
What counts as the peer's failure: after a kill, a run that does not end with the weights of the undisturbed one when it
is started again with `resume_from_checkpoint` (its 20 kills all fall between the first save and the end, nearly all of
them inside a save, whose half-written folder then stops it; of ours half do); with a damaged checkpoint, a run that
ends with other weights, or does not go on although an older checkpoint is whole; an altered adapter or another base
that is merged without an error; a diverged training that ends as a success.

The rows P8, P9, P10, P15 and P16 are tests of the default suite alone (tests/robustness/test_no_pickle.py,
tests/robustness/test_bad_inputs.py, tests/test_finetune.py, tests/inference/test_predict.py,
tests/data/test_readers.py): they try all their cases there.
"""


def figures(trials: list[Trial]) -> dict[str, Any]:
    return {"tried": len(trials), "failed": len(failures(trials)), "failures": failures(trials)[:50]}


def run_section(name: str, soak: Soak) -> None:
    """Try one promise, and the peer on it; what the longest ones have tried so far is kept on the way."""
    _, ours, peer = SECTIONS[name]
    started = time.monotonic()
    facts = {"seed": soak.seed, "share": soak.share, "date": datetime.date.today().isoformat()}

    def keep(trials: list[Trial]) -> dict[str, Any]:
        found = {"toolkit": figures(trials), "seconds": round(time.monotonic() - started), **facts}
        write_result(name, found)
        return found

    soak.keep = keep
    found = keep(ours(soak))
    if peer is not None:
        write_result(name, {**found, "peer": figures(peer(soak))})


def write_result(name: str, found: dict[str, Any]) -> None:
    # Read anew: another process may have added its sections.
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"promises": {}}
    result |= {"machine": environment(torch.device("cpu")), "date": found["date"]}
    result["promises"][name] = found
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    write_page(result)
    told = {who: (found[who]["failed"], found[who]["tried"]) for who in ("toolkit", "peer") if who in found}
    print(name, "failed, tried:", told, f"{found['seconds']} s", flush=True)


def write_page(result: dict[str, Any]) -> None:
    machine = result["machine"]
    line = (
        f"Machine: {machine['cpu']}, {os.cpu_count()} cores shared with other work, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, peft {machine['peft']}, {result['date']}."
    )
    rows = []
    for name, (what, _, _) in SECTIONS.items():
        if name in result["promises"]:
            found = result["promises"][name]
            peer = found.get("peer")
            theirs = f"{peer['tried']} | {peer['failed']}" if peer else "- | -"
            ours = found["toolkit"]
            rows.append(
                f"| {name} | {what} | {ours['tried']:,} | **{ours['failed']}** | {theirs} | "
                f"{found['share']:g} | {found['seconds']:,} | {found['seed']} |"
            )
    PAGE.write_text(HEAD.format(machine=line) + "\n".join(rows) + "\n" + FOOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--share", type=float, default=1.0, help="of the cases that are drawn at random")
    parser.add_argument("--seed", type=int, default=1)
    words = parser.parse_args()
    paths = os.pathsep.join(map(str, (ROOT, TESTS, HERE)))
    with tempfile.TemporaryDirectory() as folder, Server(TOOLKIT_CACHE=f"{folder}/cache", PYTHONPATH=paths) as server:
        soak = Soak(server, pathlib.Path(folder), share=words.share, seed=words.seed)
        for name in words.only:
            run_section(name, soak)


if __name__ == "__main__":
    main()
