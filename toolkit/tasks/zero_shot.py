"""A language model that is asked what each text is: nothing trains, and the answer is read off as a classifier's."""

from __future__ import annotations

import pathlib
import tempfile
from dataclasses import replace

import torch

from toolkit.config.methods import ZeroShotMethod
from toolkit.data.prompt import build_prompt, write_prompted_tokenizer
from toolkit.data.tokenize import load_tokenizer
from toolkit.data.tokens import TokenTable, gather
from toolkit.models.forward import unwrapped
from toolkit.tasks.classification import ClassificationTask
from toolkit.tasks.task import Kind, Setup


class ZeroShotTask(ClassificationTask):
    """A classifier whose head holds the base's own embeddings of the labels' words.

    GPT-2 predicts the next token by the product of the last state with every embedding; of these products, the head
    gives those of the words. So stock transformers, with the tokenizer that asks the question, gives the same logits.
    """

    def __init__(self, setup: Setup) -> None:
        recipe, base, data = setup.recipe, setup.base, setup.data
        assert isinstance(recipe.method, ZeroShotMethod)
        assert data.label_map is not None
        self._prompt = build_prompt(
            recipe.method, data.label_map.names, setup.tokenizer, max_length=recipe.model.max_length
        )
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            write_prompted_tokenizer(base.path, folder, self._prompt)
            tokenizer = load_tokenizer(folder, kind=base.family.tokenizer)
        super().__init__(replace(setup, tokenizer=tokenizer))
        self.objective.solve = self._take_words

    def _take_words(self) -> int:
        """Write the embeddings of the labels' words into the head; no token is read for it."""
        model = unwrapped(self.model)
        words = torch.tensor(self._prompt.words, device=self._accelerator.device)
        with torch.no_grad():
            model.score.weight.copy_(model.get_input_embeddings()(words))
        return 0

    def save(self, folder: pathlib.Path) -> Kind:
        """Write what stock transformers loads, with the tokenizer that asks the question."""
        with tempfile.TemporaryDirectory() as name:
            self._tokenizer_from = pathlib.Path(name)
            write_prompted_tokenizer(self._base.path, self._tokenizer_from, self._prompt)
            return super().save(folder)

    def _baseline_table(self, part: str) -> TokenTable:
        """Return the tokens of the texts alone."""
        table = self.tables[part]
        before, behind = len(self._prompt.before), len(self._prompt.behind)
        return gather(table.ids, table.offsets[:-1] + before, table.lengths - before - behind)
