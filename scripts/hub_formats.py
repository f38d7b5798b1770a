"""The data sets of the hub: where each lies, and its rows turned into the released layout.

Every data set has its rows documented where they are written: the form of the hub first, then that of our file.
"""

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import write_text_atomic
from mindmerger.tasks import find_task
from mindmerger.tasks.languages import LANGUAGES, Language
from mindmerger.tasks.readers import read_records

XNLI_LABELS = ("entailment", "neutral", "contradiction")  # the hub's integers, in order
CODES = {language.name: language.code for language in LANGUAGES.values()}


@dataclass(frozen=True)
class Source:
    """One file of the data folder and the split of a hub data set that it is made from."""

    path: str
    repository: str
    config: str
    split: str
    write: Callable[[Path, Iterable[dict]], None]
    english: str | None = None  # config whose texts are put beside the rows, as their field "english"


def tsv_rows(path: Path) -> list[dict]:
    """Reads rows of a TSV file: by the names in its first line, or of question and answer where that has none."""
    first, *others = (record.value for record in read_records(path))
    if "question" in first or "premise" in first:
        # Files with a line of names are written by pandas, which puts texts with a quote or a line break in quotes.
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, dialect="excel-tab"))
    return [dict(zip(("question", "answer_number"), columns, strict=False)) for columns in (first, *others)]


def mgsm_line(row: dict) -> str:
    """Writes one line of `mgsm_XX.tsv` from a hub row `{question, answer, answer_number, equation_solution}`.

    `answer` is empty in the test split; `answer_number` holds the gold answer.

    Raises:
        UserError: when the row lacks one of the two fields that are needed.
    """
    question, number = field(row, "question"), field(row, "answer_number")
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    # A TSV line has no room for these; none of the published questions holds one.
    question = str(question).translate({ord(character): " " for character in "\t\r\n"})
    return f"{question}\t{number}"


def x_csqa_line(row: dict) -> str:
    """Writes one line of an X-CSQA file from a hub row `{id, lang, question, answerKey}`.

    `question.choices` may be a list of `{label, text}` or, as `datasets` shows it, a pair of lists; it is written as
    the release has it, a list.
    """
    question = field(row, "question")
    choices = field(question, "choices")
    # `datasets` turns a list of records into a record of lists.
    if isinstance(choices, dict):
        pairs = zip(field(choices, "label"), field(choices, "text"), strict=True)
        choices = [{"label": label, "text": text} for label, text in pairs]
    record = {"id": field(row, "id"), "lang": field(row, "lang")}
    record["question"] = {"stem": field(question, "stem"), "choices": choices}
    record["answerKey"] = field(row, "answerKey")
    return json.dumps(record, ensure_ascii=False)


def xnli_records(rows: Iterable[dict]) -> list[dict]:
    """Returns `{sentence1, sentence2, label, language}` for every language of hub rows of config `all_languages`.

    A row's premise is `{code: text}`, its hypothesis `{"language": [code, ...], "translation": [text, ...]}`, its label
    an integer. The result goes language by language, in the task's order.

    Raises:
        UserError: for a label that XNLI does not have, or a language that one row has and another lacks.
    """
    # A row of the hub holds all fifteen languages, the release a row for each.
    by_language = {name: [] for name in find_task("xnli").evaluation_languages}
    for number, row in enumerate(rows):
        label = field(row, "label")
        text_label = label_word(label, f"XNLI row {number}")
        premise, hypothesis = translations(field(row, "premise")), translations(field(row, "hypothesis"))
        for name, records in by_language.items():
            sentences = {"sentence1": field(premise, CODES[name]), "sentence2": field(hypothesis, CODES[name])}
            records.append({**sentences, "label": text_label, "language": name})
    return [record for records in by_language.values() for record in records]


def label_word(label, where: str) -> str:
    """Returns a label of XNLI's form as a word.

    Raises:
        UserError: for one that XNLI does not have.
    """
    # A bad label must not become a wrong one: -1 marks a missing one in many data sets, and would index the last.
    if not (label in XNLI_LABELS or (isinstance(label, int) and 0 <= label < len(XNLI_LABELS))):
        raise UserError(f"{where}: label {label!r} is none of {', '.join(XNLI_LABELS)}")
    return label if isinstance(label, str) else XNLI_LABELS[label]


