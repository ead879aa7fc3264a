"""A recipe file and command-line overrides to one validated ``Recipe``, and back to YAML."""

from __future__ import annotations

import contextlib
import copy
import io
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from toolkit.config.document import Document, Path, parse_yaml
from toolkit.config.methods import FittedMethod
from toolkit.config.problems import dotted, explain, locate
from toolkit.config.rules import broken_rules
from toolkit.config.schema import Recipe
from toolkit.errors import InputError, Problem, RecipeError, nearest

MAX_BYTES = 1 << 20
DEFAULT_EPOCHS = 5

# Of two settings that exclude each other, the one on the command line wins over the one in the file.
EXCLUSIVE: tuple[tuple[Path, Path], ...] = (
    (("training", "epochs"), ("training", "max_steps")),
    (("data", "source"), ("data", "train")),
)


def load_recipe(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: A YAML file.
        overrides: ``dotted.path=YAML value`` each, applied in order.

    Returns:
        The resolved recipe: every default filled in.

    Raises:
        RecipeError: With every problem found, one line each.
    """
    source = str(path)
    recipe = parse_yaml(read_text(pathlib.Path(path)), source=source)
    if recipe.data is None:
        raise RecipeError(Problem(source, "", "empty file", "a recipe; see recipes/README.md"))
    if not isinstance(recipe.data, dict):
        kind = "a list" if isinstance(recipe.data, list) else "a single value"
        raise RecipeError(Problem(source, "", f"the top level is {kind}", "sections such as model: and data:"))
    documents = apply_overrides(recipe.data, overrides)
    _fill_in(recipe.data, name=pathlib.Path(path).stem)
    return _validate(recipe, documents)


def _validate(recipe: Document, documents: dict[Path, Document]) -> Recipe:
    try:
        checked = Recipe.model_validate(recipe.data)
    except ValidationError as error:
        raise RecipeError(explain(error, documents, recipe)) from None
    broken = broken_rules(checked)
    if broken:
        raise RecipeError(
            Problem(locate(rule.path, documents, recipe), dotted(rule.path), rule.wrong, rule.right) for rule in broken
        )
    if checked.training.epochs is None and checked.training.max_steps is None:
        length = {"max_steps": 1} if isinstance(checked.method, FittedMethod) else {"epochs": DEFAULT_EPOCHS}
        training = checked.training.model_copy(update=length)
        checked = checked.model_copy(update={"training": training})
    return checked


@contextlib.contextmanager
def pointing_into(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Give problems that name a field of a recipe, and no file, the place where that recipe sets the field.

    Args:
        path: The file that ``load_recipe`` read.
        overrides: The overrides it was given.

    Raises:
        InputError: The error of the block, its problems placed.
    """
    try:
        yield
    except InputError as error:
        if all(problem.where for problem in error.problems):
            raise
        recipe = parse_yaml(read_text(pathlib.Path(path)), source=str(path))
        documents = apply_overrides(recipe.data, overrides)
        raise type(error)(
            replace(problem, where=problem.where or locate(tuple(problem.field.split(".")), documents, recipe))
            for problem in error.problems
        ) from error


def read_text(path: pathlib.Path) -> str:
    """Return a recipe file's text.

    Raises:
        RecipeError: If it is missing, a folder, too large, or not clean UTF-8.
    """
    where = str(path)
    if path.is_dir():
        raise RecipeError(Problem(where, "", "is a directory", "the path of a YAML recipe"))
    if not path.exists():
        raise RecipeError(Problem(where, "", "no such file", _similar_file(path)))
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(Problem(where, "", f"cannot be read: {error.strerror}")) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(Problem(where, "", "larger than 1 MiB", "a recipe of a few lines"))
    if b"\0" in raw:
        raise RecipeError(Problem(where, "", f"NUL byte at offset {raw.index(0)}", "plain UTF-8 text"))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(Problem(where, "", f"not UTF-8 at byte {error.start}", "save it as UTF-8")) from error


def _similar_file(path: pathlib.Path) -> str:
    folder = path.parent
    names = [entry.name for entry in folder.glob("*.y*ml")] if folder.is_dir() else []
    return nearest(path.name, names) or "the path of a YAML recipe"


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[Path, Document]:
    """Set each override in ``data``; return which override set which path.

    Raises:
        RecipeError: If an override is not ``dotted.path=YAML value``.
    """
    documents: dict[Path, Document] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        source = f"command line: {override}"
        if not equals or not name.strip():
            raise RecipeError(Problem(source, "", "not an override", "dotted.path=value"))
        path: Path = tuple(name.strip().split("."))
        document = parse_yaml(text, source=source)
        _set(data, path, document.data)
        documents[path] = document
    _settle_exclusive(data, documents)
    return documents


def _set(data: dict[str, Any], path: Path, value: Any) -> None:
    for part in path[:-1]:
        inner = data.get(str(part))
        if not isinstance(inner, dict):
            inner = data[str(part)] = {}
        data = inner
    data[str(path[-1])] = copy.deepcopy(value)


def _settle_exclusive(data: dict[str, Any], documents: dict[Path, Document]) -> None:
    for pair in EXCLUSIVE:
        for winner, loser in (pair, pair[::-1]):
            if winner in documents and documents[winner].data is not None and loser not in documents:
                section = data.get(str(loser[0]))
                if isinstance(section, dict):
                    section.pop(str(loser[1]), None)


def _fill_in(data: dict[str, Any], *, name: str) -> None:
    """Resolve the defaults that depend on other fields or on the file's name."""
    output = data.setdefault("output", {})
    if isinstance(output, dict) and output.get("dir") is None:
        output["dir"] = f"runs/{name}"
    method = data.get("method")
    if isinstance(method, dict):
        method.setdefault("name", "lora")
    if data.get("objective") == "language_modeling":
        data.setdefault("method", {"name": "full"})
    rows = data.get("data")
    numbers = isinstance(rows, dict) and rows.get("problem_type") == "regression"
    if numbers or data.get("objective") in ("language_modeling", "instruction"):
        evaluation = data.setdefault("evaluation", {})
        if isinstance(evaluation, dict):
            evaluation.setdefault("metric", "loss")


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that ``load_recipe`` reads back equal."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    buffer = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), buffer)
    return buffer.getvalue()


def recipe_schema() -> dict[str, Any]:
    """Return the recipe's JSON Schema."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
