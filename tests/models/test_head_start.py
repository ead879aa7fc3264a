"""The embedding head start: tokens are matched by their text, near words stay near."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import cosine_similarity

from toolkit.errors import ModelError
from toolkit.models.base import EMBEDDED
from toolkit.models.head_start import EMBEDDING_STD, start_from_encoder, start_masked_head, token_texts


def test_texts_of_both_vocabularies():
    gpt2 = token_texts(EMBEDDED / "gpt2-mini", byte_level=True)
    assert (gpt2[3807], gpt2[262], gpt2[50256]) == (" movie", " the", "<|endoftext|>")
    bert = token_texts(EMBEDDED / "distilbert-mini", byte_level=False)
    assert (bert[101], bert[3185], bert[2135]) == ("[CLS]", " movie", "##ly")


def build(name: str):
    config = transformers.AutoConfig.from_pretrained(EMBEDDED / name)
    kinds = {"gpt2-mini": transformers.GPT2LMHeadModel, "distilbert-mini": transformers.DistilBertForMaskedLM}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kinds[name](config)


@pytest.mark.parametrize(("name", "least"), [("gpt2-mini", 0.6), ("distilbert-mini", 0.99)])
def test_near_words_stay_near(name, least, minilm: Path):
    model = build(name)
    matched = start_from_encoder(model, EMBEDDED / name, minilm)
    assert matched > least
    rows = model.get_input_embeddings().weight.detach()
    assert float(rows.std()) == pytest.approx(EMBEDDING_STD, rel=1e-3)
    texts = {text: i for i, text in enumerate(token_texts(EMBEDDED / name, byte_level=name == "gpt2-mini"))}
    good, great, table = (rows[texts[f" {word}"]] for word in ("good", "great", "table"))
    assert cosine_similarity(good, great, dim=0) > cosine_similarity(good, table, dim=0) + 0.1


def test_a_narrower_encoder_and_a_folder_without_embeddings_are_refused(pico_folder, tmp_path):
    with pytest.raises(ModelError, match="at least 192"):
        start_from_encoder(build("distilbert-mini"), EMBEDDED / "distilbert-mini", pico_folder("distilbert"))
    with pytest.raises(ModelError, match="no word and position embeddings"):
        start_from_encoder(build("distilbert-mini"), EMBEDDED / "distilbert-mini", tmp_path)


def test_the_masked_head_starts_at_the_frequencies():
    model = build("distilbert-mini")
    counts = torch.ones(30522)
    counts[3185] = 1000
    start_masked_head(model, counts)
    assert int(model.vocab_projector.bias.argmax()) == 3185
    shares = model.vocab_projector.bias.detach().exp()
    assert float(shares.sum()) == pytest.approx(1 + 30522 / float(counts.sum()), rel=1e-3)
