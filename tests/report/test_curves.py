"""The drawings hold what was measured; pixels are looked at where a human would look."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from toolkit.report.curves import BEST, TRAIN, VALIDATION, draw_confusion, draw_curves, draw_memory
from toolkit.report.run_record import RunRecord


def history(steps: int = 60) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 1 / step})
        if step % 20 == 0:
            lines.append({"step": step, "validation": {"loss": 0.2, "accuracy": 0.9, "f1_macro": 0.88}})
    return lines


def pixels(path: pathlib.Path, colour: str) -> int:
    """Count pixels close to a colour; antialiasing mixes the edges of a line."""
    with Image.open(path) as opened:
        image = np.asarray(opened.convert("RGB")).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(image - wanted).max(axis=2) < 12).sum())


def size(path: pathlib.Path) -> tuple[int, int]:
    with Image.open(path) as opened:
        return opened.size


def test_both_panels_and_the_best_step(tmp_path: pathlib.Path) -> None:
    draw_curves(history(), tmp_path / "with.png", title="run", best_step=40)
    draw_curves(history(), tmp_path / "without.png", title="run")
    assert pixels(tmp_path / "with.png", TRAIN) > 500
    assert pixels(tmp_path / "with.png", VALIDATION) > 500
    assert pixels(tmp_path / "with.png", BEST) > 100 > pixels(tmp_path / "without.png", BEST)
    width, height = size(tmp_path / "with.png")
    assert width > 2 * height


def test_no_share_above_all_is_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    seen: list[float] = []
    save = Figure.savefig

    def look(figure: Figure, *arguments: Any, **options: Any) -> None:
        seen.extend(float(tick) for tick in figure.axes[1].get_yticks())
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", look)
    draw_curves(history(), tmp_path / "curves.png", title="run")
    assert len(seen) > 2
    assert 0 <= min(seen) < max(seen) <= 1 + 1e-9


def test_language_modelling_has_one_panel(tmp_path: pathlib.Path) -> None:
    lines = [{"step": 5, "loss": 3.0}, {"step": 5, "validation": {"loss": 2.9}}, {"step": 9, "loss": None}]
    draw_curves(lines, tmp_path / "one.png", title="run")
    width, height = size(tmp_path / "one.png")
    assert width < 2 * height


def test_no_history_still_draws(tmp_path: pathlib.Path) -> None:
    draw_curves([], tmp_path / "empty.png", title="")
    assert (tmp_path / "empty.png").stat().st_size > 1000


@pytest.mark.parametrize("names", [["$5_{x}", "^bad$"], ["詐欺", "正常"], ["x" * 60, "y"]])
def test_any_label_is_drawn_as_text(names: list[str], tmp_path: pathlib.Path) -> None:
    draw_confusion([[3, 1], [0, 5]], names, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_confusion_is_shaded_by_row(tmp_path: pathlib.Path) -> None:
    draw_confusion([[1000, 0], [0, 1]], ["a", "b"], tmp_path / "sure.png")
    draw_confusion([[500, 500], [1, 0]], ["a", "b"], tmp_path / "unsure.png")
    dark = "#08306b"
    assert pixels(tmp_path / "sure.png", dark) > 1.8 * pixels(tmp_path / "unsure.png", dark) > 0


def test_many_labels_and_an_empty_row(tmp_path: pathlib.Path) -> None:
    draw_confusion(np.eye(40, dtype=int).tolist(), [f"label {i}" for i in range(40)], tmp_path / "m.png")
    draw_confusion([[0, 0], [1, 1]], ["a", "b"], tmp_path / "e.png")
    assert size(tmp_path / "m.png")[0] > size(tmp_path / "e.png")[0]


def test_memory_over_time(record: RunRecord, tmp_path: pathlib.Path) -> None:
    memory = record["memory"]
    lines = [{"step": 1, "time": at, "memory": {"allocated": 0, "rss": 1_400_000_000}} for at in (110.0, 115.0)]
    draw_memory(memory, [*lines, {"step": 2, "validation": {}}], tmp_path / "all.png")
    for colour in (BEST, TRAIN, VALIDATION):
        assert pixels(tmp_path / "all.png", colour) > 200
    # Lines of an earlier process of the run, and no prediction: neither is drawn.
    draw_memory({**memory, "predicted_bytes": None}, [{**lines[0], "time": 99.0}], tmp_path / "phases.png")
    assert pixels(tmp_path / "phases.png", VALIDATION) > 200
    assert pixels(tmp_path / "phases.png", TRAIN) == pixels(tmp_path / "phases.png", BEST) == 0
