"""Keeps torch's compiler out of a process that compiles nothing: 75 MiB of memory, a second and a half of its start.

Optimizers, and transformers as it is imported, ask ``torch._dynamo`` to leave functions alone that it would compile;
peft asks whether a weight is one of ``torch.distributed.tensor``, which brings the compiler, too. Where nothing
compiles and nothing is distributed the answers are known, and neither package is needed, nor sympy behind them. Any
other question gets the real ones.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import operator
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

COMPILER, TENSORS = "torch._dynamo", "torch.distributed.tensor"
# transformers' masks import one class by name, recomputed blocks ask for a setting, a range without memory is checked.
MASKS, CONFIG = f"{COMPILER}._trace_wrapped_higher_order_op", f"{COMPILER}.config"
SHAPES = "torch.fx.experimental.symbolic_shapes"
DISTRIBUTED = "is_torch_distributed_available"


def keep_compiler_out() -> None:
    """Let a process of the toolkit's own, one that is not part of a larger run, do without torch's compiler.

    Before torch is imported. Not for the process of somebody who may want the compiler for other work.
    """
    if "torch" in sys.modules or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return

    def as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if callable(function) else as_it_is

    def to_index() -> Any:
        return _real(MASKS).TransformGetItemToIndex()

    marks = dict.fromkeys(("disable", "assume_constant_result", "allow_in_graph"), as_it_is)
    config = StandIn(CONFIG, error_on_nested_fx_trace=True, patch=lambda **_: contextlib.nullcontext())
    StandIn(COMPILER, **marks, graph_break=lambda: None, config=config, __path__=[])
    StandIn(MASKS, TransformGetItemToIndex=to_index)
    StandIn(SHAPES, expect_true=bool, sym_eq=operator.eq)
    StandIn(TENSORS, DTensor=type("DTensor", (), {}), __path__=[])
    sys.meta_path.insert(0, _Finder())


def is_kept_out() -> bool:
    """Return whether no compiler is there, as ``keep_compiler_out`` arranged it."""
    return isinstance(sys.modules.get(COMPILER), StandIn)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import without a look for garbage at every few hundred objects, where the process is the toolkit's own.

    A sixth of the time; there is none, and what was imported need not be looked at again.
    """
    if not is_kept_out() or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def undistributed() -> Iterator[None]:
    """Import parts of transformers without what they have for distributed models, where the compiler is kept out."""
    if not is_kept_out():
        yield
        return
    import torch

    torch.distributed.tensor = sys.modules[TENSORS]
    places = [importlib.import_module(name) for name in ("transformers.utils", "transformers.utils.import_utils")]
    real = getattr(places[0], DISTRIBUTED)
    for place in places:
        setattr(place, DISTRIBUTED, lambda: False)
    try:
        yield
    finally:
        for place in places:
            setattr(place, DISTRIBUTED, real)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Import bitsandbytes without functions that are compiled at their first call, where the compiler is kept out.

    It tries, and takes what is not compiled instead; on CPU and CUDA other kernels serve.
    """
    import torch

    if not is_kept_out():
        yield
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("nothing is compiled here")

    real = torch.compile
    torch.compile = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real


class StandIn(types.ModuleType):
    """Stands for a module, and knows some of its names; asked for another, it makes way for the real one.

    Args:
        name: Of the module.
        known: What it answers itself.
    """

    def __init__(self, name: str, **known: Any) -> None:
        super().__init__(name)
        self.__dict__.update(known)
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # ``inspect`` asks every module for its file.
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> types.ModuleType:
    """Return a module behind a stand-in, imported now; the other stand-ins go with it."""
    for other in (COMPILER, CONFIG, MASKS, SHAPES, TENSORS):
        if isinstance(sys.modules.get(other), StandIn):
            del sys.modules[other]
    return importlib.import_module(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules inside of those that have a stand-in, which makes way."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package = next((one for one in (COMPILER, TENSORS) if name.startswith(f"{one}.")), None)
        if package is None or not isinstance(sys.modules.get(package), StandIn):
            return None
        _real(name)
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Return the module that is there by now."""
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: it has run."""
