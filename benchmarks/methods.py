"""Every method beside its twin by hand: accuracy with its interval, peak memory, time. Resumes; rows may be had singly.

    python benchmarks/methods.py [--data DIR] [--encoder DIR] [--only REGEX] [--again] [--prefix WORDS]

Rows are named DATA/BASE/METHOD/ARM; the arms are "toolkit" (the real command) and "by hand" (benchmarks/by_hand.py).
Every row is a process of its own, one after another, and is written to results/methods.json as soon as it is there;
rows that are there are not run again unless asked for. --data is a folder of sms_spam.tsv and
emotion_{train,val,test}.tsv; without it the named set sms_spam serves alone. --encoder is the folder of a DistilBERT;
without it the embedded bases serve.

The settings are small on purpose: all rows of a base and a set have the same number of steps. Learning rates are those
of the recipes where these have one; none was tuned on these rows.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import peers

from toolkit.evaluation.metrics import accuracy_interval
from toolkit.evaluation.predictions import read_predictions

HERE = pathlib.Path(__file__).parent
ARMS = ("toolkit", "by hand")
# What a recipe says of the method, its learning rate on GPT-2 and on DistilBERT, and whether the twin exists.
METHODS: dict[str, tuple[str, float, float, bool]] = {
    "zero-shot": ('method: {name: zero_shot, prompt: "{text}\\n\\nThis text is {words}:"}', 1e-3, 0.0, True),
    "features": ("method: {name: features}", 1e-3, 1e-3, True),
    "features, forest": ("method: {name: features, classifier: random_forest}", 1e-3, 1e-3, True),
    "head": ("method: {name: head}", 5e-3, 5e-3, True),
    "last block": ("method: {name: last_n, n: 1}", 5e-4, 5e-4, True),
    "biases": ("method: {name: bias}", 1e-3, 1e-3, True),
    "norms": ("method: {name: ln_tuning}", 1e-3, 1e-3, True),
    "IA3": ("method: {name: ia3}", 5e-3, 5e-3, True),
    "VeRA": ("method: {name: vera, r: 256}", 1e-2, 1e-2, True),
    "prefix": ("method: {name: prefix}", 1e-2, 0.0, True),
    "LoRA": ("method: {name: lora}", 2e-3, 1e-3, True),
    "LoRA, last two blocks": ("method: {name: lora, layers: last_2}", 2e-3, 1e-3, True),
    "rsLoRA": ("method: {name: lora, variant: rslora, r: 64, lora_alpha: 16}", 1e-3, 1e-3, True),
    "DoRA": ("method: {name: lora, variant: dora, r: 8, lora_alpha: 16}", 1e-3, 5e-4, True),
    "PiSSA": ("method: {name: lora, variant: pissa, lora_dropout: 0.0}", 2e-4, 2e-4, True),
    "EVA": ("method: {name: lora, variant: eva}", 1e-3, 1e-3, True),
    "LoRA+": ("method: {name: lora, lora_plus_ratio: 16}", 2e-4, 2e-4, True),
    "LoRA-FA": ("method: {name: lora, variant: lora_fa}", 2e-3, 1e-3, True),
    "AdaLoRA": ("method: {name: adalora, target_modules: all-linear}", 2e-3, 2e-3, True),
    "LoRA, 8 bits": ("method: {name: lora}\nquantization: {bits: 8}", 2e-3, 1e-3, True),
    "LoRA, 4 bits": ("method: {name: lora}\nquantization: {bits: 4}", 2e-3, 1e-3, True),
    "DoRA, 4 bits": (
        "method: {name: lora, variant: dora, r: 8, lora_alpha: 16}\nquantization: {bits: 4}", 1e-3, 5e-4, True,
    ),
    "gradual": ("method: {name: gradual, epochs_per_block: plateau}", 1e-3, 1e-3, False),
    "full": ("method: {name: full}", 2e-4, 1e-4, True),
    "full, layer decay": ("method: {name: full, layer_decay: 0.8}", 2e-4, 1e-4, False),
}  # fmt: skip
# Optimizer steps of 16 texts.
STEPS = {"gpt2-mini": 150, "distilbert-mini": 150, "encoder": 60}
RECIPE = """
model: {{base: '{base}', max_length: 64}}
data: {data}
{method}
training: {{max_steps: {steps}, batch_size: 16, learning_rate: {rate}}}
evaluation: {{every: {every}, baselines: {baselines}}}
output: {{dir: '{run}', save_every: end, keep: 1}}
"""


def cut_emotion(data: pathlib.Path, work: pathlib.Path) -> str:
    """Write the first rows of each part, and return the data section."""
    for part, rows in (("train", 2000), ("val", 200), ("test", 1000)):
        lines = (data / f"emotion_{part}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        (work / f"{part}.tsv").write_text("".join(lines[: rows + 1]), encoding="utf-8")
    return f"{{train: '{work}/train.tsv', validation: '{work}/val.tsv', test: '{work}/test.tsv', duplicates: remove}}"


def data_sections(data: pathlib.Path | None, work: pathlib.Path) -> dict[str, str]:
    if data is None:
        return {"sms_spam": "{source: sms_spam, balance: undersample}"}
    sms = f"{{source: '{data.resolve()}/sms_spam.tsv', balance: undersample}}"
    return {"sms_spam": sms, "emotion": cut_emotion(data, work)}


def run(name: str, *, data: str, base: str, work: pathlib.Path, prefix: list[str]) -> dict[str, Any]:
    """Run one row and return its figures."""
    _, base_name, method, arm = name.split("/")
    text, on_gpt2, on_distilbert, _ = METHODS[method]
    steps = STEPS.get(base_name, STEPS["encoder"])
    if method in ("zero-shot", "features", "features, forest"):
        steps = 1
    rate = on_gpt2 if "gpt2" in base_name else on_distilbert
    with tempfile.TemporaryDirectory(dir=work) as folder:
        place = pathlib.Path(folder)
        recipe = place / "recipe.yaml"
        recipe.write_text(
            RECIPE.format(base=base, data=data, method=text, steps=steps, rate=rate, run=place / "run",
                          every=steps // 8 if method == "gradual" else "end",
                          baselines=str(method == "head").lower())
        )  # fmt: skip
        # A cache of its own: no row finds the states that another one left.
        environment = {**os.environ, "TOOLKIT_CACHE": str(place / "cache"), "PYTHONPATH": str(HERE.parent)}
        command = [sys.executable, "-m", "toolkit", "train", str(recipe)]
        if arm == "by hand":
            command = [sys.executable, str(HERE / "by_hand.py"), str(recipe), str(place / "out.json")]
        done = subprocess.run([*prefix, *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": " ".join(done.stderr.split())[-300:].replace(str(place), "")}
        figures: dict[str, Any] = {"steps": steps, "learning_rate": rate}
        if arm == "by hand":
            found = json.loads((place / "out.json").read_text())
            right = np.array(found["right"], dtype=bool)
        else:
            record = json.loads((place / "run" / "result.json").read_text())
            answers = read_predictions(place / "run" / "predictions.csv")
            assert answers is not None
            right, kept = answers.right, record["prefix_cache"]
            found = {
                "seconds": record["timing"]["train_seconds"] + (kept["seconds"] if kept else 0.0),
                "peak_bytes": record["memory"]["peak_bytes"],
                "trainable": record["parameters"]["trainable"],
            }
            if record["metrics"]["baselines"]:
                figures["baselines"] = {k: v["accuracy"] for k, v in record["metrics"]["baselines"].items()}
    return figures | {
        "rows": len(right),
        "accuracy": round(float(right.mean()), 6),
        "interval": [round(end, 4) for end in accuracy_interval(int(right.sum()), len(right))],
        "peak_bytes": found["peak_bytes"],
        "seconds": round(found["seconds"], 2),
        "trainable": found["trainable"],
        # Which rows were right, a bit each: two arms are compared row by row.
        "right": np.packbits(right).tobytes().hex(),
    }


def names(datas: list[str], bases: list[str]) -> list[str]:
    """Return every row there can be, a row and its twin one after the other."""
    return [
        f"{data}/{base}/{method}/{arm}"
        for data in datas
        for base in bases
        for method, (_, _, on_distilbert, twin) in METHODS.items()
        for arm in ARMS
        if (arm == "toolkit" or twin) and ("gpt2" in base or on_distilbert)
    ]


def main(data: pathlib.Path | None, encoder: pathlib.Path | None, only: str, again: bool, prefix: list[str]) -> None:
    path = peers.RESULTS / "methods.json"
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    bases = {name: name for name in ("gpt2-mini", "distilbert-mini")}
    if encoder is not None:
        bases[encoder.name] = str(encoder.resolve())
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        sections = data_sections(data, work)
        wanted = [name for name in names(list(sections), list(bases)) if re.search(only, name)]
        for place, name in enumerate(wanted, start=1):
            if name in rows and "failed" not in rows[name] and not again:
                continue
            section, base = sections[name.split("/")[0]], bases[name.split("/")[1]]
            rows[name] = run(name, data=section, base=base, work=work, prefix=prefix)
            shown = {key: value for key, value in rows[name].items() if key not in ("right", "interval")}
            print(f"{place} of {len(wanted)} {name}: {shown}", flush=True)
            peers.write("methods", {"rows": dict(sorted(rows.items()))})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--encoder", type=pathlib.Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--prefix", default="", help="put before each command, for example nice")
    arguments = parser.parse_args()
    main(arguments.data, arguments.encoder, arguments.only, arguments.again, arguments.prefix.split())
