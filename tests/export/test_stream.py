"""Files written tensor by tensor are what the safetensors library reads."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from toolkit.errors import ToolkitError
from toolkit.export.stream import plan_shards, write_tensors

TENSORS = {
    "b.weight": torch.arange(12.0).view(3, 4).T,
    "a": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "größe": torch.randn(5, generator=torch.Generator().manual_seed(0)),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_the_same(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    total = write_tensors(tmp_path, SHAPES, TENSORS.__getitem__, dtype=dtype)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor.to(dtype))
    assert total == sum(tensor.numel() * dtype.itemsize for tensor in TENSORS.values())
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


def test_shards_and_their_index(tmp_path: pathlib.Path) -> None:
    total = write_tensors(tmp_path, SHAPES, TENSORS.__getitem__, dtype=torch.float32, max_shard_bytes=30)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == TENSORS.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])
    assert sorted(set(index["weight_map"].values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_slices_of_a_tensor_are_as_good_as_the_tensor(tmp_path: pathlib.Path) -> None:
    whole = torch.arange(24.0).view(6, 4)
    write_tensors(tmp_path, {"x": (6, 4)}, lambda name: iter(whole.split([1, 3, 2])), dtype=torch.float32)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], whole)


def test_a_tensor_above_the_limit_gets_its_own_file() -> None:
    shapes = {"a": (2,), "big": (100,), "b": (2,)}
    assert plan_shards(shapes, dtype=torch.float32, max_shard_bytes=16) == [["a"], ["big"], ["b"]]


def test_shape_and_finiteness_are_proven(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ToolkitError, match=r"x: 2 rows where \(3,\)"):
        write_tensors(tmp_path, {"x": (3,)}, lambda name: torch.zeros(2), dtype=torch.float32)
    with pytest.raises(ToolkitError, match=r"x: rows of shape \(3,\) where \(3, 2\)"):
        write_tensors(tmp_path, {"x": (3, 2)}, lambda name: torch.zeros(3, 3), dtype=torch.float32)
    with pytest.raises(ToolkitError, match="x: not finite as F32"):
        write_tensors(tmp_path, {"x": (1,)}, lambda name: torch.tensor([float("nan")]), dtype=torch.float32)
    with pytest.raises(ToolkitError, match="x: not finite as F16"):
        write_tensors(tmp_path, {"x": (1,)}, lambda name: torch.tensor([7e4]), dtype=torch.float16)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="a device that is full")
def test_a_full_disk_is_an_error_of_the_caller_whichever_piece_meets_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    for rows in (1, 3):
        with pytest.raises(OSError, match="No space left"):
            write_tensors(tmp_path, {"x": (rows, 4)}, lambda _, n=rows: iter(torch.ones(n, 1, 4)), dtype=torch.float32)
