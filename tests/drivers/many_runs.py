"""Runs `run_training.main` for every argument list of a JSON file in one launch, and writes how each ended.

    many_runs.py RUNS.json OUTCOMES.json [--local_rank N]

Importing torch and DeepSpeed costs seconds; this pays it once for many short runs.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import run_training  # noqa: E402
import runtime_utils  # noqa: E402


def outcome(argv):
    """How one run ended, with what it printed."""
    printed, error, code = io.StringIO(), None, None
    with contextlib.redirect_stderr(printed):
        try:
            code = run_training.main(argv)
        except runtime_utils.UserError as caught:
            error, code = str(caught), 2
        except SystemExit as caught:
            code = caught.code
    return {"argv": argv, "code": code, "error": error, "printed": printed.getvalue()}


def main():
    """Runs all of them; an error of ours ends the process with its traceback."""
    runs_file, outcomes_file = [a for a in sys.argv[1:] if not a.startswith("--local_rank")][:2]
    outcomes = [outcome(argv) for argv in json.loads(Path(runs_file).read_text())]
    if runtime_utils.is_main():
        Path(outcomes_file).write_text(json.dumps(outcomes))
    return 0


if __name__ == "__main__":
    runtime_utils.run_main(main)
