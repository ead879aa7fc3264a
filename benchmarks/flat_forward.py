"""Is a step without padding faster than the padded one? The same model, the same batches, in turns.

    OMP_NUM_THREADS=2 python benchmarks/flat_forward.py

Full-size GPT-2 124M and DistilBERT 66M with random weights, batch 8, SMS-like lengths (mean about 22 tokens, at most
120), dropout 0, float32. A is stock transformers' forward on the batch padded to its longest row, B the toolkit's; both
run the backward pass and the optimizer's step (torch's fused AdamW). Ratios are of the same batch in the same round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from toolkit.adapters.apply import apply_method
from toolkit.config.schema import FullMethod, LoraMethod
from toolkit.families import FAMILIES
from toolkit.models.forward import CLASSIFIERS, classify
from toolkit.runtime import environment

RESULTS = Path(__file__).parent / "results" / "flat_forward.json"
BATCH, LONGEST = 8, 120
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        num_labels=2, pad_token_id=50256, use_cache=False, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
    ),
    "distilbert": lambda: transformers.DistilBertConfig(
        num_labels=2, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0
    ),
}
STOCK: dict[str, Any] = {
    "gpt2": transformers.GPT2ForSequenceClassification,
    "distilbert": transformers.DistilBertForSequenceClassification,
}
METHODS: dict[str, Any] = {"lora": LoraMethod(r=16, lora_alpha=32, lora_dropout=0.0), "full": FullMethod(name="full")}
Batch = dict[str, torch.Tensor]


def sms_lengths(rows: int, seed: int) -> np.ndarray:
    """Return token counts like those of the SMS set: log-normal, mean about 22."""
    drawn = np.random.default_rng(seed).lognormal(mean=2.83, sigma=0.75, size=rows)
    return np.clip(np.round(drawn), 2, LONGEST).astype(np.int64)


def build_batch(seed: int, pad_id: int) -> Batch:
    lengths = torch.from_numpy(sms_lengths(BATCH, seed))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20000, (BATCH, int(lengths.max())), generator=generator)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    labels = torch.randint(2, (BATCH,), generator=generator)
    return {"input_ids": torch.where(mask > 0, ids, pad_id), "attention_mask": mask, "labels": labels}


def build_model(model_type: str, method: str) -> Any:
    torch.manual_seed(0)
    model = CLASSIFIERS[model_type](CONFIGS[model_type]())
    return apply_method(model, METHODS[method], family=FAMILIES[model_type], base_name="random", seed=1).train()


def padded(model: Any, batch: Batch) -> torch.Tensor:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = STOCK[base.config.model_type].forward
    logits: torch.Tensor = forward(base, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


def loss_of(model: Any, forward: Callable[[Any, Batch], torch.Tensor], batch: Batch) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(forward(model, batch), batch["labels"])


def saved_bytes(model: Any, forward: Callable[[Any, Batch], torch.Tensor], batch: Batch) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, forward, batch)
        total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def compare(model_type: str, method: str, rounds: int) -> dict[str, Any]:
    model = build_model(model_type, method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    pad_id = model.config.pad_token_id
    forwards = {"padded": padded, "flat": classify}
    batches = [build_batch(seed, pad_id) for seed in range(rounds + 1)]
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    # The first round only warms up; afterwards each goes first in turn.
    for number, batch in enumerate(batches):
        for name in sorted(forwards, reverse=number % 2 == 0):
            started = time.perf_counter()
            loss_of(model, forwards[name], batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - started)
    ratios = [slow / fast for slow, fast in zip(seconds["padded"][1:], seconds["flat"][1:], strict=True)]
    real = sum(int(batch["attention_mask"].sum()) for batch in batches[1:])
    with torch.no_grad():
        apart = float((padded(model, batches[0]) - classify(model, batches[0])).abs().max())
    tokens = int(batches[1]["attention_mask"].sum())
    return {
        "model": model_type,
        "method": method,
        "ratio": {
            "median": round(statistics.median(ratios), 2),
            "min": round(min(ratios), 2),
            "max": round(max(ratios), 2),
        },
        "seconds_a_step": {name: round(statistics.median(times[1:]), 4) for name, times in seconds.items()},
        "padded_positions_per_real_token": round(
            sum(batch["attention_mask"].numel() for batch in batches[1:]) / real, 2
        ),
        "real_tokens_a_batch": round(real / rounds, 1),
        "saved_kib_per_real_token": {
            name: round(saved_bytes(model, forward, batches[1]) / 1024 / tokens) for name, forward in forwards.items()
        },
        "largest_logit_difference": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    record = {
        "question": "step without padding against stock transformers on padded batches",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": environment(torch.device("cpu")),
        "load_average_at_start": round(load, 2),
        "note": arguments.note,
        "batch_size": BATCH,
        "mean_length": round(float(sms_lengths(10_000, 0).mean()), 1),
        "rounds": arguments.rounds,
        "results": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for family in CONFIGS:
        for method in METHODS:
            row = compare(family, method, arguments.rounds)
            rows.append(row)
            arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            ratio, saved = row["ratio"], row["saved_kib_per_real_token"]
            print(
                f"{family:10} {method:5} x{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}), "
                f"{row['seconds_a_step']['padded']:.3f} s -> {row['seconds_a_step']['flat']:.3f} s a step, "
                f"saved {saved['padded']} -> {saved['flat']} KiB a real token",
                flush=True,
            )


if __name__ == "__main__":
    main()
