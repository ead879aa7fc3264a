"""The house keeps its floors, its doors and its public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "toolkit").rglob("*.py"))


def test_floors():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_public_names_are_sorted_lazy_and_there():
    assert toolkit.__all__ == sorted(toolkit.__all__)
    for name in toolkit.__all__:
        assert getattr(toolkit, name) is not None
    assert set(toolkit.__all__) <= set(dir(toolkit))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        toolkit.nothing  # noqa: B018


@pytest.mark.parametrize("first", ["", "import toolkit.finetune, toolkit.cli; "])
def test_what_a_user_imports_can_be_called(first):
    names = ", ".join(toolkit.__all__)
    code = f"{first}from toolkit import {names}; print(all(map(callable, [{names}])))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize(
    "statement",
    [
        "import toolkit",
        "import toolkit.cli",
        "import toolkit.finetune",
        "from toolkit import load_recipe, ToolkitError, Recipe",
        "import toolkit.inference.evaluate",
    ],
)
def test_torch_stays_outside_until_it_is_needed(statement):
    code = (
        f"import sys\n{statement}\nprint([n for n in ('torch', 'transformers', 'peft', 'sklearn') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


DOORS = {
    "ruamel": {"toolkit/config"},
    "peft": {"toolkit/adapters"},
    "bitsandbytes": {"toolkit/models/quantize.py", "toolkit/training/optim.py"},
    "accelerate": {
        "toolkit/runtime.py",
        "toolkit/training",
        "toolkit/tasks",
        "toolkit/memory/prefix.py",
        "toolkit/memory/measure.py",
    },
    "optuna": {"toolkit/experiments/sweep.py"},
    "typer": {"toolkit/cli.py", "toolkit/cli_experiments.py"},
    "rich": {"toolkit/console.py", "toolkit/console_compare.py", "toolkit/console_plan.py"},
    "pickle": set(),
}


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_has_one_door(library):
    users = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if any(name.split(".")[0] == library for name in imports_of(path))
    }
    assert all(any(user.startswith(door) for door in DOORS[library]) for user in users), users


def test_only_the_console_prints():
    for path in MODULES:
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = {"print", "sys.stdout.write", "sys.stderr.write"} & set(calls)
        assert not prints or path.stem.partition("_")[0] in ("cli", "console"), path


def test_no_error_is_swallowed():
    """Whoever catches every error passes it on, at least where it is not the one expected."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            ):
                raises = [inner for inner in ast.walk(node) if isinstance(inner, ast.Raise) and inner.exc is None]
                assert raises, f"{path}:{node.lineno}"


def test_no_room_is_fat():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 320, path


def test_no_drawer_for_everything():
    assert not [path for path in MODULES if path.stem in ("utils", "common", "helpers", "misc")]


def test_every_module_says_what_it_is_for():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_scripts_shadow_no_library():
    libraries = set(sys.stdlib_module_names) | {"evaluate", "datasets", "peft", "accelerate", "transformers", "torch"}
    assert not {path.stem for path in (ROOT / "scripts").glob("*.py")} & libraries
