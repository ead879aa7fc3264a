"""The card is what the hub reads and says what the record says."""

from __future__ import annotations

import itertools
import pathlib
import re

import pytest
from huggingface_hub import ModelCard

from toolkit.report.model_card import front_matter, loading_snippet, write_model_card
from toolkit.report.run_record import RunRecord

RECIPE = "model:\n  base: openai-community/gpt2\n"


def write(record: RunRecord, folder: pathlib.Path) -> str:
    write_model_card(record, folder / "README.md", recipe=RECIPE)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_hub_reads_the_front_matter(record: RunRecord, tmp_path: pathlib.Path) -> None:
    write(record, tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.base_model, data.library_name) == ("mit", "openai-community/gpt2", "peft")
    assert data.pipeline_tag == "text-classification"
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"accuracy": 0.959866, "f1": 0.959865, "matthews_correlation": 0.9198}


def test_the_whole_story_is_told(record: RunRecord, tmp_path: pathlib.Path) -> None:
    card = write(record, tmp_path)
    for part in (
        "**95.99 %** (95 % interval 93.6 % to 98.0 %)",
        "| always answering the commonest label | 50.17 % |",
        "| TF-IDF with logistic regression on the same rows | 92.31 % |",
        "| ham | 96.6 % | 95.3 % |",
        "| train | 1,046 | 523 | 523 |",
        "CC BY 4.0",
        "- 12 texts occur with two labels",
        "3 texts were longer than 256 tokens",
        "296,448 of 124,736,256 (0.24 %)",
        "4 min 11 s, 812 tokens a second",
        "1.40 GiB",
        "The test part is small (299 texts)",
        "```yaml\nmodel:\n  base: openai-community/gpt2\n```",
    ):
        assert part in card
    assert [line for line in card.splitlines() if line.startswith("## ")] == [
        "## Intended use",
        "## How to load it",
        "## Training data",
        "## Training",
        "## Limits",
        "## How to reproduce it",
    ]


def test_markdown_is_well_formed(record: RunRecord, tmp_path: pathlib.Path) -> None:
    card = write(record, tmp_path)
    assert "\n\n\n" not in card
    assert card.count("```") % 2 == 0
    lines = card.splitlines()
    for before, line in itertools.pairwise(lines):
        if line.startswith(("## ", "```python", "```yaml")):
            assert before == ""
    tables = re.findall(r"(?:^\|.*\n)+", card, flags=re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_hostile_labels_stay_inside_their_cells(record: RunRecord, tmp_path: pathlib.Path) -> None:
    label = "a|b\n# <b>[x](y)"
    record["data"]["labels"][0] = label
    assert record["metrics"]["test"] is not None
    rows = record["metrics"]["test"]["per_label"]
    rows[label] = rows.pop("ham")
    card = write(record, tmp_path)
    assert "a\\|b # \\<b\\>\\[x\\](y)" in card
    assert "\n# <b>" not in card


def test_a_stand_in_cannot_be_missed(record: RunRecord, tmp_path: pathlib.Path) -> None:
    record["base"] |= {"offline": True, "used": "gpt2-mini", "name_or_path": "/models/gpt2-mini"}
    card = write(record, tmp_path)
    assert card.index("Trained on a stand-in") < card.index("## Intended use")
    # The hub refuses a card that names a local path as its base.
    assert "base_model" not in front_matter(record)


def test_an_unknown_licence_is_not_invented(record: RunRecord) -> None:
    record["base"]["used"] = record["base"]["name_or_path"] = "someone/else"
    assert "license" not in front_matter(record)


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_every_snippet_compiles(kind: str, bits: int | None, record: RunRecord) -> None:
    record["artifact"]["kind"] = record["artifact"]["folder"] = kind  # type: ignore[typeddict-item]
    record["quantization"] = None if bits is None else {"bits": bits, "quant_type": "nf4", "double_quant": True}
    record["data"]["labels"] = ['quo"te', "new\nline"]
    snippet = loading_snippet(record)
    compile(snippet, "snippet", "exec")
    assert ("peft" in snippet) == (kind == "adapter")
    assert ("BitsAndBytesConfig" in snippet) == (kind == "adapter" and bits is not None)


def test_a_language_model_gets_a_card(record: RunRecord, tmp_path: pathlib.Path) -> None:
    record["objective"] = "language_modeling"
    record["method"], record["quantization"] = {"name": "full"}, None
    record["artifact"] = {"kind": "model", "folder": "model", "max_length": 128, "head": None}
    record["data"] |= {"labels": [], "counts": {}}
    record["metrics"] = {"validation": {"loss": 5.7, "perplexity": 298.9}, "test": None}
    card = write(record, tmp_path)
    assert "pipeline_tag: text-generation" in card
    assert "Held-out loss: 5.7000" in card
    assert "AutoModelForCausalLM" in card
