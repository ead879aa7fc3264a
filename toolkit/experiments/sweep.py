"""The best settings of a recipe, searched with Optuna: poor runs are cut short, a killed sweep goes on."""

from __future__ import annotations

import logging
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from toolkit.config.load import dump_recipe, load_recipe, pointing_into
from toolkit.config.schema import Recipe
from toolkit.durable import write_file_atomically
from toolkit.errors import (
    CapabilityError,
    DivergedError,
    InputError,
    OutOfMemoryError,
    OutputError,
    Problem,
    RecipeError,
    ToolkitError,
)
from toolkit.experiments.space import Dimension, read_space
from toolkit.listener import Listener
from toolkit.run_folder import RunFolder

if TYPE_CHECKING:
    import optuna

STUDY = "study.db"
BEST = "best.yaml"
# Whole trials before one may be cut short: the median of fewer says little.
FIRST_WHOLE = 4


class TrialRecord(TypedDict):
    """One trial.

    Attributes:
        number: From 0.
        state: ``complete``, ``pruned`` (cut short) or ``fail``.
        value: Best validation metric; None where it failed.
        overrides: What it changed in the recipe.
        folder: Its run folder.
        reason: Why it failed, or None.
    """

    number: int
    state: str
    value: float | None
    overrides: list[str]
    folder: str
    reason: str | None


class Sweep(TypedDict):
    """What a sweep found.

    Attributes:
        metric: What the trials were judged by, on the validation rows.
        best: Number of the best trial.
        recipe: The file of the best recipe.
        trials: In their order.
    """

    metric: str
    best: int
    recipe: str
    trials: list[TrialRecord]


class _Pruned(Exception):
    """The trial is not worth its remaining steps."""


