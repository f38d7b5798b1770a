"""Rows of a user's own file in the form of a task's training rows, and what the task's test sets hold."""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from mindmerger.runtime.files import what_is
from mindmerger.tasks.base import Example, Task, _file_of
from mindmerger.tasks.languages import Language
from mindmerger.tasks.readers import DataError


def read_rows(task: Task, path, languages: Sequence[Language], train_num: int | None = None) -> Iterator[Example]:
    """Yields the examples of a file of rows, each naming its language, at most `train_num` of each language.

    Raises:
        DataError: for a missing or faulty file, a language without rows, a task without an augmentation stage.
    """
    task.check_augmentation()
    path = Path(path)
    if (found := what_is(path)) != "a file":
        raise DataError(f"--rows {path} is {found}: pass a file with rows in the form of {task.augmentation_file}")
    if "{" in path.name:  # in a task's own pattern it stands for the language
        raise DataError(f"--rows {path}: rename the file, a name with braces is not read")
    return task._read(path.name, task.parse_augmentation, path.parent, languages, train_num)


def evaluation_sources(task: Task, data_root, languages: Sequence[Language]) -> set[str] | None:
    """Returns the sources of all test sets that belong to a task's training rows, as `normalise_source` writes them.

    Returns:
        None where the data folder has none of these test sets.

    Raises:
        DataError: for a faulty file.
    """
    from mindmerger.tasks import TASKS

    found: set[str] | None = None
    wanted = {language.name for language in languages}
    for one in TASKS.values():
        if one.training_name != task.training_name or one.evaluation_file is None:
            continue
        mixed = "{" not in one.evaluation_file
        for language in [None] if mixed else languages:
            file = one.evaluation_file if mixed else _file_of(one.evaluation_file, language)
            if not (Path(data_root) / file).exists():
                continue
            # All languages of a mixed file: it need not have the ones that are asked for.
            rows = one._read(one.evaluation_file, one.parse_evaluation, data_root, language and [language], None)
            found = (found or set()) | {normalise_source(row.source) for row in rows if row.language in wanted}
    return found


def normalise_source(text: str) -> str:
    """Returns a text without what differs between copies of one row: case, kinds of blanks, forms of characters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
