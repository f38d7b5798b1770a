"""`many_runs.py` where `--bridge toy` exists."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

import toy_bridge  # noqa: F401
from many_runs import main

from mindmerger.runtime import command

if __name__ == "__main__":
    command.run_main(main)
