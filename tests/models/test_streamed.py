"""Frozen blocks that stay on disk give the very states, logits and files of those in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico import BaseOf, PicoFolder
from safetensors.torch import load_file, save_file

from toolkit.adapters.apply import apply_method
from toolkit.config.schema import HeadMethod, LastNMethod, LoraMethod
from toolkit.errors import ModelError, ToolkitError
from toolkit.families import FAMILIES
from toolkit.models.flat import pooled_states, prefix_states
from toolkit.models.load import load_classifier
from toolkit.models.stored import PIECE_BYTES, StoredTensors, all_finite, check_finite

FAMILY_NAMES = ["gpt2", "distilbert"]
CPU = torch.device("cpu")


def load(base: Any, *, streamed: int | None) -> Any:
    return load_classifier(base, labels=("ham", "spam"), quantization=None, seed=3, device=CPU, streamed=streamed)


def batch(rows: int, longest: int, *, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator).sort().values
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": torch.randint(5, 60, (rows, longest), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_states_are_those_of_a_model_in_memory(
    family: str, blocks: int, pico_cache: PicoFolder, base_of: BaseOf
) -> None:
    base = base_of(pico_cache(family))
    whole, streamed = load(base, streamed=None), load(base, streamed=blocks)
    batches = [batch(3, 9, seed=0), batch(5, 20, seed=1)]
    with torch.no_grad():
        expected = prefix_states(whole, batches, blocks=blocks)
        found = prefix_states(streamed, batches, blocks=blocks)
        one_by_one = [prefix_states(whole, [one], blocks=blocks)[0] for one in batches]
        logits = [pooled_states(model, **batches[1]) for model in (whole, streamed)]
    for one, other, single in zip(found, expected, one_by_one, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, single)
    assert torch.equal(*logits)
    head = {name: weight for name, weight in whole.state_dict().items() if name.startswith(FAMILIES[family].head)}
    assert head
    assert all(torch.equal(weight, streamed.state_dict()[name]) for name, weight in head.items())


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    "method",
    [HeadMethod(name="head"), LastNMethod(name="last_n", n=1), LoraMethod(layers="last_1")],
    ids=lambda method: method.name,
)
def test_only_what_is_not_streamed_has_memory(
    family: str, method: Any, pico_cache: PicoFolder, base_of: BaseOf
) -> None:
    base = base_of(pico_cache(family))
    blocks = 2 if method.name == "head" else 1
    model = apply_method(load(base, streamed=blocks), method, family=base.family, base_name="here", seed=0)
    core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = [name for name, parameter in core.named_parameters() if parameter.is_meta]
    inside = tuple(f"{base.family.blocks}.{number}." for number in range(blocks))
    assert all(name.startswith(inside) or name.endswith(("wte.weight", "word_embeddings.weight")) for name in names)
    assert len(names) > 8
    assert not any(parameter.is_meta for parameter in model.parameters() if parameter.requires_grad)
    assert not any(buffer.is_meta for buffer in model.buffers())
    with torch.no_grad():
        prefix_states(core, [batch(3, 9, seed=0)], blocks=blocks)
    assert [name for name, parameter in core.named_parameters() if parameter.is_meta] == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_read_whole_in_pieces_and_by_row(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.models.stored.PIECE_BYTES", 64)
    table = torch.randn(33, 5).to(dtype)
    save_file(
        {"transformer.wte.weight": table, "transformer.ln_f.bias": table[0].clone()}, tmp_path / "model.safetensors"
    )
    stored = StoredTensors(tmp_path, FAMILIES["gpt2"])
    assert torch.equal(stored.read("wte.weight"), table.float())
    pieces = [piece.clone() for piece in stored.pieces("transformer.wte.weight")]
    assert len(pieces) > 3
    assert torch.equal(torch.cat(pieces), table)
    # One may still be written while the next is read.
    before = None
    for place, piece in enumerate(stored.pieces("transformer.wte.weight")):
        assert before is None or torch.equal(before, pieces[place - 1])
        before = piece
    assert pieces[0].dtype == dtype
    assert torch.equal(stored.rows("wte.weight", torch.tensor([0, 7, 32])), table[[0, 7, 32]].float())
    assert torch.equal(stored.read("ln_f.bias"), table[0].float())
    with pytest.raises(ToolkitError, match="nothing: not among the base's tensors"):
        stored.read("nothing")


def test_a_file_cut_after_it_was_checked_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"wte.weight": torch.ones(64, 64)}, file)
    stored = StoredTensors(tmp_path, FAMILIES["gpt2"])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ToolkitError, match="became shorter"):
        stored.read("wte.weight")
    with pytest.raises(ToolkitError, match="became shorter"):
        stored.rows("wte.weight", torch.tensor([63]))


def test_not_a_number_is_found_in_any_piece(tmp_path: Path) -> None:
    values = torch.zeros(PIECE_BYTES // 4 + 10)
    save_file({"x": values}, tmp_path / "model.safetensors")
    check_finite(tmp_path)
    values[-1] = float("inf")
    save_file({"x": values}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="x: holds NaN or infinity"):
        check_finite(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["x"][-1] == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_is_what_torch_calls_finite(dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf"), -float("inf"), 0.0, torch.finfo(dtype).max):
        for place in (0, 57, 99):
            values = torch.randn(100).to(dtype)
            values[place] = bad
            assert all_finite(values) == bool(torch.isfinite(values).all())
    assert all_finite(torch.empty(0, dtype=dtype))
