"""Flags that name test items, for commands that read these without evaluating a model on them."""

import argparse

from mindmerger.tasks import find_task
from mindmerger.tasks.base import Task
from mindmerger.tasks.languages import Language, add_language_flags, parse_languages, use_languages_file
from mindmerger.tasks.readers import DataError


def add_item_flags(parser: argparse.ArgumentParser, also: str = "") -> None:
    """Adds --task, --data_root, --languages and --languages_file.

    Args:
        also: what the help of --languages says besides.
    """
    parser.add_argument(
        "--task",
        default="math",
        help="math (means MGSM, the default), math_msvamp, x-csqa, xnli, or another that has test items",
    )
    parser.add_argument("--data_root", default="./datas", help="data folder of the test items (default ./datas)")
    add_language_flags(
        parser.add_argument,
        f"languages of the test items, by name, code or NLLB's tag, with commas{also} (default: all of the task)",
    )


def find_items(args: argparse.Namespace) -> tuple[Task, list[Language]]:
    """Returns the task and the languages that the flags name.

    Raises:
        DataError: for a name that is not known, a task without test items, and a fault of --languages_file.
    """
    use_languages_file(args.languages_file)
    task = find_task(args.task)
    # `translation` is a task of the mapping stage alone.
    if not task.evaluation_languages:
        raise DataError(f"task {task.name} has no evaluation set")
    return task, parse_languages(args.languages or ",".join(task.evaluation_languages))
