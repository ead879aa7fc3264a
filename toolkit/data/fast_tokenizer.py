"""Tokenizers described by files (WordPiece, and BPE other than GPT-2's), through the ``tokenizers`` library."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from toolkit.errors import ModelError, Problem

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class FastBackend:
    """A ``tokenizers`` tokenizer whose own truncation and padding are switched off.

    Args:
        tokenizer: Adds the special tokens of its kind.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.sha256 = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        probe = tokenizer.encode("a")
        added = list(itertools.takewhile(bool, reversed(probe.special_tokens_mask)))
        self.behind = tuple(probe.ids[len(probe.ids) - len(added) :])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens added."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        return self._tokenizer.token_to_id(token)

    def rest(self) -> None:
        """Keep what there is: it could not be built again without its files."""


def read_tokenizer_json(path: Path, where: str) -> Tokenizer:
    """Build what a tokenizer.json describes.

    Raises:
        ModelError: The library does not accept the file.
    """
    with _refusing(where, "tokenizer.json"):
        return Tokenizer.from_file(str(path))


@contextlib.contextmanager
def _refusing(where: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # tokenizers raises the bare class for every malformed file; any other error is not its own.
        if type(error) is not Exception:
            raise
        raise ModelError(Problem(where, name, f"not usable: {str(error)[:120]}")) from error


def wordpiece_of_file(vocab: Path, *, lowercase: bool, strip_accents: bool | None, chinese: bool) -> Tokenizer:
    """Build BERT's WordPiece from a vocab.txt.

    Args:
        vocab: One token a line; the line number is the id.
        lowercase: The model is uncased.
        strip_accents: None follows ``lowercase``.
        chinese: Split CJK characters.
    """
    lines = vocab.read_text(encoding="utf-8").split("\n")
    ids = {token.rstrip("\r"): index for index, token in enumerate(lines[:-1] if not lines[-1] else lines)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese, strip_accents=strip_accents, lowercase=lowercase
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    known = [token for token in SPECIAL if token in ids]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known])
    return tokenizer


def add_frame(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """Make a WordPiece tokenizer put [CLS] before and [SEP] behind every text, if it does not do so yet.

    Raises:
        ModelError: The vocabulary lacks one of BERT's special tokens.
    """
    found = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    missing = [token for token, index in found.items() if index is None]
    if missing:
        wrong = f"the vocabulary lacks {', '.join(missing)}"
        raise ModelError(Problem(where, "tokenizer", wrong, f"a WordPiece vocabulary with {', '.join(SPECIAL)}"))
    start, end = found["[CLS]"] or 0, found["[SEP]"] or 0
    ids = tokenizer.encode("a").ids
    if ids[0] != start or ids[-1] != end:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", end), ("[CLS]", start))
    return tokenizer


def bpe_of_files(vocab: Path, merges: Path, where: str, *, prefix_space: bool) -> Tokenizer:
    """Build a byte-level BPE tokenizer from a vocab.json and a merges.txt.

    Raises:
        ModelError: The library does not accept the files.
    """
    with _refusing(where, "vocab.json"):
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id("<|endoftext|>") is not None:
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return tokenizer
