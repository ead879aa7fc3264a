"""Every method through the trainer: stopped on the way and gone on with, it ends bit-equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ladder import ADAPTERS, FAMILY_NAMES, LADDER, stands_on
from pico import PicoFolder, pico_cache

from toolkit import runtime
from toolkit.adapters.apply import trainable_state
from toolkit.adapters.rates import rate_scales
from toolkit.adapters.schedule import build_schedule
from toolkit.config.methods import Method
from toolkit.config.schema import QuantizationSettings, Recipe
from toolkit.data.tokenize import load_tokenizer
from toolkit.finetune import read_inputs
from toolkit.listener import SILENT
from toolkit.memory.measure import MemoryWatch
from toolkit.tasks import Setup, Task, build_task
from toolkit.training.checkpoint import load_checkpoint
from toolkit.training.optim import build_optimizer
from toolkit.training.plan import build_plan
from toolkit.training.trainer import Trainer

__all__ = ["pico_cache"]

STORAGE = {"fp32": None, "nf4": QuantizationSettings(), "int8": QuantizationSettings(bits=8)}
PLAIN = [(name, family, "fp32") for name in LADDER for family in FAMILY_NAMES]
# Each adapter on each storage once, the families in turn.
QUANTISED = [
    (name, FAMILY_NAMES[(place + shift) % 2], storage)
    for place, name in enumerate(ADAPTERS)
    for shift, storage in enumerate(("nf4", "int8"))
]
CASES = [case for case in PLAIN + QUANTISED if stands_on(case[0], family=case[1], storage=case[2])]


class Losses:
    """Keeps what an observer hears."""

    def __init__(self) -> None:
        self.heard: dict[int, float] = {}

    def step(self, step: int, loss: float) -> None:
        self.heard[step] = loss

    def logged(self, record: Any) -> None: ...

    def evaluated(self, step: int, metrics: Any) -> None: ...


def recipe_of(
    tmp_path: Path, base: Path, method: Method, *, storage: str = "fp32", head: Any = None, **training: Any
) -> Recipe:
    """Return a recipe of three steps an epoch."""
    file = tmp_path / "texts.csv"
    rows = [f"{'ham' if i % 2 else 'spam'},{'see you at dinner' if i % 2 else 'a free prize'} {i}" for i in range(30)]
    file.write_text("label,text\n" + "\n".join(rows) + "\n")
    settings = {"max_steps": 8, "batch_size": 7, "learning_rate": 1e-2} | training
    return Recipe.model_validate(
        {
            "model": {"base": str(base), "max_length": 16, "head": head},
            "data": {"source": str(file)},
            "method": method.model_dump(),
            "quantization": None if STORAGE[storage] is None else STORAGE[storage].model_dump(),
            "training": settings,
            "evaluation": {"every": 4},
            "output": {"save_every": 3, "keep": 9, "dir": str(tmp_path / "run")},
        }
    )


def trainer_of(recipe: Recipe, checkpoints: Path) -> tuple[Trainer, Task, Losses]:
    """Build what `finetune` builds, without its folder and reports."""
    data, base = read_inputs(recipe)
    device = torch.device("cpu")
    accelerator = runtime.build_accelerator(device=device, precision="fp32", tracker=None, logging_dir=checkpoints)
    runtime.seed_everything(recipe.training.seed)
    tokenizer = load_tokenizer(base.path, kind=base.family.tokenizer)
    task = build_task(Setup(recipe, data, base, tokenizer, accelerator, "default", SILENT, MemoryWatch(device)))
    plan = build_plan(recipe.training, lengths=task.tables["train"].lengths, processes=1)
    blocks, losses = base.config[base.family.layers_key], Losses()
    trainer = Trainer(
        objective=task.objective,
        optimizer=build_optimizer(
            task.model, recipe.training, scale_of=rate_scales(recipe.method, base.family, blocks=blocks)
        ),
        schedule=build_schedule(
            task.model, recipe.method, family=base.family, total_steps=plan.total_steps, processes=1
        ),
        accelerator=accelerator,
        plan=plan,
        recipe=recipe,
        checkpoints=checkpoints,
        inputs={},
        evaluate=task.validate,
        observer=losses,
    )
    return trainer, task, losses


@pytest.mark.parametrize(("name", "family", "storage"), CASES)
def test_it_ends_bit_equal(pico_cache: PicoFolder, tmp_path: Path, name: str, family: str, storage: str) -> None:
    end_bit_equal(recipe_of(tmp_path, pico_cache(family), LADDER[name], storage=storage), tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_8bit", "paged_adamw_8bit"])
def test_so_it_does_with_every_optimizer(pico_cache: PicoFolder, tmp_path: Path, optimizer: str) -> None:
    end_bit_equal(recipe_of(tmp_path, pico_cache("gpt2"), LADDER["full"], optimizer=optimizer), tmp_path)
    kept = load_checkpoint(tmp_path / "checkpoints" / "step-6").tensors["optimizer"]
    # bitsandbytes rounds the moments of 4,096 weights and more.
    assert any(moments.dtype == torch.uint8 for moments in kept.values()) == ("8bit" in optimizer)


@pytest.mark.parametrize(
    ("name", "family", "storage", "head"),
    [
        ("full", "gpt2", "fp32", {"pooling": "mean"}),
        ("lora", "distilbert", "nf4", {"pooling": "max", "hidden": [24], "dropout": 0.3}),
        ("head", "distilbert", "fp32", {"pooling": "mean", "hidden": [24, 8], "dropout": 0.3}),
        ("last_n", "gpt2", "fp32", {"dropout": 0.3}),
    ],
)
def test_a_head_ends_bit_equal(
    pico_cache: PicoFolder, tmp_path: Path, name: str, family: str, storage: str, head: Any
) -> None:
    end_bit_equal(recipe_of(tmp_path, pico_cache(family), LADDER[name], storage=storage, head=head), tmp_path)


def end_bit_equal(recipe: Recipe, tmp_path: Path) -> None:
    trainer, task, losses = trainer_of(recipe, tmp_path / "checkpoints")
    before = {key: tensor.clone() for key, tensor in trainable_state(task.model).items()}
    trainer.fit()
    expected = trainable_state(task.model)
    assert any(not torch.equal(expected[key], before[key]) for key in before)
    again, resumed, more = trainer_of(recipe, tmp_path / "elsewhere")
    again.resume(load_checkpoint(tmp_path / "checkpoints" / "step-3"))
    again.fit()
    assert more.heard == {step: loss for step, loss in losses.heard.items() if step > 3}
    found = trainable_state(resumed.model)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert again.progress.evaluated == trainer.progress.evaluated
