"""Write GPT-2's shape without weights, for a random start where the hub is out of reach: make_gpt2_shape.py DIR

The shape is that of openai-community/gpt2, 124 M parameters; the tokenizer, which is the same, is that of gpt2-mini.
"""

import pathlib
import shutil
import sys

from transformers import GPT2Config

from toolkit.config.schema import ModelSettings
from toolkit.models.base import resolve_base

TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json")


def main(folder: pathlib.Path) -> None:
    mini = resolve_base(ModelSettings(base="gpt2-mini"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        shutil.copyfile(mini.path / name, folder / name)
    config = GPT2Config(architectures=["GPT2LMHeadModel"])
    config.save_pretrained(folder)
    print(f"{folder}: {config.n_layer} blocks of width {config.n_embd}, no weights")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
