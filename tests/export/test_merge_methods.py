"""A merge of every kind of adapter: stock transformers gives what the live model and stock peft give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ladder import ADAPTERS, LADDER, cases
from pico import PicoFolder
from test_merge import STORAGE, live_model, random_batch, relative, stock_logits
from trained import build_run

from toolkit.errors import AdapterError
from toolkit.export.merge import merge_adapter
from toolkit.models.forward import classify

MERGED = [case for case in cases(adapters=True) if LADDER[case[0]].name != "prefix"]


@pytest.mark.parametrize(("name", "family", "storage"), MERGED)
def test_stock_transformers_gives_the_live_logits_of_every_method(
    name: str, family: str, storage: str, pico_cache: PicoFolder, tmp_path: Path
) -> None:
    run = build_run(tmp_path / "run", pico_cache(family), method=LADDER[name], quantization=STORAGE[storage])
    report = merge_adapter(run, tmp_path / "merged")
    batch = random_batch()
    with torch.no_grad():
        live = classify(live_model(run), batch)
    # 8-bit layers round what they are given, too; the merged model rounds nothing.
    allowed = {"fp32": 1e-5, "nf4": 1e-4, "int8": 5e-2}[storage]
    assert relative(stock_logits(tmp_path / "merged", batch), live) <= allowed
    assert report.parity.relative <= report.parity.bound
    assert report.adapted > 0


def test_a_prefix_is_refused(pico_cache: PicoFolder, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", pico_cache("gpt2"), method=ADAPTERS["prefix"])
    with pytest.raises(AdapterError, match="prefix stands beside the weights"):
        merge_adapter(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_variant_other_than_the_manifests_is_refused(pico_cache: PicoFolder, tmp_path: Path) -> None:
    """The same tensors, scaled as another variant would."""
    run = build_run(tmp_path / "run", pico_cache("gpt2"), method=LADDER["rslora"])
    config = run / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": true', '"use_rslora": false'))
    with pytest.raises(AdapterError):
        merge_adapter(run, tmp_path / "merged")
