from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pico import BaseOf, Batch, PicoFolder

from toolkit.models.base import Base
from toolkit.models.forward import checkpoint_activations, classify
from toolkit.models.load import load_classifier

CPU = torch.device("cpu")
FAMILY_NAMES = ["gpt2", "distilbert"]


def load(base: Base, **more: Any) -> Any:
    return load_classifier(base, labels=("ham", "spam"), quantization=None, seed=1, device=CPU, **more)


def stock(model: Any, tmp_path: Path) -> Any:
    model.save_pretrained(tmp_path / "stock")
    return transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock").eval()


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_logits_are_those_of_the_stock_architecture(
    pico_cache: PicoFolder, base_of: BaseOf, batch: Batch, tmp_path: Path, model_type: str
) -> None:
    model = load(base_of(pico_cache(model_type)))
    reference = stock(model, tmp_path)
    assert type(reference).__module__.startswith("transformers.")
    with torch.no_grad():
        torch.testing.assert_close(classify(model, batch), reference(**batch).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_a_row_does_not_depend_on_its_batch(
    pico_cache: PicoFolder, base_of: BaseOf, batch: Batch, model_type: str
) -> None:
    model = load(base_of(pico_cache(model_type)))
    with torch.no_grad():
        together = classify(model, batch)
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = {key: value[i : i + 1, :length] for key, value in batch.items()}
            torch.testing.assert_close(classify(model, alone)[0], together[i], atol=1e-6, rtol=1e-5)


def test_a_texts_own_last_pad_id_is_pooled_where_stock_loses_it(
    pico_cache: PicoFolder, base_of: BaseOf, tmp_path: Path
) -> None:
    model = load(base_of(pico_cache("gpt2")))
    assert model.config.pad_token_id == 0
    ids = torch.tensor([[11, 12, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        logits = classify(model, {"input_ids": ids, "attention_mask": mask})
        hidden = model.transformer(ids[:, :3]).last_hidden_state
        torch.testing.assert_close(logits, model.score(hidden[:, 2]), atol=1e-6, rtol=1e-5)
        lost = stock(model, tmp_path)(input_ids=ids, attention_mask=mask).logits
    assert (logits - lost).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_a_bf16_body_has_an_fp32_head_and_logits(
    pico_cache: PicoFolder, base_of: BaseOf, batch: Batch, model_type: str
) -> None:
    base = base_of(pico_cache(model_type))
    model, exact = load(base, dtype=torch.bfloat16), load(base)
    assert {model.get_submodule(path).weight.dtype for path in base.family.head} == {torch.float32}
    with torch.no_grad():
        logits = classify(model, batch)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, classify(exact, batch), atol=2e-2, rtol=0)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
@pytest.mark.parametrize("frozen_below_last", [False, True])
def test_checkpointing_changes_no_gradient(
    pico_cache: PicoFolder, base_of: BaseOf, batch: Batch, model_type: str, frozen_below_last: bool
) -> None:
    base = base_of(pico_cache(model_type))
    gradients = []
    for checkpointed in (False, True):
        model = load(base).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if frozen_below_last:
            model.requires_grad_(False)
            model.get_submodule(f"{base.family.blocks}.1").requires_grad_(True)
        embedded: list[bool] = []
        model.get_submodule(base.family.embeddings[0]).register_forward_hook(
            lambda module, arguments, output, embedded=embedded: embedded.append(output.requires_grad)
        )
        if checkpointed:
            checkpoint_activations(model)
            assert model.is_activation_checkpointing
        torch.autograd.backward(classify(model, batch).square().sum())
        assert embedded == [not frozen_below_last]
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-7, rtol=1e-6)
