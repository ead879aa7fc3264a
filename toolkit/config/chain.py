"""A recipe whose base another recipe makes: the chain from the first run to this one."""

from __future__ import annotations

import pathlib

from toolkit.config.load import load_recipe
from toolkit.config.schema import ModelSettings, Recipe
from toolkit.errors import Problem, RecipeError

SUFFIXES = (".yaml", ".yml")
FIELD = "model.base"


def names_recipe(model: ModelSettings) -> bool:
    """Return whether the base is what another recipe trains."""
    return pathlib.Path(model.base).suffix.lower() in SUFFIXES


def recipe_before(model: ModelSettings) -> Recipe | None:
    """Return the recipe whose run makes the base; None where the base is a model.

    Args:
        model: The recipe's model section.

    Raises:
        RecipeError: That recipe, or one before it, is wrong, trains no language model, or comes round to itself.
    """
    if not names_recipe(model):
        return None
    first = _load(model.base)
    seen, last = [model.base], first
    while names_recipe(last.model):
        if pathlib.Path(last.model.base).resolve() in (pathlib.Path(name).resolve() for name in seen):
            wrong = f"{last.model.base} is made from itself"
            raise RecipeError(Problem(seen[-1], FIELD, wrong, "a base that is there before the first run"))
        seen.append(last.model.base)
        last = _load(last.model.base)
    return first


def trained_model(recipe: Recipe) -> pathlib.Path | None:
    """Return the folder of the language model that a recipe's run left; None before the run has finished."""
    run = pathlib.Path(str(recipe.output.dir))
    return run / "model" if (run / "result.json").is_file() else None


def _load(name: str) -> Recipe:
    recipe = load_recipe(name)
    if recipe.objective != "language_modeling":
        wrong = f"{recipe.objective} leaves no base for another run"
        raise RecipeError(Problem(name, "objective", wrong, "language_modeling in the recipe that model.base names"))
    return recipe
