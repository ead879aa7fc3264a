"""The training loop: a step, when to log, evaluate, save and stop."""

from __future__ import annotations

import math
import pathlib
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from toolkit.adapters.apply import load_trainable_state
from toolkit.adapters.schedule import MethodSchedule
from toolkit.config.schema import Recipe
from toolkit.errors import DivergedError, StoppedError
from toolkit.parameters import trained_parameters
from toolkit.resident import return_freed_memory
from toolkit.runtime import held_memory, is_out_of_memory, memory_errors
from toolkit.training.checkpoint import Checkpoint, load_best, rotate, save_checkpoint, steps_on_disk
from toolkit.training.in_backward import InBackward
from toolkit.training.observer import Observer, StepRecord
from toolkit.training.offload import offloading
from toolkit.training.optim import learning_rate
from toolkit.training.plan import Rows, StepPlan
from toolkit.training.shortage import advice, describe, go_on_smaller, go_smaller, nothing_left, split_rows
from toolkit.training.signals import StopSignals
from toolkit.training.state import Progress, capture, restore

# Gradients are whole tensors in every process.
PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Trainer:
    """Trains an objective's model along a plan.

    Args:
        objective: Module whose ``forward(batch)`` is a summed loss (see ``training.objectives``).
        optimizer: Over the parameters that train.
        accelerator: The processes and the precision.
        plan: Which rows each step sees.
        recipe: Settings of training, evaluation and output.
        checkpoints: Folder of the checkpoints.
        inputs: Hashes of data and base, kept in every checkpoint.
        evaluate: Returns validation metrics, or None where there are no validation rows.
        observer: Hears of steps, log lines and evaluations.
        schedule: What the method changes while it trains.
    """

    def __init__(
        self,
        *,
        objective: Any,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        plan: StepPlan,
        recipe: Recipe,
        checkpoints: pathlib.Path,
        inputs: dict[str, str],
        evaluate: Callable[[], dict[str, float]] | None,
        observer: Observer,
        schedule: MethodSchedule | None = None,
    ) -> None:
        self.model: nn.Module = objective.model
        self.accelerator, self.plan, self.recipe = accelerator, plan, recipe
        self.checkpoints, self.inputs = checkpoints, inputs
        self._objective = objective
        # Everything is on its device already; blocks that stay on disk could not be moved.
        streamed = any(parameter.is_meta for parameter in objective.parameters())
        placement = [False, True] if streamed else None
        self._wrapped, self.optimizer = accelerator.prepare(objective, optimizer, device_placement=placement)
        self._evaluate, self._observer = evaluate, observer
        self._schedule = schedule or MethodSchedule()
        self._trained = [parameter for _, parameter in trained_parameters(self.model)]
        in_backward = recipe.training.optimizer_in_backward
        self._in_backward = InBackward(self._trained, optimizer, accelerator) if in_backward else None
        self._signals = StopSignals(accelerator)
        self.progress = Progress()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.progress = restore(checkpoint, self.model, self.optimizer, self.accelerator, self._schedule)
        go_on_smaller(self.progress, self.model)

    def fit(self) -> Progress:
        """Train to the end of the plan, or until patience runs out; leave the best weights in the model.

        Raises:
            DivergedError: On a non-finite loss, gradient or weight, within the step.
            OutOfMemoryError: When a step does not fit.
            StoppedError: After SIGINT or SIGTERM, once a checkpoint is saved.
        """
        with self._signals:
            self._wrapped.train()
            while self.progress.step < self.plan.total_steps and not self.progress.stopped_early:
                loss = self._timed_step()
                self._after_step(loss)
        self._load_best()
        return self.progress

    def release(self) -> None:
        """Let optimizer and wrapped model go; the trainer cannot be used any more."""
        if self._in_backward is not None:
            # The parameters would hold it, and it the optimizer.
            self._in_backward.remove()
        self._wrapped = self.optimizer = self._in_backward = None

    def _timed_step(self) -> float:
        started = time.perf_counter()
        with memory_errors(self._out_of_memory):
            record = self._step(self.progress.step)
        elapsed = time.perf_counter() - started
        self.progress.train_seconds += elapsed
        self.progress.seconds += elapsed
        self.progress.step += 1
        return record

    def _step(self, step: int) -> float:
        """Take one optimizer step over a global batch and return its mean loss."""
        self._schedule.before_step(epoch=self.plan.locate(step)[0], stalls=self.progress.stalls)
        self._rate = learning_rate(step, total=self.plan.total_steps, settings=self.recipe.training)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate * group["rate_scale"]
        loss, tokens = self._gradients(step)
        loss = self._total(loss)
        self._check_finite(loss, "loss", step)
        self._grad_norm = self._clip() if self._in_backward is None else self._in_backward.take_norm()
        if self.accelerator.scaler is None:
            self._check_finite(self._grad_norm, "gradient norm", step)
        if self._in_backward is None:
            self.optimizer.step()
        self._schedule.after_step(step + 1)
        self.optimizer.zero_grad()
        self._check_weights(step)
        self.progress.tokens += int(tokens)
        return loss

    def _gradients(self, step: int) -> tuple[float, float]:
        """Fill the gradients of a step, in smaller pieces where it does not fit; return mean loss share and tokens."""
        rows = self.plan.micro_batches(step, rank=self.accelerator.process_index)
        training, progress = self.recipe.training, self.progress
        while (done := self._attempt(split_rows(rows, progress.pieces), step)) is None:
            self.optimizer.zero_grad()
            return_freed_memory()
            if not go_smaller(progress, self.model, training, rows=max(len(part) for part in rows)):
                raise nothing_left(progress, self._last_good())
            self._observer.warned(describe(training, progress))
        return done

    def _attempt(self, rows: list[Rows], step: int) -> tuple[float, float] | None:
        """Return mean loss share and tokens of a step, or None where memory was out."""
        try:
            batches = [self._objective.batch(part, step=step) for part in rows]
            # The mean is over the whole window, so a short last one and uneven processes weigh every row alike.
            weight = self._total(sum(self._objective.weight(batch) for batch in batches))
            tokens = self._total(float(sum(self._objective.tokens(batch) for batch in batches)))
            loss = 0.0
            for index, batch in enumerate(batches):
                loss += self._backward(self._to_device(batch), weight, last=index == len(batches) - 1)
            return loss, tokens
        except (RuntimeError, MemoryError) as error:
            # The other processes of a launch wait for this one's gradients, or weights have changed: no way back.
            final = self.accelerator.num_processes > 1 or self._in_backward is not None
            if final or not is_out_of_memory(error):
                raise
            return None

    def _backward(self, batch: dict[str, torch.Tensor], weight: float, *, last: bool) -> float:
        """Add one micro-batch's share of the mean loss to the gradients; return that share."""
        synchronise = nullcontext() if last else self.accelerator.no_sync(self._wrapped)
        with synchronise:
            with self.accelerator.autocast(), offloading(self.recipe.training, self.model, batch):
                share = self._wrapped(batch) / weight
            if self._in_backward is not None:
                self._check_finite(float(share.detach()), "loss", self.progress.step)
            # DDP averages gradients over processes; the mean above is already global.
            self.accelerator.backward(share * self.accelerator.num_processes)
        return float(share.detach())

    def _clip(self) -> float:
        limit = self.recipe.training.max_grad_norm
        if self.accelerator.scaler is None and self.accelerator.distributed_type in PLAIN:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
            # torch multiplies by 1 where nothing is to be clipped: two passes over every gradient for nothing.
            if limit is not None and float(norm) + 1e-6 > limit:
                torch.nn.utils.clip_grads_with_norm_(self._trained, limit, norm)
            return float(norm)
        total = self.accelerator.clip_grad_norm_(self._trained, math.inf if limit is None else limit)
        return 0.0 if total is None else float(total)

    def _total(self, value: float) -> float:
        """Return the sum of ``value`` over the processes."""
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, reduction="sum"))

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}

    def _check_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            raise DivergedError(
                f"training diverged: {what} is {value} at step {step + 1} "
                f"(lower training.learning_rate, now {self.recipe.training.learning_rate:g}; {self._last_good()})"
            )

    def _check_weights(self, step: int) -> None:
        # A sum is as good as a norm for this, and twice as fast on a CPU.
        sums = torch.stack([p.detach().sum(dtype=torch.float32) for p in self._trained])
        self._check_finite(float(sums.sum()), "a trained weight", step)

    def _last_good(self) -> str:
        steps = steps_on_disk(self.checkpoints)
        return f"the last checkpoint, step {steps[0]}, is finite" if steps else "no checkpoint was saved yet"

    def _out_of_memory(self) -> str:
        return advice(self.recipe.training, self.progress, self._last_good())

    def _after_step(self, loss: float) -> None:
        progress, step = self.progress, self.progress.step
        progress.pending_loss += loss
        progress.pending_steps += 1
        last = step == self.plan.total_steps
        if step % self.recipe.output.log_every == 0 or last:
            self._write_log()
        self._observer.step(step, loss)
        better = self._is_due(self.recipe.evaluation.every) and self._validate()
        stopping = self._signals.received()
        if better or last or progress.stopped_early or stopping or self._is_due(self.recipe.output.save_every):
            self.save()
        if stopping:
            raise StoppedError(
                f"stopped by {signal.Signals(stopping).name} after step {step}; the same command goes on from there",
                signal_number=stopping,
            )

    def _is_due(self, every: Literal["epoch", "end"] | int) -> bool:
        step = self.progress.step
        if step == self.plan.total_steps:
            return True
        if every == "end":
            return False
        return self.plan.ends_epoch(step) if every == "epoch" else step % every == 0

    def _write_log(self) -> None:
        progress = self.progress
        record = StepRecord(
            step=progress.step,
            epoch=round(self.plan.epoch_of(progress.step), 4),
            loss=progress.pending_loss / progress.pending_steps,
            learning_rate=self._rate,
            grad_norm=self._grad_norm,
            tokens_per_second=round(progress.tokens / progress.train_seconds, 1),
            time=round(time.time(), 3),
            memory=held_memory(self.accelerator.device),
        )
        progress.pending_loss, progress.pending_steps = 0.0, 0
        self._observer.logged(record)

    def _validate(self) -> bool:
        """Evaluate; return whether this is the best so far."""
        if self._evaluate is None:
            return False
        started = time.perf_counter()
        with memory_errors(self._out_of_memory):
            metrics = self._evaluate()
        self._wrapped.train()
        progress = self.progress
        progress.seconds += time.perf_counter() - started
        progress.evaluated[str(progress.step)] = metrics
        self._observer.evaluated(progress.step, metrics)
        self._check_finite(metrics["loss"], "validation loss", progress.step - 1)
        better = self._is_better(metrics)
        if better:
            name = self.recipe.evaluation.metric
            progress.best_step, progress.best_value, progress.best_loss = progress.step, metrics[name], metrics["loss"]
        progress.stale = 0 if better else progress.stale + 1
        progress.stalls += not better
        patience = self.recipe.evaluation.early_stopping_patience
        progress.stopped_early = patience is not None and progress.stale >= patience
        return better

    def _is_better(self, metrics: dict[str, float]) -> bool:
        best, best_loss = self.progress.best_value, self.progress.best_loss
        if best is None or best_loss is None:
            return True
        name = self.recipe.evaluation.metric
        value = metrics[name] if name != "loss" else -metrics[name]
        best = best if name != "loss" else -best
        # Accuracy on a small validation part ties often; the lower loss decides.
        return (value, -metrics["loss"]) > (best, -best_loss)

    def save(self) -> None:
        """Write a checkpoint of this step and let old ones go."""
        started = time.perf_counter()
        progress = self.progress
        tensors, state = capture(self.model, self.optimizer, self.accelerator, progress, self._schedule)
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoints, progress.step, tensors=tensors, state={**state, "inputs": self.inputs})
            protected = set() if progress.best_step is None else {progress.best_step}
            rotate(self.checkpoints, keep=self.recipe.output.keep, protected=protected)
        self.accelerator.wait_for_everyone()
        progress.seconds += time.perf_counter() - started

    def _load_best(self) -> None:
        best = self.progress.best_step
        if best is not None and best != self.progress.step:
            checkpoint = load_best(self.checkpoints / f"step-{best}")
            load_trainable_state(self.model, checkpoint.tensors["trainable"])
