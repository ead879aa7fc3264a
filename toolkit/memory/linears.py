"""The linear layers of a block as sizes, with the adapters that a method puts on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from toolkit.adapters.methods import target_modules
from toolkit.config.methods import AdaloraMethod, Ia3Method, LoraMethod, TargetedMethod, VeraMethod
from toolkit.families import Family


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    Attributes:
        name: Its suffix in the family's table.
        fan_in: Input width.
        fan_out: Output width.
        rank: Rank of the adapter on it; 0 without one, and for IA3, which scales.
        down: Elements of the adapter's first half that train.
        up: Elements of its second half that train, with vectors and IA3's scale.
        fixed: Elements of the adapter that do not train.
        scaled: Elements of the trained vector that the adapter's output, or both outputs, are multiplied with.
        normed: Whether norms of the whole weight are taken in every pass.
    """

    name: str
    fan_in: int
    fan_out: int
    rank: int = 0
    down: int = 0
    up: int = 0
    fixed: int = 0
    scaled: int = 0
    normed: bool = False

    @property
    def weight(self) -> int:
        """Elements of the weight."""
        return self.fan_in * self.fan_out


def block_linears(family: Family, *, width: int, inner: int, method: TargetedMethod | None) -> tuple[Linear, ...]:
    """Return the linear layers of one block, in the order they run.

    Args:
        family: The architecture.
        width: Of the residual stream.
        inner: Of the MLP.
        method: What adapts them, or None.

    Raises:
        RecipeError: Targets that match no layer.
    """
    targets = target_modules(method, family) if method else []
    found = []
    for name in family.linear:
        last = name.rpartition(".")[2]
        fan_in = inner if name == family.mlp_out else width
        fan_out = {"c_attn": 3 * width, "c_fc": inner, "lin1": inner}.get(last, width)
        layer = Linear(name, fan_in, fan_out)
        adapted = method is not None and any(_matches(name, target) for target in targets)
        found.append(_adapted(layer, method, family) if adapted and method is not None else layer)
    return tuple(found)


def _adapted(layer: Linear, method: TargetedMethod, family: Family) -> Linear:
    """Return a layer with its adapter's sizes."""
    if isinstance(method, Ia3Method):
        # The second layer of the MLP is scaled at its input, the others at their output.
        return replace(layer, up=layer.fan_in if layer.name == family.mlp_out else layer.fan_out)
    if isinstance(method, VeraMethod):
        return replace(layer, rank=method.r, down=method.r, up=layer.fan_out, scaled=layer.fan_out)
    rank = method.r if isinstance(method, LoraMethod) else method.init_r
    down, up = rank * layer.fan_in, rank * layer.fan_out
    if isinstance(method, AdaloraMethod):
        # Singular values train too; the rank is kept as a number beside them.
        return replace(layer, rank=rank, down=down + rank, up=up, fixed=1)
    if method.variant == "lora_fa":
        return replace(layer, rank=rank, up=up, fixed=down)
    if method.variant == "dora":
        return replace(layer, rank=rank, down=down, up=up + layer.fan_out, scaled=layer.fan_out, normed=True)
    return replace(layer, rank=rank, down=down, up=up)


def _matches(name: str, target: str) -> bool:
    """Return whether a target names this layer, by peft's rule: the whole name or a dotted end of it."""
    return name == target or name.endswith(f".{target}") or target.endswith(f".{name}")
