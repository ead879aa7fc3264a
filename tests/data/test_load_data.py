"""From settings to parts: every way a recipe can name its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from toolkit.config.schema import DataSettings
from toolkit.data.labels import LabelMap
from toolkit.data.load import load_data, load_part
from toolkit.data.parts import LoadedData
from toolkit.data.targets import TargetFormat
from toolkit.errors import DataError

WriteFile = Callable[[str, "bytes | str"], str]


def table(spam: int, ham: int, name: str = "text") -> str:
    rows = [f"{name} s{i},spam\n" for i in range(spam)] + [f"{name} h{i},ham\n" for i in range(ham)]
    return "text,label\n" + "".join(rows)


def sizes(data: LoadedData) -> list[int]:
    return [len(part) for part in data.parts.values()]


def test_a_source_is_cut_in_shares(write: WriteFile) -> None:
    path = write("a.csv", table(40, 160))
    data = load_data(DataSettings(source=path))
    assert data.counts == {
        "train": {"ham": 112, "spam": 28},
        "validation": {"ham": 16, "spam": 4},
        "test": {"ham": 32, "spam": 8},
    }
    assert data.label_map == LabelMap(("ham", "spam"))
    assert [origin.served for origin in data.origins] == [path]
    assert data.warnings == []
    lines = Path(path).read_text().splitlines()[1:]
    for part in data.parts.values():
        assert part.texts is not None
        assert part.labels is not None
        names = [("ham", "spam")[label] for label in part.labels]
        pairs = zip(part.texts.to_pylist(), names, strict=True)
        assert [lines[row] for row in part.row_numbers] == [f"{text},{name}" for text, name in pairs]


def test_labels_take_the_order_of_the_recipe(write: WriteFile) -> None:
    data = load_data(DataSettings(source=write("a.csv", table(20, 20)), labels=["spam", "ham", "eggs"]))
    assert data.label_map == LabelMap(("spam", "ham", "eggs"))
    assert data.train.labels is not None
    assert data.train.texts is not None
    assert (data.train.labels == [int(" h" in text) for text in data.train.texts.to_pylist()]).all()
    assert data.warnings[0].endswith("label eggs has no training rows")


def test_balance_and_max_rows_come_before_the_cut(write: WriteFile) -> None:
    path = write("a.csv", table(40, 160))
    balanced = load_data(DataSettings(source=path, balance="undersample"))
    assert balanced.counts["train"] == {"ham": 28, "spam": 28}
    assert sizes(balanced) == [56, 8, 16]
    both = load_data(DataSettings(source=path, balance="undersample", max_rows=20))
    assert sizes(both) == [14, 2, 4]
    sampled = load_data(DataSettings(source=path, max_rows=50))
    assert sampled.counts["train"] == {"ham": 28, "spam": 7}


def test_oversampling_leaves_the_held_out_parts_alone(write: WriteFile) -> None:
    path = write("a.csv", table(40, 160))
    plain, data = load_data(DataSettings(source=path)), load_data(DataSettings(source=path, balance="oversample"))
    assert data.counts["train"] == {"ham": 112, "spam": 112}
    assert set(data.train.row_numbers) == set(plain.train.row_numbers)
    for name in ("validation", "test"):
        assert (data.parts[name].row_numbers == plain.parts[name].row_numbers).all()
    assert data.split is not None
    assert len(data.split.parts["train"]) == len(plain.train)


def test_three_files_are_used_as_they_are(write: WriteFile) -> None:
    settings = DataSettings(
        train=write("a.csv", table(10, 30)),
        validation=write("b.jsonl", '{"text": "v1", "label": "ham"}\n{"text": "v2", "label": "spam"}\n'),
        test=write("c.tsv", 'text\tlabel\nt "1\tspam\n'),
        balance="undersample",
    )
    data = load_data(settings)
    assert sizes(data) == [20, 2, 1]
    assert data.split is None
    assert data.test.texts is not None
    assert data.test.texts.to_pylist() == ['t "1']
    assert [Path(origin.name).name for origin in data.origins] == ["a.csv", "b.jsonl", "c.tsv"]


def test_missing_parts_are_cut_from_train(write: WriteFile) -> None:
    train, test = write("a.csv", table(80, 80)), write("c.csv", table(5, 5, "test"))
    assert sizes(load_data(DataSettings(train=train, test=test))) == [140, 20, 10]
    assert sizes(load_data(DataSettings(train=train, validation=test))) == [124, 10, 36]
    assert sizes(load_data(DataSettings(train=train))) == [112, 16, 32]


def test_repeats(write: WriteFile) -> None:
    path = write("a.csv", table(40, 60) + "text s1,spam\n" * 20)
    for duplicates, total in (("refuse", 120), ("remove", 100), ("allow", 120)):
        data = load_data(DataSettings.model_validate({"source": path, "duplicates": duplicates}))
        assert sum(sizes(data)) == total
        holding = sum("text s1" in part.texts.to_pylist() for part in data.parts.values() if part.texts is not None)
        assert (holding > 1) == (duplicates == "allow")
        assert "20 of 120 rows repeat an earlier text" in data.warnings[0]


def test_an_empty_part_needs_a_zero_fraction(write: WriteFile) -> None:
    path = write("a.csv", table(3, 3))
    with pytest.raises(DataError, match=r"data\.validation: no rows are left for this part"):
        load_data(DataSettings(source=path))
    split = {"train": 1.0, "validation": 0.0, "test": 0.0}
    data = load_data(DataSettings.model_validate({"source": path, "split": split}))
    assert sizes(data) == [6, 0, 0]
    assert data.test.labels is not None
    with pytest.raises(DataError, match=r"data\.split: the fractions sum to 1\.3"):
        load_data(DataSettings.model_validate({"source": path, "split": {"train": 1.0}}))


def test_without_stratification_the_sizes_still_hold(write: WriteFile) -> None:
    split = {"stratify": False}
    data = load_data(DataSettings.model_validate({"source": write("a.csv", table(100, 100)), "split": split}))
    assert sizes(data) == [140, 20, 40]
    assert data.counts["train"] != {"ham": 70, "spam": 70}


def test_unsupervised(write: WriteFile) -> None:
    data = load_data(DataSettings(source=write("a.txt", "".join(f"line {i}\n" for i in range(50)))), supervised=False)
    assert sizes(data) == [35, 5, 10]
    assert data.label_map is None
    assert data.train.labels is None
    assert data.counts == {}


def test_token_ids(tmp_path: Path) -> None:
    values = np.arange(1, 401).reshape(40, 10)
    values[:, -1] = np.arange(40) % 2
    np.save(tmp_path / "a.npy", values)
    data = load_data(DataSettings(source=str(tmp_path / "a.npy")))
    assert sizes(data) == [28, 4, 8]
    assert data.train.token_ids is not None
    for row, number in enumerate(data.train.row_numbers):
        assert data.train.token_ids[row].tolist() == values[number, :-1].tolist()
    (tmp_path / "b.csv").write_text(table(2, 2))
    with pytest.raises(DataError, match=r"b\.csv: data\.test: holds texts, data\.train token ids"):
        load_data(DataSettings(train=str(tmp_path / "a.npy"), test=str(tmp_path / "b.csv")))


def test_the_split_is_kept_and_reused(write: WriteFile, tmp_path: Path) -> None:
    settings = DataSettings(source=write("a.csv", table(40, 60)))
    kept = tmp_path / "run" / "split.json"
    first = load_data(settings, split_file=kept)
    written = kept.read_bytes()
    assert first.split is not None
    assert first.split.parts["test"].tolist() == first.test.row_numbers.tolist()
    again = load_data(settings, split_file=kept)
    assert kept.read_bytes() == written
    for name, part in first.parts.items():
        assert part.row_numbers.tolist() == again.parts[name].row_numbers.tolist()
    with pytest.raises(DataError, match=r"split\.json: data\.max_rows: None when the split was made, 50 now"):
        load_data(settings.model_copy(update={"max_rows": 50}), split_file=kept)
    write("a.csv", table(40, 61))
    with pytest.raises(DataError, match=r"split\.json: origin_sha256: the data changed since"):
        load_data(settings, split_file=kept)


def test_nothing_is_written_when_the_data_are_wrong(write: WriteFile, tmp_path: Path) -> None:
    kept = tmp_path / "run" / "split.json"
    with pytest.raises(DataError):
        load_data(DataSettings(source=write("a.csv", table(1, 1))), split_file=kept)
    one_class = DataSettings(source=write("b.csv", table(0, 40)), labels=["ham", "spam"])
    with pytest.raises(DataError, match="every training row"):
        load_data(one_class, split_file=kept)
    assert not kept.parent.exists()


def test_load_part(write: WriteFile) -> None:
    labels = LabelMap(("spam", "ham"))
    path = write("a.csv", table(1, 2))
    part, origin = load_part(path, text_column="text", targets=TargetFormat(), label_map=labels)
    assert part.labels is not None
    assert part.labels.tolist() == [0, 1, 1]
    assert origin.rows == len(part) == 3
    with pytest.raises(DataError, match="'ham' is not one of the labels"):
        load_part(path, text_column="text", targets=TargetFormat(), label_map=LabelMap(("a", "spam")))


def test_the_real_sms_set_is_read_exactly(shared: Path) -> None:
    path = shared / "data" / "sms_spam.tsv"
    data = load_data(DataSettings(source=str(path)))
    totals = {name: sum(counts[name] for counts in data.counts.values()) for name in ("ham", "spam")}
    assert totals == {"ham": 4827, "spam": 747}
    lines = path.read_text(encoding="utf-8").split("\n")[1:-1]
    texts = {int(row): text for part in data.parts.values() for row, text in _numbered(part.row_numbers, part.texts)}
    assert [texts[row] for row in range(len(lines))] == [line.split("\t")[1] for line in lines]
    seen = [{texts[int(row)] for row in part.row_numbers} for part in data.parts.values()]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 5171


def _numbered(rows: np.ndarray, texts: object) -> list[tuple[int, str]]:
    return list(zip(rows.tolist(), texts.to_pylist(), strict=True))  # type: ignore[attr-defined]
