"""How fast are GPT-2 texts tokenised, against the fast tokenizer of tokenizers?

    python benchmarks/tokenizing.py [--texts 100000] [--rounds 3]

Real messages (sms_spam), repeated. "one thread": tiktoken's loop against the tokenizer's batch call with its
parallelism off. "all cores": the toolkit's encode against the batch call with its parallelism on. Writes
results/tokenizing.json.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import peers
from prediction_speed import messages

from toolkit.data.bpe import FOLDER
from toolkit.data.fast_tokenizer import bpe_of_files
from toolkit.data.tokenize import load_tokenizer
from toolkit.models.base import EMBEDDED


def timed(run: Callable[[], Any], *, parallel: bool) -> float:
    os.environ["TOKENIZERS_PARALLELISM"] = str(parallel).lower()
    started = time.perf_counter()
    run()
    return round(time.perf_counter() - started, 3)


def main(count: int, rounds: int) -> None:
    texts = messages(count)
    ours = load_tokenizer(EMBEDDED / "gpt2-mini", kind="bpe")
    fast = bpe_of_files(FOLDER / "vocab.json", FOLDER / "merges.txt", "gpt2", prefix_space=False)
    assert [row.tolist() for row in ours.encode(texts[:500], max_length=None).table] == [
        one.ids for one in fast.encode_batch(texts[:500])
    ]
    arms: dict[str, tuple[Callable[[], Any], bool]] = {
        "tokenizers, one thread": (lambda: [one.ids for one in fast.encode_batch(texts)], False),
        "toolkit, one thread": (lambda: ours.backend.encode(texts), False),
        "tokenizers, all cores": (lambda: [one.ids for one in fast.encode_batch(texts)], True),
        "toolkit, all cores": (lambda: ours.encode(texts, max_length=None), True),
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(rounds + 1):
        for arm, (run, parallel) in arms.items():
            took = timed(run, parallel=parallel)
            # The first round warms up.
            if number:
                seconds[arm].append(took)
    record = {
        "case": {"texts": count},
        "seconds": seconds,
        "ratio": {
            kind: peers.ratios(seconds[f"tokenizers, {kind}"], seconds[f"toolkit, {kind}"])
            for kind in ("one thread", "all cores")
        },
    }
    peers.write("tokenizing", record)
    print(record)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    main(arguments.texts, arguments.rounds)
