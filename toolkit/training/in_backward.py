"""Updates each weight while the backward pass still runs, so that gradients never lie in memory together.

The update of a weight by AdamW or SGD reads its own gradient alone, so nothing changes but the peak: at most a few
gradients at a time instead of a second copy of what trains. It rules out what needs all gradients at once: clipping by
their norm, accumulation, a loss scale, a step that is taken again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn

from toolkit.errors import CapabilityError, Problem
from toolkit.resident import return_freed_memory

# Bytes of a gradient from which its going leaves a hole worth giving back.
LARGE = 1 << 20


class InBackward:
    """Hooks that take an optimizer's step for one parameter as soon as its gradient is complete.

    Args:
        parameters: Those that train.
        optimizer: Over them; its learning rates are set before the backward pass.
        accelerator: Must be one process without a loss scale.

    Raises:
        CapabilityError: More than one process, or fp16 with a loss scale.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, accelerator: Accelerator
    ) -> None:
        if accelerator.num_processes > 1 or accelerator.scaler is not None:
            wrong = "several processes and fp16's loss scale need all gradients before the first update"
            right = "false, or one process with precision fp32 or bf16"
            raise CapabilityError(Problem("", "training.optimizer_in_backward", wrong, right))
        self._optimizer = optimizer
        self._norms: list[torch.Tensor] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._update)  # type: ignore[no-untyped-call]
            for parameter in parameters
        ]

    def _update(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._norms.append(torch.linalg.vector_norm(parameter.grad))
        # Every other parameter has no gradient now, and is left alone.
        self._optimizer.step()
        parameter.grad = None
        if parameter.is_cpu and parameter.nbytes >= LARGE:
            # The moments that the first step makes lie between gradients and activations: glibc's heap keeps what is
            # free between them, and the largest gradient, the token embedding's, comes last and on top.
            return_freed_memory()

    def remove(self) -> None:
        """Let parameters and optimizer be as they were."""
        for hook in self._hooks:
            hook.remove()

    def take_norm(self) -> float:
        """Return the norm of all gradients since the last call; 0 without any."""
        norms, self._norms = self._norms, []
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
