"""Recipes side by side: each is run, or its finished run reused, and all are judged on the same test rows."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.config.load import load_recipe
from toolkit.config.schema import Recipe
from toolkit.errors import InputError, OutputError, Problem, RecipeError, ToolkitError
from toolkit.evaluation.predictions import read_predictions
from toolkit.experiments.launch import train_apart
from toolkit.experiments.verdict import Candidate, Run, accuracy, judge
from toolkit.listener import SILENT, Listener
from toolkit.report.comparison import Comparison, SeedRecord
from toolkit.report.comparison_page import write_comparison
from toolkit.report.run_record import read_run_record
from toolkit.report.wording import percent
from toolkit.run_folder import RunFolder

FORMAT = 1


@dataclass(frozen=True)
class _Planned:
    """One run to be had: the words of its command, and what they resolve to."""

    path: str
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def folder(self) -> RunFolder:
        return RunFolder(pathlib.Path(str(self.recipe.output.dir)))


def compare(
    recipes: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    seeds: int = 1,
    output: pathlib.Path,
    listener: Listener = SILENT,
) -> Comparison:
    """Run recipes one after another, each in a process of its own, and write one page about all of them.

    A finished run of the same resolved recipe is reused, an unfinished one goes on; a run that fails is a row that says
    so. The recipe's own seed is run in its own folder, further seeds beside it, in ``<folder>-seed-N``.

    Args:
        recipes: YAML files.
        overrides: ``dotted.path=value`` each, for all of them.
        seeds: Runs of each recipe; ``training.seed`` counts up. The split keeps its seed.
        output: Folder of compare.html, compare.png and compare.json.
        listener: Hears what each run says.

    Raises:
        InputError: If a recipe or a folder is wrong; nothing was run.
        StoppedError: If a signal stopped a run; the same command goes on.
        ToolkitError: If no run ended well.
    """
    planned = _plan(recipes, overrides, seeds)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(Problem(str(output), "--output", f"cannot be made: {error.strerror}", "a folder")) from error
    candidates = [_run(runs, listener) for runs in planned]
    if not any(one.runs for one in candidates):
        reasons = [f"{one.name}: {run['failed']}" for one in candidates for run in one.seeds]
        raise ToolkitError("no run ended well\n" + "\n".join(reasons))
    verdict = judge(candidates)
    best = next(one for one in candidates if one.name == verdict.best)
    baselines = best.runs[best.median].record["metrics"]["baselines"] or {}
    comparison: Comparison = {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seeds": seeds,
        "recipes": verdict.rows,
        "best": verdict.best,
        "enough": verdict.enough,
        "verdict": verdict.sentences,
        "baselines": {name: figures["accuracy"] for name, figures in baselines.items()},
    }
    write_comparison(comparison, output)
    return comparison


def _plan(recipes: Sequence[str], overrides: Sequence[str], seeds: int) -> list[list[_Planned]]:
    """Resolve every run and look at its folder; raise the problems of all of them together."""
    problems: list[Problem] = []
    planned: list[list[_Planned]] = []
    if not recipes:
        raise RecipeError(Problem("toolkit compare", "RECIPE", "overrides alone", "one YAML recipe or more"))
    for path in recipes:
        try:
            first = load_recipe(path, overrides)
            planned.append([_with_seed(path, overrides, first, seed) for seed in range(seeds)])
        except RecipeError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    folders: dict[pathlib.Path, str] = {}
    for runs in planned:
        problems += _unsuited(runs[0])
        for run in runs:
            place = run.folder.path.resolve()
            if place in folders:
                wrong = f"{run.folder.path} is the folder of {folders[place]} too"
                problems.append(Problem(run.path, "output.dir", wrong, "a folder for each recipe"))
                continue
            folders[place] = run.path
            try:
                run.folder.state(run.recipe)
            except OutputError as error:
                problems += error.problems
    if problems:
        raise InputError(problems)
    return planned


def _with_seed(path: str, overrides: Sequence[str], first: Recipe, place: int) -> _Planned:
    if place == 0:
        return _Planned(path, tuple(overrides), first)
    seed = first.training.seed + place
    words = (*overrides, f"training.seed={seed}", f"output.dir='{first.output.dir}-seed-{seed}'")
    return _Planned(path, words, load_recipe(path, words))


def _unsuited(run: _Planned) -> list[Problem]:
    """Return why a right recipe cannot be compared."""
    recipe, problems = run.recipe, []
    if recipe.objective != "classification":
        problems.append(Problem(run.path, "objective", f"{recipe.objective} has no accuracy", "classification"))
    elif recipe.data.problem_type != "single_label_classification":
        wrong = f"{recipe.data.problem_type} is not right or wrong row by row"
        problems.append(Problem(run.path, "data.problem_type", wrong, "single_label_classification"))
    if recipe.output.overwrite:
        wrong = "would throw away the finished runs that a comparison reuses"
        problems.append(Problem(run.path, "output.overwrite", wrong, "false"))
    if recipe.data.test is None and recipe.data.split.test == 0:
        problems.append(Problem(run.path, "data.split.test", "no test rows to compare on", "above 0"))
    return problems


def _run(planned: Sequence[_Planned], listener: Listener) -> Candidate:
    """Have every seed of a recipe, and read what it left."""
    name = planned[0].folder.path.name
    records: list[SeedRecord] = []
    found: dict[int, Run] = {}
    for run in planned:
        seed, folder = run.recipe.training.seed, run.folder
        reused = folder.finished
        shown = folder.path.name
        if reused:
            listener.say(f"{shown}: finished before, reused")
        failed = None if reused else train_apart(run.path, run.overrides, name=shown, listener=listener)
        if failed is None:
            found[seed] = Run(read_run_record(folder.result), read_predictions(folder.predictions))
            listener.say(f"{shown}: test accuracy {percent(accuracy(found[seed].record))}")
        else:
            listener.say(f"{shown}: failed, {failed}")
        records.append(
            {
                "seed": seed,
                "folder": str(folder.path),
                "accuracy": accuracy(found[seed].record) if failed is None else None,
                "reused": reused,
                "failed": failed,
            }
        )
    return Candidate(name, planned[0].path, records, found)
