"""accelerate launch scripts/train.py RECIPE [dotted.path=value ...]"""

import sys

from toolkit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
