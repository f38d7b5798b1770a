"""The parts of a benchmark: languages, files, what a row means, prompt, gold answer, scoring, published numbers."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mindmerger.tasks.languages import LANGUAGES, Language, _names, find_language
from mindmerger.tasks.numbers import gold_number
from mindmerger.tasks.readers import DataError, Record, RowError, find_file, read_records
from mindmerger.tasks.scoring import Score, _code, score_number


@dataclass(frozen=True, slots=True)
class Example:
    """One input: `source` goes to the encoder, `prompt` ("" for none) and `target` to the LLM.

    `shrinkable` is the span of the prompt that may be shortened when the prompt is too long, never the template's end.
    `id` is the language's code and the row's number within its language: parallel test sets share the numbers.
    `question` is the record's own id where the data have one, which its translations share: X-CSQA's files hold their
    rows in another order in every language. `labels` are the answers that the row may have, in the data's order, where
    they are given beforehand.
    """

    id: str
    language: str
    source: str
    prompt: str
    target: str
    shrinkable: tuple[int, int] = (0, 0)
    question: str = ""
    labels: tuple[str, ...] = ()


# What a task's parse function makes of a record: source, prompt, shrinkable span of the prompt, target; and the labels
# that the row can be answered with, where rows differ in them.
Parsed = tuple[str, str, tuple[int, int], str] | tuple[str, str, tuple[int, int], str, tuple[str, ...]]


def _fill(before: str, text: str, after: str) -> tuple[str, tuple[int, int]]:
    return before + text + after, (len(before), len(before) + len(text))


def _whole_text(text: str) -> tuple[str, tuple[int, int]]:
    return text, (0, 0)


@dataclass(frozen=True)
class Task:
    """Everything of one task: languages, files, what a row means, prompt, scoring, published numbers.

    In file patterns {code} and {name} stand for the language; a file without them mixes languages and tells each
    row's by `language_field`. `published` is {row label: {language name or "avg": accuracy in percent}}, measured on
    `published_rows` rows of each language; a label holds its LLM's name in PUBLISHED_LLMS. `labels` are all answers
    that a row can have, None where answers are free text; where rows differ in them, the parse function says which are
    the row's own. `text_fields` are the keys, in a test record, that lead to its texts in the question's language ("*":
    every entry of a list), the question, stem or premise first: translate-test translates them.
    """

    name: str
    training_name: str
    mapping_languages: tuple[str, ...]
    augmentation_languages: tuple[str, ...] | None  # None: whatever is in the file
    evaluation_languages: tuple[str, ...]
    max_new_tokens: int
    augmentation_file: str | None
    evaluation_file: str | None
    language_field: str
    parse_augmentation: Callable[[Record, Language], Parsed] | None
    parse_evaluation: Callable[[Record, Language], Parsed] | None
    format_query: Callable[[str], tuple[str, tuple[int, int]]]
    score: Callable[..., Score]  # of (output, target, language of the question)
    published: Mapping[str, Mapping[str, float]]
    published_rows: int | None = None
    # Whether training rows of one target are one question in several languages, as the question stage pairs them.
    pairs_by_target: bool = False
    scorer_version: int | None = None  # None where no other version has ever scored the task
    labels: tuple[str, ...] | None = None
    text_fields: tuple[tuple[str | int, ...], ...] = ()
    # Ids of the hub: of the test set, and of the data set whose rows the task is trained on, where they are there.
    hub_dataset: str | None = None
    training_dataset: str | None = None
    # Of (outputs, targets) of one language, where answers are graded: scores of all rows together, by name.
    corpus_scores: Callable[[Sequence[str], Sequence[str]], dict[str, float]] | None = None

    @property
    def translates(self) -> bool:
        """Whether answers are translations, as the mapping stage trains them on sentence pairs."""
        return self.training_name == "translation"

    def gold_key(self, target: str, language: str) -> str:
        """Returns a gold answer in a form that translations of one row share: 1,450 in English is 1.450 in German."""
        # Letters and labels are one in every language; only numbers are written otherwise from one to the next.
        if self.score is not score_number:
            return target
        try:
            return str(gold_number(target, _code(language)))
        except (ValueError, DataError):  # no answer of this version's data
            return target

    def read_augmentation(
        self,
        data_root,
        languages: Sequence[Language] | None = None,
        train_num: int | None = None,
        faults: list[str] | None = None,
    ) -> Iterator[Example]:
        """Yields the augmentation stage's examples, at most `train_num` of each language.

        Args:
            faults: takes the faults of single rows, which are then left out; without it the first one is raised.

        Raises:
            DataError: for a missing or faulty file, a language without rows, a task without this stage.
        """
        self.check_augmentation()
        if languages is None and self.augmentation_languages is not None:
            languages = [LANGUAGES[name] for name in self.augmentation_languages]
        return self._read(self.augmentation_file, self.parse_augmentation, data_root, languages, train_num, faults)

    def check_augmentation(self, otherwise: str = "") -> None:
        """Makes sure that the task has rows of its own to train on.

        Args:
            otherwise: what the message advises beside another task: a stage that needs none, where there is one.

        Raises:
            DataError: naming the tasks that have them.
        """
        if self.augmentation_file is None:
            from mindmerger.tasks import _stage_tasks

            raise DataError(
                f"task {self.name} has no rows of its own to train on: choose --task {', '.join(_stage_tasks())}"
                f"{otherwise}"
            )

    def read_evaluation(self, data_root, language: Language, faults: list[str] | None = None) -> Iterator[Example]:
        """Yields the evaluation examples of one language.

        Args:
            faults: takes the faults of single rows, which are then left out; without it the first one is raised. A
                row of unknown language is always raised: without it, later rows might get other ids.

        Raises:
            DataError: for a missing or faulty file, a language without rows, a task without an evaluation set.
        """
        if self.evaluation_file is None:
            from mindmerger.tasks import _evaluation_tasks

            raise DataError(f"task {self.name} has no evaluation set: choose one of {', '.join(_evaluation_tasks())}")
        return self._read(self.evaluation_file, self.parse_evaluation, data_root, [language], None, faults)

    def _read(self, pattern, parse, data_root, languages, limit, faults=None) -> Iterator[Example]:
        mixed = "{" not in pattern
        files = [(pattern, None)] if mixed else [(_file_of(pattern, language), language) for language in languages]
        # All files are looked for before the first is read.
        files = [(find_file(data_root, relative), language) for relative, language in files]
        # Two counts: an id is the row's number among all of its language, whatever is left out or beyond the limit.
        seen: Counter[str] = Counter()
        given: Counter[str] = Counter()
        for path, language_of_file in files:
            for record in read_records(path, faults):
                if record is None:  # a faulty line, which keeps its number
                    seen[language_of_file.name if language_of_file else ""] += 1
                    continue
                language = language_of_file
                try:
                    language = language or _language_of(record, self.language_field)
                    seen[language.name] += 1
                    # Passed over unparsed: nothing is asked of rows that nobody trains on.
                    if languages is not None and language not in languages or given[language.name] == limit:
                        continue
                    example = self._example(parse, record, language, seen[language.name], mixed)
                except RowError as error:
                    if faults is None or language is None and parse is self.parse_evaluation:
                        raise
                    faults.append(str(error))
                    continue
                given[language.name] += 1
                yield example
                # A file of many languages is read to its end: rows of another one may stand there.
                if not mixed and given[language.name] == limit:
                    break
        absent = [language.name for language in languages or () if not given[language.name]]
        if faults and (absent or not given):
            raise DataError(f"{path}: every row in {', '.join(absent) or 'it'} is faulty, the first: {faults[0]}")
        if absent:
            held = ", ".join(f"{name} ({count})" for name, count in seen.items())
            raise DataError(f"{path}: no rows in {', '.join(absent)}; the file holds {held}")

    def _example(self, parse, record: Record, language: Language, number: int, mixed: bool) -> Example:
        source, prompt, shrinkable, target, *own = parse(record, language)
        [labels] = own or [self.labels or ()]
        # In a file of several languages an id would be a row's, not a question's.
        has_own = not mixed and isinstance(record.value, dict) and isinstance(record.value.get("id"), str)
        question = record.text("id", may_be_empty=True).strip() if has_own else ""
        id = f"{language.code}-{number}"
        return Example(id, language.name, source, prompt, target, shrinkable, question, labels)


def _file_of(pattern: str, language: Language) -> str:
    return pattern.format(code=language.code, name=language.name)


def _language_of(record: Record, field: str) -> Language:
    try:
        return find_language(record.text(field))
    except DataError as error:
        text = str(error)
        raise error if text.startswith(f"{record.path}:") else record.fail(f"field {field!r}: {text}") from None


def _row(codes: str, average: float, scores: str) -> dict[str, float]:
    return {"avg": average} | dict(zip(_names(codes), map(float, scores.split()), strict=True))


# The LLMs of the published rows: the name that the rows' labels hold, and the hub's, where the LLM is there.
PUBLISHED_LLMS: dict[str, str | None] = {
    "MetaMath-7B": "meta-math/MetaMath-7B-V1.0",
    "Llama2-7B-X-CSQA": None,
    "LLaMAX-7B-X-CSQA": "LLaMAX/LLaMAX2-7B-X-CSQA",
    "Llama2-7B-X-XNLI": None,
    "LLaMAX-7B-X-XNLI": "LLaMAX/LLaMAX2-7B-XNLI",
}
PUBLISHED_ENCODER = "google/mt5-xl"
