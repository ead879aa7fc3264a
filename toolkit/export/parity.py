"""The proof of a merge: the exported folder, read by stock transformers, gives the live adapter's logits.

A model with a head of the toolkit's own is read by the toolkit instead, and runs the stock padded body. Of one with a
random forest, the states that its trees are asked about are compared: answers jump where a state that is rounded
otherwise crosses a threshold.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from toolkit.data.batching import collate
from toolkit.data.tokenize import Tokenizer
from toolkit.errors import ToolkitError
from toolkit.evaluation.evaluate import predict_logits
from toolkit.export.model import tensor_shapes
from toolkit.export.stream import Shapes
from toolkit.families import family_of, family_of_model
from toolkit.models.classification_head import is_forest
from toolkit.models.forward import CLASSIFIERS, classify, pooled, unwrapped
from toolkit.models.headers import read_tensor_headers
from toolkit.models.language import next_token_logits
from toolkit.models.load import quiet_transformers, read_config, skeleton, without_memory
from toolkit.models.quantize import dequantized_weight, is_quantized
from toolkit.models.stored import StoredTensors
from toolkit.models.streamed import load_body, load_head, stream_blocks

# Spread over length, case, digits, scripts and odd characters; the last one is longer than is read of it.
PROBES = (
    "ok",
    "Hey, are we still on for dinner tonight?",
    "WINNER!! You have been selected to receive a $1000 cash prize. Call 09061701461 now, code KL341.",
    "I did not expect to like this film, and I was right: two hours of nothing, beautifully lit.",
    "A quiet, funny and deeply moving story, told without one false note.",
    "i feel so grateful and a little bit nervous about tomorrow",
    "Grüße aus Köln — schöne Straße, naïve café, 北京, Привет, 😀🎉",
    "http://example.com/?q=1&r=%20 #hashtag @someone 12:30 3.14159 v2.0-beta",
    "The quick brown fox jumps over the lazy dog. " * 40,
)
# Of GPT-2 XL, each costs both models together 30 ms on two cores.
PROBE_TOKENS = 16

# Largest difference of a logit, as a share of the largest logit (at least 1). fp32 sums in another order; bf16 and
# fp16 keep 8 and 11 bits of each weight. Up to so many blocks; of more, errors that know nothing of each other add up
# as the root of their number (GPT-2 of 48 blocks with random weights, in bf16: 0.12).
BOUNDS = {"fp32": 1e-5, "bf16": 1e-1, "fp16": 1e-2}
BLOCKS = 12
QUANTISED_BOUND = 1e-4
# An 8-bit layer also rounds its activations to 8 bits (Dettmers et al. 2022, arXiv:2208.07339), which no exported
# weight can repeat; 2e-2 was measured on GPT-2 124M.
LIVE_8BIT_BOUND = 1e-1


@dataclass(frozen=True)
class Parity:
    """How far the exported model is from the live one, over the probe texts.

    Attributes:
        texts: Probe texts.
        max_abs: Largest difference of a logit from the live model that computes in float32 on the weights it stores.
        relative: The same as a share of the largest live logit.
        bound: What ``relative`` may be; on a full-precision base whose logits stay below 1, what ``max_abs`` may be.
        live_relative: The same as ``relative``, from the live model with the kernels it trained with.
        compared: ``logits``, or ``pooled states`` before a random forest.
    """

    texts: int
    max_abs: float
    relative: float
    bound: float
    live_relative: float
    compared: str = "logits"

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """Logits (texts, labels) of the live model, or its pooled states (texts, width).

    Attributes:
        live: With the kernels it trained with.
        exact: In float32 on the weights it stores; the same array where nothing is quantised.
        bits: Bits of the stored weights, or None.
        compared: What they are, in words.
    """

    live: NDArray[np.float32]
    exact: NDArray[np.float32]
    bits: int | None
    compared: str = "logits"


def reference_logits(model: nn.Module, tokenizer: Tokenizer, *, max_length: int, bits: int | None) -> Reference:
    """Return the live model's logits on the probe texts; a quantised model is turned into float32 layers by it."""
    # A language model answers with the token that follows a text.
    core = unwrapped(model)
    answer = classify if family_of_model(core).head else next_token_logits
    if is_forest(core.config):
        answer = pooled

    def run() -> NDArray[np.float32]:
        return _probe(lambda batch: answer(model, batch), tokenizer, max_length=max_length)

    live = run()
    if is_forest(core.config):
        return Reference(live, live, None, "pooled states")
    if bits is None:
        return Reference(live, live, None)
    dequantize_layers(model)
    return Reference(live, run(), bits)


def dequantize_layers(model: nn.Module) -> None:
    """Replace every quantised layer by a float32 one with the weights it stores."""
    # A LoRA layer answers for the weight of the layer it wraps; only the wrapped one is replaced.
    stored = [(name, layer) for name, layer in model.named_modules() if is_quantized(layer)]
    for name, layer in [(name, layer) for name, layer in stored if not hasattr(layer, "base_layer")]:
        weight = dequantized_weight(layer)
        with without_memory():
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(layer.bias, torch.Tensor):
            plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        model.set_submodule(name, plain)


def rounding_bound(dtype: str, *, blocks: int) -> float:
    """Return what rounding to ``dtype`` may do to the logits of a model of so many blocks."""
    return float(BOUNDS[dtype] * max(1.0, (blocks / BLOCKS) ** 0.5))


