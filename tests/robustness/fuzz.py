"""P11: changed bytes into every parser. ``fuzz.py WORLD TARGET COUNT SEED`` prints what went wrong, as JSON.

A case may end in success or in one of the toolkit's errors, within a second and with 200 MB more than before.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import ROOT
from world import Trial

SECONDS, BYTES = 1.0, 200 << 20
CORPUS = Path(__file__).with_name("corpus")
# What parsers stumble over, in the formats that are read here.
WORDS = (
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\r\n", b'"', b'""', b",", b"\t", b"'", b"{",
    b"}", b"[", b"]", b":", b": ", b"- ", b"&a ", b"*a", b"!!python/object:os.system ", b"<<: ", b"? ", b"|", b">",
    b"%", b"@", b"null", b"true", b"NaN", b"Infinity", b"-Infinity", b"-1", b"0", b"1e400", b"9" * 30, b"9" * 5000,
    b"0x10", b"1_0", b"\\ud800", b"\\u0000", b"../", b"/etc/passwd", b"\xe2\x80\xae", b"[" * 3000, b'{"a":' * 3000,
    b"- " * 500, (1 << 63).to_bytes(8, "little"), (1 << 31).to_bytes(4, "little"), b"__class__", b"\x80\x04\x95",
    b"\x1f\x8b",
)  # fmt: skip


def mutate(seed: bytes, chance: random.Random) -> bytes:
    """Return ``seed`` with one to six changes: bytes, words, cuts, repeats, and pieces moved."""
    data = bytearray(seed)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data) + 1)
        to = min(len(data), at + chance.choice((1, 1, 2, 8, 64, 1024)))
        kind = chance.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = chance.randrange(256)
        elif kind == 2:
            data[at:to] = chance.choice(WORDS)
        elif kind == 3:
            data[at:at] = chance.choice(WORDS)
        elif kind == 4:
            del data[at:to]
        elif kind == 5:
            data[at:at] = bytes(data[at:to]) * chance.choice((1, 2, 50))
        else:
            data[at:at] = bytes(data[chance.randrange(len(data) + 1) :][: to - at])
    return bytes(data)


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        file: Its file in the world of ``write_targets``.
        read: Called with the world; reads the file.
    """

    file: str
    read: Callable[[Path], Any]


def _recipe(world: Path) -> Any:
    from toolkit.config.load import load_recipe

    return load_recipe(world / "recipe.yaml")


def _data(name: str) -> Callable[[Path], Any]:
    def read(world: Path) -> Any:
        from toolkit.config.schema import DataSettings
        from toolkit.data.load import load_data

        return load_data(DataSettings(source=str(world / name)))

    return read


def _split(world: Path) -> Any:
    from toolkit.config.schema import DataSettings
    from toolkit.data.load import load_data

    return load_data(DataSettings(source=str(world / "data.csv")), split_file=world / "split.json")


def _model(world: Path) -> Any:
    from toolkit.models.folder import check_model_folder

    return check_model_folder(world / "base", family_types=["distilbert", "gpt2"])


def _tokenizer(world: Path) -> Any:
    from toolkit.data.tokenize import load_tokenizer

    return load_tokenizer(world / "base", kind="bpe").encode(["see you at the station"], max_length=8)


def _manifest(world: Path) -> Any:
    from toolkit.export.artifact import find_artifact

    return find_artifact(world / "run")


def _adapter_config(world: Path) -> Any:
    from toolkit.adapters.check import read_adapter_config
    from toolkit.families import FAMILIES

    return read_adapter_config(world / "run" / "adapter", family=FAMILIES["gpt2"])


def _adapter_tensors(world: Path) -> Any:
    from toolkit.adapters.check import read_adapter_tensors

    return read_adapter_tensors(world / "run" / "adapter")


def _checkpoint(world: Path) -> Any:
    from toolkit.training.checkpoint import newest_valid

    return newest_valid(world / "checkpoints")


def _record(world: Path) -> Any:
    from toolkit.report.run_record import read_run_record

    return read_run_record(world / "run" / "result.json")


