"""Fine-tune text classifiers on little memory: a recipe in, a classifier stock libraries load out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.config.load import load_recipe
    from toolkit.config.schema import Recipe
    from toolkit.errors import ToolkitError
    from toolkit.export.merge import merge_adapter
    from toolkit.finetune import finetune
    from toolkit.inference.evaluate import evaluate
    from toolkit.inference.predict import Classifier
    from toolkit.memory.plan import plan_memory
    from toolkit.report.run_record import RunRecord

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "Recipe",
    "RunRecord",
    "ToolkitError",
    "evaluate",
    "finetune",
    "load_recipe",
    "merge_adapter",
    "plan_memory",
]

# Where each public name lives; imported on first use, because most of them bring torch.
_HOMES = {
    "Classifier": "toolkit.inference.predict",
    "Recipe": "toolkit.config.schema",
    "RunRecord": "toolkit.report.run_record",
    "ToolkitError": "toolkit.errors",
    "evaluate": "toolkit.inference.evaluate",
    "finetune": "toolkit.finetune",
    "load_recipe": "toolkit.config.load",
    "merge_adapter": "toolkit.export.merge",
    "plan_memory": "toolkit.memory.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
