"""The LoRA recipe against HF Trainer + peft with the same hyper-parameters and the same rows: test accuracy and time.

    python benchmarks/against_hf_trainer.py --base DIR --data sms_spam.tsv [--seeds 3]

Both arms train on the very rows of the toolkit's split and run in turn; the peer is HF Trainer with length-grouped
batches and its fused optimizer. Writes results/against_hf_trainer.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from toolkit.config.load import load_recipe
from toolkit.data.load import load_data
from toolkit.finetune import finetune

RESULTS = pathlib.Path(__file__).parent / "results" / "against_hf_trainer.json"
RECIPE = """
model: {base: '%s', max_length: 128}
data: {source: '%s', balance: undersample}
training: {epochs: %d, batch_size: 8, learning_rate: 1e-3, seed: %d}
output: {dir: '%s', save_every: end}
"""


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, part: Any, tokenizer: Any) -> None:
        self.encoded = tokenizer([str(text) for text in part.texts], truncation=True, max_length=128)["input_ids"]
        self.labels = part.labels

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self.encoded[row], "label": int(self.labels[row]), "length": len(self.encoded[row])}


def peer(recipe: Any, *, folder: pathlib.Path) -> dict[str, float]:
    data, training, method = load_data(recipe.data), recipe.training, recipe.method
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.base)
    torch.manual_seed(training.seed)
    model = AutoModelForSequenceClassification.from_pretrained(recipe.model.base, num_labels=2, dtype=torch.float32)
    config = LoraConfig(
        task_type="SEQ_CLS", r=method.r, lora_alpha=method.lora_alpha, lora_dropout=method.lora_dropout,
        target_modules=["q_lin", "v_lin"],
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=training.epochs, per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate, weight_decay=training.weight_decay, warmup_steps=training.warmup_ratio,
        lr_scheduler_type="linear", optim="adamw_torch_fused", train_sampling_strategy="group_by_length",
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="accuracy",
        save_total_limit=1, report_to=[], disable_tqdm=True, seed=training.seed, use_cpu=True, logging_strategy="no",
    )  # fmt: skip

    def compute(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        model=get_peft_model(model, config), args=arguments, train_dataset=Rows(data.train, tokenizer),
        eval_dataset=Rows(data.validation, tokenizer), processing_class=tokenizer, compute_metrics=compute,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    accuracy = trainer.predict(Rows(data.test, tokenizer)).metrics["test_accuracy"]
    return {"accuracy": accuracy, "seconds": seconds}


def ours(recipe: Any) -> dict[str, float]:
    started = time.perf_counter()
    record = finetune(recipe)
    seconds = time.perf_counter() - started
    metrics: Any = record["metrics"]["test"]
    return {"accuracy": metrics["accuracy"], "seconds": seconds, "train_seconds": record["timing"]["train_seconds"]}


def main(base: str, data: str, seeds: int, epochs: int) -> None:
    arms: dict[str, list[dict[str, float]]] = {"toolkit": [], "HF Trainer + peft": []}
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for seed in range(seeds):
            path = root / "recipe.yaml"
            path.write_text(RECIPE % (base, data, epochs, seed, root / f"run-{seed}"))
            recipe = load_recipe(path)
            arms["toolkit"].append(ours(recipe))
            arms["HF Trainer + peft"].append(peer(recipe, folder=root / f"peer-{seed}"))
            for name, runs in arms.items():
                print(f"seed {seed} {name}: {runs[-1]}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "base": pathlib.Path(base).name,
        "data": pathlib.Path(data).name,
        "epochs": epochs,
        "threads": torch.get_num_threads(),
        "runs": arms,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    means = {name: statistics.mean(run["accuracy"] for run in runs) for name, runs in arms.items()}
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(arms["HF Trainer + peft"], arms["toolkit"], strict=True)]
    print({name: f"{100 * mean:.2f} %" for name, mean in means.items()})
    print(f"time ratio: median {np.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    chosen = parser.parse_args()
    main(chosen.base, chosen.data, chosen.seeds, chosen.epochs)
