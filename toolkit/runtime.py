"""The machine: device, precision, seeds, memory peaks, environment facts, and the Accelerator.

torch and accelerate are imported inside the functions, so that rooms which need only a process rank stay light.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from toolkit.errors import CapabilityError, OutOfMemoryError, Problem
from toolkit.lean import is_kept_out, uncollected, uncompiled, undistributed
from toolkit.model_index import remember_models
from toolkit.resident import describe_allocator

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

Precision = Literal["fp32", "bf16", "fp16"]
WantedPrecision = Literal["auto", "fp32", "bf16", "fp16"]
MemoryKind = Literal["resident set", "cuda allocated"]


class MemoryUse(TypedDict):
    """Bytes of memory: ``allocated`` and ``reserved`` by CUDA's allocator, 0 elsewhere; ``rss``, the resident set."""

    allocated: int
    reserved: int
    rss: int


# Set for the processes that the toolkit itself starts; its value is the pid of the one that did.
LAUNCHER = "TOOLKIT_LAUNCHER"
PEFT_ASKS = ("peft.import_utils.is_bnb_available", "peft.import_utils.is_bnb_4bit_available")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "tiktoken", "safetensors")


def process_rank() -> int:
    """Return this process's rank as the launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def choose_device(wanted: str = "auto") -> torch.device:
    """Return the device to compute on: CUDA, then Apple's MPS, then the CPU."""
    import torch

    if wanted != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(wanted: WantedPrecision, device: torch.device) -> Precision:
    """Resolve ``auto``: bf16 on CUDA that computes in it, fp16 on older CUDA, fp32 elsewhere."""
    import torch

    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def build_accelerator(
    *, device: torch.device, precision: Precision, tracker: str | None, logging_dir: pathlib.Path
) -> Accelerator:
    """Return accelerate's view of the processes that the launcher started (one without a launcher).

    Raises:
        CapabilityError: If the tracker's library is not installed.
    """
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        right = "pip install 'classifier-toolkit[trackers]', or output.tracker: null"
        raise CapabilityError(Problem("", "output.tracker", f"{tracker} is not installed", right))
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps the first run's precision for the whole process; a second run brings its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=tracker,
        project_dir=str(logging_dir),
    )
    if accelerator.state.deepspeed_plugin is not None:
        # DeepSpeed wants a loader's batch size; ours is a plan of row numbers.
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    return accelerator


def end_processes(accelerator: Accelerator) -> None:
    """Wait for the other processes of a launch, and leave them.

    What DDP made has to be gone before. It would keep the group alive, and end it while it holds Python's lock; the
    group then waits for its thread, and that thread now and then for the lock: a process that never ends.
    """
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()


def seed_everything(seed: int) -> None:
    """Seed torch's generators on every device (the toolkit draws from no other)."""
    import torch

    torch.manual_seed(seed)


@uncollected()
def import_models(*, adapters: bool, quantised: bool) -> None:
    """Import transformers' models, and peft for adapters, without what these bring along and the run has no use for.

    transformers loads scipy for the losses of object detectors (35 MiB), peft loads bitsandbytes wherever it is
    installed (45 MiB).

    Args:
        adapters: Whether the run needs peft.
        quantised: Whether it needs bitsandbytes.
    """
    remember_models()
    with absent("scipy", "transformers.utils.is_scipy_available"), undistributed():
        importlib.import_module("transformers.modeling_utils")
    if quantised:
        with uncompiled():
            importlib.import_module("bitsandbytes")
    if adapters:
        with contextlib.nullcontext() if quantised else absent("bitsandbytes", *PEFT_ASKS):
            importlib.import_module("peft")


def import_sklearn() -> None:
    """Import scikit-learn, where the process is the toolkit's own without pandas: it asks for it, and no table is one.

    23 MiB and half a second.
    """
    with absent("pandas") if is_kept_out() else contextlib.nullcontext():
        importlib.import_module("sklearn.utils")


