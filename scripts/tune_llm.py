"""Tunes an LLM on a task's rows in this project's prompt and target form.

    python -m scripts.tune_llm --llm_path HuggingFaceTB/SmolLM2-135M-Instruct --task xnli --output_dir tuned

Settings and data: `mindmerger/training/tuning_settings.py`; the steps: `mindmerger/training/tuning.py`.
"""

import contextlib

from mindmerger.runtime.command import run_main
from mindmerger.training.tuning_settings import build_parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    from mindmerger.runtime.processes import locked_folder
    from mindmerger.training.tuning_settings import settle

    settings = settle(build_parser().parse_args(argv))
    from mindmerger.training.tuning import is_finished, tune

    with locked_folder(settings.work, "--output_dir"):
        if not is_finished(settings):
            tune(settings)
    with contextlib.suppress(OSError):  # what a run without checkpoints leaves is its lock's folder, empty
        settings.work.rmdir()
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
