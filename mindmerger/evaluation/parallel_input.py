"""Parallel multilingual input: prompts that hold a text together with its translations."""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mindmerger.tasks.base import Example, Task
from mindmerger.tasks.examples import read_parallel, varying_text
from mindmerger.tasks.languages import Language, find_language, parse_languages
from mindmerger.tasks.readers import DataError, find_file, read_records

# The numbers of translations that the published method reports.
SIZES = (1, 3, 6)
ORDERS = ("source-first", "english-first", "shuffled")
EXTRA_LANGUAGES = ("Spanish", "Russian", "French", "Chinese", "German", "Japanese")

# Our words; the published prompt is not known to us in full.
MATH_PREAMBLE = (
    "The same problem is given in {number} languages, one per line. Use whichever version helps you, reason step by "
    "step in English and end with the number that answers the problem.\n"
)


@dataclass(frozen=True)
class ParallelInput:
    """Settings of PMI: the translations that it adds to the input.

    size: translations per item (k). translations: "aligned", or the path of a .jsonl file. languages: candidates for
    the translations, in order of preference; None for `default_languages`. seed: of the order "shuffled".
    """

    size: int
    translations: str = "aligned"
    order: str = "source-first"
    languages: tuple[Language, ...] | None = None
    seed: int = 0

    @property
    def label(self) -> str:
        """Who translated: humans ("oracle") or a machine; no table may leave it out."""
        return "oracle" if self.translations == "aligned" else "machine"

    @property
    def name(self) -> str:
        """Name in tables: PMI-3 (oracle)."""
        return f"PMI-{self.size} ({self.label})"

    @property
    def suffix(self) -> str:
        """End of a results folder's name: -pmi3-oracle."""
        return f"-pmi{self.size}-{self.label}"


def default_languages(task: Task) -> tuple[Language, ...]:
    """Returns es, ru, fr, zh, de, ja as far as the task has them; then (ours) English and its others, last one first.

    The source is never among its own translations, so a task without one of the six, or an item in one of them, would
    otherwise have no six.
    """
    # Last one first: the tasks list their languages from those with few resources to English.
    rest = [name for name in reversed(task.evaluation_languages) if name not in EXTRA_LANGUAGES]
    rest.sort(key=lambda name: name != "English")
    return tuple(find_language(name) for name in (*EXTRA_LANGUAGES, *rest) if name in task.evaluation_languages)


def choose_languages(source: Language, options: ParallelInput, candidates: Sequence[Language]) -> list[Language]:
    """Returns the k languages translated into for items in `source`.

    Under the order english-first English takes the first place (ours): without it that order would say nothing.

    Raises:
        DataError: when fewer than k candidates are left without the source.
    """
    left = [language for language in dict.fromkeys(candidates) if language != source]
    if options.order == "english-first":
        english = find_language("English")
        left = [english] * (source != english) + [language for language in left if language != english]
    if len(left) < options.size:
        raise DataError(
            f"--parallel_input {options.size} needs {options.size} languages besides {source.name}, there are "
            f"{len(left)} ({', '.join(language.code for language in left) or 'none'}): name more by "
            "--parallel_languages or take a smaller number"
        )
    return left[: options.size]


class AlignedTranslations:
    """The benchmark's own rows in other languages, checked to be the same items."""

    def __init__(self, task: Task, data_root):
        self.task, self.data_root = task, data_root
        # Kept: every item of a source asks for the same k languages, and a test set is read once.
        self.rows: dict[Language, dict[str, Example]] = {}
        self.key_of: dict[str, str] = {}

    def _read(self, language: Language) -> dict[str, Example]:
        if language not in self.rows:
            self.rows[language] = read_parallel(self.task, self.data_root, language)
            self.key_of |= {example.id: key for key, example in self.rows[language].items()}
        return self.rows[language]

    def find(self, example: Example, language: Language) -> Example:
        """Finds the row of `language` that translates `example`.

        Raises:
            DataError: when there is none, or its gold answer says that it is another item.
        """
        self._read(find_language(example.language))
        key = self.key_of[example.id]
        other = self._read(language).get(key)
        if other is None:
            raise DataError(
                f"{self.task.name}: item {example.id} (key {key}) has no row in {language.name}: these test sets are "
                "not parallel; leave the language out by --parallel_languages, or pass --translations FILE.jsonl"
            )
        # X-CSQA shuffles its options in every language, so its letters say nothing; the shared id does.
        keys = [self.task.gold_key(one.target, one.language) for one in (other, example)]
        if self.task.name != "x-csqa" and keys[0] != keys[1]:
            raise DataError(
                f"{self.task.name}: {example.id} has the answer {example.target!r} but {other.id} has {other.target!r}:"
                " they are not the same item, so these test sets are not parallel"
            )
        return other

    def text(self, example: Example, language: Language) -> str:
        """Returns `example`'s question, stem or premise in `language`."""
        return varying_text(self.find(example, language))