@contextlib.contextmanager
def absent(library: str, *questions: str) -> Iterator[None]:
    """Keep a library, unless it is there already, out of what is imported inside; it can be imported afterwards.

    Args:
        library: Its name.
        questions: Full names of the functions that answer whether it is installed, and remember what they said.
    """
    if library in sys.modules:
        yield
        return
    # Python's own word for a module that cannot be imported; libraries then do without.
    sys.modules[library] = None  # type: ignore[assignment]
    _ask_again(questions)
    try:
        yield
    finally:
        del sys.modules[library]
        _ask_again(questions)


def _ask_again(questions: tuple[str, ...]) -> None:
    """Make functions forget what they said, be it to the program that calls this one."""
    for question in questions:
        module, _, name = question.rpartition(".")
        if module in sys.modules:
            getattr(sys.modules[module], name).cache_clear()


def end_with_launcher() -> None:
    """On Linux, receive SIGTERM when the launcher dies: it does not pass signals on."""
    # torchrun sets LOCAL_RANK; accelerate launch does not for a single process.
    launched = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", LAUNCHER} & set(os.environ)
    if platform.system() != "Linux" or not launched:
        return
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def use_huge_pages() -> None:
    """Start this program again with glibc asking for huge pages, where Linux hands them out on request.

    Steps on full-size models free and take hundreds of MiB; in pages of 4 KiB a seventh of their time goes into page
    faults (two CPU cores: GPT-2 LoRA 597 -> 496 ms, DistilBERT full 550 -> 453 ms a step). glibc reads the setting
    before Python runs, hence the new start; a GLIBC_TUNABLES of the user's own is left alone.
    """
    setting = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc" or not setting.exists():
        return
    if "[madvise]" in setting.read_text():
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is out; torch has a class of its own for CUDA alone."""
    import torch

    # oneDNN does not say why it has no kernel; that it has one was tried before (``training.gemm``).
    words = ("can't allocate memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED", "could not create a primitive")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


@contextlib.contextmanager
def memory_errors(line: Callable[[], str]) -> Iterator[None]:
    """Turn what libraries raise when memory is out into the one line that says what to change.

    Raises:
        OutOfMemoryError: In the place of theirs.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(line()) from error


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak measurement."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clear_refs = pathlib.Path("/proc/self/clear_refs")
    if clear_refs.exists():
        # proc(5): writing 5 resets the peak resident set size.
        clear_refs.write_text("5")


def memory_kind(device: torch.device) -> MemoryKind:
    """Return what decides whether a run fits: what CUDA's allocator handed out, or the process's resident set."""
    return "cuda allocated" if device.type == "cuda" else "resident set"


def held_memory(device: torch.device) -> MemoryUse:
    """Return the bytes held now."""
    import psutil
    import torch

    on_card = device.type == "cuda"
    return {
        "allocated": torch.cuda.memory_allocated(device) if on_card else 0,
        "reserved": torch.cuda.memory_reserved(device) if on_card else 0,
        "rss": int(psutil.Process().memory_info().rss),
    }


def peak_memory(device: torch.device) -> MemoryUse:
    """Return the most bytes held since the last reset; where the system cannot reset it, ``rss`` is of all the time."""
    import torch

    on_card = device.type == "cuda"
    return {
        "allocated": torch.cuda.max_memory_allocated(device) if on_card else 0,
        "reserved": torch.cuda.max_memory_reserved(device) if on_card else 0,
        "rss": _peak_resident(),
    }


def _peak_resident() -> int:
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def available_bytes() -> int:
    """Return the bytes of memory that the machine could still give this process."""
    import psutil

    return int(psutil.virtual_memory().available)


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to repeat a figure: versions, device, threads, platform."""
    import torch

    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts["cpu"] = cpu_name()
    facts["threads"] = torch.get_num_threads()
    facts["allocator"] = describe_allocator()
    return facts


def cpu_name() -> str:
    """Return what the processor calls itself; on x86 with its generation, which a virtual machine leaves out."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    if cpuinfo.exists():
        for line in reversed(cpuinfo.read_text().splitlines()):
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    if "model name" in facts:
        generation = [f"{name.removeprefix('cpu ')} {facts[name]}" for name in ("cpu family", "model") if name in facts]
        return facts["model name"] + (f" ({', '.join(generation)})" if generation else "")
    return platform.processor() or platform.machine()
