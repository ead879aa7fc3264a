"""The text of docs/methods.md: every method's accuracy, memory and time, beside the same by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from toolkit.evaluation.paired import compare_answers

MIB = 2**20
HEAD = """# Methods

Made by `make methods` from `benchmarks/results/methods.json`. Every row is a process of its own; the first lines of
`benchmarks/methods.py` say how the figures were taken, those of `benchmarks/by_hand.py` what "by hand" is: the Trainer
of transformers with peft, with the same settings on the same rows.

{machine}

Accuracy is that of the test rows, with its 95 % bootstrap interval. p is McNemar's exact test of the two arms on the
same rows: below 0.05 they differ by more than chance, which one pair in twenty does where both are equally good. Memory
is the peak of the process up to the end of training, time that of the training loop, with the states of frozen blocks
where they were computed.

The runs are short, and no learning rate was tuned on these rows: the table shows that each method does here what it
does by hand, and what it costs, not which one is best after a full training. Times are those of a machine that did
other work beside: read them as orders of magnitude. TF-IDF has seen all training rows, the runs about as many texts as
their steps hold.

All rows ran on one thread. Those of the embedded bases ran on an AMD EPYC with AVX-512, where `training.gemm: auto`
measured oneDNN as the faster one; zero-shot, forests and the encoder's rows on the machine named above.
"""
TABLE = """
## {data}, {base}

{steps} steps of 16 texts, {rows} test rows.{baselines}

| method | accuracy | by hand | p | MiB | by hand | seconds | by hand | trained |
|---|---|---|---|---|---|---|---|---|
"""


def right(row: dict[str, Any]) -> np.ndarray:
    """Return which test rows were right."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), dtype=np.uint8))
    return bits[: row["rows"]].astype(bool)


def _accuracy(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _line(method: str, own: dict[str, Any], twin: dict[str, Any] | None) -> str:
    if "failed" in own:
        return f"| {method} | failed | | | | | | | |"
    cells = [method, _accuracy(own)]
    if twin is None or "failed" in twin:
        beside = ["failed" if twin else "", "", f"{own['peak_bytes'] / MIB:.0f}", "", f"{own['seconds']:.0f}", ""]
    else:
        p_value = compare_answers(right(own), right(twin))["p_value"]
        beside = [
            _accuracy(twin), f"{p_value:.2g}",
            f"{own['peak_bytes'] / MIB:.0f}", f"{twin['peak_bytes'] / MIB:.0f}",
            f"{own['seconds']:.0f}", f"{twin['seconds']:.0f}",
        ]  # fmt: skip
    return "| " + " | ".join([*cells, *beside, f"{own['trainable']:,}"]) + " |"


def _baselines(rows: list[dict[str, Any]]) -> str:
    found = next((row["baselines"] for row in rows if "baselines" in row), None)
    if found is None:
        return ""
    shown = f" Always the commonest label: {100 * found['majority']:.1f} %."
    if "tfidf_logistic_regression" in found:
        shown += f" TF-IDF with logistic regression: {100 * found['tfidf_logistic_regression']:.1f} %."
    return shown


def _summary(pairs: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> str:
    if not pairs:
        return ""
    apart = [(name, compare_answers(right(own), right(twin))) for name, own, twin in pairs]
    worse = [name for name, paired in apart if paired["p_value"] < 0.05 and paired["difference"] < 0]
    better = [name for name, paired in apart if paired["p_value"] < 0.05 and paired["difference"] > 0]
    lighter = sum(own["peak_bytes"] < twin["peak_bytes"] for _, own, twin in pairs)
    mean = 100 * float(np.mean([paired["difference"] for _, paired in apart]))
    return (
        f"\n## In short\n\nOf {len(pairs)} pairs, the toolkit is less accurate by more than chance in {len(worse)}"
        f"{' (' + '; '.join(worse) + ')' if worse else ''}, and more accurate in {len(better)}"
        f"{' (' + '; '.join(better) + ')' if better else ''}; on average {mean:+.1f} points. "
        f"It takes less memory in {lighter} of {len(pairs)}.\n"
    )


def methods_page(record: dict[str, Any], machine: str) -> str:
    """Return the page of a results/methods.json."""
    rows: dict[str, dict[str, Any]] = record["rows"]
    groups: dict[tuple[str, str], list[str]] = {}
    for name in rows:
        data, base, method, arm = name.split("/")
        if arm == "toolkit":
            groups.setdefault((data, base), []).append(method)
    tables, pairs = "", []
    for (data, base), methods in sorted(groups.items()):
        own = {method: rows[f"{data}/{base}/{method}/toolkit"] for method in methods}
        order = sorted(own, key=lambda method: -own[method].get("accuracy", 0.0))
        whole = [row for row in own.values() if "failed" not in row]
        # Features are fitted at once.
        one = max(whole, key=lambda row: row["steps"])
        tables += TABLE.format(
            data=data, base=base, steps=one["steps"], rows=one["rows"], baselines=_baselines(list(own.values()))
        )
        for method in order:
            twin = rows.get(f"{data}/{base}/{method}/by hand")
            tables += _line(method, own[method], twin) + "\n"
            if twin is not None and "failed" not in twin and "failed" not in own[method]:
                pairs.append((f"{data}, {base}, {method}", own[method], twin))
    return HEAD.format(machine=machine) + _summary(pairs) + tables
