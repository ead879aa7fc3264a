"""The question around each text of method zero_shot, and a tokenizer that asks it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import processors

from toolkit.config.fitted_rules import TEXT, WORDS
from toolkit.config.methods import ZeroShotMethod
from toolkit.data.bpe import END
from toolkit.data.fast_tokenizer import bpe_of_files, read_tokenizer_json
from toolkit.data.tokenize import Tokenizer
from toolkit.errors import Problem, RecipeError, nearest

BEFORE, BEHIND = "<|before the text|>", "<|behind the text|>"


@dataclass(frozen=True)
class Prompt:
    """What stands around a text, as token ids.

    Attributes:
        before: Ids before each text.
        behind: Ids behind it; they stay when a text is cut.
        words: The id of each label's word, in the order of the labels.
    """

    before: tuple[int, ...]
    behind: tuple[int, ...]
    words: tuple[int, ...]


def build_prompt(method: ZeroShotMethod, labels: Sequence[str], tokenizer: Tokenizer, *, max_length: int) -> Prompt:
    """Return the prompt of a recipe as token ids.

    Args:
        method: The recipe's `method` section.
        labels: Names, in the order of their ids.
        tokenizer: The base's.
        max_length: Tokens of the longest text with its prompt.

    Raises:
        RecipeError: A word for a label that does not exist, one that is no single token of the base or stands for two
            labels, or a prompt that leaves no room for a text.
    """
    unknown = [label for label in method.words if label not in labels]
    if unknown:
        right = nearest(unknown[0], labels) or f"one of {', '.join(labels[:20])}"
        raise RecipeError(Problem("", "method.words", f"{unknown[0]!r} is no label of the data", right))
    words = [method.words.get(label, label) for label in labels]
    answers = [tuple(ids) for ids in tokenizer.backend.encode([f" {word}" for word in words])]
    for label, word, ids in zip(labels, words, answers, strict=True):
        if len(ids) != 1:
            wrong = f"{word!r}, for label {label!r}, is {len(ids)} tokens of this base"
            raise RecipeError(Problem("", "method.words", wrong, f"a common word of one: words: {{{label}: yes}}"))
        if answers.count(ids) > 1:
            wrong = f"{word!r} stands for more than one label"
            raise RecipeError(Problem("", "method.words", wrong, "a word of its own for each label"))
    before, behind = method.prompt.replace(WORDS, _either(words)).split(TEXT)
    first, last = (tuple(ids) for ids in tokenizer.backend.encode([before, behind]))
    room = max_length - len(first) - len(last)
    if room < 1:
        wrong = f"the prompt takes {max_length - room} tokens, and model.max_length is {max_length}"
        raise RecipeError(Problem("", "method.prompt", wrong, "a shorter prompt, or a larger model.max_length"))
    return Prompt(first, last, tuple(ids[0] for ids in answers))


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def write_prompted_tokenizer(source: Path, folder: Path, prompt: Prompt) -> None:
    """Write the tokenizer of a GPT-2 base so that any library that loads it puts the prompt around each text.

    The prompt counts as special tokens, which truncation leaves alone.

    Args:
        source: Folder of the base.
        folder: An existing folder.
        prompt: From ``build_prompt``.
    """
    settings = source / "tokenizer_config.json"
    found = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if (source / "tokenizer.json").is_file():
        tokenizer = read_tokenizer_json(source / "tokenizer.json", str(source))
    else:
        files = source / "vocab.json", source / "merges.txt"
        tokenizer = bpe_of_files(*files, str(source), prefix_space=bool(found.get("add_prefix_space")))
    around = {name: ids for name, ids in ((BEFORE, prompt.before), (BEHIND, prompt.behind)) if ids}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[BEFORE, "$A", BEHIND] if prompt.before else ["$A", BEHIND],
        special_tokens=[
            {"id": name, "ids": list(ids), "tokens": [tokenizer.id_to_token(index) for index in ids]}
            for name, ids in around.items()
        ],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    # The class of GPT-2 would put its own template in the place of the file's.
    kept = {name: value for name, value in found.items() if name not in ("tokenizer_class", "add_prefix_space")}
    written = kept | {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