class _Pruning:
    """A listener that hands every evaluation to the trial, and stops the run where the trial says so."""

    def __init__(self, trial: optuna.Trial, metric: str, listener: Listener) -> None:
        self._trial, self._metric, self._listener = trial, metric, listener
        # A resumed run may come past an evaluation that it has reported before.
        self._known = set(trial.study.trials[trial.number].intermediate_values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._listener.evaluated(step, metrics)
        if step not in self._known:
            self._trial.report(metrics[self._metric], step)
            if self._trial.should_prune():
                raise _Pruned


def sweep(
    recipe: str,
    space: str,
    *,
    overrides: Sequence[str] = (),
    trials: int,
    output: pathlib.Path | None = None,
    listener: Listener,
) -> Sweep:
    """Try settings until there are ``trials`` of them, and write the best recipe.

    A trial is a run like any other, in ``<output>/trial-N``. What settings come next depends on the recipe's seed and
    the trials before alone, so a sweep that was killed ends as if it had not been. The test rows decide nothing.

    Args:
        recipe: The YAML file whose fields vary.
        space: YAML file of the fields: lists of values, or ranges.
        overrides: ``dotted.path=value`` each, for all trials.
        trials: How many there will be, those of earlier calls among them.
        output: Folder of the study, the trials and ``best.yaml``; None: ``<output.dir>-sweep``.
        listener: Hears the trials.

    Raises:
        InputError: If recipe, space, data or base are wrong, or the folder holds another sweep.
        CapabilityError: Without Optuna.
        StoppedError: After a signal; the same command goes on.
        ToolkitError: If every trial failed.
    """
    base = load_recipe(recipe, overrides)
    dimensions = read_space(space, recipe=recipe, overrides=tuple(overrides))
    _check(base, recipe)
    optuna = _optuna()
    from toolkit.finetune import read_inputs

    with pointing_into(recipe, overrides):
        read_inputs(base)
    folder = output or pathlib.Path(f"{base.output.dir}-sweep")
    study = _open(optuna, folder, base, dimensions)
    while (number := _next(study)) < trials:
        # A sampler for each trial, so that what it draws does not depend on where the sweep was interrupted.
        study.sampler = optuna.samplers.TPESampler(seed=base.training.seed + number)
        trial = _under_way(optuna, study) or study.ask(_distributions(optuna, dimensions))
        words = [*overrides, *_overrides(dimensions, trial.params)]
        listener.say(f"trial {number}: {' '.join(words[len(overrides) :])}")
        _try(optuna, study, trial, [*words, f"output.dir='{folder}/trial-{number}'"], recipe, listener)
    return _conclude(study, base, recipe, tuple(overrides), dimensions, folder)


def _check(base: Recipe, path: str) -> None:
    problems = []
    if base.data.validation is None and base.data.split.validation == 0:
        problems.append(Problem(path, "data.split.validation", "no validation rows to judge trials by", "above 0"))
    if base.output.overwrite:
        problems.append(Problem(path, "output.overwrite", "would throw away the trial that goes on", "false"))
    if problems:
        raise RecipeError(problems)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        right = "pip install 'classifier-toolkit[sweep]'"
        raise CapabilityError(Problem("toolkit sweep", "optuna", "is not installed", right)) from error
    optuna.logging.set_verbosity(logging.ERROR)
    return optuna


def _open(optuna: Any, folder: pathlib.Path, base: Recipe, dimensions: list[Dimension]) -> Any:
    """Open or begin the study of this recipe and space."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(Problem(str(folder), "--output", f"cannot be made: {error.strerror}", "a folder")) from error
    said = {"recipe": dump_recipe(base), "space": repr(dimensions)}
    study = optuna.create_study(
        storage=f"sqlite:///{(folder / STUDY).resolve()}",
        study_name="sweep",
        load_if_exists=True,
        direction="minimize" if base.evaluation.metric == "loss" else "maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST_WHOLE),
    )
    for name, text in said.items():
        before = study.user_attrs.get(name)
        if before is None:
            study.set_user_attr(name, text)
        elif before != text:
            wrong = f"holds a sweep of another {name}"
            raise OutputError(Problem(str(folder), "--output", wrong, f"the old {name}, or another folder"))
    return study


def _next(study: optuna.Study) -> int:
    """Return the number of the trial that is under way or comes next."""
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def _under_way(optuna: Any, study: optuna.Study) -> optuna.Trial | None:
    """Return the trial that an interrupted sweep was at."""
    running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    return optuna.Trial(study, running[0]._trial_id) if running else None


def _distributions(optuna: Any, dimensions: list[Dimension]) -> dict[str, Any]:
    made = {}
    for one in dimensions:
        if one.choices:
            made[one.path] = optuna.distributions.CategoricalDistribution(one.choices)
        elif one.whole:
            made[one.path] = optuna.distributions.IntDistribution(one.low, one.high, log=one.log, step=one.step or 1)
        else:
            made[one.path] = optuna.distributions.FloatDistribution(one.low, one.high, log=one.log, step=one.step)
    return made


def _overrides(dimensions: list[Dimension], params: Mapping[str, Any]) -> list[str]:
    return [one.override(params[one.path]) for one in dimensions]


def _try(
    optuna: Any, study: optuna.Study, trial: optuna.Trial, words: list[str], recipe: str, listener: Listener
) -> None:
    """Run a trial to its end, or until it is cut short, and tell the study."""
    from toolkit.finetune import finetune

    states = optuna.trial.TrialState
    try:
        checked = load_recipe(recipe, words)
        record = finetune(checked, listener=_Pruning(trial, checked.evaluation.metric, listener))
    except _Pruned:
        listener.say(f"trial {trial.number}: cut short, below the median of the trials before")
        shutil.rmtree(RunFolder(pathlib.Path(str(checked.output.dir))).checkpoints, ignore_errors=True)
        study.tell(trial, state=states.PRUNED)
    except (InputError, DivergedError, OutOfMemoryError) as error:
        # Values that are right one by one may exclude each other; the others go on.
        listener.say(f"trial {trial.number}: failed, {error}")
        trial.set_user_attr("reason", " | ".join(str(error).splitlines()))
        study.tell(trial, state=states.FAIL)
    else:
        best = record["best"]
        assert best is not None
        listener.say(f"trial {trial.number}: {best['metric']} {best['value']:.4f}")
        study.tell(trial, best["value"])


def _conclude(
    study: optuna.Study,
    base: Recipe,
    recipe: str,
    overrides: tuple[str, ...],
    dimensions: list[Dimension],
    folder: pathlib.Path,
) -> Sweep:
    records: list[TrialRecord] = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "overrides": _overrides(dimensions, trial.params),
            "folder": str(folder / f"trial-{trial.number}"),
            "reason": trial.user_attrs.get("reason"),
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    whole = [one for one in records if one["state"] == "complete"]
    if not whole:
        raise ToolkitError("no trial ended well\n" + "\n".join(f"{one['number']}: {one['reason']}" for one in records))
    best = study.best_trial.number
    chosen = load_recipe(recipe, (*overrides, *records[best]["overrides"]))
    write_file_atomically(folder / BEST, dump_recipe(chosen))
    return {"metric": base.evaluation.metric, "best": best, "recipe": str(folder / BEST), "trials": records}
