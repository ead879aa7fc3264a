"""P6, P7: adapters that were altered, bases that are another, and merges that are held against the live model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked import Answer, Server
from pico import build_pico
from safetensors.torch import load_file, save_file
from trained import INT8, LORA, MAX_LENGTH, NF4, build_run, facts_of
from world import Trial, copy

from toolkit.config.schema import ModelSettings
from toolkit.export.artifact import write_manifest
from toolkit.models.base import resolve_base

MERGE, PREDICT = ("merge", "run", "-o", "merged"), ("predict", "run", "texts.txt")
HEAD = "base_model.model.score.weight"
PAIR = "base_model.model.transformer.h.1.mlp.c_fc.lora_{}.weight"
Change = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]


def tensors_of(file: str, change: Callable[[Tensors], object]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return apply


def adapter(change: Callable[[Tensors], object]) -> Change:
    return tensors_of("adapter_model.safetensors", change)


def json_of(file: str, **changes: Any) -> Change:
    def apply(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def settings(**changes: Any) -> Change:
    return json_of("adapter_config.json", **changes)


def _raw(change: Callable[[bytearray], object], file: str = "adapter_model.safetensors") -> Change:
    def apply(folder: Path) -> None:
        raw = bytearray((folder / file).read_bytes())
        change(raw)
        (folder / file).write_bytes(raw)

    return apply


def _bit(raw: bytearray) -> None:
    raw[-5] ^= 4


def _half(raw: bytearray) -> None:
    del raw[len(raw) // 2 :]


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@dataclass(frozen=True)
class Altered:
    """One way in which an adapter is not what was trained.

    Attributes:
        change: Given the adapter's folder.
        named: What the refusal names, once the manifest's hashes are made to fit; None where only a hash can tell.
    """

    change: Change
    named: str | None


ALTERED = {
    "the head is absent": Altered(adapter(lambda t: t.pop(HEAD)), "the trained head is absent"),
    "half of a pair is absent": Altered(adapter(lambda t: t.pop(PAIR.format("A"))), "half of a LoRA pair is absent"),
    "a pair is absent": Altered(
        adapter(lambda t: [t.pop(PAIR.format(half)) for half in "AB"]), "a LoRA pair is absent"
    ),
    "a tensor more": Altered(adapter(lambda t: t.update(extra=torch.zeros(1))), "an unexpected tensor"),
    "NaN in the head": Altered(adapter(lambda t: t[HEAD].fill_(float("nan"))), "NaN or infinity"),
    "infinity in a pair": Altered(adapter(lambda t: t[PAIR.format("B")].fill_(float("inf"))), "NaN or infinity"),
    "whole numbers": Altered(adapter(lambda t: t.update({HEAD: t[HEAD].int()})), "torch.int32"),
    "another shape": Altered(adapter(lambda t: t.update({HEAD: t[HEAD][:-1].contiguous()})), "shape"),
    "another r": Altered(settings(r=8), "r: is 8"),
    "another lora_alpha": Altered(settings(lora_alpha=80), "lora_alpha: is 80"),
    "other target modules": Altered(settings(target_modules=["attn.c_attn"]), "target_modules"),
    "another kind of adapter": Altered(settings(peft_type="LOHA"), "peft_type"),
    "another variant of LoRA": Altered(settings(use_rslora=True), "use_rslora"),
    "alpha by layer": Altered(settings(alpha_pattern={"attn.c_attn": 64}), "alpha_pattern"),
    "a head that is not kept": Altered(settings(modules_to_save=None), "modules_to_save"),
    "a pickle": Altered(_pickle, "never unpickled"),
    "half a file": Altered(_raw(_half), "damaged"),
    "one bit": Altered(_raw(_bit), None),
}


def _swap_blocks(tensors: Tensors) -> None:
    first = {name: tensors[name] for name in tensors if ".h.0." in name}
    for name in first:
        other = name.replace(".h.0.", ".h.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def weights(change: Callable[[Tensors], object]) -> Change:
    return tensors_of("model.safetensors", change)


def _another(family: str = "gpt2", **options: Any) -> Change:
    def apply(folder: Path) -> None:
        shutil.rmtree(folder)
        build_pico(folder, family, **options)

    return apply


def _halve(tensors: Tensors) -> None:
    for name in tensors:
        tensors[name] = tensors[name].half()


def _shorter(folder: Path) -> None:
    weights(lambda t: [t.pop(name) for name in list(t) if ".h.1." in name])(folder)
    json_of("config.json", n_layer=1)(folder)


def _more_words(tensors: Tensors) -> None:
    name = next(name for name in tensors if name.endswith("wte.weight"))
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def _wider_vocabulary(folder: Path) -> None:
    weights(_more_words)(folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    json_of("config.json", vocab_size=size + 1)(folder)


WRONG_BASES: dict[str, Change] = {
    "other weights of the same shapes": _another(seed=1),
    "one bit": _raw(_bit, "model.safetensors"),
    "another width": _another(width=96),
    "another family": _another("distilbert"),
    "a block less": _shorter,
    "a token more": _wider_vocabulary,
    "stored in half precision": weights(_halve),
    "two blocks swapped": weights(_swap_blocks),
    "another layer norm": json_of("config.json", layer_norm_epsilon=1e-3),
}


def adapted(world: Path) -> Path:
    """Write a base and a run with an adapter of it; return the world."""
    build_pico(world / "base", "gpt2")
    build_run(world / "run", world / "base")
    (world / "texts.txt").write_text("free prize call now\nsee you\n")
    return world


def _remake_manifest(world: Path) -> None:
    base = resolve_base(ModelSettings(base=str(world / "base"), max_length=MAX_LENGTH))
    write_manifest(world / "run" / "adapter", facts_of(base, method=LORA.model_dump(), quantization=None, adapter=True))


def altered_adapters(server: Server, world: Path, *, chosen: Iterable[str] = ALTERED) -> list[Trial]:
    """Merge and predict with each altered adapter, by its hashes, and behind hashes that fit."""
    sound, trials = adapted(world / "sound"), []
    for what in chosen:
        altered = ALTERED[what]
        other = copy(sound, world / "altered")
        altered.change(other / "run" / "adapter")
        for command in (MERGE, PREDICT):
            found = server.run(*command, cwd=other)
            trials.append(Trial("P6", f"{command[0]}: {what}", _refused(found, other, "altered|missing|weights that")))
        if altered.named is None:
            continue
        _remake_manifest(other)
        for command in (MERGE, PREDICT):
            found = server.run(*command, cwd=other)
            case = f"{command[0]}: {what}, behind hashes that fit"
            trials.append(Trial("P6", case, _refused(found, other, altered.named)))
    return trials


def wrong_bases(server: Server, world: Path) -> list[Trial]:
    """Merge and predict over each wrong base: refused by both fingerprints, or by what the base is."""
    sound, trials = adapted(world / "sound"), []
    for what, change in WRONG_BASES.items():
        other = copy(sound, world / "wrong")
        _point_to(other)
        change(other / "base")
        for command in (MERGE, PREDICT):
            found = server.run(*command, cwd=other)
            trials.append(Trial("P6", f"{command[0]}: base with {what}", _refused(found, other, "fingerprint sha256:")))
    return trials


def _point_to(world: Path) -> None:
    """Make a copied run name the base beside it."""
    path = world / "run" / "adapter" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["base"] |= dict.fromkeys(("requested", "used", "name_or_path"), str(world / "base"))
    path.write_text(json.dumps(manifest))


def _refused(found: Answer, world: Path, named: str) -> str:
    if found.code != 2:
        return f"exit {found.code}: {found.output[-300:]}"
    if "Traceback" in found.output or not any(word in found.output for word in named.split("|")):
        return f"said {found.output[-300:]}"
    return "something is left at the output" if list(world.glob("*merged*")) else ""


def forced(server: Server, world: Path) -> Trial:
    """``--force`` takes another base and leaves its trace in the output."""
    sound = adapted(world / "sound")
    build_pico(sound / "other", "gpt2", seed=1)
    found = server.run(*MERGE, "--base", "other", "--force", cwd=sound)
    failure = "" if found.code == 0 and "because of force" in found.output else found.output[-300:]
    if not failure:
        manifest = json.loads((sound / "merged" / "manifest.json").read_text())
        other = resolve_base(ModelSettings(base=str(sound / "other"), max_length=MAX_LENGTH)).fingerprint
        if manifest["merge"]["base_fingerprint"] != other or manifest["base"]["fingerprint"] == other:
            failure = f"the manifest says {manifest['merge']}"
    return Trial("P6", "merge: another base, by force", failure)


def merges(server: Server, world: Path) -> list[Trial]:
    """Merge every family and storage; stock logits, read from the folder alone, against the live adapter's."""
    trials = []
    for family in ("gpt2", "distilbert"):
        for storage, quantization, bound in (("fp32", None, 1e-5), ("8-bit", INT8, 0.05), ("4-bit", NF4, 1e-4)):
            place = world / f"{family}-{storage}"
            build_pico(place / "base", family)
            build_run(place / "run", place / "base", quantization=quantization)
            (place / "texts.txt").write_text("free prize call now\nsee you\nhey are we still on for dinner\n")
            found = server.run(*MERGE, cwd=place)
            answers = [server.run("predict", name, "texts.txt", cwd=place) for name in ("run", "merged")]
            failure = "" if found.code == 0 else found.output[-300:]
            failure = failure or _apart(answers, bound=bound) or _same_as_base(place)
            trials.append(Trial("P7", f"{family}, {storage}", failure))
    return trials


def _apart(answers: list[Answer], *, bound: float) -> str:
    live, merged = (
        [json.loads(line)["scores"] for line in found.output.splitlines() if line[:1] == "{"] for found in answers
    )
    if len(live) != 3 or len(merged) != 3:
        return f"{len(live)} and {len(merged)} predictions"
    largest = max(abs(one[label] - other[label]) for one, other in zip(live, merged, strict=True) for label in one)
    return "" if largest <= bound else f"probabilities are {largest:.1e} apart"


def _same_as_base(place: Path) -> str:
    merged, base = (load_file(place / name / "model.safetensors") for name in ("merged", "base"))
    changed = [name for name in merged if name in base and not torch.equal(merged[name], base[name])]
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())
    return "" if changed and finite else "the merge changed nothing, or is not finite"
