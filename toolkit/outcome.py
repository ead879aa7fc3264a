"""A trained task to its record and everything a person reads: result.json, card, curves, report."""

from __future__ import annotations

import datetime
import pathlib
from typing import Any

from toolkit import runtime
from toolkit.adapters.apply import ParameterReport
from toolkit.config.load import dump_recipe
from toolkit.config.schema import Recipe
from toolkit.data.parts import LoadedData
from toolkit.evaluation.mistakes import Mistake
from toolkit.evaluation.predictions import write_predictions
from toolkit.models.base import Base
from toolkit.models.heads import own_head
from toolkit.report.curves import draw_confusion, draw_curves, draw_memory
from toolkit.report.html import ErrorExample, write_report
from toolkit.report.metrics_log import MetricsLog
from toolkit.report.model_card import write_model_card
from toolkit.report.run_record import FORMAT, MemoryRecord, PrefixCacheRecord, RunRecord, write_run_record
from toolkit.run_folder import RunFolder
from toolkit.tasks import Kind, Task
from toolkit.training.state import Progress


def build_record(
    recipe: Recipe,
    *,
    folder: RunFolder,
    data: LoadedData,
    base: Base,
    truncated: int,
    parameters: ParameterReport,
    artifact: Kind,
    progress: Progress,
    epochs: float,
    metrics: dict[str, Any],
    memory: MemoryRecord,
    prefix_cache: PrefixCacheRecord | None,
    environment: dict[str, Any],
) -> RunRecord:
    """Return the content of result.json."""
    named: Any = {**base.as_dict(), "name_or_path": base.name_or_path, "model_type": base.family.model_type}
    origins: Any = [origin.as_dict() for origin in data.origins]
    best: Any = None
    if progress.best_step is not None:
        best = {"step": progress.best_step, "metric": recipe.evaluation.metric, "value": progress.best_value}
    return {
        "format": FORMAT,
        "name": folder.path.resolve().name,
        "status": "stopped early" if progress.stopped_early else "finished",
        "objective": recipe.objective,
        "problem_type": recipe.data.problem_type,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "base": named,
        "artifact": {
            "kind": artifact,
            "folder": artifact,
            "max_length": recipe.model.max_length,
            "head": own_head(base.head, base.config) if data.label_map else None,
            "template": recipe.instruction.template if recipe.objective == "instruction" else None,
        },
        "data": {
            "origins": origins,
            "rows": {name: len(part) for name, part in data.parts.items()},
            "counts": data.counts,
            "labels": list(data.label_map.names) if data.label_map else [],
            "truncated": truncated,
            "warnings": data.warnings,
        },
        "method": recipe.method.model_dump(mode="json"),
        "quantization": None if recipe.quantization is None else recipe.quantization.model_dump(mode="json"),
        "parameters": {"total": parameters.total, "trainable": parameters.trainable},
        "steps": progress.step,
        "epochs": round(epochs, 4),
        "best": best,
        "metrics": {name: metrics.get(name) for name in ("validation", "test", "baselines")},  # type: ignore[typeddict-item]
        "timing": {
            "train_seconds": round(progress.train_seconds, 3),
            "total_seconds": round(progress.seconds, 3),
            "tokens_per_second": round(progress.tokens / max(progress.train_seconds, 1e-9), 1),
        },
        "memory": memory,
        "prefix_cache": prefix_cache,
        "environment": environment,
    }


def write_reports(record: RunRecord, *, recipe: Recipe, folder: RunFolder, data: LoadedData, task: Task) -> None:
    """Write predictions, pictures, report and model card; then result.json, which says that the run is finished."""
    text = dump_recipe(recipe)
    predictions = task.predictions()
    if predictions is not None and data.label_map is not None:
        write_predictions(
            folder.predictions, predictions, row_numbers=data.test.row_numbers, names=data.label_map.names
        )
    curves = folder.path / "curves.png"
    best = record["best"]["step"] if record["best"] else None
    history = MetricsLog(folder.metrics).read()
    draw_curves(history, curves, title=record["name"], best_step=best)
    timeline = folder.path / "memory.png"
    draw_memory(record["memory"], history, timeline)
    confusion: pathlib.Path | None = None
    test = record["metrics"]["test"]
    if test is not None and "confusion" in test:
        confusion = folder.path / "confusion.png"
        draw_confusion(test["confusion"], record["data"]["labels"], confusion)
    write_report(
        record,
        folder.path / "report.html",
        recipe=text,
        errors=error_examples(task.mistakes(), data),
        curves=curves,
        confusion=confusion,
        memory=timeline,
    )
    write_model_card(record, folder.path / "README.md", recipe=text)
    write_run_record(record, folder.result)


def error_examples(mistakes: list[Mistake], data: LoadedData) -> list[ErrorExample]:
    """Return wrong test predictions with their texts; none where the rows are token ids."""
    texts = data.test.texts
    if texts is None:
        return []
    return [
        {
            "text": str(texts[mistake.row]),
            "label": mistake.label,
            "predicted": mistake.predicted,
            "probability": mistake.probability,
        }
        for mistake in mistakes
    ]


def environment(device: Any, *, precision: str, processes: int, gemm: str) -> dict[str, Any]:
    """Return the machine's facts and how it was used."""
    return {**runtime.environment(device), "precision": precision, "processes": processes, "gemm": gemm}
