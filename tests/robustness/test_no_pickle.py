"""P8: nothing is ever unpickled, no code of a model folder runs. P9: no socket offline, no file elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import write_world

PicoFolder = Callable[[str], Path]
AUDITED = Path(__file__).with_name("audited.py")
ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = str(ROOT / "toolkit") + os.sep
# Devices and process settings, which are no files.
DEVICES = ("/dev/", "/proc/self/")
pytestmark = pytest.mark.timeout(900)


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return (Path.write_text, (self.path, "unpickled"))  # type: ignore[return-value]


def lay_bombs(folder: Path, at: Path) -> None:
    """Put pickles beside the base's weights, under every name that a library looks for."""
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(at)))
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(at)!r}).write_text('imported')\n")
    classes = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes}))


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory, pico_cache: PicoFolder) -> tuple[dict[str, Any], Path]:
    """Train, be stopped, resume, merge, predict with the adapter and with the merged model, in one audited process."""
    root = tmp_path_factory.mktemp("audited")
    world, home, temporary = (root / name for name in ("world", "home", "tmp"))
    for folder in (world, home, temporary):
        folder.mkdir()
    write_world(world, pico_cache("gpt2"))
    lay_bombs(world / "base", root / "exploded")
    (world / "texts.txt").write_text("text 3\ntext 4\n")
    train = ["train", "recipe.yaml", "training.max_steps=6", "output.save_every=2", "evaluation.every=3"]
    jobs = [
        {"words": train, "stop_after": "step-2"},
        {"words": train, "stop_after": None},
        {"words": ["merge", "run", "-o", "merged"], "stop_after": None},
        {"words": ["predict", "run", "texts.txt"], "stop_after": None},
        {"words": ["predict", "merged", "texts.txt"], "stop_after": None},
    ]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HF_", "TOOLKIT_"))
    }
    environment |= {
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "TORCHINDUCTOR_CACHE_DIR": str(temporary / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(AUDITED), str(root / "report.json"), json.dumps(jobs)],
        cwd=world,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    heard: dict[str, Any] = json.loads((root / "report.json").read_text())
    assert heard["codes"] == [143, 0, 0, 0, 0], done.stderr
    assert "resuming after step" in done.stderr
    return heard, root


def ours(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events below a call of ours; an import of a library is the library's own work."""
    return [
        event
        for event in events
        if any(name.startswith(PACKAGE) for name in event["stack"])
        and not any("importlib._bootstrap" in name for name in event["stack"])
    ]


def test_p8_nothing_is_unpickled(audit: tuple[dict[str, Any], Path]) -> None:
    heard, root = audit
    assert ours(heard["pickle"]) == []
    assert heard["loads"] == []
    assert not (root / "exploded").exists()


def test_p8_the_hook_hears_a_pickle() -> None:
    """The test above can fail: the same hook hears one class being looked up."""
    code = (
        "import runpy, sys, json, pickle; heard = runpy.run_path(sys.argv[1])['listen']; sys.addaudithook(heard)\n"
        "pickle.loads(pickle.dumps(pickle.PickleError()))\nprint(len(heard.__globals__['heard']['pickle']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(AUDITED)], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 1


def test_p9_no_socket_is_used_offline(audit: tuple[dict[str, Any], Path]) -> None:
    heard, _ = audit
    assert heard["sockets"] == []


def test_p9_nothing_is_written_elsewhere(audit: tuple[dict[str, Any], Path]) -> None:
    heard, root = audit
    allowed = [root / name for name in ("world/run", "world/merged", "world/.merged-", "home", "tmp")]
    assert any("step-2" in path for path in heard["writes"])
    strays = {path for path in heard["writes"] if not path.startswith((*map(str, allowed), *DEVICES))}
    # mkdir(exist_ok=True) of the folder that the output stands in, which exists.
    assert strays <= {str(root / "world")}


def test_p9_nothing_is_read_elsewhere(audit: tuple[dict[str, Any], Path]) -> None:
    """Beside the folders given: the interpreter, the libraries, the system's own files, and the locale."""
    heard, root = audit
    system = ("/usr/", "/lib", "/etc/", "/dev/", "/proc/", "/sys/", "/var/cache/fontconfig")
    libraries = {sys.prefix, sys.base_prefix, *map(str, {Path(p).resolve() for p in sys.path if p})}
    known = (str(root), str(ROOT), *system, *libraries)
    strays = {path for path in heard["reads"] if not path.startswith(known)}
    assert any(path.endswith("model.safetensors") or path.endswith("data.csv") for path in heard["reads"])
    assert strays == set()


def test_p9_the_inputs_are_untouched(audit: tuple[dict[str, Any], Path], pico_cache: PicoFolder) -> None:
    _, root = audit
    base = pico_cache("gpt2")
    for path in base.iterdir():
        assert (root / "world" / "base" / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in (root / "world").iterdir()} == {
        "base", "data.csv", "merged", "recipe.yaml", "run", "texts.txt"
    }  # fmt: skip
