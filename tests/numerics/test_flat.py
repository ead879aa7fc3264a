"""The forward without padding against its plain twin: stock transformers on the padded batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
import transformers
from ladder import LADDER
from pico import BaseOf, Batch, PicoFolder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from toolkit.adapters.apply import apply_method
from toolkit.config.schema import FullMethod, HeadMethod, LastNMethod, LoraMethod, QuantizationSettings
from toolkit.families import FAMILIES
from toolkit.models.cpu_kernels import stepped
from toolkit.models.flat import prefix_states, runs_flat
from toolkit.models.forward import checkpoint_activations, classify, frozen_blocks, unwrapped
from toolkit.models.load import load_classifier
from toolkit.models.packing import attend_by_run, attend_padded, attend_widened, pack

FAMILY_NAMES = ["gpt2", "distilbert"]
STOCK: dict[str, Any] = {
    "gpt2": transformers.GPT2ForSequenceClassification,
    "distilbert": transformers.DistilBertForSequenceClassification,
}
LENGTHS = (7, 40, 1, 22, 7, 3, 40, 13, 1, 18, 29, 7)

LORA = LoraMethod(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
INT8 = QuantizationSettings(bits=8)
NF4 = QuantizationSettings(bits=4)

# Method, quantisation, relative tolerance of the loss and of every gradient.
CASES: dict[str, tuple[Any, QuantizationSettings | None, float]] = {
    "full": (FullMethod(name="full"), None, 3e-6),
    "last_n": (LastNMethod(name="last_n", n=1), None, 3e-6),
    "head": (HeadMethod(name="head"), None, 3e-6),
    "lora": (LORA, None, 3e-6),
    "lora_auto": (LORA.model_copy(update={"target_modules": "auto"}), None, 3e-6),
    "lora_8bit": (LORA, INT8, 3e-6),
    "lora_4bit": (LORA, NF4, 3e-6),
    "head_4bit": (HeadMethod(name="head"), NF4, 3e-6),
    **{name: (LADDER[name], None, 3e-6) for name in LADDER if name not in ("full", "last_n", "head", "lora", "prefix")},
    "dora_4bit": (LADDER["dora"], NF4, 3e-6),
    "adalora_8bit": (LADDER["adalora"], INT8, 3e-6),
    "vera_4bit": (LADDER["vera"], NF4, 3e-6),
    "ia3_8bit": (LADDER["ia3_all"], INT8, 3e-6),
    "ln_tuning_4bit": (LADDER["ln_tuning"], NF4, 3e-6),
}


def batch_of(lengths: tuple[int, ...]) -> Batch:
    """Padded on the right with id 0, which no text holds: stock GPT-2 finds a text's end by it."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 60, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def build(base: Any, method: Any, quantization: QuantizationSettings | None = None, *, dropout: float = 0.0) -> Any:
    model = load_classifier(base, labels=("a", "b", "c"), quantization=quantization, seed=1, device=torch.device("cpu"))
    tuned = apply_method(model, method, family=base.family, base_name=base.name_or_path, seed=2)
    generator = torch.Generator().manual_seed(3)
    for parameter in tuned.parameters():
        # peft starts B at zero, which would leave every gradient of A zero.
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    for module in tuned.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return tuned.train()


