"""P12, P17: numbers that are not, and memory that is not there, put into a run at a chosen place."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forked import Server
from safetensors.torch import load_file
from world import BY_NAME, LAST_BLOCK, Setting, Trial, difference, problems, strays, write_world

TRAIN = ("train", "recipe.yaml")
# Optimizer steps done before the injection; checkpoints stand at 2 and 3.
STEP = 4
# Positions after max_length carry no text.
UNUSED_POSITION = 47
NAN, INF = float("nan"), float("inf")


def _once(trainer: Any, change: Callable[[torch.Tensor], torch.Tensor], *, calls: int) -> None:
    """Change what the objective returns for the next calls."""
    left = [calls]

    def hook(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor | None:
        left[0] -= 1
        return change(output) if left[0] >= 0 else None

    trainer._objective.register_forward_hook(hook)


def _gradient(trainer: Any, value: float) -> None:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        changed = gradient.clone()
        changed.view(-1)[0] = value
        return changed

    trainer._trained[0].register_hook(hook)


def _after_update(trainer: Any, change: Callable[[], object]) -> None:
    update = trainer.optimizer.step

    def step() -> None:
        update()
        with torch.no_grad():
            change()

    trainer.optimizer.step = step


def _named(trainer: Any, name: str) -> torch.Tensor:
    return next(parameter for key, parameter in trainer.model.named_parameters() if key.endswith(name))


def _frozen(trainer: Any) -> None:
    with torch.no_grad():
        _named(trainer, "h.1.ln_1.weight").fill_(NAN)


def _states(trainer: Any) -> None:
    batch = trainer._objective.batch

    def changed(rows: Any, *, step: int) -> Any:
        found = batch(rows, step=step)
        return {**found, "states": found["states"] * NAN}

    trainer._objective.batch = changed


def _moment(trainer: Any) -> None:
    state = next(iter(trainer.optimizer.state.values()))
    state["exp_avg"].view(-1)[0] = NAN


def _rate(trainer: Any) -> None:
    for group in trainer.optimizer.param_groups:
        group["rate_scale"] = INF


def _validation(trainer: Any) -> None:
    evaluate = trainer._evaluate
    trainer._evaluate = lambda: {**evaluate(), "loss": NAN}


# The place, and the setting that has it.
PLACES: dict[str, tuple[Callable[[Any], object], str]] = {
    "the loss": (lambda t: _once(t, lambda loss: loss * NAN, calls=1), "gpt2 lora"),
    "the loss, infinite": (lambda t: _once(t, lambda loss: loss * INF, calls=1), "distilbert lora 4-bit"),
    "one gradient": (lambda t: _gradient(t, NAN), "gpt2 lora"),
    "one gradient, infinite": (lambda t: _gradient(t, INF), "distilbert lora 4-bit"),
    "a weight after the update": (
        lambda t: _after_update(t, lambda: t._trained[0].view(-1)[:1].fill_(NAN)), "gpt2 lora",
    ),
    "a weight that no logit depends on": (
        lambda t: _after_update(t, lambda: _named(t, "wpe.weight")[UNUSED_POSITION].fill_(NAN)), "gpt2 full",
    ),
    "a moment of the optimizer": (_moment, "gpt2 full"),
    "the learning rate": (_rate, "gpt2 lora"),
    "the validation loss": (_validation, "gpt2 lora"),
    "a frozen weight": (_frozen, "gpt2 lora"),
    "the kept states of frozen blocks": (_states, LAST_BLOCK),
}  # fmt: skip


def diverge(place: str) -> None:
    """In the child: put it in before the step."""
    from toolkit.training.trainer import Trainer

    change, step_of = PLACES[place][0], Trainer._step

    def step(trainer: Any, number: int) -> float:
        if number == STEP:
            change(trainer)
        return step_of(trainer, number)

    Trainer._step = step  # type: ignore[method-assign]


def diverged(server: Server, world: Path, *, places: list[str]) -> list[Trial]:
    """Inject each place: exit 3 within the step, all checkpoints finite, and the run goes on without the injection."""
    trials = []
    for number, place in enumerate(places):
        setting = BY_NAME[PLACES[place][1]]
        here = world / str(number)
        write_world(here, setting)
        plain = server.run(*TRAIN, "output.dir=plain", cwd=here)
        found = server.run(*TRAIN, "output.dir=run", cwd=here, inject="injections:diverge", argument=place)
        said = problems(found.output)
        failure = ""
        if found.code != 3 or len(said) != 1 or not re.search(r"training diverged: .* at step (5|6) ", said[0]):
            failure = f"exit {found.code}: {found.output[-300:]}"
        failure = failure or _finite(here / "run")
        again = server.run(*TRAIN, "output.dir=run", cwd=here)
        failure = failure or ("" if plain.code == again.code == 0 else again.output[-300:])
        failure = failure or difference(here / "plain", here / "run", artifact=setting.artifact) or strays(here / "run")
        trials.append(Trial("P12", f"{setting.name}: {place}", failure))
    return trials


def _finite(run: Path) -> str:
    saved = list(run.glob("checkpoints/step-*/*.safetensors"))
    if not saved or (run / "result.json").exists():
        return "no checkpoint, or a result"
    for path in saved:
        for name, tensor in load_file(path).items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"{path.parent.name}/{path.name}: {name} is not finite"
    return ""


def _finite_model(run: Path) -> str:
    tensors = load_file(run / "model" / "model.safetensors").values()
    return "" if all(bool(torch.isfinite(tensor).all()) for tensor in tensors) else "the model is not finite"


def starve(more: int) -> None:
    """In the child: leave ``more`` bytes of address space once training begins."""
    from toolkit.training.trainer import Trainer

    step_of = Trainer._step

    def step(trainer: Any, number: int) -> float:
        if number == STEP:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + more
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        return step_of(trainer, number)

    Trainer._step = step  # type: ignore[method-assign]


def out_of_memory(server: Server, world: Path, setting: Setting) -> Trial:
    """Take the address space away in the middle of a run: it goes on smaller, or names a setting, and resumes."""
    write_world(world, setting, width=512, rows_a_batch=42)
    found = server.run(*TRAIN, "output.dir=run", cwd=world, inject="injections:starve", argument=8 << 20)
    last = found.output.rstrip().splitlines()[-1]
    named = found.code == 4 and re.match(r"out of memory .*\(.*(training\.|model\.|toolkit plan)", last) is not None
    smaller = found.code == 0 and "did not fit into memory" in found.output
    failure = "" if named or smaller else f"exit {found.code}: {found.output[-500:]}"
    again = server.run(*TRAIN, "output.dir=run", cwd=world)
    failure = failure or ("" if again.code == 0 else again.output[-300:]) or _finite_model(world / "run")
    return Trial("P17", f"{setting.name}: no address space left", failure)
