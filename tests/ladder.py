"""Every method of the ladder at a pico model's size, and what it can be put on: `from ladder import ...`."""

from __future__ import annotations

from toolkit.config.methods import (
    AdaloraMethod,
    BiasMethod,
    FullMethod,
    GradualMethod,
    HeadMethod,
    Ia3Method,
    LastNMethod,
    LnTuningMethod,
    LoraMethod,
    Method,
    PrefixMethod,
    VeraMethod,
    leaves_adapter,
)

LORA = LoraMethod(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")


def lora(variant: str) -> LoraMethod:
    return LORA.model_copy(update={"variant": variant})


LADDER: dict[str, Method] = {
    "head": HeadMethod(name="head"),
    "last_n": LastNMethod(name="last_n", n=1, layer_decay=0.5),
    "gradual": GradualMethod(name="gradual"),
    "bias": BiasMethod(name="bias"),
    "lora": LORA,
    "rslora": lora("rslora"),
    "dora": lora("dora"),
    "pissa": lora("pissa"),
    "eva": lora("eva"),
    "lora_fa": lora("lora_fa"),
    "lora_plus": LORA.model_copy(update={"lora_plus_ratio": 16.0}),
    "lora_last": LORA.model_copy(update={"layers": "last_1", "variant": "dora"}),
    "adalora": AdaloraMethod(
        name="adalora", init_r=4, target_r=2, every=2, lora_dropout=0.0, target_modules="all-linear"
    ),
    "vera": VeraMethod(name="vera", r=8, target_modules="all-linear"),
    "vera_last": VeraMethod(name="vera", r=8, layers="last_1"),
    "ia3": Ia3Method(name="ia3"),
    "ia3_all": Ia3Method(name="ia3", target_modules="all-linear"),
    "prefix": PrefixMethod(name="prefix", num_virtual_tokens=3),
    "ln_tuning": LnTuningMethod(name="ln_tuning"),
    "full": FullMethod(name="full", layer_decay=0.9),
}
ADAPTERS = {name: method for name, method in LADDER.items() if leaves_adapter(method)}
FAMILY_NAMES = ("gpt2", "distilbert")


def stands_on(name: str, *, family: str = "gpt2", storage: str = "fp32") -> bool:
    """Whether the recipe check lets a method onto a base; the checks themselves are tested with the rules."""
    method = LADDER[name]
    variant = getattr(method, "variant", "")
    if method.name == "prefix" and family == "distilbert":
        return False
    if storage == "fp32":
        return True
    return leaves_adapter(method) and variant != "pissa" and not (variant == "dora" and storage == "int8")


def cases(*, storages: tuple[str, ...] = ("fp32", "nf4", "int8"), adapters: bool = False) -> list[tuple[str, str, str]]:
    """Return (method, family, storage) of everything that can be trained."""
    return [
        (name, family, storage)
        for name in (ADAPTERS if adapters else LADDER)
        for family in FAMILY_NAMES
        for storage in storages
        if stands_on(name, family=family, storage=storage)
    ]