def nli_line(row: dict) -> str:
    """Writes one line of a .jsonl file of XNLI's form from a hub row `{premise, hypothesis, label}`.

    The label is a number, also as text (a TSV file's), or a word.
    """
    label = field(row, "label")
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    premise, hypothesis = field(row, "premise"), field(row, "hypothesis")
    record = {"sentence1": premise, "sentence2": hypothesis, "label": label_word(label, f"premise {premise!r:.40}")}
    return json.dumps(record, ensure_ascii=False)


def xcopa_line(row: dict) -> str:
    """Writes one line of an XCOPA file from a hub row `{premise, question, choice1, choice2, label, idx, changed}`.

    `idx` is the row's number in COPA, the same in every language: it becomes the `id`.
    """
    record = {"id": str(field(row, "idx"))}
    record |= {name: field(row, name) for name in ("premise", "question", "choice1", "choice2", "label")}
    return json.dumps(record, ensure_ascii=False)


def belebele_line(row: dict) -> str:
    """Writes one line of a Belebele file from a hub row, whose fields it keeps.

    `link` names the passage, and with `question_number` the question, the same in every language: both become the `id`.
    """
    names = ("link", "question_number", "flores_passage", "question", *(f"mc_answer{i}" for i in range(1, 5)))
    record = {name: field(row, name) for name in (*names, "correct_answer_num")}
    return json.dumps({"id": f"{record['link']} {record['question_number']}", **record}, ensure_ascii=False)


def flores_line(row: dict) -> str:
    """Writes one line of a FLORES file, `{id, sentence, english}`, from a row of FLORES+, `{id, text, ...}`, with the
    English one's text beside it."""
    record = {"id": str(field(row, "id")), "sentence": field(row, "text"), "english": field(row, "english")}
    return json.dumps(record, ensure_ascii=False)


def translations(value: dict) -> dict[str, str]:
    """Returns `{code: text}` from either of the two forms in which the hub writes translations."""
    if set(value) == {"language", "translation"}:
        return dict(zip(value["language"], value["translation"], strict=True))
    return value


