"""Translate-test: the LLM alone answers the English prompt that is made of a machine's translation of the question.

Translations come from a .jsonl file of {"id", "language", "text"} lines, the form that --parallel_input reads, or from
a clone of a hub data set that keeps them row by row, one `test.tsv` for each language.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from mindmerger.evaluation.parallel_input import FileTranslations
from mindmerger.tasks.base import Example, Task
from mindmerger.tasks.languages import Language, find_language
from mindmerger.tasks.numbers import gold_number
from mindmerger.tasks.readers import DataError
from mindmerger.tasks.scoring import _code, score_number
from mindmerger.tasks.texts import Row, check_text_fields, fill_row, read_rows

NAME = "translate-test (machine)"  # in tables: no other rows of the benchmark are read, so it is never an oracle
SUFFIX = "-translate_test"  # of a results folder
TRANSLATIONS_FILE, RECORD_FILE = "translations.jsonl", "translations.json"


def add_argument(group) -> None:
    """Adds --translate_test."""
    group.add_argument(
        "--translate_test",
        metavar="PATH",
        help="with --llm_only, the prompt is made of the question's translation into English (translate-test): a "
        'folder of mindmerger.baselines.translate_test, a .jsonl file of {"id", "language", "text"} lines, or a clone '
        "of masakhane/afrimgsm-translate-test; English questions stay as they are",
    )


class LinesOfFile:
    """Translations into English by item and field, from a .jsonl file."""

    def __init__(self, path: Path):
        self.file = FileTranslations(str(path))
        self.english = find_language("English")
        self.translator = read_translator(path.with_name(RECORD_FILE)) if path.name == TRANSLATIONS_FILE else None

    def text(self, row: Row, field: str) -> str | None:
        """Returns the translation of one text of a row, None where there is none.

        Raises:
            DataError: when the line says that it translates another text than the row's.
        """
        key = row.example.id, self.english, field
        # Of other data, or of a version with corrected questions: the ids would be the same.
        if self.file.sources.get(key, row.texts[field]) != row.texts[field]:
            raise DataError(
                f"{self.file.path}: the translation of item {row.example.id} was made of another text than the test "
                "set now has: translate these data"
            )
        return self.file.texts.get(key)


class RowsOfHub:
    """Translations into English by row, from a folder `<language code>/test.tsv` for each language.

    A row has the columns `question` (in English) and `answer_number` or `answer`, which tells whether it is the item's.
    """

    translator = None  # not recorded there

    def __init__(self, path: Path, task: Task, files: Iterable[Path], languages: Sequence[Language]):
        if task.score is not score_number or len(task.text_fields) > 1:
            raise DataError(f"{path} holds questions with numbers for answers, which task {task.name} does not have")
        self.rows = {
            language.name: (file, read_tsv(file))
            for file in files
            if (language := _named(file.parent.name)) in languages
        }

    def text(self, row: Row, field: str) -> str | None:
        """Returns the translation of a row's question, None where there is none.

        Raises:
            DataError: when the row of that number has another answer.
        """
        example = row.example
        file, rows = self.rows.get(example.language, (None, []))
        number = int(example.id.rpartition("-")[2])
        if number > len(rows):
            return None
        question, answer = rows[number - 1]
        own = gold_number(example.target, _code(find_language(example.language)))
        try:
            same = gold_number(answer) == own
        except ValueError:
            same = False
        if not same:
            raise DataError(
                f"{file}: row {number} has the answer {answer!r} but {example.id} has {example.target!r}: they are not "
                "the same item, so these rows are not the test set's"
            )
        return question if question.strip() else None


def _named(folder: str) -> Language | None:
    """Returns the language of a folder's name, None where the table has none, so that nobody can ask for it."""
    try:
        return find_language(folder)
    except DataError:
        return None


def read_tsv(path: Path) -> list[tuple[str, str]]:
    """Reads (question, answer) rows of a .tsv file with a head, as spreadsheets and pandas write it.

    Raises:
        DataError: for a file that cannot be read, or lacks one of the two columns.
    """
    try:
        # By csv and not by the project's own reader: texts that hold quotes are written in quotes.
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    columns = list(rows[0]) if rows else []
    answer = next((name for name in ("answer_number", "answer") if name in columns), None)
    if "question" not in columns or answer is None:
        raise DataError(f"{path} needs the columns question and answer_number, it has: {', '.join(map(str, columns))}")
    return [(row["question"] or "", row[answer] or "") for row in rows]


def open_translations(path: str, task: Task, languages: Sequence[Language]):
    """Opens a file or folder of translations.

    Raises:
        DataError: when it is neither, or a line of it is faulty.
    """
    folder = Path(path)
    if not folder.is_dir():
        return LinesOfFile(folder)
    if (folder / TRANSLATIONS_FILE).is_file():
        return LinesOfFile(folder / TRANSLATIONS_FILE)
    files = sorted(folder.rglob("test.tsv"))
    if not files:
        raise DataError(
            f"{path} holds neither {TRANSLATIONS_FILE}, as mindmerger.baselines.translate_test leaves it when it has "
            "finished, nor a test.tsv for each language"
        )
    return RowsOfHub(folder, task, files, languages)


def apply_translate_test(task: Task, data_root, examples: Sequence[Example], path: str) -> tuple[list[Example], dict]:
    """Gives every example the task's prompt over its translation; ids, sources and targets stay, and English ones.

    Returns:
        the examples, and the record for results.json.

    Raises:
        DataError: where translations are missing, with their number and the first, or belong to other items.
    """
    check_text_fields(task)
    names = list(dict.fromkeys(example.language for example in examples if example.language != "English"))
    languages = [find_language(name) for name in names]
    source = open_translations(path, task, languages)
    # Read a second time, for the records behind the examples; what is faulty is left out of them already.
    rows = {row.example.id: row for one in languages for row in read_rows(task, data_root, one, faults=[])}
    built, missing = [], []
    for example in examples:
        row = rows.get(example.id)
        if row is not None:
            # A blank option has nothing to translate.
            texts = {name: source.text(row, name) if text.strip() else text for name, text in row.texts.items()}
            absent = [field for field, text in texts.items() if text is None]
            if absent:
                missing.append((example.id, absent[0]))
                continue
            example = fill_row(task, row, texts)
        built.append(example)
    if missing:
        (first, field), total = missing[0], sum(example.language != "English" for example in examples)
        raise DataError(
            f"{path}: {len(missing)} of {total} items have no translation into English, the first is {first}"
            f"{f' ({field})' if field else ''}: translate them (python -m mindmerger.baselines.translate_test), or "
            "leave their languages out by --languages"
        )
    record = {"name": NAME, "translations": "machine", "source": path, "languages": names}
    return built, record | {"translator": source.translator}


def read_translator(file: Path) -> dict | None:
    """Reads what mindmerger.baselines.translate_test recorded of the model that translated; None without a record.

    Raises:
        DataError: for a record that cannot be read.
    """
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["translator"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not the record of translations: {type(error).__name__} {error}") from error
