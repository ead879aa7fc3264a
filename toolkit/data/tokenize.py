"""From texts to token tables: tiktoken for GPT-2, WordPiece for DistilBERT, truncation counted."""

from __future__ import annotations

import json
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from toolkit.data.bpe import END, Gpt2Backend, is_gpt2_tokenizer, is_gpt2_vocabulary
from toolkit.data.fast_tokenizer import FastBackend, add_frame, bpe_of_files, read_tokenizer_json, wordpiece_of_file
from toolkit.data.token_cache import cache_key, cached, texts_sha256
from toolkit.data.tokens import Encoded, TokenTable
from toolkit.errors import ModelError, Problem

CHUNK_TEXTS = 2_048
CACHE_BYTES = 8 << 20


class Backend(Protocol):
    """What both tokenizers do."""

    vocab_size: int
    sha256: str
    # Ids that stand behind every text, and stay where one is cut.
    behind: tuple[int, ...]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens added where the kind has them."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""

    def token_id(self, token: str) -> int | None:
        """Return the id of a special token, or None."""

    def rest(self) -> None:
        """Let go of what can be built again when the next text comes."""


@dataclass(frozen=True)
class Tokenizer:
    """Turns texts into ids as the base was trained with.

    Attributes:
        backend: The library behind it.
        kind: bpe or wordpiece.
        special: Ids of the special tokens by role: pad and eos (bpe), or pad, unk, cls, sep and mask (wordpiece).
        source: What built it, for the run record.
    """

    backend: Backend
    kind: Literal["bpe", "wordpiece"]
    special: dict[str, int]
    source: str

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is below it."""
        return self.backend.vocab_size

    @property
    def pad_id(self) -> int:
        """Id that fills short rows of a batch; GPT-2, which has none, pads with its end of text."""
        return self.special["pad"]

    @property
    def sha256(self) -> str:
        """Hash of all that decides the ids, hex digits."""
        return self.backend.sha256

    def encode(self, texts: pa.ChunkedArray | Iterable[str], *, max_length: int | None) -> Encoded:
        """Return the ids of every text; what is cut off comes from the text's end, and what stands behind it stays.

        Args:
            texts: Arrow strings or any iterable, read in chunks.
            max_length: Tokens kept of each text, special tokens included; None keeps all.
        """
        return Encoded.join(self._pieces(texts, max_length=max_length))

    def _pieces(self, texts: pa.ChunkedArray | Iterable[str], *, max_length: int | None) -> Iterator[Encoded]:
        for rows in self._encoded(_chunks(texts)):
            ids, lengths = array("i"), array("q")
            truncated = dropped = 0
            behind = self.backend.behind
            for row in rows:
                if max_length is not None and (extra := len(row) - max_length) > 0:
                    truncated, dropped = truncated + 1, dropped + extra
                    row[max_length - len(behind) :] = behind
                ids.extend(row)
                lengths.append(len(row))
            table = TokenTable.from_lengths(np.frombuffer(ids, dtype=np.int32), np.frombuffer(lengths, dtype=np.int64))
            yield Encoded(table, truncated, dropped)

    def _encoded(self, chunks: Iterator[list[str]]) -> Iterator[list[list[int]]]:
        """Yield the ids of each chunk in order, on all cores: both libraries work outside of Python's lock."""
        workers = os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:
            ahead: deque[Future[list[list[int]]]] = deque()
            for chunk in chunks:
                ahead.append(pool.submit(self.backend.encode, chunk))
                # So many chunks in flight bound the memory.
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def encode_cached(self, texts: pa.ChunkedArray, *, max_length: int) -> Encoded:
        """Do what ``encode`` does; tables of more than 8 MiB of text are kept on disk and memory-mapped."""
        if texts.nbytes < CACHE_BYTES:
            return self.encode(texts, max_length=max_length)

        key = cache_key(texts_sha256(texts), self.sha256, max_length=max_length)
        return cached(key, lambda: self._pieces(texts, max_length=max_length))

    def adopt(self, table: TokenTable, *, max_length: int, where: str) -> Encoded:
        """Take token ids as they are: prove that they fit the vocabulary and cut long rows.

        Args:
            table: Ids read from a file.
            max_length: Tokens kept of each row.
            where: The file, for messages.

        Raises:
            DataError: An id outside the vocabulary.
        """
        table.check_vocabulary(self.vocab_size, where=where)
        extra = np.maximum(table.lengths - max_length, 0)
        if not extra.any():
            return Encoded(table, 0, 0)
        cut = table.truncate(max_length, keep_last=self.kind == "wordpiece")
        return Encoded(cut, int((extra > 0).sum()), int(extra.sum()))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of one row of ids, for reports."""
        return self.backend.decode([int(index) for index in ids])


def _chunks(texts: pa.ChunkedArray | Iterable[str]) -> Iterator[list[str]]:
    if isinstance(texts, pa.ChunkedArray | pa.Array):
        for low in range(0, len(texts), CHUNK_TEXTS):
            yield texts.slice(low, CHUNK_TEXTS).to_pylist()
        return
    iterator = iter(texts)
    while chunk := list(islice(iterator, CHUNK_TEXTS)):
        yield chunk


def load_tokenizer(folder: Path, *, kind: Literal["bpe", "wordpiece"]) -> Tokenizer:
    """Build the tokenizer that a model folder describes; nothing is downloaded.

    Args:
        folder: Holds tokenizer.json, or vocab.json and merges.txt (bpe), or vocab.txt (wordpiece).
        kind: ``Family.tokenizer`` of the base.

    Raises:
        ModelError: The files are missing or not usable.
    """
    return _load_bpe(folder) if kind == "bpe" else _load_wordpiece(folder)


def _read_json(path: Path) -> dict[str, object]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(Problem(str(path), "", f"not a readable JSON file: {str(error)[:80]}")) from error
    if not isinstance(record, dict):
        raise ModelError(Problem(str(path), "", "not a JSON object", "the file that came with the model"))
    return record


def _load_bpe(folder: Path) -> Tokenizer:
    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    prefix_space = bool(_settings(folder).get("add_prefix_space"))
    if whole.is_file():
        backend: Backend | None = Gpt2Backend() if is_gpt2_tokenizer(_read_json(whole)) else None
        backend = backend or FastBackend(read_tokenizer_json(whole, str(folder)))
    elif vocab.is_file() and merges.is_file():
        real = not prefix_space and is_gpt2_vocabulary(vocab, merges)
        fast = None if real else bpe_of_files(vocab, merges, str(folder), prefix_space=prefix_space)
        backend = Gpt2Backend() if fast is None else FastBackend(fast)
    else:
        right = "tokenizer.json, or vocab.json with merges.txt"
        raise ModelError(Problem(str(folder), "tokenizer", "the folder holds no tokenizer", right))
    end = backend.token_id(END)
    if end is None:
        raise ModelError(Problem(str(folder), "tokenizer", f"the vocabulary lacks {END}", "a GPT-2 tokenizer"))
    source = "tiktoken" if isinstance(backend, Gpt2Backend) else "tokenizers"
    return Tokenizer(backend, "bpe", {"pad": end, "eos": end}, source)


def _settings(folder: Path) -> dict[str, object]:
    path = folder / "tokenizer_config.json"
    return _read_json(path) if path.is_file() else {}


def _load_wordpiece(folder: Path) -> Tokenizer:
    whole, vocab = folder / "tokenizer.json", folder / "vocab.txt"
    if whole.is_file():
        _read_json(whole)
        tokenizer = read_tokenizer_json(whole, str(folder))
    elif vocab.is_file():
        settings = _settings(folder)
        accents = settings.get("strip_accents")
        tokenizer = wordpiece_of_file(
            vocab,
            lowercase=bool(settings.get("do_lower_case", True)),
            strip_accents=accents if isinstance(accents, bool) else None,
            chinese=bool(settings.get("tokenize_chinese_chars", True)),
        )
    else:
        raise ModelError(
            Problem(str(folder), "tokenizer", "the folder holds no tokenizer", "tokenizer.json or vocab.txt")
        )
    backend = FastBackend(add_frame(tokenizer, str(folder)))
    special = {name: backend.token_id(f"[{name.upper()}]") for name in ("pad", "unk", "cls", "sep", "mask")}
    return Tokenizer(backend, "wordpiece", {name: i for name, i in special.items() if i is not None}, "tokenizers")