class FileTranslations:
    """Machine translations from a .jsonl file of {"id", "language", "text"}; id is the source item's, such as sw-12.

    Further texts of an item, which PMI does not use, have a "field". "source" may hold the text that was translated.
    """

    def __init__(self, path: str):
        self.path = path
        self.texts: dict[tuple[str, Language, str], str] = {}
        self.sources: dict[tuple[str, Language, str], object] = {}
        for record in read_records(find_file(".", path)):
            try:
                language = find_language(record.text("language"))
            except DataError as error:
                # Once: the error may name this very line already.
                raise record.fail(str(error).removeprefix(f"{record.path}:{record.line}: ")) from None
            field = record.text("field") if "field" in record.value else ""
            key = record.text("id"), language, field
            # The later one would replace the earlier unseen.
            if key in self.texts:
                raise record.fail(
                    f"item {key[0]} has a second translation into {language.name}" + (f" of {field}" if field else "")
                )
            self.texts[key] = record.text("text")
            if "source" in record.value:
                self.sources[key] = record.value["source"]

    def text(self, example: Example, language: Language) -> str:
        """Returns the machine's translation of `example` into `language`.

        Raises:
            DataError: when the file holds none.
        """
        found = self.texts.get((example.id, language, ""))
        if found is None:
            have = [lang.code for key, lang, field in self.texts if key == example.id and not field]
            raise DataError(
                f"{self.path}: no translation of item {example.id} into {language.name} (it has: "
                f"{', '.join(have) or 'none'}): add it, or name other languages by --parallel_languages"
            )
        return found


def build_prompt(task: Task, example: Example, texts: Sequence[tuple[Language, str]]) -> Example:
    """Replaces an example's question, stem or premise by one `[Language] text` line for each of `texts`.

    What may be dropped of a prompt that is too long are these lines, from the last one's end on.
    """
    # A line break inside a text would look like the start of another language's line.
    lines = "\n".join(f"[{language.name}] {' '.join(text.splitlines())}" for language, text in texts)
    # The span is what the translations share; hypothesis, options and template stay as they are, once.
    start, end = example.shrinkable
    before = example.prompt[:start]
    if task.training_name == "math":
        before += MATH_PREAMBLE.format(number=len(texts))
    prompt = before + lines + example.prompt[end:]
    # The span grows with the lines: a prompt over the limit loses translations, never the template's end.
    return replace(example, prompt=prompt, shrinkable=(len(before), len(before) + len(lines)))


def apply_parallel_input(
    task: Task, data_root, examples: Sequence[Example], options: ParallelInput
) -> tuple[list[Example], dict[str, list[str]]]:
    """Gives every example its PMI prompt; ids, encoder texts and targets stay.

    Returns:
        the examples, and for each source language the codes of the languages beside it, in order of preference.

    Raises:
        DataError: where a translation is missing or the test sets are not parallel.
    """
    if task.translates:
        raise DataError(f"task {task.name} has no parallel input: the English translation is the answer itself")
    if options.translations == "aligned":
        source = AlignedTranslations(task, data_root)
    else:
        source = FileTranslations(options.translations)
    candidates = options.languages or default_languages(task)
    chosen = {
        name: choose_languages(find_language(name), options, candidates)
        for name in dict.fromkeys(example.language for example in examples)
    }
    built = []
    for example in examples:
        own = find_language(example.language)
        texts = [(own, varying_text(example))]
        texts += [(language, source.text(example, language)) for language in chosen[example.language]]
        if options.order == "english-first":
            # A stable sort: the others keep their order of preference.
            texts.sort(key=lambda pair: pair[0].code != "en")
        elif options.order == "shuffled":
            # A generator for each item: its order is the same whichever others are evaluated beside it.
            random.Random(f"{options.seed} {example.id}").shuffle(texts)
        built.append(build_prompt(task, example, texts))
    return built, {name: [language.code for language in languages] for name, languages in chosen.items()}


def add_arguments(group) -> None:
    """Adds the flags of parallel input, which several commands have."""
    group.add_argument(
        "--parallel_input",
        type=int,
        choices=SIZES,
        metavar="K",
        help="PMI-K: the prompt holds the input and K translations of it (1, 3 or 6)",
    )
    group.add_argument(
        "--translations",
        metavar="aligned|FILE.jsonl",
        help="translations for --parallel_input: aligned takes the benchmark's own parallel rows (labelled oracle); a "
        'file of {"id", "language", "text"} lines holds machine translations (labelled machine)',
    )
    group.add_argument(
        "--order",
        choices=ORDERS,
        help="order of the languages in the prompt (default source-first); english-first gives English the first of "
        "the K places (ours)",
    )
    group.add_argument(
        "--parallel_languages",
        help="languages of the translations in order of preference, the source left out (default es,ru,fr,zh,de,ja; "
        "then, ours: English and the task's other languages)",
    )


def options_of(args: argparse.Namespace) -> ParallelInput | None:
    """Returns the options that the flags ask for, None without --parallel_input.

    Raises:
        DataError: for flags that say nothing without another one.
    """
    if args.parallel_input is None:
        for flag in ("translations", "order", "parallel_languages"):
            if getattr(args, flag) is not None:
                raise DataError(f"--{flag} belongs to --parallel_input: pass that too (1, 3 or 6)")
        return None
    # No default: an oracle taken by accident would be reported as a fair result.
    if args.translations is None:
        raise DataError(
            "--parallel_input needs --translations: aligned (the benchmark's own rows, an oracle) or a .jsonl file of "
            "machine translations"
        )
    languages = tuple(parse_languages(args.parallel_languages)) if args.parallel_languages else None
    return ParallelInput(
        args.parallel_input, args.translations, args.order or ORDERS[0], languages, getattr(args, "seed", 0)
    )
