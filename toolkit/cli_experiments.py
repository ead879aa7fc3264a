"""The commands that train more than once: recipes side by side, a search of settings, other rows."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Annotated

import typer

from toolkit.console import TerminalListener

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[OVERRIDE]...", help="dotted.path=value, for example training.epochs=1")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def compare(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE... [OVERRIDE]...", help="YAML recipes; overrides.")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=100, help="Runs of each recipe.")] = 1,
    output: Annotated[
        pathlib.Path, typer.Option("--output", "-o", metavar="DIR", help="Where the page is written.")
    ] = pathlib.Path("runs/compare"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run recipes, or reuse their finished runs, and say which one is enough."""
    from toolkit.console_compare import print_comparison
    from toolkit.experiments.compare import compare as compare_recipes

    files = [word for word in recipes if "=" not in word or pathlib.Path(word).is_file()]
    overrides = [word for word in recipes if word not in files]
    found = compare_recipes(files, overrides=overrides, seeds=seeds, output=output, listener=TerminalListener())
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        print_comparison(found, output)


def sweep(
    recipe: RecipeFile,
    space: Annotated[str, typer.Argument(metavar="SPACE", help="YAML: dotted field to a list of values, or a range.")],
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Trials in all, earlier ones included.")] = 20,
    output: Annotated[
        pathlib.Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where the study is kept.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Search a recipe's best settings; poor runs are cut short, an interrupted sweep goes on."""
    from toolkit.console_compare import print_sweep
    from toolkit.experiments.sweep import sweep as search

    listener = TerminalListener()
    found = search(recipe, space, overrides=overrides or [], trials=trials, output=output, listener=listener)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        print_sweep(found)


def resample(
    recipe: RecipeFile,
    overrides: Overrides = None,
    folds: Annotated[int | None, typer.Option("--folds", min=2, max=100, help="Test on each of so many folds.")] = None,
    train_rows: Annotated[
        list[int] | None, typer.Option("--train-rows", min=2, help="Training rows; once for each point of the curve.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Cross-validate a recipe over folds, or draw its learning curve; finished runs are not run again."""
    if (folds is None) == (not train_rows):
        raise typer.BadParameter("give --folds, or --train-rows once for each size")
    from toolkit.config.load import load_recipe, pointing_into

    # A wrong recipe is said before anything heavy is imported.
    load_recipe(recipe, overrides or [])
    from toolkit.console import print_series
    from toolkit.resampling import cross_validate, learning_curve

    listener = TerminalListener()
    with pointing_into(recipe, overrides or []):
        if folds is not None:
            found, folder = cross_validate(recipe, overrides or [], folds=folds, listener=listener)
        else:
            found, folder = learning_curve(recipe, overrides or [], sizes=train_rows or [], listener=listener)
    print_series(found, folder)
