"""What the model card and the HTML pages share: the template environment, and the values of a run they speak of."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from toolkit.report import wording
from toolkit.report.run_record import RunRecord

LONGEST_TEXT = 600


def render(template: str, *, record: RunRecord, recipe: str, extra: dict[str, Any]) -> str:
    """Fill a template of ``report/templates``.

    Args:
        template: File name; ``.html`` templates escape every value.
        record: The run.
        recipe: The resolved recipe as YAML.
        extra: Values of this template alone.
    """
    return fill(template, **_shared(record, recipe), **extra)


def fill(template: str, **values: Any) -> str:
    """Fill a template of ``report/templates`` with these values alone."""
    environment = Environment(
        loader=PackageLoader("toolkit.report"),
        autoescape=".html" in template,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": lambda share, digits=2: wording.percent(share, digits=digits),
        "count": lambda number: f"{number:,}",
        "duration": wording.duration,
        "size": wording.size,
        "cell": cell,
        "clip": clip,
    }
    return environment.get_template(template).render(**values)


def cell(text: str) -> str:
    """Return text that stays inside its cell of a Markdown table and is not read as markup."""
    flat = " ".join(str(text).split())
    for sign in "\\`*_[]<>|":
        flat = flat.replace(sign, "\\" + sign)
    return flat


def clip(text: str) -> str:
    """Return a text cut to a length worth reading in a table."""
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT].rstrip() + " …"


def _shared(record: RunRecord, recipe: str) -> dict[str, Any]:
    metrics, environment = record["metrics"], record["environment"]
    test = metrics["test"] if record["data"]["labels"] else None
    # A language model is judged by its loss, on the test part where there is one.
    language = None if record["data"]["labels"] else metrics["test"] or metrics["validation"]
    method = wording.method_sentence(record["method"], head=bool(record["data"]["labels"]))
    numbers = test if record["problem_type"] == "regression" else None
    test = None if numbers else test
    several = record["problem_type"] == "multi_label_classification"
    supports = {label: row["support"] for label, row in test["per_label"].items()} if test and not several else {}
    named = ("python", "torch", "transformers", "peft")
    return {
        "record": record,
        "recipe": recipe,
        "labels": record["data"]["labels"],
        "answers": record["objective"] == "instruction",
        "test": test,
        "several": several,
        "numbers": numbers,
        "cheap": (metrics.get("baselines") or {}).get("tfidf_ridge" if numbers else "tfidf_logistic_regression"),
        "language": language,
        "summary": wording.summary(record),
        "method": method[0].upper() + method[1:],
        "head": wording.head_sentence(record["artifact"]["head"]),
        "storage": wording.storage_sentence(record["method"], record["quantization"]),
        "memory": wording.memory_kind(record["memory"]["kind"]),
        "majority": wording.majority_share(supports),
        "commonest": max(supports, key=lambda label: supports[label]) if supports else "",
        "device": _device(environment),
        "versions": ", ".join(f"{name} {environment[name]}" for name in named if name in environment),
    }


def _device(environment: dict[str, Any]) -> str:
    device = str(environment.get("device", "not recorded"))
    if device == "cpu":
        device = f"{environment.get('cpu', 'cpu')}, {environment.get('threads', '?')} threads"
    return device
