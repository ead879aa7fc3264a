"""The peer on the cases of benchmarks/reliability.py: the Trainer of transformers, with peft, as their manuals say.

``train`` and ``merge`` run in forked children (tests/robustness/forked.py) and end them; the rest counts failures.
"""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from damage import DAMAGES
from forked import Server
from injections import NAN
from merging import ALTERED, WRONG_BASES, adapted
from safetensors.torch import load_file
from world import SETTINGS, Trial, copy, write_world

LABELS = ("ham", "spam")
FILES = (
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "adapter_config.json",
)  # fmt: skip


def _last_line(output: str) -> str:
    """Return what a traceback says in the end; its frames name folders of this machine."""
    return (output.strip().splitlines() or [""])[-1][:200]


def train(argument: dict[str, Any]) -> int:
    """Train a LoRA classifier on the world's data, from the last checkpoint where there is one."""
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers.trainer_utils import get_last_checkpoint

    transformers.set_seed(1)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file="base/tokenizer.json", pad_token="<|endoftext|>")
    with open("data.csv", newline="") as file:
        rows = list(csv.DictReader(file))[:84]
    data = [{**tokenizer(row["text"]), "labels": LABELS.index(row["label"])} for row in rows]
    base = transformers.GPT2ForSequenceClassification.from_pretrained("base", num_labels=2, pad_token_id=0)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["c_attn"]))
    arguments = transformers.TrainingArguments(
        argument["output"], max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=argument.get("learning_rate", 1e-2), save_steps=2, save_total_limit=4, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, data_collator=transformers.DataCollatorWithPadding(tokenizer)
    )
    _inject(trainer, argument.get("place", ""))
    last = get_last_checkpoint(argument["output"]) if os.path.isdir(argument["output"]) else None
    trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(f"{argument['output']}/final")
    return 0


def _inject(trainer: Any, place: str) -> None:
    model = trainer.model
    if place == "a frozen weight":
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if name.endswith("h.1.ln_1.weight")).fill_(NAN)
    elif place == "one gradient":
        next(p for p in model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * NAN)
    elif place == "the loss":
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *words, **options: compute(*words, **options) * NAN


def merge(argument: dict[str, str]) -> int:
    """Merge an adapter into a base and save the model."""
    import transformers
    from peft import PeftModel

    base = transformers.AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    merged = PeftModel.from_pretrained(base, argument["adapter"]).merge_and_unload(safe_merge=True)
    merged.save_pretrained(argument["output"])
    return 0


def _trained(server: Server, world: Path, **options: Any) -> Any:
    argument = {key: options.pop(key) for key in ("output", "learning_rate", "place") if key in options}
    return server.run("--help", cwd=world, inject="reliability_peer:train", argument=argument, **options)


def _final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "adapter_model.safetensors")


def _differs(one: Path, other: Path) -> str:
    a, b = _final(one), _final(other)
    same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return "" if same else "ends with other weights"


def peer_kills(server: Server, world: Path, *, count: int, seed: int) -> list[Trial]:
    """SIGKILL before a change on disk at or after the first save, then the same command."""
    write_world(world, SETTINGS[0])
    plain = _trained(server, world, output="plain", watch=world / "plain")
    assert plain.code == 0, plain.output
    saving = [number for number, name in enumerate(plain.events, 1) if "checkpoint-" in name]
    chance, trials = random.Random(seed), []
    for number in range(count):
        at, run = chance.randrange(saving[0] + 1, len(plain.events)), world / f"killed-{number}"
        _trained(server, world, output=run.name, watch=run, at=at, signals=[signal.SIGKILL])
        again = _trained(server, world, output=run.name)
        failure = _last_line(again.output) if again.code else _differs(world / "plain", run)
        trials.append(Trial("P1", f"SIGKILL before event {at}, {plain.events[at - 1]}", failure))
    return trials


def peer_damage(server: Server, world: Path, *, seed: int) -> list[Trial]:
    """Damage a file of the newest of two checkpoints, then the same command."""
    write_world(world, SETTINGS[0])
    plain = _trained(server, world, output="plain")
    assert plain.code == 0, plain.output
    cut = copy(world / "plain", world / "cut", without=["final", "checkpoint-6"])
    chance, trials = random.Random(seed), []
    for file in FILES:
        for kind, damage in DAMAGES.items():
            run = copy(cut, world / "damaged")
            path = run / "checkpoint-4" / file
            before = path.read_bytes()
            if kind == "another checkpoint's":
                shutil.copyfile(run / "checkpoint-2" / file, path)
            else:
                damage(path, chance)
            if path.exists() and path.read_bytes() == before:
                continue
            again = _trained(server, world, output=run.name)
            failure = f"does not go on: {_last_line(again.output)}" if again.code else _differs(world / "plain", run)
            trials.append(Trial("P4", f"{file} {kind}", failure))
    return trials


def _merged(server: Server, world: Path) -> Any:
    argument = {"adapter": "run/adapter", "output": "merged"}
    return server.run("--help", cwd=world, inject="reliability_peer:merge", argument=argument)


def peer_adapters(server: Server, world: Path) -> list[Trial]:
    """Merge each altered adapter; accepted, it must give what the sound one gives."""
    sound, trials = adapted(world / "sound"), []
    found = _merged(server, sound)
    assert found.code == 0, found.output
    expected = load_file(sound / "merged" / "model.safetensors")
    for what, altered in ALTERED.items():
        other = copy(sound, world / "altered", without=["merged"])
        altered.change(other / "run" / "adapter")
        failure = ""
        if _merged(server, other).code == 0:
            merged = load_file(other / "merged" / "model.safetensors")
            same = all(torch.equal(merged[name], expected[name]) for name in expected)
            failure = "" if merged.keys() == expected.keys() and same else "is merged without an error"
        trials.append(Trial("P6", what, failure))
    return trials


def peer_bases(server: Server, world: Path) -> list[Trial]:
    """Merge into each wrong base."""
    sound, trials = adapted(world / "sound"), []
    for what, change in WRONG_BASES.items():
        other = copy(sound, world / "wrong")
        change(other / "base")
        failure = "is merged without an error" if _merged(server, other).code == 0 else ""
        trials.append(Trial("P6", f"base with {what}", failure))
    return trials


def peer_divergence(server: Server, world: Path) -> list[Trial]:
    """Let training diverge: it must not end as a success with weights that are not finite."""
    write_world(world, SETTINGS[0])
    cases = {place: {"place": place} for place in ("the loss", "one gradient", "a frozen weight")}
    trials = []
    for number, (what, options) in enumerate({**cases, "a learning rate of 1e30": {"learning_rate": 1e30}}.items()):
        run = world / f"run-{number}"
        found = _trained(server, world, output=run.name, **options)
        finite = found.code or all(bool(torch.isfinite(tensor).all()) for tensor in _final(run).values())
        failure = "" if found.code else "ends as a success" + ("" if finite else ", its weights not finite")
        trials.append(Trial("P12", what, failure))
    return trials