TARGETS = {
    "recipe": Target("recipe.yaml", _recipe),
    "csv": Target("data.csv", _data("data.csv")),
    "tsv": Target("data.tsv", _data("data.tsv")),
    "jsonl": Target("data.jsonl", _data("data.jsonl")),
    "npy": Target("data.npy", _data("data.npy")),
    "parquet": Target("data.parquet", _data("data.parquet")),
    "split": Target("split.json", _split),
    "model config": Target("base/config.json", _model),
    "tokenizer.json": Target("base/tokenizer.json", _tokenizer),
    "safetensors header": Target("base/model.safetensors", _model),
    "manifest": Target("run/adapter/manifest.json", _manifest),
    "adapter config": Target("run/adapter/adapter_config.json", _adapter_config),
    "adapter tensors": Target("run/adapter/adapter_model.safetensors", _adapter_tensors),
    "checkpoint manifest": Target("checkpoints/step-2/manifest.json", _checkpoint),
    "result.json": Target("run/result.json", _record),
}


def write_targets(world: Path) -> None:
    """Write a sound file for every parser."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet
    import torch
    from trained import build_run
    from world import SETTINGS, rows, write_world

    from toolkit.report.run_record import FORMAT, RunRecord
    from toolkit.training.checkpoint import save_checkpoint

    write_world(world, SETTINGS[0])
    csv = rows()
    (world / "data.tsv").write_text(csv.replace(",", "\t"))
    records = [dict(zip(("label", "text"), line.split(",", 1), strict=True)) for line in csv.splitlines()[1:]]
    (world / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pa.parquet.write_table(pa.Table.from_pylist(records), world / "data.parquet")
    np.save(world / "data.npy", np.array([[i + 5, i + 6, i % 2] for i in range(40)]))
    _split(world)
    build_run(world / "run", world / "base")
    record = {key: {"x": 1} for key in RunRecord.__required_keys__} | {"format": FORMAT}
    (world / "run" / "result.json").write_text(json.dumps(record))
    for step in (1, 2):
        save_checkpoint(world / "checkpoints", step, tensors={"trainable": {"a": torch.ones(3)}}, state={})


def attempt(target: Target, world: Path) -> str:
    """Read once; return what was wrong, empty if nothing."""
    from toolkit.errors import ToolkitError

    started = time.process_time()
    try:
        target.read(world)
    except ToolkitError as error:
        if len(str(error)) > 100_000:
            return f"a message of {len(str(error))} characters"
    # Any other error is what is looked for.
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} at {last.filename}:{last.lineno}"
    seconds = time.process_time() - started
    return f"{seconds:.1f} s" if seconds > SECONDS else ""


def fuzz(world: Path, name: str, *, count: int, seed: int) -> list[dict[str, str]]:
    """Try the kept cases and ``count`` new ones; return the failures."""
    target, chance, found = TARGETS[name], random.Random(f"{seed} {name}"), []
    file = world / target.file
    sound = file.read_bytes()
    # The first read imports what the parser needs; its memory is not the input's.
    target.read(world)
    kept = sorted((CORPUS / name.replace(" ", "_")).glob("*")) if CORPUS.is_dir() else []
    for case in [*(path.read_bytes() for path in kept), *(mutate(sound, chance) for _ in range(count))]:
        file.write_bytes(case)
        limit_memory(BYTES)
        wrong = attempt(target, world)
        limit_memory(None)
        if wrong:
            found.append({"wrong": wrong, "case": case.hex()})
    file.write_bytes(sound)
    return found


def limit_memory(more: int | None) -> None:
    """Leave ``more`` bytes of address space, or all there is."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft = resource.RLIM_INFINITY if more is None else pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))


def fuzzed(world: Path, name: str, *, count: int, seed: int) -> list[Trial]:
    """Run the fuzzer in a process of its own; one trial per case."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        "TOOLKIT_CACHE": str(world / "cache"),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(world), name, str(count), str(seed)],
        env=environment, capture_output=True, text=True, check=False, timeout=60 + 2 * count,
    )  # fmt: skip
    if done.returncode:
        return [Trial("P11", f"{name}, seed {seed}", f"exit {done.returncode}: {done.stderr[-500:]}")]
    bad = [Trial("P11", f"{name}: {found['case'][:4000]}", found["wrong"]) for found in json.loads(done.stdout)]
    return bad + [Trial("P11", name)] * (count - len(bad))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    words = sys.argv[1:]
    told = fuzz(Path(words[0]), words[1], count=int(words[2]), seed=int(words[3]))
    sys.stdout.write(json.dumps(told))