def field(row: dict, name: str):
    """Returns a field that must be there.

    Raises:
        UserError: naming the field and the fields that are there.
    """
    # Checked by name: data sets on the hub change, and half-filled files would be noticed in training at the earliest.
    if not isinstance(row, dict) or row.get(name) is None:
        found = ", ".join(map(str, row)) if isinstance(row, dict) else f"{row!r:.60}"
        raise UserError(f"the hub's row format has changed: no {name!r} among {found}")
    return row[name]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a file of these lines, whole or not at all."""
    write_text_atomic(path, "".join(f"{line}\n" for line in lines))


def write_mgsm(path: Path, rows: Iterable[dict]) -> None:
    """Writes hub rows of MGSM as the release has them, a .tsv file."""
    write_lines(path, map(mgsm_line, rows))


def write_x_csqa(path: Path, rows: Iterable[dict]) -> None:
    """Writes hub rows of X-CSQA as the release has them, a .jsonl file."""
    write_lines(path, map(x_csqa_line, rows))


def write_nli(path: Path, rows: Iterable[dict]) -> None:
    """Writes hub rows of AfriXNLI or AmericasNLI, a .jsonl file."""
    write_lines(path, map(nli_line, rows))


def write_xcopa(path: Path, rows: Iterable[dict]) -> None:
    """Writes hub rows of XCOPA, a .jsonl file."""
    write_lines(path, map(xcopa_line, rows))


def write_belebele(path: Path, rows: Iterable[dict]) -> None:
    """Writes hub rows of Belebele, a .jsonl file."""
    write_lines(path, map(belebele_line, rows))


def write_flores(path: Path, rows: Iterable[dict]) -> None:
    """Writes rows of FLORES+ with their English sentences, a .jsonl file."""
    write_lines(path, map(flores_line, rows))


def write_xnli(path: Path, rows: Iterable[dict]) -> None:
    """Writes hub rows of XNLI as the release has them: one JSON list, here with a record on each line."""
    records = ",\n".join(json.dumps(record, ensure_ascii=False) for record in xnli_records(rows))
    write_text_atomic(path, f"[\n{records}\n]\n")


# How the hub's data sets call languages, where it is not by the first three letters of NLLB's tag (IrokoBench, by its
# own code in the table where NLLB has none) or by the whole tag (Belebele, FLORES+).
IROKO_CONFIGS = {"swh": "swa", "gaz": "orm"}
AMERICAS_CONFIGS = {"ayr": "aym", "grn": "gn"}
FLORES_CONFIGS = {
    "ajp_Arab": "apc_Arab_sout3123",
    "aka_Latn": "twi_Latn_akua1239",
    "apc_Arab": "apc_Arab_nort3139",
    "est_Latn": "ekk_Latn",
    "grn_Latn": "gug_Latn",
    "kon_Latn": "ktu_Latn",
    "sat_Beng": "sat_Olck",
    "tgl_Latn": "fil_Latn",
    "twi_Latn": "twi_Latn_asan1239",
    "tzm_Tfng": "zgh_Tfng",
    "zho_Hans": "cmn_Hans",
    "zho_Hant": "cmn_Hant",
}


def _files(task: str, split: str, write: Callable, config: Callable, **more) -> list[Source]:
    """Returns one source for each language of a task whose files are by language.

    Args:
        config: returns the hub's name of a language.
    """
    known = find_task(task)
    pattern, languages = known.evaluation_file, [LANGUAGES[name] for name in known.evaluation_languages]
    return [
        Source(pattern.format(code=one.code, name=one.name), known.hub_dataset, config(one), split, write, **more)
        for one in languages
    ]


def _three_letters(others: dict[str, str]) -> Callable:
    def config(language: Language) -> str:
        letters = (language.nllb or language.code)[:3]
        return others.get(letters, letters)

    return config


def hub_sources() -> dict[str, list[Source]]:
    """Lists everything the hub can give, by the name that `--tasks` uses."""
    x_csqa = [CODES[name] for name in find_task("x-csqa").evaluation_languages]
    # The data set calls Japanese `jap`.
    configs = {code: f"X-CSQA-{'jap' if code == 'ja' else code}" for code in x_csqa}
    questions, xnli = find_task("x-csqa").hub_dataset, find_task("xnli").hub_dataset
    by_code, by_tag = (lambda one: one.code), (lambda one: one.nllb)
    return {
        "mgsm": _files("math_mgsm", "test", write_mgsm, by_code),
        # X-CSQA keeps the answers of its test split to itself: the dev split is what everybody reports.
        "x-csqa": [
            Source(f"evaluation/x-csqa/{x}/dev.jsonl", questions, configs[x], "validation", write_x_csqa)
            for x in x_csqa
        ]
        + [Source("query_translation/x-csqa/train_en.jsonl", questions, configs["en"], "train", write_x_csqa)],
        "xnli": [
            Source("evaluation/xnli/test.json", xnli, "all_languages", "test", write_xnli),
            Source("query_translation/xnli_dev.json", xnli, "all_languages", "validation", write_xnli),
        ],
        "mgsm_rev2": _files("math_mgsm_rev2", "test", write_mgsm, by_code),
        "afrimgsm": _files("math_afrimgsm", "test", write_mgsm, _three_letters(IROKO_CONFIGS)),
        "afrixnli": _files("afrixnli", "test", write_nli, _three_letters(IROKO_CONFIGS)),
        "americas_nli": _files("americas_nli", "test", write_nli, _three_letters(AMERICAS_CONFIGS)),
        "xcopa": _files("xcopa", "test", write_xcopa, by_code),
        "belebele": _files("belebele", "test", write_belebele, by_tag),
        "flores": _files(
            "flores",
            "devtest",
            write_flores,
            lambda one: FLORES_CONFIGS.get(one.nllb, one.nllb),
            english="eng_Latn",
        ),
    }


# Those that the method was published on: fetched where --tasks names none.
PUBLISHED = ("mgsm", "x-csqa", "xnli")
