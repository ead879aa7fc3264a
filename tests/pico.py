"""Two-layer models with small real tokenizers, for the rooms that load models: `from pico import ...` in a conftest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.config.schema import ModelSettings
from toolkit.models.base import Base, resolve_base

TEXTS = ["you are a winner of a cash award", "hey are we still on for dinner tonight", "free prize call now", "see you"]
MINILM = Path(__file__).resolve().parents[2] / "shared" / "models" / "minilm-l6-distilbert"

PicoFolder = Callable[[str], Path]
BaseOf = Callable[[Path], Base]
LoadModel = Callable[..., Any]
Batch = dict[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]


def build_pico(folder: Path, model_type: str, *, seed: int = 0, width: int = 64) -> Path:
    """Write a language model of the family, with a small tokenizer trained on TEXTS."""
    import transformers

    vocabulary = write_tokenizer(folder, model_type)
    if model_type == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=48, n_embd=width, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model_class = transformers.GPT2LMHeadModel
    else:
        config = transformers.DistilBertConfig(
            vocab_size=vocabulary, max_position_embeddings=48, dim=width, hidden_dim=2 * width, n_layers=2, n_heads=2
        )
        model_class = transformers.DistilBertForMaskedLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class(config).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, model_type: str) -> int:
    """Train and save a tokenizer.json; return its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    trainer: Any
    if model_type == "gpt2":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    if model_type == "distilbert":
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return int(tokenizer.get_vocab_size())


@pytest.fixture(scope="session")
def pico_cache(tmp_path_factory: pytest.TempPathFactory) -> PicoFolder:
    """Read-only pico models, each built once."""
    root = tmp_path_factory.mktemp("pico")

    def folder(model_type: str) -> Path:
        path = root / model_type
        return path if path.exists() else build_pico(path, model_type)

    return folder


@pytest.fixture
def pico_folder(pico_cache: PicoFolder, tmp_path: Path) -> PicoFolder:
    """A pico model's folder that the test may damage."""

    def copy(model_type: str) -> Path:
        target = tmp_path / f"base-{model_type}"
        if not target.exists():
            shutil.copytree(pico_cache(model_type), target)
        return target

    return copy


@pytest.fixture
def minilm() -> Path:
    """A real DistilBERT, where the machine has it."""
    if not MINILM.is_dir():
        pytest.skip(f"{MINILM} is not here")
    return MINILM


@pytest.fixture
def base_of() -> BaseOf:
    """Resolve a local folder."""

    def resolve(folder: Path) -> Base:
        return resolve_base(ModelSettings(base=str(folder), max_length=16))

    return resolve


@pytest.fixture
def batch() -> Batch:
    """Four rows of 1 to 9 real tokens, padded on the right."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([9, 3, 6, 1])
    ids = torch.randint(5, 60, (4, 9), generator=generator)
    mask = (torch.arange(9) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
