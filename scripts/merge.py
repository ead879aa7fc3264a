"""python scripts/merge.py RUN --output DIR [--dtype fp32|bf16|fp16]"""

import sys

from toolkit.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
