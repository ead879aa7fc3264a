"""A column that waits on the disk is the column that stayed in memory, and leaves no file."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from toolkit.config.schema import DataSettings
from toolkit.data import rows, spool
from toolkit.data.load import load_data
from toolkit.data.rows import string_array
from toolkit.data.spool import TextSpool
from toolkit.errors import DataError, OutputError

WriteFile = Callable[[str, "bytes | str"], str]


def mapped_bytes() -> int:
    """Bytes of nameless files that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if "(deleted)" in line and "cache" in line]
    return sum(int(high, 16) - int(low, 16) for low, high in spans)


def test_chunks_beyond_memory_come_back_from_a_nameless_file(
    monkeypatch: pytest.MonkeyPatch, private_cache: Path
) -> None:
    monkeypatch.setattr(spool, "MEMORY_BYTES", 1000)
    texts = [f"text {i} with ünicode and some length" for i in range(500)]
    collected = TextSpool()
    for low in range(0, 500, 20):
        collected.add(string_array(texts[low : low + 20]))
    before = pa.total_allocated_bytes()
    column = collected.column()
    assert column.to_pylist() == texts
    assert column.type == pa.large_string()
    assert pa.total_allocated_bytes() - before < 20_000
    assert mapped_bytes() > 15_000
    assert list(private_cache.iterdir()) == []
    del column, collected
    assert mapped_bytes() == 0


def test_a_small_column_touches_no_disk(private_cache: Path) -> None:
    collected = TextSpool()
    collected.add(string_array(["a", "b"]))
    assert collected.column().to_pylist() == ["a", "b"]
    assert TextSpool().column().to_pylist() == []
    assert not private_cache.exists()


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_table_is_read_and_cut_alike(write: WriteFile, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    lines = [f"text number {i},{'ab'[i % 2]}" for i in range(400)]
    content = "text,label\n" + "\n".join(lines)
    if suffix == "jsonl":
        records = [{"text": f"text number {i}", "label": "ab"[i % 2]} for i in range(400)]
        content = "\n".join(map(json.dumps, records))
    path = write(f"a.{suffix}", content)
    settings = DataSettings(source=path, balance="oversample", max_rows=333)
    plain = load_data(settings)
    for name, value in (("CHUNK_ROWS", 30), ("SMALL_TABLE", 10)):
        monkeypatch.setattr(rows, name, value)
    monkeypatch.setattr(spool, "MEMORY_BYTES", 500)
    spilled = load_data(settings)
    assert mapped_bytes() > 0
    for name, part in plain.parts.items():
        other = spilled.parts[name]
        assert part.texts is not None
        assert other.texts is not None
        assert part.texts.to_pylist() == other.texts.to_pylist()
        assert np.array_equal(part.row_numbers, other.row_numbers)
    assert plain.warnings == spilled.warnings


LOADED = """
import sys
from toolkit.config.schema import DataSettings
from toolkit.data.load import load_data
load_data(DataSettings(source=sys.argv[1]))
print(*sys.modules)
"""


def test_a_large_table_is_cut_without_pandas(write: WriteFile) -> None:
    lines = [f"text number {i},{'ab'[i % 2]}" for i in range(2 * rows.SMALL_TABLE)]
    path = write("a.csv", "text,label\n" + "\n".join(lines))
    done = subprocess.run([sys.executable, "-c", LOADED, path], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "pyarrow" in loaded
    assert not {"pandas", "pyarrow.parquet"} & loaded


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="wants a device that is full")
def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MEMORY_BYTES", 100)
    full = os.fdopen(os.open("/dev/full", os.O_RDWR), "r+b", 0)
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda dir: full)
    with pytest.raises(OutputError, match=r"bytes free.*bytes needed"):
        TextSpool().add(string_array(["long " * 100]))
    full.close()


def test_without_a_folder_texts_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(spool, "MEMORY_BYTES", 100)
    collected = TextSpool()
    for _ in range(3):
        collected.add(string_array(["long " * 100]))
    assert len(collected.column()) == 3
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "texts stay in memory" in caplog.text


def test_a_table_that_is_refused_half_way_leaves_no_open_file(
    write: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "MEMORY_BYTES", 500)
    monkeypatch.setattr(rows, "CHUNK_ROWS", 10)
    path = write("a.csv", "text,label\n" + "".join(f"text {i},a\n" for i in range(200)) + ",b\n")
    with pytest.raises(DataError, match="the text is empty"):
        load_data(DataSettings(source=path))
    gc.collect()
    assert mapped_bytes() == 0
