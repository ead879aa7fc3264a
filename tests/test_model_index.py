"""What transformers' models export is found once, and is then what transformers itself would find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORT = """
import sys
from toolkit.model_index import remember_models
if sys.argv[1] == "remembered":
    remember_models()
    remember_models()
opened = set()
sys.addaudithook(lambda event, args: event == "open" and opened.add(str(args[0])))
import transformers, transformers.models
from transformers.utils.import_utils import define_import_structure
from transformers import BertForSequenceClassification, GPT2Config, pipeline
models = transformers.models.__path__[0]
found = [define_import_structure(models, prefix="models"), define_import_structure(models + "/__init__.py")]
print([sorted((sorted(k), sorted((m, sorted(n)) for m, n in v.items())) for k, v in one.items()) for one in found])
print(models + "/zamba/modeling_zamba.py" in opened)
"""


def look(how: str, cache: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOOLKIT_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, how], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("damage", ["", "{", '{"pairs": 3}', '{"pairs": [[3, 4]]}', "\xff"])
def test_the_second_import_reads_no_model_and_finds_the_same(tmp_path: Path, damage: str) -> None:
    plain, read = look("plain", tmp_path)
    assert read == "True"
    assert not list(tmp_path.iterdir())
    assert look("remembered", tmp_path) == [plain, "True"]
    [kept] = (tmp_path / "models").iterdir()
    if damage:
        kept.write_bytes(damage.encode("latin-1"))
        assert look("remembered", tmp_path) == [plain, "True"]
    assert look("remembered", tmp_path) == [plain, "False"]


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("no folder")
    assert look("remembered", tmp_path)[1] == "True"