def padded(model: Any, batch: Batch) -> torch.Tensor:
    """Return the logits of the stock forward, with the layers that peft and bitsandbytes put into the model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    more = {"use_cache": False} if base.config.model_type == "gpt2" else {}
    logits: torch.Tensor = STOCK[base.config.model_type].forward(base, **batch, **more).logits
    return logits


def loss_and_gradients(
    model: Any, forward: Callable[[Any, Batch], torch.Tensor], batch: Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    labels = torch.arange(len(batch["input_ids"])) % 3
    loss = functional.cross_entropy(forward(model, batch), labels)
    torch.autograd.backward(loss)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return loss.detach(), {name: p.grad.clone() for name, p in trained.items()}


def errors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return each gradient's largest error, relative to its largest entry.

    The gradient of a key bias is zero in exact arithmetic, softmax being blind to a shift: what both forwards return
    for it is rounding. Hence no gradient is measured on a scale below 1e-3 of the largest one.
    """
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in expected.values())
    assert got.keys() == expected.keys()
    return {
        name: float((got[name] - gradient).abs().max()) / max(float(gradient.abs().max()), floor)
        for name, gradient in expected.items()
    }


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_loss_and_every_gradient_are_those_of_the_padded_forward(
    pico_cache: PicoFolder, base_of: BaseOf, model_type: str, case: str, checkpointed: bool
) -> None:
    method, quantization, tolerance = CASES[case]
    model = build(base_of(pico_cache(model_type)), method, quantization)
    batch = batch_of(LENGTHS)
    loss, expected = loss_and_gradients(model, padded, batch)
    if checkpointed:
        checkpoint_activations(model)
    flat_loss, got = loss_and_gradients(model, classify, batch)
    assert float((flat_loss - loss).abs()) <= tolerance * float(loss)
    wrong = {name: error for name, error in errors(got, expected).items() if error > tolerance}
    assert not wrong
    assert max(float(gradient.abs().max()) for gradient in got.values()) > 1e-3


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_blocks_are_recomputed_only_while_training(pico_cache: PicoFolder, base_of: BaseOf, model_type: str) -> None:
    model = build(base_of(pico_cache(model_type)), FullMethod(name="full"))
    checkpoint_activations(model)
    calls: list[str] = []
    for block in model.get_submodule(FAMILIES[model_type].blocks):
        next(m for m in block.modules() if isinstance(m, nn.LayerNorm)).register_forward_hook(
            lambda *arguments: calls.append("norm")
        )
    loss_and_gradients(model, classify, batch_of((3, 5)))
    assert len(calls) == 4
    calls.clear()
    loss_and_gradients(model.eval(), classify, batch_of((3, 5)))
    assert len(calls) == 2
    calls.clear()
    checkpoint_activations(model.train(), 1)
    loss_and_gradients(model, classify, batch_of((3, 5)))
    assert len(calls) == 3


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_predictions_do_not_depend_on_the_batch(pico_cache: PicoFolder, base_of: BaseOf, model_type: str) -> None:
    model = build(base_of(pico_cache(model_type)), FullMethod(name="full")).eval()
    batch = batch_of(LENGTHS)
    with torch.no_grad():
        together = classify(model, batch)
        torch.testing.assert_close(together, padded(model, batch), atol=1e-6, rtol=3e-6)
        backwards = classify(model, {name: tensor.flip(0) for name, tensor in batch.items()}).flip(0)
        torch.testing.assert_close(backwards, together, atol=1e-6, rtol=3e-6)
        for row, length in enumerate(LENGTHS):
            alone = {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
            torch.testing.assert_close(classify(model, alone)[0], together[row], atol=1e-6, rtol=3e-6)
    assert (together[1] - together[0]).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_padding_may_stand_anywhere(pico_cache: PicoFolder, base_of: BaseOf, model_type: str) -> None:
    model = build(base_of(pico_cache(model_type)), FullMethod(name="full")).eval()
    ids = torch.tensor([[11, 12, 13, 0, 0], [0, 0, 11, 12, 13], [0, 11, 0, 12, 13]])
    with torch.no_grad():
        logits = classify(model, {"input_ids": ids, "attention_mask": (ids > 0).long()})
        alone = model(input_ids=torch.tensor([[11, 12, 13]])).logits
    torch.testing.assert_close(logits, alone.expand(3, -1), atol=1e-6, rtol=3e-6)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_a_row_without_tokens_is_classified_by_one_padding(
    pico_cache: PicoFolder, base_of: BaseOf, model_type: str
) -> None:
    model = build(base_of(pico_cache(model_type)), FullMethod(name="full")).eval()
    ids, mask = torch.tensor([[11, 12, 13], [0, 0, 0]]), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with torch.no_grad():
        logits = classify(model, {"input_ids": ids, "attention_mask": mask})
        alone = classify(model, {"input_ids": torch.tensor([[0]]), "attention_mask": torch.tensor([[1]])})
        full = classify(model, {"input_ids": ids[:1], "attention_mask": mask[:1]})
    torch.testing.assert_close(logits, torch.cat([full, alone]), atol=1e-6, rtol=3e-6)


DROPOUTS = {
    "gpt2": ["transformer.drop", "transformer.h.0.attn.attn_dropout", "transformer.h.1.attn.attn_dropout",
             "transformer.h.0.attn.resid_dropout", "transformer.h.1.attn.resid_dropout", "transformer.h.0.mlp.dropout",
             "transformer.h.1.mlp.dropout"],
    "distilbert": ["distilbert.embeddings.dropout", "distilbert.transformer.layer.0.attention.dropout",
                   "distilbert.transformer.layer.1.attention.dropout", "distilbert.transformer.layer.0.ffn.dropout",
                   "distilbert.transformer.layer.1.ffn.dropout", "dropout"],
}  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_every_dropout_acts_while_training_and_only_then(
    pico_cache: PicoFolder, base_of: BaseOf, model_type: str
) -> None:
    model = build(base_of(pico_cache(model_type)), FullMethod(name="full"))
    batch = batch_of((4, 9, 4))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert sorted(names) == sorted(DROPOUTS[model_type])
    with torch.no_grad():
        kept = classify(model, batch)
        for name in names:
            # All or nothing is not random, so the two forwards can be compared.
            model.get_submodule(name).p = 1.0
            dropped = classify(model.train(), batch)
            torch.testing.assert_close(dropped, padded(model, batch), atol=1e-6, rtol=3e-6)
            assert (dropped - kept).abs().max() > 1e-5, name
            torch.testing.assert_close(classify(model.eval(), batch), kept, atol=0, rtol=0)
            model.get_submodule(name).p = 0.0


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_autocast_reaches_the_layers(pico_cache: PicoFolder, base_of: BaseOf, model_type: str) -> None:
    model = build(base_of(pico_cache(model_type)), LORA)
    batch = batch_of(LENGTHS)
    seen: list[torch.dtype] = []
    block = model.get_base_model().get_submodule(FAMILIES[model_type].blocks)[0]
    linear = next(m for m in block.modules() if hasattr(m, "base_layer"))
    linear.base_layer.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, expected = classify(model, batch), padded(model, batch)
    assert seen[0] == torch.bfloat16
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.float(), atol=2e-2, rtol=2e-2)


