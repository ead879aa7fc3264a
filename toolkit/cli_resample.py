"""The command that trains one recipe on other rows."""

from __future__ import annotations

from typing import Annotated

import typer

from toolkit.console import TerminalListener, print_series


def resample(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[OVERRIDE]...", help="dotted.path=value")] = None,
    folds: Annotated[int | None, typer.Option("--folds", min=2, max=100, help="Test on each of so many folds.")] = None,
    train_rows: Annotated[
        list[int] | None, typer.Option("--train-rows", min=2, help="Training rows; once for each point of the curve.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Cross-validate a recipe over folds, or draw its learning curve; finished runs are not run again."""
    if (folds is None) == (not train_rows):
        raise typer.BadParameter("give --folds, or --train-rows once for each size")
    from toolkit.config.load import load_recipe, pointing_into

    # A wrong recipe is said before anything heavy is imported.
    load_recipe(recipe, overrides or [])
    from toolkit.resampling import cross_validate, learning_curve

    listener = TerminalListener()
    with pointing_into(recipe, overrides or []):
        if folds is not None:
            found, folder = cross_validate(recipe, overrides or [], folds=folds, listener=listener)
        else:
            found, folder = learning_curve(recipe, overrides or [], sizes=train_rows or [], listener=listener)
    print_series(found, folder)
