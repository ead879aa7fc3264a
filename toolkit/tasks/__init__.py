"""What a run trains: a classifier or a language model, with its token tables, objective, judge and artifact."""

from __future__ import annotations

from toolkit.config.methods import ZeroShotMethod
from toolkit.tasks.classification import ClassificationTask
from toolkit.tasks.instruction import InstructionTask
from toolkit.tasks.language_modeling import LanguageModelingTask
from toolkit.tasks.task import Kind, Setup, Task
from toolkit.tasks.zero_shot import ZeroShotTask

__all__ = ["Kind", "Setup", "Task", "build_task"]


def build_task(setup: Setup) -> Task:
    """Return the task of the recipe's objective."""
    if setup.recipe.objective == "language_modeling":
        return LanguageModelingTask(setup)
    if setup.recipe.objective == "instruction":
        return InstructionTask(setup)
    if isinstance(setup.recipe.method, ZeroShotMethod):
        return ZeroShotTask(setup)
    return ClassificationTask(setup)
