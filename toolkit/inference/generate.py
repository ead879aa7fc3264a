"""A language model at work: a prompt in, text out, piece by piece."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.config.objectives import PROMPT
from toolkit.config.schema import QuantizationSettings
from toolkit.data.pairs import PairTable, encode_pairs
from toolkit.data.parts import Part
from toolkit.data.tokenize import Tokenizer, load_tokenizer
from toolkit.errors import AdapterError, InputError, Problem
from toolkit.export.artifact import Artifact, find_artifact, verify_files
from toolkit.export.trained_base import check_settings, resolve_trained_base
from toolkit.runtime import choose_device, import_models

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; without it the likeliest one is taken.

    Attributes:
        temperature: Above 0; logits are divided by it.
        top_p: Of the likeliest tokens, those that hold this much of the probability together (Holtzman et al. 2019,
            arXiv:1904.09751); 1 keeps all.
        seed: Of the draws: the same one gives the same text on the same machine.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


class Generator:
    """A trained adapter on its GPT-2, or a standalone model, that goes on with a text. Made by ``load``.

    Attributes:
        template: What stands around a prompt, ``{prompt}`` in its place.
        positions: Tokens that prompt and answer may have together.
        max_length: Tokens of both that training read.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        stock: Any,
        *,
        template: str,
        positions: int,
        max_length: int,
        device: torch.device,
    ) -> None:
        self.template, self.positions, self.max_length = template, positions, max_length
        self._model, self._tokenizer, self._stock, self._device = model.eval(), tokenizer, stock, device

    @classmethod
    def load(cls, path: str | pathlib.Path, *, device: str = "auto") -> Generator:
        """Load what an ``instruction`` or causal ``language_modeling`` run trained.

        Args:
            path: A run folder, an adapter folder, or a model folder that training or a merge wrote.
            device: ``auto``, or a torch device such as ``cpu`` or ``cuda:1``.

        Raises:
            AdapterError: If there is no such model, its files were altered, or its base is another.
            ModelError: If the base cannot be reached or is damaged.
            CapabilityError: If the device cannot run its quantised base.
        """
        artifact = find_artifact(path)
        check_writes(artifact)
        verify_files(artifact.folder, artifact.manifest)
        base = resolve_trained_base(artifact)
        settings = artifact.manifest.quantization if artifact.kind == "adapter" else None
        # Everything above answers without torch.
        import_models(adapters=artifact.kind == "adapter", quantised=settings is not None)
        from transformers import AutoTokenizer

        from toolkit.adapters.save import load_adapter
        from toolkit.models.load import load_language_model

        check_settings(artifact, base.family)
        target = choose_device(device)
        quantization = None if settings is None else QuantizationSettings(**settings)
        model = load_language_model(base, quantization=quantization, seed=0, device=target)
        return cls(
            load_adapter(model, artifact.folder) if artifact.kind == "adapter" else model,
            load_tokenizer(artifact.folder, kind=base.family.tokenizer),
            AutoTokenizer.from_pretrained(artifact.folder, local_files_only=True),
            template=artifact.manifest.template or PROMPT,
            positions=base.config[base.family.positions_key],
            max_length=artifact.manifest.max_length,
            device=target,
        )

    def judge(self, pairs: Part, *, batch_size: int = 32) -> dict[str, float]:
        """Return rows, predicted tokens, loss (nats a token of a response or its end) and perplexity.

        Args:
            pairs: From ``read_pairs``.
            batch_size: Rows computed at once.

        Raises:
            DataError: A prompt leaves no room for a response.
        """
        from toolkit.training.instruction import InstructionObjective
        from toolkit.training.objectives import mean_loss

        longest = self.max_length
        found = encode_pairs(pairs, self._tokenizer, template=self.template, max_length=longest, name="test").table
        assert isinstance(found, PairTable)
        objective = InstructionObjective(self._model, table=found, pad_id=self._tokenizer.pad_id)
        rows = np.arange(len(found), dtype=np.int64)
        cuts = [rows[low : low + batch_size] for low in range(0, len(rows), batch_size)]
        loss = mean_loss(
            objective,
            [objective.batch(cut, step=0) for cut in cuts],
            prepare=lambda batch: {name: tensor.to(self._device) for name, tensor in batch.items()},
        )
        figures = {"rows": len(found), "tokens": int(found.targets.sum())}
        return {**figures, "loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        heard: Callable[[str], None] | None = None,
    ) -> str:
        """Return what the model writes behind a prompt, up to its end of text.

        Args:
            prompt: Put into the template.
            max_new_tokens: Where it is stopped at the latest; the positions that are left may be fewer.
            sampling: How tokens are drawn; None takes the likeliest.
            heard: Called with each piece of text as soon as it is sure.

        Raises:
            InputError: If the prompt is empty or fills all positions.
        """
        import torch

        if not prompt.strip():
            raise InputError(Problem("", "prompt", "is empty", "a text to answer"))
        ids = self._tokenizer.encode([self.template.replace(PROMPT, prompt)], max_length=None).table[0]
        room = self.positions - len(ids)
        if room < 1:
            wrong = f"{len(ids)} tokens with its template fill the model's {self.positions} positions"
            raise InputError(Problem("", "prompt", wrong, "a shorter prompt"))
        given = torch.from_numpy(ids.astype("int64"))[None].to(self._device)
        drawn = {"do_sample": False} if sampling is None else self._drawn(sampling)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0 if sampling is None else sampling.seed)
            model: Any = self._model
            found = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=min(max_new_tokens, room),
                eos_token_id=self._tokenizer.special["eos"],
                pad_token_id=self._tokenizer.pad_id,
                use_cache=True,
                streamer=None if heard is None else _streamer(self._stock, heard),
                **drawn,
            )
        return self._text(found[0, given.shape[1] :])

    def _drawn(self, sampling: Sampling) -> dict[str, Any]:
        # top_k is 50 in transformers unless it is said otherwise.
        return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}

    def _text(self, ids: torch.Tensor) -> str:
        text: str = self._stock.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _streamer(tokenizer: Any, heard: Callable[[str], None]) -> Any:
    """Return transformers' streamer, which holds a piece back until no later token can change it."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            heard(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_writes(artifact: Artifact) -> None:
    """Refuse what does not write.

    Raises:
        AdapterError: If the artifact is a classifier, or a model that fills gaps.
    """
    manifest, where = artifact.manifest, str(artifact.folder)
    if manifest.labels:
        raise AdapterError(Problem(where, "labels", "a classifier does not write", "toolkit predict"))
    if manifest.model_type != "gpt2":
        wrong = f"{manifest.model_type} fills gaps and does not write"
        raise AdapterError(Problem(where, "model_type", wrong, "the run of a GPT-2"))
