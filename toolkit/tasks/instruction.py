"""A GPT-2 that is taught to answer prompts."""

from __future__ import annotations

import pathlib
from dataclasses import replace

from toolkit.adapters.apply import apply_method
from toolkit.config.methods import leaves_adapter
from toolkit.data.pairs import PairTable, encode_pairs
from toolkit.families import language_family
from toolkit.models.forward import checkpoint_activations
from toolkit.models.load import load_language_model
from toolkit.tasks.language_modeling import LanguageTask
from toolkit.tasks.task import PARTS, Kind, Setup, note_truncation, write_artifact
from toolkit.training.gemm import use_gemm
from toolkit.training.instruction import InstructionObjective


class InstructionTask(LanguageTask):
    """A GPT-2 that is taught to answer prompts."""

    def __init__(self, setup: Setup) -> None:
        recipe, data, tokenizer, device = setup.recipe, setup.data, setup.tokenizer, setup.accelerator.device
        base = replace(setup.base, family=language_family(setup.base.family))
        self._recipe, self._base, self._accelerator = recipe, base, setup.accelerator
        setup.memory.enter("tokenise")
        longest, template = recipe.model.max_length, recipe.instruction.template
        encoded = {
            name: encode_pairs(data.parts[name], tokenizer, template=template, max_length=longest, name=name)
            for name in PARTS
        }
        self.truncated = note_truncation(data, encoded, max_length=longest)
        self.tables = {name: part.table for name, part in encoded.items()}
        self._pad_id = tokenizer.pad_id
        setup.memory.enter("load")
        seed = recipe.training.seed
        model = load_language_model(base, quantization=recipe.quantization, seed=seed, device=device)
        self.model = apply_method(model, recipe.method, family=base.family, base_name=base.name_or_path, seed=seed)
        use_gemm(self.model, setup.gemm)
        if blocks := recipe.training.recomputed_blocks(base.config[base.family.layers_key]):
            checkpoint_activations(self.model, blocks)
        self.objective = self._objective("train")

    def _objective(self, part: str) -> InstructionObjective:
        table = self.tables[part]
        assert isinstance(table, PairTable)
        return InstructionObjective(self.model, table=table, pad_id=self._pad_id)

    def save(self, folder: pathlib.Path) -> Kind:
        """Write what stock peft or, for full fine-tuning, stock transformers loads."""
        kind: Kind = "adapter" if leaves_adapter(self._recipe.method) else "model"
        write_artifact(self.model, folder / kind, kind=kind, recipe=self._recipe, base=self._base, labels=())
        return kind