def prove_parity(
    folder: pathlib.Path, reference: Reference, tokenizer: Tokenizer, *, max_length: int, dtype: str
) -> Parity:
    """Load ``folder`` anew and compare its logits with the live model's.

    Raises:
        ToolkitError: If they differ by more than the bound, or its tokenizer reads a probe text differently.
    """
    _prove_tokenizer(folder, tokenizer, max_length=max_length)
    found = _probe(_exported_forward(folder), tokenizer, max_length=max_length)
    config = read_config(folder)
    bound = rounding_bound(dtype, blocks=getattr(config, family_of(config).layers_key))
    bound = max(bound, QUANTISED_BOUND if reference.bits else 0.0)
    parity = _compare(found, reference, bound=bound)
    _check(parity, reference, dtype=dtype)
    return parity


def _exported_forward(folder: pathlib.Path) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Return what makes logits of a padded batch: (B, labels), or (B, vocabulary) of the token that follows a row."""
    config = read_config(folder)
    if config.architectures != ["GPT2LMHeadModel"]:
        return padded_forward(exported_model(folder))
    model = _language_model(folder, config)

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["attention_mask"]
        logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=mask).logits
        return logits[torch.arange(len(mask)), mask.sum(1) - 1]

    return run


def _language_model(folder: pathlib.Path, config: Any) -> nn.Module:
    """Return the language model that stock transformers makes of a folder, in float32.

    Raises:
        ToolkitError: If the folder's tensors are not exactly those that the model has.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        _check_tensors(folder, tensor_shapes(skeleton(lambda: AutoModelForCausalLM.from_config(config))))
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model.config.use_cache = False
    stock: nn.Module = model.eval()
    return stock


def _check_tensors(folder: pathlib.Path, wanted: Shapes) -> None:
    held = {name: info.shape for name, info in read_tensor_headers(folder).items()}
    if wanted != held:
        differ = sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name))
        raise ToolkitError(f"{folder.name}: the model has other tensors: {', '.join(differ[:3])}")


def padded_forward(model: Any) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Return what makes logits, or a forest's states, of a padded batch by the stock body, not that of training."""

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits: torch.Tensor
        if family_of(model.config).own_head:
            states = model.pooled_padded(ids, mask)
            logits = states if is_forest(model.config) else model.head_logits(states)
        else:
            logits = model(input_ids=ids, attention_mask=mask).logits
        return logits

    return run


def empty_classifier(config: Any) -> Any:
    """Return a config's classifier with random weights: the stock one, or with an own head the toolkit's."""
    from transformers import AutoModelForSequenceClassification

    if family_of(config).own_head:
        return CLASSIFIERS[config.model_type](config)
    return AutoModelForSequenceClassification.from_config(config)


def exported_model(folder: pathlib.Path) -> nn.Module:
    """Return the classifier that is made of a folder, in float32, with its blocks left on disk.

    Raises:
        ToolkitError: If the folder's tensors are not exactly those that the model has.
    """
    with quiet_transformers():
        model = skeleton(lambda: empty_classifier(read_config(folder)))
    family = family_of(model.config)
    _check_tensors(folder, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    stored, blocks = StoredTensors(folder, family), model.config.to_dict()[family.layers_key]
    cpu = torch.device("cpu")
    stream_blocks(model, stored, family=family, count=blocks, device=cpu)
    load_body(model, stored, family=family, device=cpu)
    load_head(model, stored, family=family)
    model.streamed.hook()
    # Keys and values of all blocks, for a next token that nobody asks for: 6 MiB a block of GPT-2 XL.
    model.config.use_cache = False
    exported: nn.Module = model.eval()
    return exported


def _prove_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, *, max_length: int) -> None:
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    table = tokenizer.encode(PROBES, max_length=max_length).table
    for row, text in enumerate(PROBES):
        if stock(text, truncation=True, max_length=max_length)["input_ids"] != table[row].tolist():
            raise ToolkitError(
                f"{folder.name}: the tokenizer files, read by stock transformers, give other tokens than in training: "
                f"{text[:60]!r}"
            )


def _compare(found: NDArray[np.float32], reference: Reference, *, bound: float) -> Parity:
    return Parity(
        texts=len(found),
        max_abs=float(np.abs(found - reference.exact).max()),
        relative=float(np.abs(found - reference.exact).max() / np.abs(reference.exact).max()),
        bound=bound,
        live_relative=float(np.abs(found - reference.live).max() / np.abs(reference.live).max()),
        compared=reference.compared,
    )


def _check(parity: Parity, reference: Reference, *, dtype: str) -> None:
    # Rounding grows with the logits; below 1 an absolute difference says more than a share of almost nothing.
    largest = float(np.abs(reference.exact).max())
    difference = parity.relative if reference.bits else parity.max_abs / max(1.0, largest)
    live_bound = max(parity.bound, LIVE_8BIT_BOUND if reference.bits == 8 else 0.0)
    # Written so that NaN fails.
    if not (difference <= parity.bound and (reference.bits is None or parity.live_relative <= live_bound)):
        raise ToolkitError(
            f"the merged model differs from the live one: {difference:.3g} of its {parity.compared} where "
            f"{dtype} allows {parity.bound:.3g} ({parity.live_relative:.3g} with the kernels of training); nothing was "
            "written"
        )


def _probe(
    forward: Callable[[dict[str, torch.Tensor]], torch.Tensor], tokenizer: Tokenizer, *, max_length: int
) -> NDArray[np.float32]:
    table = tokenizer.encode(PROBES, max_length=min(max_length, PROBE_TOKENS)).table
    return predict_logits(
        forward,
        table.lengths,
        collate=lambda rows: collate(table, None, rows, pad_id=tokenizer.pad_id),
        device=torch.device("cpu"),
        # One batch: each reads all blocks.
        batch_size=len(PROBES),
    )
