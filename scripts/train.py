"""accelerate launch scripts/train.py RECIPE [dotted.path=value ...]"""

import sys

from toolkit.cli import main
from toolkit.lean import keep_compiler_out
from toolkit.runtime import use_huge_pages

if __name__ == "__main__":
    keep_compiler_out()
    use_huge_pages()
    sys.exit(main(["train", *sys.argv[1:]]))
