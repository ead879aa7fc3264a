"""Turns a recipe's method section into the config that peft builds it from, and into what its file must say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.adapters.methods import adapted_blocks, target_modules
from toolkit.config.methods import (
    AdaloraMethod,
    AdapterMethod,
    Ia3Method,
    LayeredMethod,
    LnTuningMethod,
    LoraMethod,
    PrefixMethod,
    VeraMethod,
)
from toolkit.families import Family

if TYPE_CHECKING:
    from peft import PeftConfig

# peft wants the number of steps before it is known; schedule.AdaloraSchedule sets it.
STEPS_UNKNOWN = 1 << 30


def peft_config(method: AdapterMethod, family: Family, *, base_name: str, blocks: int, seed: int = 0) -> PeftConfig:
    """Return peft's config for a sequence classifier, or a causal language model where the family has no head.

    Args:
        method: The recipe's `method` section.
        family: The architecture.
        base_name: Hub id or absolute folder that stock peft will load the base from.
        blocks: How many the base has.
        seed: Of VeRA's frozen matrices, which peft draws by a key of their own.

    Raises:
        RecipeError: A target module that the architecture lacks, or more layers than the base has.
    """
    # Checked before peft is imported.
    own = _own(method, family, blocks=blocks, seed=seed)
    import peft

    config_class: Any = {
        LoraMethod: peft.LoraConfig,
        AdaloraMethod: peft.AdaLoraConfig,
        VeraMethod: peft.VeraConfig,
        Ia3Method: peft.IA3Config,
        PrefixMethod: peft.PrefixTuningConfig,
        LnTuningMethod: peft.LNTuningConfig,
    }[type(method)]
    return config_class(
        task_type=peft.TaskType.SEQ_CLS if family.head else peft.TaskType.CAUSAL_LM,
        base_model_name_or_path=base_name,
        modules_to_save=list(family.head) or None,
        **own,
    )


def _own(method: AdapterMethod, family: Family, *, blocks: int, seed: int) -> dict[str, Any]:
    """Return the arguments that are the method's own."""
    if isinstance(method, PrefixMethod):
        return {"num_virtual_tokens": method.num_virtual_tokens}
    # DistilBERT's head layers are plain Linear: without this a user's pattern could adapt and train them both.
    apart = {"exclude_modules": list(family.head) or None}
    if isinstance(method, LnTuningMethod):
        return {"target_modules": list(family.norms)} | apart
    targets = target_modules(method, family)
    own: dict[str, Any] = {"target_modules": targets, "fan_in_fan_out": family.fan_in_fan_out}
    if isinstance(method, Ia3Method):
        return own | apart | {"feedforward_modules": feedforward(targets, family)}
    own |= _layer_choice(method, family, blocks=blocks)
    if isinstance(method, VeraMethod):
        more = {"r": method.r, "d_initial": method.d_initial, "vera_dropout": method.vera_dropout}
        return own | more | {"projection_prng_key": seed}
    own |= apart | {"lora_alpha": method.lora_alpha, "lora_dropout": method.lora_dropout}
    if isinstance(method, LoraMethod):
        # EVA's start needs texts: adapters.eva gives it once the model stands.
        start = {"init_lora_weights": "pissa"} if method.variant == "pissa" else {}
        return own | start | {"r": method.r} | _flags(method)
    return own | {
        "init_r": method.init_r,
        "target_r": method.target_r,
        "orth_reg_weight": method.orthogonal_weight,
        "deltaT": method.every,
        "total_step": STEPS_UNKNOWN,
    }


def _flags(method: LoraMethod) -> dict[str, bool]:
    flags = {"rslora": "use_rslora", "dora": "use_dora"}
    return {flags[method.variant]: True} if method.variant in flags else {}


def feedforward(targets: list[str], family: Family) -> list[str]:
    """Return the target names whose input IA3 scales, and not their output: the MLP's second layer."""
    return [name for name in targets if name == family.mlp_out or name.endswith(f".{family.mlp_out}")]


def _layer_choice(method: LayeredMethod, family: Family, *, blocks: int) -> dict[str, Any]:
    """Return peft's words for "these blocks": their numbers, and the name of the list that holds them.

    Left out where all blocks are adapted, so that such an adapter's config stays as it was.
    """
    chosen = adapted_blocks(method, blocks=blocks)
    if method.layers == "all":
        return {}
    return {"layers_to_transform": list(chosen), "layers_pattern": family.blocks.rpartition(".")[2]}


def saved_settings(method: AdapterMethod, family: Family) -> dict[str, Any]:
    """Return what the config of a saved adapter must say of this method, as peft spells it."""
    if isinstance(method, PrefixMethod):
        return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": method.num_virtual_tokens}
    if isinstance(method, LnTuningMethod):
        return {"peft_type": "LN_TUNING", "target_modules": sorted(family.norms)}
    targets = {"target_modules": sorted(target_modules(method, family))}
    if isinstance(method, Ia3Method):
        return targets | {"peft_type": "IA3", "feedforward_modules": feedforward(targets["target_modules"], family)}
    if isinstance(method, VeraMethod):
        return targets | {"peft_type": "VERA", "r": method.r}
    if isinstance(method, AdaloraMethod):
        # Saved as LoRA with the singular values and the scale inside B (adapters.as_lora).
        return targets | {"peft_type": "LORA", "r": method.init_r, "lora_alpha": method.init_r}
    # PiSSA is saved as the difference from its start: two adapters side by side.
    width = 2 if method.variant == "pissa" else 1
    flags = {"use_rslora": False, "use_dora": False} | _flags(method)
    return targets | flags | {"peft_type": "LORA", "r": width * method.r, "lora_alpha": width * method.lora_alpha}