def test_blocks_that_are_not_stock_run_padded(pico_cache: PicoFolder, base_of: BaseOf) -> None:
    class ShardedBlock(GPT2Block):  # type: ignore[misc]
        """What FSDP2 makes of a block: a subclass whose own forward gathers its parameters."""

    model = build(base_of(pico_cache("gpt2")), FullMethod(name="full")).eval()
    batch = batch_of((4, 9, 4))
    with torch.no_grad():
        flat = classify(model, batch)
        assert runs_flat(model)
        model.transformer.h[1].__class__ = ShardedBlock
        assert not runs_flat(model)
        torch.testing.assert_close(classify(model, batch), flat, atol=1e-6, rtol=3e-6)


def test_only_real_tokens_are_computed_and_the_last_mlp_sees_one_a_row(pico_cache: PicoFolder, base_of: BaseOf) -> None:
    model = build(base_of(pico_cache("gpt2")), FullMethod(name="full"))
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("wte", "h.0.attn.c_attn", "h.0.mlp.c_fc", "h.1.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp.c_fc"):
        model.transformer.get_submodule(name).register_forward_hook(
            lambda module, arguments, output, name=name: shapes.update({name: tuple(output.shape[:-1])})
        )
    classify(model, batch_of((3, 8, 1)))
    assert shapes == {
        "wte": (12,),
        "h.0.attn.c_attn": (12,),
        "h.0.mlp.c_fc": (12,),
        "h.1.attn.c_attn": (12,),
        "h.1.attn.c_proj": (3,),
        "h.1.mlp.c_fc": (3,),
    }


