"""The commands that make many runs: compare and sweep. `cli.py` puts them beside the others."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Annotated

import typer

from toolkit.console import TerminalListener

Output = Annotated[
    pathlib.Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where page or study are kept.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
PAGE = pathlib.Path("runs/compare")


def compare(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE... [OVERRIDE]...", help="YAML recipes; overrides.")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=100, help="Runs of each recipe.")] = 1,
    output: Output = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run recipes, or reuse their finished runs, and say which one is enough."""
    from toolkit.console_compare import print_comparison
    from toolkit.experiments.compare import compare as compare_recipes

    files = [word for word in recipes if "=" not in word or pathlib.Path(word).is_file()]
    overrides = [word for word in recipes if word not in files]
    folder = output or PAGE
    found = compare_recipes(files, overrides=overrides, seeds=seeds, output=folder, listener=TerminalListener())
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        print_comparison(found, folder)


def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML recipe.")],
    space: Annotated[str, typer.Argument(metavar="SPACE", help="YAML: dotted field to a list of values, or a range.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDE]...", help="dotted.path=value, for all trials.")
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Trials in all, earlier ones included.")] = 20,
    output: Output = None,
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
