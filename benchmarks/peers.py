"""What the benchmarks share: full-size models with random weights, texts of known lengths, and the peer's training run.

The peer is the Trainer of transformers, with peft where adapters train. "defaults": batches of 8 in random order, each
padded to its longest row (the Trainer's own collator). "tuned": as by a user who has read all of its documentation:
batches of like length, the fused optimizer (its default), and the fastest of the batch sizes 8, 16 and 32. Dropout is 0
on both sides, so that neither pays for random numbers.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from toolkit.data.bpe import FOLDER as VOCABULARY
from toolkit.families import FAMILIES
from toolkit.runtime import environment

RESULTS = pathlib.Path(__file__).parent / "results"
WITHOUT_BF16 = "_without_bf16"
# Log-normal lengths in tokens: mean, spread, longest.
LENGTHS = {"short": (22, 0.75, 120), "long": (230, 0.6, 512)}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(
        num_labels=2, pad_token_id=50256, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
    ),
    "distilbert": lambda: transformers.DistilBertConfig(
        num_labels=2, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0
    ),
}
MODELS: dict[str, Any] = {
    "gpt2": transformers.GPT2ForSequenceClassification,
    "distilbert": transformers.DistilBertForSequenceClassification,
}


def draw_lengths(kind: str, rows: int, seed: int) -> np.ndarray:
    mean, sigma, longest = LENGTHS[kind]
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, rows)
    return np.clip(np.round(drawn), 3, longest).astype(np.int64)


def draw_rows(kind: str, rows: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Return token ids of texts and their labels."""
    chance = np.random.default_rng(seed + 1)
    texts = [chance.integers(1000, 20_000, length).tolist() for length in draw_lengths(kind, rows, seed)]
    return texts, chance.integers(0, 2, rows).tolist()


def save_array(path: pathlib.Path, texts: list[list[int]], labels: list[int]) -> None:
    """Write rows as .npy: ids padded with 0, the label last."""
    table = np.zeros((len(texts), max(map(len, texts)) + 1), dtype=np.int32)
    for row, (ids, label) in enumerate(zip(texts, labels, strict=True)):
        table[row, : len(ids)] = ids
        table[row, -1] = label
    np.save(path, table)


def save_base(folder: pathlib.Path, family: str, **changes: Any) -> pathlib.Path:
    """Write a full-size base with random weights and a real tokenizer; ``changes`` go into its config."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.update(changes)
    model = MODELS[family](config)
    model.save_pretrained(folder)
    if family == "gpt2":
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(VOCABULARY / name, folder / name)
    else:
        from toolkit.models.base import EMBEDDED

        for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
            if (EMBEDDED / "distilbert-mini" / name).exists():
                shutil.copy(EMBEDDED / "distilbert-mini" / name, folder / name)
    return folder


def collate(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[place, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def peer_model(base: pathlib.Path, family: str, method: str, *, dropout: float = 0.0, **options: Any) -> Any:
    """Return the peer's model; ``options`` go to ``from_pretrained``, ``dropout`` is that of LoRA."""
    model = MODELS[family].from_pretrained(base, **options)
    if family == "gpt2":
        model.config.use_cache = False
    if method == "lora":
        from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

        if options:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        targets = list(FAMILIES[family].lora_auto)
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=16, lora_alpha=32, lora_dropout=dropout,
                            target_modules=targets, fan_in_fan_out=family == "gpt2" and not options)  # fmt: skip
        return get_peft_model(model, config)
    if method == "last_n":
        last = len(list(model.get_submodule(FAMILIES[family].blocks))) - 1
        trained = (f"{FAMILIES[family].blocks}.{last}.", str(FAMILIES[family].final_norm), *FAMILIES[family].head)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
    return model


def peer_train(model: Any, texts: list[list[int]], labels: list[int], *, folder: pathlib.Path, batch_size: int,
               grouped: bool, epochs: int, callbacks: Any = None, **settings: Any) -> float:  # fmt: skip
    """Run the peer's training loop and return its seconds; ``settings`` are more TrainingArguments."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch_size, num_train_epochs=epochs, learning_rate=1e-4,
        use_cpu=True, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        train_sampling_strategy="group_by_length" if grouped else "random", **settings,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(texts, labels, strict=True)]
    pad_id = int(model.config.pad_token_id)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks,
                                   data_collator=lambda b: collate(b, pad_id))  # type: ignore[arg-type]  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def peak_gflops() -> float:
    """Return the fastest fp32 matrix product of this machine, in GFLOP/s: the limit of any training step."""
    best = 0.0
    for rows, inner, columns in ((2048, 768, 3072), (2048, 3072, 768), (4096, 1024, 1024)):
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        for _ in range(8):
            started = time.perf_counter()
            a @ b
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started) / 1e9)
    return best


def multiplies_bf16() -> bool:
    """Return whether this processor multiplies bf16 faster than fp32; without instructions for it, it is far slower."""
    hidden, weight = torch.randn(256, 768), torch.randn(768, 768)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        low, lower = hidden.to(dtype), weight.to(dtype)
        tries = []
        for _ in range(8):
            started = time.perf_counter()
            torch.nn.functional.linear(low, lower)
            tries.append(time.perf_counter() - started)
        seconds[dtype] = min(tries)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def kind_of_processor() -> str:
    """Return what the names of results end with: those of processors with and without bf16 stand beside each other."""
    return "" if multiplies_bf16() else WITHOUT_BF16


def needed_flops(family: str, method: str, tokens: int) -> float:
    """Return the multiplications and additions in linear layers that an epoch cannot do without.

    A block is 12 squares of the width (attention 4, MLP 8). Of the last one, only keys and values (2) see every token.
    Backwards, a frozen weight costs one product (the gradient of its input), a trained one two; below the first adapter
    there is none (query, key and value of the first block, 3 squares). Attention and adapters are left out.
    """
    blocks, square = (12 if family == "gpt2" else 6), 768**2
    forward = 12 * (blocks - 1) + 2
    backward = forward - 3 if method == "lora" else 2 * forward
    return 2.0 * square * (forward + backward) * tokens


def spread(ratios: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(ratios), 2), "min": round(min(ratios), 2), "max": round(max(ratios), 2)}


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Return the spread of the ratios of each round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def write(name: str, record: dict[str, Any]) -> None:
    """Write a result beside machine and date."""
    whole = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {**environment(torch.device("cpu")), "cores": os.cpu_count()},
        **record,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
