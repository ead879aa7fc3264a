"""Large files are parsed once: what the cache returns is what the parser returned, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from toolkit.data import table_cache
from toolkit.data.repeats import content_keys
from toolkit.data.rows import Rows
from toolkit.data.sources import read_rows
from toolkit.errors import DataError

TEXTS = ["NA", "007", "  padded ", "a, b", "häßlich 🙂", "NA"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table_cache, "CACHE_BYTES", 1)
    path = tmp_path / "rows.tsv"
    path.write_text("label\ttext\n" + "".join(f"{n % 2}\t{text}\n" for n, text in enumerate(TEXTS)), encoding="utf-8")
    return path


def read(path: Path, label: str | None = "label") -> Rows:
    return read_rows(str(path), text_column="text", label_column=label)[0]


def same(one: Rows, other: Rows) -> bool:
    assert one.texts is not None
    assert other.texts is not None
    assert (one.labels is None) == (other.labels is None)
    labels = one.labels is None or [*one.labels] == [*other.labels]  # type: ignore[misc]
    places = [one.place(row) for row in range(len(one))] == [other.place(row) for row in range(len(other))]
    return one.texts.to_pylist() == other.texts.to_pylist() and labels and places


def parses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    from toolkit.data import sources

    parse = sources.read_tsv
    monkeypatch.setattr(sources, "read_tsv", lambda *arguments: calls.append(1) or parse(*arguments))
    return calls


@pytest.mark.parametrize("label", ["label", None])
def test_the_second_read_parses_nothing_and_returns_the_same(
    file: Path, monkeypatch: pytest.MonkeyPatch, label: str | None
) -> None:
    monkeypatch.setattr(table_cache, "CACHE_BYTES", 1 << 30)
    plain = read(file, label)
    monkeypatch.setattr(table_cache, "CACHE_BYTES", 1)
    calls = parses(monkeypatch)
    first, second = read(file, label), read(file, label)
    assert len(calls) == 1
    assert same(plain, first)
    assert same(plain, second)
    np.testing.assert_array_equal(content_keys(second), content_keys(plain))
    taken = second.take(np.array([4, 0]))
    assert taken.texts is not None
    assert taken.texts.to_pylist() == [TEXTS[4], TEXTS[0]]


def test_other_columns_or_another_content_are_another_table(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = parses(monkeypatch)
    read(file)
    read(file, None)
    file.write_text(file.read_text(encoding="utf-8") + "1\tmore\n", encoding="utf-8")
    assert len(read(file)) == len(TEXTS) + 1
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["texts.arrow", "codes.npy", "lines.npy", "keys.npy", "facts.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_table_is_made_anew(file: Path, tmp_path: Path, name: str, damage: str) -> None:
    plain = read(file)
    [found] = (tmp_path / "cache" / "tables").glob(f"*/{name}")
    data = bytearray(found.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        found.unlink()
    else:
        found.write_bytes(data if damage == "flip" else data[:-3])
    assert same(plain, read(file))


def test_nothing_is_kept_of_a_wrong_file(file: Path, tmp_path: Path) -> None:
    file.write_text("label\ttext\n1\t \n", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(DataError, match="white space"):
            read(file)
    assert not (tmp_path / "cache").exists()
