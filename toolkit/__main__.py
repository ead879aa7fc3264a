"""``python -m toolkit``: the command line where the console script is not on the path."""

from __future__ import annotations

from toolkit.cli import run

if __name__ == "__main__":
    run()
