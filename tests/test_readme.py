"""The README's promises: its tree is the tree, its commands exist, its keys load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from toolkit.config.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tree_names_what_is_there():
    tree = re.search(r"## The house.*?```\n(.*?)```", README, re.DOTALL)
    assert tree
    listed: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in tree[1].splitlines():
        if not (match := re.match(r"( *)([\w.\-/]+)  ", line + "  ")):
            continue
        depth, name = len(match[1]), match[2]
        parents = [(d, n) for d, n in parents if d < depth]
        path = "".join(n for _, n in parents) + name
        listed.append(path)
        if name.endswith("/"):
            parents.append((depth, name))
    assert listed
    for path in listed:
        assert (ROOT / path).exists(), path
    for module in (ROOT / "toolkit").glob("*.py"):
        if module.name not in ("__init__.py", "__main__.py"):
            assert f"toolkit/{module.name}" in listed, module.name
    for room in (ROOT / "toolkit").iterdir():
        if room.is_dir() and room.name != "__pycache__":
            assert f"toolkit/{room.name}/" in listed, room.name


def test_every_file_it_links_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_recipe_it_names_is_valid_with_its_overrides():
    launches = re.findall(
        r"(?:launch (?:--config_file \S+ )?scripts/train\.py|toolkit train) (recipes/\S+)(.*)", README
    )
    assert launches
    import shlex

    for recipe, overrides in launches:
        load_recipe(ROOT / recipe, shlex.split(overrides, comments=True))


@pytest.mark.parametrize("target", ["demo", "test", "lint", "schema", "clean"])
def test_makefile_targets_it_names(target):
    makefile = (ROOT / "Makefile").read_text()
    if f"make {target}" in README:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_two_commands_come_first():
    commands = re.findall(r"^    (make \w+)", README, re.MULTILINE)
    assert commands[:2] == ["make demo", "make test"]


def test_every_subcommand_is_described():
    from typer.main import get_command

    from toolkit.cli import app

    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"toolkit {name}" in README, name
