"""The report is one whole page, escapes what it quotes, and needs nothing beside it."""

from __future__ import annotations

import base64
import pathlib
import re
from html.parser import HTMLParser

from toolkit.report.curves import draw_confusion
from toolkit.report.html import ErrorExample, write_report
from toolkit.report.run_record import RunRecord

VOID = {"meta", "img", "br"}
ERROR: ErrorExample = {
    "text": '<script>alert("x")</script> & {{ record }}',
    "label": "ham",
    "predicted": "spam",
    "probability": 0.974,
}


class Balance(HTMLParser):
    """Collects text, and fails on a tag that is closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def write(record: RunRecord, folder: pathlib.Path, *, errors: list[ErrorExample]) -> str:
    draw_confusion([[142, 7], [5, 145]], ["ham", "spam"], folder / "confusion.png")
    image = folder / "confusion.png"
    write_report(record, folder / "report.html", recipe="a: <b>", errors=errors, curves=image, confusion=image)
    return (folder / "report.html").read_text(encoding="utf-8")


def words(page: str) -> str:
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return " ".join(" ".join(parser.text).split())


def test_a_newcomer_finds_what_how_good_and_what_it_cost(record: RunRecord, tmp_path: pathlib.Path) -> None:
    text = words(write(record, tmp_path, errors=[ERROR]))
    for part in (
        "fine-tuned with LoRA, rank 16",
        "Test accuracy 95.99 %",
        "on 299 texts kept out of training; 95 % interval 93.6 % to 98.0 %",
        "always answering “spam” would be 50.2 % accurate",
        "92.31 %",
        "TF-IDF with logistic regression, on the same rows",
        "296,448 of 124,736,256",
        "4 min 11 s",
        "1.40 GiB",
        "The dotted line marks step 520",
        "12 texts occur with two labels",
    ):
        assert part in text


def test_quoted_texts_are_text(record: RunRecord, tmp_path: pathlib.Path) -> None:
    page = write(record, tmp_path, errors=[ERROR])
    assert "<script>" not in page
    assert ERROR["text"] in words(page)
    assert "a: <b>" in words(page)


def test_nothing_is_fetched(record: RunRecord, tmp_path: pathlib.Path) -> None:
    page = write(record, tmp_path, errors=[])
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2
    for source in sources:
        kind, _, payload = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(payload) == (tmp_path / "confusion.png").read_bytes()
    assert "url(" not in page
    assert "@import" not in page


def test_no_mistakes_is_said(record: RunRecord, tmp_path: pathlib.Path) -> None:
    assert "every test text got its label" in words(write(record, tmp_path, errors=[]))


def test_a_stand_in_is_said_first(record: RunRecord, tmp_path: pathlib.Path) -> None:
    record["base"] |= {"offline": True, "used": "gpt2-mini"}
    text = words(write(record, tmp_path, errors=[]))
    assert text.index("Trained on a stand-in.") < text.index("Test accuracy")


def test_without_labels_or_images(record: RunRecord, tmp_path: pathlib.Path) -> None:
    record["objective"] = "language_modeling"
    record["method"] = {"name": "full"}
    record["data"] |= {"labels": [], "counts": {}}
    record["metrics"] = {"validation": {"loss": 5.7, "perplexity": 298.9}, "test": None}
    record["best"] = None
    write_report(record, tmp_path / "report.html", recipe="")
    text = words((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Held-out loss 5.7000" in text
    assert "Errors worth reading" not in text
