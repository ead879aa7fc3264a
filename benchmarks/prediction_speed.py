"""Is prediction faster than the pipeline of transformers, as it comes and as its best user would tune it?

    python benchmarks/prediction_speed.py [--texts 1000] [--rounds 3]

Full-size GPT-2 124M and DistilBERT 66M with random weights and a trained head, on real messages (sms_spam). The arms
take turns. "defaults": pipeline("text-classification", model, batch_size=32). "tuned": the texts sorted by length, and
the fastest of the batch sizes 8, 16, 32, 64 and of fp32 and bf16. Where that is bf16, the toolkit runs in bf16 as well.
Both sides start from strings; SAMPLE of them warm up both, and have to get the same labels. Writes
results/prediction_MODEL.json.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time
from typing import Any

import peers
import torch
import transformers

from toolkit.config.load import load_recipe
from toolkit.data.sources import read_rows
from toolkit.finetune import finetune
from toolkit.inference.predict import Classifier

SAMPLE = 200
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECIPE = """
model: {{base: '{base}', max_length: 256}}
data: {{source: sms_spam, max_rows: 60}}
method: {{name: head}}
training: {{max_steps: 1}}
output: {{dir: '{run}'}}
"""


def messages(count: int) -> list[str]:
    rows, _ = read_rows("sms_spam", text_column="text", label_column="label")
    assert rows.texts is not None
    texts: list[str] = rows.texts.to_pylist()
    return [texts[number % len(texts)] for number in range(count)]


def compare(family: str, count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(base=peers.save_base(folder / "base", family), run=folder / "run"))
        finetune(load_recipe(recipe))
        model = str(folder / "run" / "model")
        texts = messages(count)
        sample = texts[:: max(1, count // SAMPLE)]
        classifiers = {name: Classifier.load(model, device="cpu", precision=name) for name in DTYPES}
        pipes = {
            name: transformers.pipeline(
                "text-classification", model, device=-1, truncation=True, max_length=256, dtype=dtype
            )
            for name, dtype in DTYPES.items()
        }

        def pipeline(batch_size: int, *, ordered: bool, precision: str = "fp32", some: list[str] = texts) -> Any:
            order = sorted(range(len(some)), key=lambda n: -len(some[n])) if ordered else list(range(len(some)))
            answers = pipes[precision]([some[n] for n in order], batch_size=batch_size)
            return {n: answer["label"] for n, answer in zip(order, answers, strict=True)}

        def timed(run: Any) -> float:
            started = time.perf_counter()
            run()
            return round(time.perf_counter() - started, 3)

        theirs = pipeline(32, ordered=True, some=sample)
        assert [one.label for one in classifiers["fp32"].predict(sample)] == [theirs[n] for n in range(len(sample))]
        classifiers["bf16"].predict(sample)
        trial = {
            (size, name): timed(lambda size=size, name=name: pipeline(size, ordered=True, precision=name, some=sample))
            for size in (8, 16, 32, 64)
            for name in DTYPES
        }
        tuned, low = min(trial, key=lambda one: trial[one])
        arms = {
            "pipeline, batch_size 32": lambda: pipeline(32, ordered=False),
            f"pipeline, tuned: sorted, batches of {tuned}{', bf16' if low == 'bf16' else ''}": lambda: pipeline(
                tuned, ordered=True, precision=low
            ),
            "toolkit": lambda: classifiers["fp32"].predict(texts),
        }
        if low == "bf16":
            arms["toolkit, bf16"] = lambda: classifiers["bf16"].predict(texts)
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(rounds):
            for arm in arms if number % 2 == 0 else reversed(arms):
                seconds[arm].append(timed(arms[arm]))
                print(f"{family} round {number + 1} {arm}: {seconds[arm][-1]:.2f} s", flush=True)
    defaults, best, *own = seconds
    peers.write(
        f"prediction_{family}",
        {
            "case": {"family": family, "texts": count},
            "seconds": seconds,
            "ratio_to_defaults": {arm: peers.ratios(seconds[defaults], seconds[arm]) for arm in own},
            "ratio_to_tuned": {arm: peers.ratios(seconds[best], seconds[arm]) for arm in own},
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    peers.quiet()
    torch.set_num_threads(os.cpu_count() or 1)
    for chosen in peers.CONFIGS:
        compare(chosen, arguments.texts, arguments.rounds)
