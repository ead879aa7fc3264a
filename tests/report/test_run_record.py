"""result.json comes back as it was written, or is refused."""

from __future__ import annotations

import pathlib
import stat

import pytest

from toolkit.durable import write_file_atomically
from toolkit.errors import OutputError
from toolkit.report.run_record import RunRecord, read_run_record, write_run_record


def test_round_trip(record: RunRecord, tmp_path: pathlib.Path) -> None:
    record["data"]["labels"] = ["größer", "詐欺"]
    write_run_record(record, tmp_path / "result.json")
    assert read_run_record(tmp_path / "result.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_record_from_before_there_was_a_prediction_is_read(record: RunRecord, tmp_path: pathlib.Path) -> None:
    write_run_record({**record, "memory": {"peak_bytes": 7, "kind": "resident set"}}, tmp_path / "result.json")  # type: ignore[typeddict-item]
    memory = read_run_record(tmp_path / "result.json")["memory"]
    assert (memory["peak_bytes"], memory["rss_bytes"], memory["predicted_bytes"], memory["phases"]) == (7, 7, None, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[" * 100_000, "not"),
        (b"[1]", "not a JSON object"),
        (b'{"format": 2}', "format: is 2"),
        (b'{"format": 1}', "metrics: missing"),
    ],
)
def test_damage_is_refused(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(OutputError, match=message):
        read_run_record(tmp_path / "result.json")


def test_missing_is_one_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OutputError) as caught:
        read_run_record(tmp_path / "result.json")
    assert (
        str(caught.value) == f"{tmp_path}/result.json: cannot be read: No such file or directory (the folder of a run)"
    )


def test_a_number_that_is_not_finite_never_replaces_a_good_file(record: RunRecord, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "result.json"
    write_run_record(record, path)
    before = path.read_bytes()
    record["timing"]["train_seconds"] = float("nan")
    with pytest.raises(ValueError, match="Out of range"):
        write_run_record(record, path)
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_file_atomically(path, "old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device: .* bytes free .at least 3 bytes needed"):
        write_file_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_files_are_readable_like_any_other(tmp_path: pathlib.Path) -> None:
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_text("x")
    write_file_atomically(atomic, "x")
    assert stat.S_IMODE(atomic.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
