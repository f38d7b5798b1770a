"""The command line of lm-evaluation-harness (0.4.13) with MindMerger among its models.

    python -m mindmerger.integrations.lm_eval --model_args init_checkpoint=outputs/MindMerger/math/augmentation \\
        --tasks mgsm_direct_sw,mindmerger_mgsm_sw --batch_size 8

All flags are the harness's own. It knows no entry points of other packages, and its --include_path loads tasks alone:
so this module registers the model and then calls the harness's main.
"""

import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

from mindmerger.runtime.command import run_main
from mindmerger.runtime.errors import UserError, one_line

TASKS = Path(__file__).with_name("lm_eval_tasks")


def main(argv: list[str] | None = None) -> int:
    """Runs the harness; see the module's docstring.

    Raises:
        UserError: where it is not installed, for a command line that the harness refuses, and what `HarnessModel` does.
    """
    if find_spec("lm_eval") is None:
        raise UserError('lm-evaluation-harness is not installed: pip install "lm_eval>=0.4.13,<0.5"')
    from lm_eval.__main__ import cli_evaluate

    import mindmerger.integrations.lm_eval_model  # noqa: F401  registers it

    # The harness reads the process's own arguments.
    sys.argv = ["lm-eval", *harness_arguments(sys.argv[1:] if argv is None else argv)]
    try:
        cli_evaluate()
    except (ValueError, TypeError, OSError) as error:
        # What the harness says of its command line, as of a task that does not exist, is a traceback's last line.
        place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent.name
        if place not in ("_cli", "config"):
            raise
        raise UserError(one_line(error)) from error
    return 0


def harness_arguments(argv: list[str]) -> list[str]:
    """Returns the harness's arguments, in which model and task folder are ours where the command line has none."""
    if argv and argv[0] in ("ls", "validate"):
        return argv
    argv = argv[1:] if argv and argv[0] == "run" else argv
    given = {one.partition("=")[0] for one in argv}
    if not given & {"--config", "-C"}:  # whose file may say them
        argv = [*argv, *(() if given & {"--model", "-M"} else ("--model", "mindmerger"))]
        argv = [*argv, *(() if "--include_path" in given else ("--include_path", str(TASKS)))]
    return ["run", *argv]


if __name__ == "__main__":
    run_main(main)
