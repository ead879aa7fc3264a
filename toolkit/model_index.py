"""Remembers what the files of transformers' models export, which ``import transformers`` would find out anew, twice.

It reads the source of every model there is: 2,544 files, 50 MB, a third of the time until a model can be built, and
many seconds where the disk has not read them before. What an installed version exports never changes.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import pathlib
import sys
import tempfile
from types import ModuleType
from typing import Any

from toolkit.cache import cache_folder

READER = "transformers.utils.import_utils"
READS = "create_import_structure_from_path"


def remember_models() -> None:
    """Let the next ``import transformers`` take from a file of the cache what its models export, or leave it there."""
    if READER not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the module that reads the models, and goes."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != READER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            run = spec.loader.exec_module

            def run_and_remember(module: ModuleType) -> None:
                run(module)
                _remember(module)

            spec.loader.exec_module = run_and_remember  # type: ignore[method-assign]
        return spec


def _remember(module: ModuleType) -> None:
    """Make transformers' function look into the cache where it is asked for all models."""
    read = getattr(module, READS, None)
    version = getattr(sys.modules["transformers"], "__version__", None)
    models = pathlib.Path(str(module.__file__)).parents[1] / "models"
    # Somebody's own checkout may change from one day to the next.
    if read is None or version is None or not {"site-packages", "dist-packages"} & set(models.parts):
        return

    def read_or_recall(path: str) -> Any:
        if pathlib.Path(path) not in (models, models / "__init__.py"):
            return read(path)
        kept = cache_folder() / "models" / f"transformers-{version}-{models.stat().st_mtime_ns}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return _decode(json.loads(kept.read_bytes()))
        exports = read(path)
        with contextlib.suppress(OSError):
            _keep(kept, json.dumps(_encode(exports)))
        return exports

    setattr(module, READS, read_or_recall)


def _keep(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(staged, path)


def _encode(exports: Any) -> Any:
    """Return nested exports as JSON has them: keys are names or sets of libraries, and lead to sets of names."""
    if not isinstance(exports, dict):
        return sorted(exports)
    pairs = [[sorted(key) if isinstance(key, frozenset) else key, _encode(value)] for key, value in exports.items()]
    return {"pairs": pairs}


def _decode(found: Any) -> Any:
    if not isinstance(found, dict):
        return set(found)
    return {frozenset(key) if isinstance(key, list) else key: _decode(value) for key, value in found["pairs"]}
