"""A command does without torch's compiler, and whoever asks for it all the same gets it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from pico import PicoFolder, pico_cache

__all__ = ["pico_cache"]

ROOT = Path(__file__).resolve().parent.parent
COMMAND = """
import sys
sys.argv = ["toolkit", *sys.argv[1:]]
from toolkit.cli import run
try:
    run()
except SystemExit as done:
    assert not done.code, done.code
from toolkit.lean import is_kept_out
print("kept out" if is_kept_out() and "sympy" not in sys.modules else "there")
"""
AFTERWARDS = """
import torch
from torch._dynamo.utils import counters
assert torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(3)).sum() == 6
import torch._dynamo.config
assert torch._dynamo.config is sys.modules["torch._dynamo.config"]
assert counters is torch._dynamo.utils.counters
from torch.distributed.tensor import DTensor, Shard
assert DTensor is torch.distributed.tensor.DTensor and DTensor.__module__.startswith("torch.distributed")
from transformers import masking_utils
with masking_utils.TransformGetItemToIndex():
    pass
print("works")
"""


def run_python(code: str, *words: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def recipe(tmp_path: Path, pico_cache: PicoFolder) -> Path:
    rows = [f"{'ham' if i % 2 else 'spam'},{'see you at dinner' if i % 2 else 'a free prize'} {i}" for i in range(60)]
    (tmp_path / "data.csv").write_text("label,text\n" + "\n".join(rows) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{base: '{pico_cache('gpt2')}', max_length: 16}}\ndata: {{source: '{tmp_path / 'data.csv'}'}}\n"
        f"training: {{max_steps: 2}}\nevaluation: {{baselines: false}}\noutput: {{dir: '{tmp_path / 'run'}'}}\n"
    )
    return path


@pytest.mark.parametrize(
    ("overrides", "merges"),
    [
        (["training.precision=bf16"], True),
        (["quantization={bits: 4}", "training.gradient_checkpointing=true"], True),
        (["quantization={bits: 8}", "training.optimizer=adamw_8bit"], False),
        (["method={name: full}"], False),
        (["method={name: prefix}"], False),
        (["method={name: lora, variant: eva}"], False),
    ],
)
def test_training_and_merging_compile_nothing(recipe: Path, overrides: list[str], merges: bool) -> None:
    assert run_python(COMMAND, "train", str(recipe), *overrides).split("\n")[-2] == "kept out"
    if merges:
        run, merged = str(recipe.parent / "run"), str(recipe.parent / "merged")
        assert run_python(COMMAND, "merge", run, "-o", merged).split("\n")[-2] == "kept out"
        texts = recipe.parent / "texts.txt"
        texts.write_text("a free prize\n")
        assert run_python(COMMAND, "predict", merged, str(texts)).split("\n")[-2] == "kept out"


def test_distilbert_compiles_nothing(recipe: Path, pico_cache: PicoFolder) -> None:
    base = f"model.base={pico_cache('distilbert')}"
    assert run_python(COMMAND, "train", str(recipe), base).split("\n")[-2] == "kept out"


def test_the_compiler_comes_when_it_is_called(recipe: Path) -> None:
    assert run_python(COMMAND + AFTERWARDS, "train", str(recipe)).split("\n")[-3:-1] == ["kept out", "works"]


@pytest.mark.skipif(find_spec("pandas") is None, reason="nothing brings pandas")
def test_baselines_bring_no_pandas_and_leave_it_to_whoever_wants_it(recipe: Path) -> None:
    afterwards = 'print("pandas" in sys.modules)\nimport pandas, sklearn\nprint(pandas.DataFrame({"a": [1]}).a.sum())'
    said = run_python(COMMAND + afterwards, "train", str(recipe), "evaluation.baselines=true").split("\n")
    assert said[-4:-1] == ["kept out", "False", "1"]


def test_a_process_of_several_keeps_everything(recipe: Path) -> None:
    one = "from toolkit.lean import *\nkeep_compiler_out()\nprint(is_kept_out())"
    assert run_python(one) == "True\n"
    assert run_python(one, WORLD_SIZE="2") == "False\n"
    assert run_python("import torch\n" + one) == "False\n"


def test_the_weights_are_those_of_a_process_with_a_compiler(recipe: Path) -> None:
    run_python(COMMAND, "train", str(recipe))
    plain = COMMAND.replace("import sys\n", "import sys, torch\n")
    assert "there" in run_python(plain, "train", str(recipe), f"output.dir={recipe.parent / 'plain'}")
    one, other = (recipe.parent / run / "adapter" / "adapter_model.safetensors" for run in ("run", "plain"))
    assert one.read_bytes() == other.read_bytes()
