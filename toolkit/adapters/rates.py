"""Learning rates that differ within a model: lower blocks learn more slowly, LoRA+'s B faster than its A."""

from __future__ import annotations

import re
from collections.abc import Callable

from toolkit.config.methods import LoraMethod, Method
from toolkit.families import Family


def rate_scales(method: Method, family: Family, *, blocks: int) -> Callable[[str], float]:
    """Return a parameter's learning rate over the recipe's, by the parameter's name.

    With a layer decay d, the head and the norm behind the last block have 1, the last block d, the one below d squared,
    and the embeddings one power more than the first block (Howard & Ruder 2018, section 3.2, with d = 1/2.6).

    Args:
        method: The recipe's `method` section.
        family: The architecture.
        blocks: How many the model has.
    """
    decay = getattr(method, "layer_decay", 1.0)
    ratio = method.lora_plus_ratio if isinstance(method, LoraMethod) else 1.0
    in_block = re.compile(rf"(?:^|\.){re.escape(family.blocks)}\.(\d+)\.")

    def scale(name: str) -> float:
        if ".lora_B." in name:
            return ratio
        if found := in_block.search(name):
            return float(decay ** (blocks - int(found[1])))
        embedded = any(name.startswith(f"{path}.") for path in family.embeddings)
        return float(decay ** (blocks + 1)) if embedded else 1.0

    return scale
