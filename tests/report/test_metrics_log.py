"""The log survives a kill, a resume and a torn last line."""

from __future__ import annotations

import pathlib

import pytest

from toolkit.errors import OutputError
from toolkit.report.metrics_log import MetricsLog


@pytest.fixture
def log(tmp_path: pathlib.Path) -> MetricsLog:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        log.append({"step": step, "epoch": step / 10, "loss": 1 / step})
        log.append({"step": step, "validation": {"loss": 0.5, "accuracy": 0.9}})
    return log


def test_lines_come_back_in_order(log: MetricsLog) -> None:
    lines = log.read()
    assert [line["step"] for line in lines] == [10, 10, 20, 20, 30, 30]
    assert lines[0]["loss"] == 0.1
    assert lines[1]["validation"] == {"loss": 0.5, "accuracy": 0.9}


def test_nothing_yet(tmp_path: pathlib.Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(5)
    assert log.read() == []
    assert not log.path.exists()


def test_resume_equals_a_run_without_interruption(log: MetricsLog, tmp_path: pathlib.Path) -> None:
    whole = log.path.read_bytes()
    log.truncate_after(20)
    assert [line["step"] for line in log.read()] == [10, 10, 20, 20]
    log.append({"step": 30, "epoch": 3.0, "loss": 1 / 30})
    log.append({"step": 30, "validation": {"loss": 0.5, "accuracy": 0.9}})
    assert log.path.read_bytes() == whole


def test_a_torn_last_line_is_left_out_and_cut_by_the_resume(log: MetricsLog) -> None:
    with log.path.open("ab") as file:
        file.write(b'{"step": 40, "lo')
    assert len(log.read()) == 6
    log.truncate_after(30)
    assert log.path.read_bytes().endswith(b"}\n")


def test_damage_in_the_middle_names_its_line(log: MetricsLog) -> None:
    lines = log.path.read_bytes().split(b"\n")
    log.path.write_bytes(b"\n".join([*lines[:2], b"{oops", *lines[2:]]))
    with pytest.raises(OutputError, match=r"metrics.jsonl:3: not JSON"):
        log.read()


def test_not_finite_becomes_null(tmp_path: pathlib.Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "grad_norm": float("inf"), "validation": {"loss": float("nan")}})
    assert log.path.read_text() == '{"step": 1, "grad_norm": null, "validation": {"loss": null}}\n'


def test_a_line_needs_a_step(tmp_path: pathlib.Path) -> None:
    with pytest.raises(KeyError):
        MetricsLog(tmp_path / "metrics.jsonl").append({"loss": 1.0})
