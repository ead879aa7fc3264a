"""Runs to be broken: small recipes that together use every part of training, and what makes two runs the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pico import build_pico
from safetensors.torch import load_file

HAM = ["are we still on for dinner tonight", "see you at the station", "call me when you are home", "ok thanks dear"]
SPAM = ["you are a winner of a cash award", "free prize call now", "claim your reward today", "win a free phone now"]
# Figures of the machine, not of the run.
MEASURED = ("tokens_per_second", "memory", "time")


@dataclass(frozen=True)
class Setting:
    """A recipe to be broken.

    Attributes:
        name: For messages.
        family: ``gpt2`` or ``distilbert``.
        sections: Further YAML.
        artifact: ``adapter`` or ``model``.
        steps: Of its runs; states are kept where rows are seen more than once, which 84 rows are after 11 steps.
    """

    name: str
    family: str
    sections: str
    artifact: str = "adapter"
    steps: int = 6


LAST_BLOCK = "distilbert last block, states kept"
# All with dropout, accumulation over two micro-batches, and a best checkpoint.
SETTINGS = (
    Setting("gpt2 lora", "gpt2", "method: {name: lora, r: 4}"),
    Setting("distilbert lora 4-bit", "distilbert", "method: {name: lora, r: 4}\nquantization: {bits: 4}"),
    Setting(LAST_BLOCK, "distilbert", "method: {name: last_n}", "model", 12),
    Setting("gpt2 full", "gpt2", "method: {name: full}", "model"),
    Setting("gpt2 lora 4-bit", "gpt2", "method: {name: lora, r: 4}\nquantization: {bits: 4}"),
    Setting("distilbert lora", "distilbert", "method: {name: lora, r: 4}"),
    Setting("gpt2 last block, states kept", "gpt2", "method: {name: last_n}", "model", 12),
    Setting("distilbert full", "distilbert", "method: {name: full}", "model"),
)


@dataclass(frozen=True)
class Trial:
    """One case that was tried.

    Attributes:
        promise: ``P1`` and so on.
        case: What was done.
        failure: What went wrong; empty if the promise held.
    """

    promise: str
    case: str
    failure: str = ""


def failures(trials: Iterable[Trial]) -> list[str]:
    return [f"{trial.promise} {trial.case}: {trial.failure}" for trial in trials if trial.failure]


def rows() -> str:
    lines = [f"{'ham' if i % 2 else 'spam'},{(HAM if i % 2 else SPAM)[i // 2 % 4]} {i}" for i in range(120)]
    return "label,text\n" + "\n".join(lines) + "\n"


BY_NAME = {setting.name: setting for setting in SETTINGS}


def write_world(
    root: Path,
    setting: Setting,
    *,
    steps: int | None = None,
    save_every: int = 2,
    width: int = 32,
    rows_a_batch: int = 4,
) -> Path:
    """Write data, base and recipe.yaml into ``root`` and return the recipe."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "data.csv").write_text(rows())
    (root / "texts.txt").write_text("\n".join([*HAM, *SPAM]) + "\n")
    if not (root / "base").exists():
        build_pico(root / "base", setting.family, width=width)
    recipe = root / "recipe.yaml"
    recipe.write_text(
        "model: {base: base, max_length: 32}\n"
        "data: {source: data.csv}\n"
        f"training: {{max_steps: {steps or setting.steps}, batch_size: {rows_a_batch}, gradient_accumulation_steps: 2, "
        "learning_rate: 1e-2}\n"
        f"evaluation: {{every: {save_every + 1}, early_stopping_patience: 50, metric: loss}}\n"
        f"output: {{dir: run, save_every: {save_every}, log_every: 1, keep: 2}}\n{setting.sections}\n"
    )
    return recipe


def curve(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # A resumed run has a line more for each phase.
    steps = [line for line in lines if "phase" not in line]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in steps]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name[5:]))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = sorted(folder.glob("*.safetensors"))
    return {f"{file.name} {name}": tensor for file in found for name, tensor in load_file(file).items()}


def difference(one: Path, other: Path, *, artifact: str) -> str:
    """Return in what two finished runs differ: artifact, optimizer, random state, curve; empty if in nothing."""
    if not (other / "result.json").is_file():
        return "is not finished"
    for what, folders in {
        "artifact": (one / artifact, other / artifact),
        "last checkpoint": (newest(one), newest(other)),
    }.items():
        a, b = (tensors(folder) for folder in folders)
        if not a or a.keys() != b.keys():
            return f"{what}: other tensors"
        changed = [name for name in a if not torch.equal(a[name], b[name])]
        if changed:
            return f"{what}: {', '.join(changed[:3])} differ"
    if curve(one) != curve(other):
        return "the loss curve differs"
    a_record, b_record = (json.loads((run / "result.json").read_text()) for run in (one, other))
    if a_record["metrics"] != b_record["metrics"] or a_record["best"] != b_record["best"]:
        return "metrics differ"
    return ""


def strays(run: Path) -> str:
    """Return what a finished run, or one that never began, holds that nobody asked for."""
    if not run.exists():
        return ""
    names = [path.name for path in [*run.iterdir(), *(run / "checkpoints").glob("*")]]
    stray = sorted(name for name in names if name.startswith(".") and name != ".lock")
    return f"left behind: {', '.join(stray)}" if stray else ""


def problems(output: str) -> list[str]:
    """Return the lines after what a run says of its inputs and its progress."""
    told = ("base: ", "data: ", "split: ", "parameters: ", "texts: ", "steps: ", "machine: ", "warning: ", "resuming ",
            "step ", "frozen blocks", "peak memory")  # fmt: skip
    return [line for line in output.splitlines() if line and not line.startswith(told)]


def copy(source: Path, target: Path, *, without: Sequence[str] = ()) -> Path:
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*without))
    return target
