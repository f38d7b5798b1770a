"""The examples of both training stages and of an evaluation, and rows paired across languages."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mindmerger.tasks.base import Example, Task, _file_of
from mindmerger.tasks.languages import LANGUAGES, Language
from mindmerger.tasks.questions import check_questions, read_question_pairs
from mindmerger.tasks.readers import DataError, find_file
from mindmerger.tasks.translation import _mapping_languages, _pair_files, read_pairs


@dataclass(frozen=True)
class StageData:
    """The examples that a stage is trained on: of which task and languages, from which data folder, how many.

    `stage` is "mapping" for sentence pairs, "question" for pairs of questions and "augmentation" for the task's own
    rows. `languages` are the task's own where it is None; `train_num` is a limit for each of them. The encoder reads
    each example's `encoder_text`.
    """

    task: Task
    stage: str
    root: str | Path
    languages: Sequence[Language] | None = None
    train_num: int | None = None
    encoder_text: str = "source"
    skip_faulty_rows: bool = False

    def examples(
        self, faults: list[str] | None = None, empty: dict[str, tuple[int, int]] | None = None
    ) -> Iterator[Example]:
        """Yields the examples.

        Args:
            faults: takes `file:line: why` of single faulty rows, which are then left out; without it the first one is
                raised.
            empty: takes the pairs with an empty side, as `read_pairs` says.

        Raises:
            DataError: at once for a wrong argument or a missing file, while reading for a faulty one.
        """
        if self.train_num is not None and self.train_num <= 0:
            raise DataError(f"--train_num must be positive, got {self.train_num}")
        if self.stage == "augmentation":
            found = self.task.read_augmentation(self.root, self.languages, self.train_num, faults)
            return read_by_encoder(found, self.encoder_text)
        if self.stage == "question":
            check_questions(self.task, self.languages)
            found = read_question_pairs(self.task, self.root, self.languages, self.train_num, faults)
            return read_by_encoder(found, self.encoder_text)
        if self.stage != "mapping":
            raise DataError(f"unknown stage {self.stage!r}: choose mapping, question or augmentation")
        chosen = _mapping_languages(self.task, self.languages)
        for language in chosen:  # all files are looked for before the first is read
            for relative in _pair_files(language):
                find_file(self.root, relative)
        # Lazily, one language after another: a hundred thousand pairs of each need not stand in memory together.
        pairs = (read_pairs(self.root, language, self.train_num, faults, empty) for language in chosen)
        return read_by_encoder(itertools.chain.from_iterable(pairs), self.encoder_text)

    def files(self) -> list[Path]:
        """Returns the data files that `examples` reads.

        Raises:
            DataError: for a missing file.
        """
        if self.stage == "mapping":
            pairs = map(_pair_files, _mapping_languages(self.task, self.languages))
            return [find_file(self.root, relative) for pair in pairs for relative in pair]
        self.task.check_augmentation()
        pattern = self.task.augmentation_file
        languages = self.languages or [LANGUAGES[name] for name in self.task.augmentation_languages or ()]
        relatives = [pattern] if "{" not in pattern else [_file_of(pattern, language) for language in languages]
        return [find_file(self.root, relative) for relative in relatives]


def read_by_encoder(examples: Iterable[Example], encoder_text: str) -> Iterator[Example]:
    """Returns examples whose source is what the encoder reads: their own "source", or the whole "prompt"."""
    if encoder_text == "source":
        return iter(examples)
    # LangBridge's encoder reads the whole prompt; the target stays the LLM's alone.
    return (replace(example, source=example.prompt) for example in examples)


def evaluation_examples(
    task: Task, data_root, language: Language, limit: int | None = None, faults: list[str] | None = None
) -> list[Example]:
    """Returns the first `limit` evaluation examples of one language; the whole file is checked all the same.

    Args:
        faults: takes the faults of single rows, which are then left out; without it the first one is raised.
    """
    # Limited after reading: a fault behind the limit is found by a first short run, not by the long one.
    return list(task.read_evaluation(data_root, language, faults))[:limit]


def varying_text(example: Example) -> str:
    """Returns the part of an example that PMI gives in several languages: question, stem or premise."""
    return example.prompt[slice(*example.shrinkable)]


def read_parallel(task: Task, data_root, language: Language) -> dict[str, Example]:
    """Returns one language's evaluation examples by a key that its translations share.

    The key is the row's own `id` where the rows have one (X-CSQA's files hold the same ids in another order in every
    language, and another order of the options), else the number of the row within its language.

    Raises:
        DataError: for a missing or faulty file, and an id that stands twice.
    """
    examples = evaluation_examples(task, data_root, language)
    # Not by position alone: row by row, X-CSQA's cat would be translated as fire.
    keys = [example.question or example.id.removeprefix(f"{language.code}-") for example in examples]
    found = dict(zip(keys, examples, strict=True))
    # Of two rows with one id the later would stand for both, unseen.
    if len(found) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{task.name} in {language.name}: id {twice!r} stands twice, so rows cannot be paired by it")
    return found
