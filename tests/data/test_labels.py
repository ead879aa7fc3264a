"""Label names and ids."""

from __future__ import annotations

import numpy as np
import pytest

from toolkit.data.labels import LabelColumn, LabelMap
from toolkit.errors import DataError


def test_found_labels_are_sorted_numbers_by_value() -> None:
    assert LabelMap.from_found(["spam", "ham", "spam"]).names == ("ham", "spam")
    assert LabelMap.from_found(["10", "2", "-1"]).names == ("-1", "2", "10")
    assert LabelMap.from_found(["10", "2", "007"]).names == ("007", "10", "2")


def test_ids_follow_the_names() -> None:
    labels = LabelMap(("no", "yes"))
    assert labels.id2label == {0: "no", 1: "yes"}
    assert labels.label2id == {"no": 0, "yes": 1}
    ids = labels.encode(["yes", "no", "yes"], where="a.csv")
    assert ids.dtype == np.int64
    assert ids.tolist() == [1, 0, 1]
    assert labels.counts(ids) == {"no": 1, "yes": 2}
    assert labels.encode([], where="a.csv").tolist() == []
    with pytest.raises(DataError, match=r"a\.csv: label: 'Yes' is not one of the labels"):
        labels.encode(["Yes"], where="a.csv")


def test_take_drops_names_that_no_longer_occur() -> None:
    column = LabelColumn.from_strings(["a", "b", "c", "b"]).take(np.array([3, 2, 1]))
    assert [column[row] for row in range(len(column))] == ["b", "c", "b"]
    assert column.names == ("b", "c")
