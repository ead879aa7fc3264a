"""Output folders are whole or absent."""

from __future__ import annotations

import pathlib
import shutil
import stat

import pytest

from toolkit.errors import OutputError
from toolkit.export.staging import check_output, staged_folder


def test_the_folder_appears_at_the_end(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "deep" / "out"
    with staged_folder(output) as staging:
        (staging / "a").write_text("x")
        assert not output.exists()
    assert (output / "a").read_text() == "x"
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(output.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_failure_leaves_nothing(tmp_path: pathlib.Path) -> None:
    def fail() -> None:
        with staged_folder(tmp_path / "out") as staging:
            (staging / "a").write_text("x")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: pathlib.Path) -> None:
    def lose_the_race() -> None:
        with staged_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(OutputError, match="cannot be made"):
        lose_the_race()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_what_a_living_process_stages_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".out-staged-old").mkdir()
    (tmp_path / ".out-staged-old" / "part").write_text("left by a kill")
    (tmp_path / ".other-staged-old").mkdir()
    with staged_folder(tmp_path / "out") as first:
        assert sorted(path.name for path in tmp_path.iterdir()) == [".other-staged-old", first.name]
        with staged_folder(tmp_path / "out") as second:
            assert first.exists()
            (second / "a").write_text("x")
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_an_empty_folder_may_be_filled(tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out")
    with staged_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("x")
    assert (tmp_path / "out" / "a").exists()


@pytest.mark.parametrize("inside", ["run", "run/merged", "run/adapter/../merged"])
def test_inside_the_input_is_refused(inside: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"exists already|lies inside"):
        check_output(tmp_path / inside, inside_of=tmp_path / "run")


def test_below_a_file_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "out")
