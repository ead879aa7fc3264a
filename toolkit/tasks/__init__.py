"""What a run trains: a classifier or a language model, with its token tables, objective, judge and artifact."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator

from toolkit.config.schema import Recipe
from toolkit.data.parts import LoadedData
from toolkit.data.tokenize import Tokenizer
from toolkit.listener import SILENT, Listener
from toolkit.models.base import Base
from toolkit.tasks.classification import ClassificationTask
from toolkit.tasks.language_modeling import LanguageModelingTask
from toolkit.tasks.task import Kind, Task
from toolkit.training.gemm import Gemm

__all__ = ["Kind", "Task", "build_task"]


def build_task(
    recipe: Recipe,
    *,
    data: LoadedData,
    base: Base,
    tokenizer: Tokenizer,
    accelerator: Accelerator,
    gemm: Gemm = "default",
    listener: Listener = SILENT,
) -> Task:
    """Return the task of the recipe's objective; the listener hears how long preparations go."""
    tasks: Mapping[str, type[ClassificationTask] | type[LanguageModelingTask]] = {
        "classification": ClassificationTask,
        "language_modeling": LanguageModelingTask,
    }
    return tasks[recipe.objective](
        recipe, data=data, base=base, tokenizer=tokenizer, accelerator=accelerator, gemm=gemm, listener=listener
    )