@pytest.mark.parametrize("kind", ["causal", "both_ways", "one_query"])
def test_padded_attention_is_attention_by_run(kind: str) -> None:
    batch = batch_of((4, 9, 4, 1))
    _, packing = pack(batch["input_ids"], batch["attention_mask"], pooling="last")
    assert packing.runs == ((1, 1), (2, 4), (1, 9))
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(18, 2, 8, generator=generator) for _ in range(3)]
    if kind == "one_query":
        parts[0] = parts[0][packing.pooled]
    results = []
    for attention in (attend_by_run, attend_padded):
        leaves = [part.clone().requires_grad_() for part in parts]
        context = attention(*leaves, packing=packing, causal=kind == "causal", dropout=0.0, scale=0.3)
        results.append([context.detach(), *torch.autograd.grad(context.square().sum(), leaves)])
    for by_run, in_one in zip(*results, strict=True):
        torch.testing.assert_close(in_one, by_run, atol=1e-6, rtol=3e-6)


@pytest.mark.parametrize("kind", ["causal", "both_ways", "one_query"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_widened_attention_is_float32_attention_rounded_once(kind: str, dropout: float) -> None:
    batch = batch_of((4, 9, 4, 1))
    _, packing = pack(batch["input_ids"], batch["attention_mask"], pooling="last", in_steps=True)
    assert packing.filler == 6
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(24, 2, 8, generator=generator).bfloat16() for _ in range(3)]
    if kind == "one_query":
        parts[0] = parts[0][packing.pooled]
    options: dict[str, Any] = {"packing": packing, "causal": kind == "causal", "dropout": dropout, "scale": 0.3}
    leaves = [part.clone().requires_grad_() for part in parts]
    twins = [part.float().requires_grad_() for part in parts]
    torch.manual_seed(1)
    context = attend_widened(*leaves, **options)
    torch.manual_seed(1)
    expected = attend_by_run(*twins, **options)
    assert context.dtype == torch.bfloat16
    assert torch.equal(context, expected.bfloat16())
    state = torch.get_rng_state()
    got = torch.autograd.grad(context.float().square().sum(), leaves)
    assert torch.equal(torch.get_rng_state(), state)
    twin = torch.autograd.grad(expected, twins, 2 * context.detach().float())
    # The gradient that arrives is rounded to bf16 as well.
    for one, other in zip(got, twin, strict=True):
        torch.testing.assert_close(one.float(), other, atol=2e-2, rtol=2e-2)


def test_few_row_counts_an_eighth_more_at_most() -> None:
    found = {rows: stepped(rows) for rows in range(1, 5000)}
    assert all(rows <= count <= max(rows * 9 / 8, rows + 7) for rows, count in found.items())
    assert len(set(found.values())) < 60


@pytest.mark.parametrize("case", ["full", "last_n", "lora", "head"])
@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_filler_for_onednn_changes_no_loss_and_no_gradient(
    pico_cache: PicoFolder, base_of: BaseOf, model_type: str, case: str
) -> None:
    model = build(base_of(pico_cache(model_type)), CASES[case][0])
    batch = batch_of(LENGTHS)
    assert stepped(sum(LENGTHS)) > sum(LENGTHS)
    assert stepped(len(LENGTHS)) > len(LENGTHS)
    for forward in (classify, *([cached] if case in ("last_n", "head") else [])):
        expected, gradients = loss_and_gradients(model, forward, batch)
        unwrapped(model).onednn = True
        loss, got = loss_and_gradients(model, forward, batch)
        unwrapped(model).onednn = False
        torch.testing.assert_close(loss, expected, atol=0, rtol=3e-6)
        wrong = {name: error for name, error in errors(got, gradients).items() if error > 3e-6}
        assert not wrong


def test_onednn_meets_few_row_counts_in_blocks_and_none_in_the_head(pico_cache: PicoFolder, base_of: BaseOf) -> None:
    model = build(base_of(pico_cache("gpt2")), FullMethod(name="full"))
    seen: dict[str, torch.Tensor] = {}
    for path in ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc", "score"):
        model.get_submodule(path).register_forward_hook(
            lambda module, arguments, output, path=path: seen.update({path: output})
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        classify(model, batch_of((3, 8, 2)))
    rows = {path: len(output) for path, output in seen.items()}
    assert rows == {"transformer.h.0.mlp.c_fc": 16, "transformer.h.1.mlp.c_fc": 8, "score": 3}
    assert seen["transformer.h.1.mlp.c_fc"].dtype == torch.bfloat16
    # Out of autocast's hands, the head is exact, and no kernel is compiled for its rows.
    assert seen["score"].dtype == torch.float32


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_folded_attention_is_in_float32_under_autocast(
    pico_cache: PicoFolder, base_of: BaseOf, model_type: str
) -> None:
    model = build(base_of(pico_cache(model_type)), CASES["last_n"][0])
    batch = batch_of(LENGTHS)
    expected, gradients = loss_and_gradients(model, cached, batch)
    multiplied: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if operation is torch.ops.aten.bmm.default:
                multiplied.extend(argument.dtype for argument in arguments)
            return operation(*arguments, **(options or {}))

    # A step's backward pass runs outside of autocast.
    low = torch.autocast("cpu", dtype=torch.bfloat16)(cached)
    with Watch():
        loss, got = loss_and_gradients(model, low, batch)
    assert set(multiplied) == {torch.float32}
    torch.testing.assert_close(loss, expected, atol=0, rtol=2e-2)
    assert max(errors(got, gradients).values()) < 5e-2


def cached(model: Any, batch: Batch) -> torch.Tensor:
    """Return the logits from kept states of the frozen blocks, fp32."""
    lengths = batch["attention_mask"].sum(1)
    order = torch.argsort(lengths, stable=True)
    blocks = frozen_blocks(model)
    with torch.no_grad():
        ascending = {name: tensor[order] for name, tensor in batch.items()}
        [states] = prefix_states(unwrapped(model), [ascending], blocks=blocks)
    pooled = blocks == len(list(unwrapped(model).get_submodule(FAMILIES[model.config.model_type].blocks)))
    rows = torch.argsort(order) if pooled else slice(None)
    return classify(model, {"states": states[rows], "lengths": lengths}, blocks=blocks)


LAST = LORA.model_copy(update={"layers": "last_1"})
PREFIX_CASES: dict[str, tuple[Any, QuantizationSettings | None]] = {
    "last_n": (LastNMethod(name="last_n", n=1), None),
    "head": (HeadMethod(name="head"), None),
    "lora": (LAST, None),
    "lora_8bit": (LAST, INT8),
    "lora_4bit": (LAST, NF4),
}


@pytest.mark.parametrize("case", PREFIX_CASES)
@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_from_kept_states_come_the_loss_and_gradients_of_the_padded_forward(
    pico_cache: PicoFolder, base_of: BaseOf, model_type: str, case: str
) -> None:
    method, quantization = PREFIX_CASES[case]
    model = build(base_of(pico_cache(model_type)), method, quantization)
    assert frozen_blocks(model) == (2 if case == "head" else 1)
    batch = batch_of(LENGTHS)
    expected, gradients = loss_and_gradients(model, padded, batch)
    loss, got = loss_and_gradients(model, cached, batch)
    torch.testing.assert_close(loss, expected, atol=0, rtol=3e-6)
    wrong = {name: error for name, error in errors(got, gradients).items() if error > 3e-6}
    assert not wrong


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_where_nothing_below_trains_keys_and_values_are_never_formed(
    pico_cache: PicoFolder, base_of: BaseOf, model_type: str
) -> None:
    model = build(base_of(pico_cache(model_type)), LastNMethod(name="last_n", n=1))
    name = {"gpt2": "transformer.h.1.attn.c_attn", "distilbert": "distilbert.transformer.layer.1.attention.k_lin"}
    calls: list[int] = []
    model.get_submodule(name[model_type]).register_forward_hook(lambda *arguments: calls.append(1))
    classify(model, batch_of((3, 8, 1)))
    assert not calls


def test_frozen_blocks_are_counted_up_to_the_first_that_trains(pico_cache: PicoFolder, base_of: BaseOf) -> None:
    base = base_of(pico_cache("gpt2"))
    assert frozen_blocks(build(base, FullMethod(name="full"))) == 0
    assert frozen_blocks(build(base, LORA)) == 0
    model = build(base, HeadMethod(name="head"))
    model.transformer.ln_f.requires_grad_(True)
    assert frozen_blocks(model) == 1
    model.transformer.wpe.requires_grad_(True)
    assert frozen_blocks(model) == 0
