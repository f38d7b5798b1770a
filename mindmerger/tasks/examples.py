"""The examples of both training stages and of an evaluation, and rows paired across languages."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mindmerger.tasks.base import Example, Task, _file_of
from mindmerger.tasks.languages import LANGUAGES, Language
from mindmerger.tasks.readers import DataError, find_file
from mindmerger.tasks.translation import _mapping_languages, _pair_files, read_pairs


def training_examples(
    task: Task,
    stage: str,
    data_root,
    languages: Sequence[Language] | None = None,
    train_num: int | None = None,
    faults: list[str] | None = None,
    empty: dict[str, tuple[int, int]] | None = None,
) -> Iterator[Example]:
    """Yields the examples of one stage ("mapping" or "augmentation"), at most `train_num` of each language.

    Args:
        languages: None for the task's own.
        faults: takes `file:line: why` of single faulty rows, which are then left out; without it the first one is
            raised.
        empty: takes the pairs with an empty side, as `read_pairs` says.

    Raises:
        DataError: at once for a wrong argument or a missing file, while reading for a faulty one.
    """
    if train_num is not None and train_num <= 0:
        raise DataError(f"--train_num must be positive, got {train_num}")
    if stage == "augmentation":
        return task.read_augmentation(data_root, languages, train_num, faults)
    if stage != "mapping":
        raise DataError(f"unknown stage {stage!r}: choose mapping or augmentation")
    chosen = _mapping_languages(task, languages)
    for language in chosen:
        for relative in _pair_files(language):
            find_file(data_root, relative)
    return (example for language in chosen for example in read_pairs(data_root, language, train_num, faults, empty))


def training_files(task: Task, stage: str, data_root, languages: Sequence[Language] | None = None) -> list[Path]:
    """The data files that `training_examples` reads.

    Raises:
        DataError: for a missing file.
    """
    if stage == "mapping":
        relatives = [name for language in _mapping_languages(task, languages) for name in _pair_files(language)]
    else:
        task.check_augmentation()
        languages = languages or [LANGUAGES[name] for name in task.augmentation_languages or ()]
        mixed = "{" not in task.augmentation_file
        relatives = [task.augmentation_file] if mixed else [_file_of(task.augmentation_file, one) for one in languages]
    return [find_file(data_root, relative) for relative in relatives]


def evaluation_examples(
    task: Task, data_root, language: Language, limit: int | None = None, faults: list[str] | None = None
) -> list[Example]:
    """The evaluation examples of one language, the first `limit` of them; the whole file is checked all the same.

    Args:
        faults: takes the faults of single rows, which are then left out; without it the first one is raised.
    """
    return list(task.read_evaluation(data_root, language, faults))[:limit]


def varying_text(example: Example) -> str:
    """The part of an example that PMI gives in several languages: question, stem or premise."""
    return example.prompt[slice(*example.cut)]


def read_parallel(task: Task, data_root, language: Language) -> dict[str, Example]:
    """One language's evaluation examples by a key that its translations share.

    The key is the row's own `id` where the rows have one (X-CSQA's files hold the same ids in another order in every
    language, and another order of the options), else the number of the row within its language.

    Raises:
        DataError: for a missing or faulty file, and an id that stands twice.
    """
    examples = evaluation_examples(task, data_root, language)
    keys = [example.question or example.id.removeprefix(f"{language.code}-") for example in examples]
    found = dict(zip(keys, examples, strict=True))
    if len(found) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{task.name} in {language.name}: id {twice!r} stands twice, so rows cannot be paired by it")
    return found
