"""What the project knows of languages and benchmarks: one row per language, one `Task` per task.

Prompt, gold answer, extraction and scoring of a task stand together here; the loops elsewhere know no task. To add a
language, add a row to LANGUAGES; to add a task, an entry to TASKS with a function that parses its records.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_numbers import gold_number, read_number, reference_number
from data_readers import DataError, Record, RowError, count_lines, find_file, read_lines, read_records, shown
from runtime_utils import warn

# ---------------------------------------------------------------------------------------------------------------------
# Languages


@dataclass(frozen=True)
class Language:
    """A language: English name (as in the data files), ISO 639-1 code (as in file names), and encoders' own tags."""

    name: str
    code: str
    nllb: str | None  # NLLB-200
    m2m100: str | None  # M2M-100
    mbart: str | None  # mBART-50; mBART-cc25 knows some of these


# A further language is one more row here. None: that encoder was not trained on the language.
LANGUAGES: dict[str, Language] = {
    row[0]: Language(*row)
    for row in (
        ("Albanian", "sq", "als_Latn", "sq", None),
        ("Arabic", "ar", "arb_Arab", "ar", "ar_AR"),
        ("Bengali", "bn", "ben_Beng", "bn", "bn_IN"),
        ("Bulgarian", "bg", "bul_Cyrl", "bg", None),
        ("Chinese", "zh", "zho_Hans", "zh", "zh_CN"),
        ("Croatian", "hr", "hrv_Latn", "hr", "hr_HR"),
        ("English", "en", "eng_Latn", "en", "en_XX"),
        ("Flemish", "nl", "nld_Latn", "nl", "nl_XX"),
        ("French", "fr", "fra_Latn", "fr", "fr_XX"),
        ("German", "de", "deu_Latn", "de", "de_DE"),
        ("Greek", "el", "ell_Grek", "el", None),
        ("Hindi", "hi", "hin_Deva", "hi", "hi_IN"),
        ("Hungarian", "hu", "hun_Latn", "hu", None),
        ("Italian", "it", "ita_Latn", "it", "it_IT"),
        ("Japanese", "ja", "jpn_Jpan", "ja", "ja_XX"),
        ("Lithuanian", "lt", "lit_Latn", "lt", "lt_LT"),
        ("Macedonian", "mk", "mkd_Cyrl", "mk", "mk_MK"),
        ("Polish", "pl", "pol_Latn", "pl", "pl_PL"),
        ("Portuguese", "pt", "por_Latn", "pt", "pt_XX"),
        ("Russian", "ru", "rus_Cyrl", "ru", "ru_RU"),
        ("Serbian", "sr", "srp_Cyrl", "sr", None),
        ("Spanish", "es", "spa_Latn", "es", "es_XX"),
        ("Swahili", "sw", "swh_Latn", "sw", "sw_KE"),
        ("Telugu", "te", "tel_Telu", None, "te_IN"),
        ("Thai", "th", "tha_Thai", "th", "th_TH"),
        ("Turkish", "tr", "tur_Latn", "tr", "tr_TR"),
        ("Urdu", "ur", "urd_Arab", "ur", "ur_PK"),
        ("Vietnamese", "vi", "vie_Latn", "vi", "vi_VN"),
    )
}
# The released files call Dutch "Flemish".
# How many languages an unknown name is answered with.
NEAREST = 10
LANGUAGE_ALIASES = {"dutch": "Flemish"}


def _names(codes: str) -> tuple[str, ...]:
    by_code = {language.code: language.name for language in LANGUAGES.values()}
    return tuple(by_code[code] for code in codes.split())


def _nearest(text: str, known: Iterable[str]) -> str:
    # A part of a name counts as the name: `mgms` is near `math_mgsm` by its end alone.
    by_part = {part: name for name in known for part in (name.split("_")[-1], name)}
    found = difflib.get_close_matches(text.lower(), list(by_part), n=1)
    return f"; did you mean {by_part[found[0]]}?" if found else ""


def find_language(text: str) -> Language:
    """Finds a language by English name or ISO code, in any case.

    Raises:
        DataError: with the nearest spelling and the nearest of the known languages.
    """
    exact = LANGUAGES.get(text)
    if exact:
        return exact
    wanted = text.strip().lower()
    wanted = LANGUAGE_ALIASES.get(wanted, wanted).lower()
    for language in LANGUAGES.values():
        if wanted in (language.name.lower(), language.code):
            return language
    near = difflib.get_close_matches(wanted, [name.lower() for name in LANGUAGES] + list(LANGUAGE_ALIASES), n=1)
    hint = f"did you mean {LANGUAGE_ALIASES.get(near[0], near[0].capitalize())}? " if near else ""

    def likeness(language: Language) -> float:
        spellings = [
            language.name.lower(),
            *(alias for alias, name in LANGUAGE_ALIASES.items() if name == language.name),
        ]
        spellings += [language.code] if len(wanted) < 4 else []
        return max(difflib.SequenceMatcher(None, wanted, one).ratio() for one in spellings)

    nearest = sorted(LANGUAGES.values(), key=likeness, reverse=True)[:NEAREST]
    names = ", ".join(f"{language.name} ({language.code})" for language in nearest)
    raise DataError(
        f"unknown language {shown(text)}: {hint}the nearest of {len(LANGUAGES)} are {names}; others: add a row to "
        "LANGUAGES"
    )


def parse_languages(text: str) -> list[Language]:
    """Reads a comma-separated list of languages; repeated ones count once.

    Raises:
        DataError: for an unknown language or an empty list.
    """
    languages = [find_language(part) for part in text.split(",") if part.strip()]
    if not languages:
        raise DataError(f"no language in {text!r}: give names or codes with commas between, such as Swahili,th")
    return list(dict.fromkeys(languages))


# ---------------------------------------------------------------------------------------------------------------------
# Examples and prompts. The templates match the released mappings' training to the character.


@dataclass(frozen=True, slots=True)
class Example:
    """One input: `source` goes to the encoder, `prompt` ("" for none) and `target` to the LLM.

    `prompt[cut[0]:cut[1]]` is the part that may be shortened when the prompt is too long, never the template's end.
    `id` is the language's code and the row's number within its language: parallel test sets share the numbers.
    `question` is the record's own id where the data have one, which its translations share: X-CSQA's files hold their
    rows in another order in every language.
    """

    id: str
    language: str
    source: str
    prompt: str
    target: str
    cut: tuple[int, int] = (0, 0)
    question: str = ""


# What the parse functions below make of a record: source, prompt, cut, target.
Parsed = tuple[str, str, tuple[int, int], str]


def _fill(before: str, text: str, after: str) -> tuple[str, tuple[int, int]]:
    return before + text + after, (len(before), len(before) + len(text))


def math_prompt(query: str) -> tuple[str, tuple[int, int]]:
    """The prompt MetaMath was tuned with, and the span of the query in it."""
    return _fill(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n",
        query,
        "\n\n### Response: Let's think step by step.",
    )


def translation_prompt(sentence: str, language: str) -> tuple[str, tuple[int, int]]:
    """The prompt of the mapping stage, where one is asked for."""
    return _fill(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n### Instruction:\n"
        f"Translate the following sentences from {language} to English.\n### Input:\n",
        sentence,
        "\n### Response:",
    )


def xnli_prompt(premise: str, hypothesis: str) -> tuple[str, tuple[int, int]]:
    """The XNLI prompt and the span of the premise in it."""
    return _fill("Premise: ", premise, f"\nHypothesis: {hypothesis}\nLabel:")


def x_csqa_prompt(stem: str, choices: Sequence[tuple[str, str]]) -> tuple[str, tuple[int, int]]:
    """The X-CSQA prompt of a question and its (label, text) options, and the span of the question in it."""
    options = "\t".join(f"{label}. {text}" for label, text in choices)
    return _fill("", stem, f"\nOptions:{options}\nAnswer:")


def _whole_text(text: str) -> tuple[str, tuple[int, int]]:
    return text, (0, 0)


def _math_training(record: Record, language: Language) -> Parsed:
    query = record.text("query")
    return (query, *math_prompt(query), record.text("response"))


def _mgsm(record: Record, language: Language) -> Parsed:
    columns = [column.strip() for column in record.value]
    if len(columns) != 2 or not all(columns):
        raise record.fail(f"expected question TAB answer, found {len(columns)} columns: {shown(columns)}")
    question, answer = columns
    return (question, *math_prompt(question), _checked_gold(record, answer, language))


def _msvamp(record: Record, language: Language) -> Parsed:
    question = record.text("m_query")
    return (question, *math_prompt(question), _checked_gold(record, record.text("response"), language))


def _checked_gold(record: Record, answer: str, language: Language) -> str:
    # A gold answer without a number could never be matched, one with two readings would be matched by the wrong answer.
    try:
        gold_number(answer, language.code)
    except ValueError as error:
        raise record.fail(f"the answer {shown(answer)} {error}") from None
    return answer


def _x_csqa(record: Record, language: Language) -> Parsed:
    stem = record.text("question", "stem")
    at = ("question", "choices")
    choices = record.get(*at)
    if isinstance(choices, dict):  # the other public form: {"label": [...], "text": [...]}
        columns = record.get(*at, "label"), record.get(*at, "text")
        if not all(isinstance(column, list) for column in columns) or len(columns[0]) != len(columns[1]):
            raise record.fail("question.choices needs lists 'label' and 'text' of equal length")
        fields = [((*at, "label", i), (*at, "text", i)) for i in range(len(columns[0]))]
    elif isinstance(choices, list):
        fields = [((*at, i, "label"), (*at, i, "text")) for i in range(len(choices))]
    else:
        raise record.fail(f"question.choices must be a list, got {shown(choices)}")
    options = [(record.text(*label), record.text(*text, may_be_empty=True)) for label, text in fields]
    labels = [label for label, _ in options]
    if not labels or len(set(labels)) < len(labels):
        raise record.fail(f"question.choices needs options with different labels, got {shown(labels)}")
    answer = record.value.get("answerKey")
    if answer not in labels:
        found = shown(answer) if answer else "none (test files come without)"
        raise record.fail(f"answerKey must be one of {shown(', '.join(labels))}, found {found}")
    prompt, cut = x_csqa_prompt(stem, options)
    return prompt, prompt, cut, answer


XNLI_LABELS = ("entailment", "neutral", "contradiction")


def _xnli(record: Record, language: Language) -> Parsed:
    label = record.text("label")
    # Translations of MultiNLI's training part spell it so.
    label = "contradiction" if label == "contradictory" else label
    if label not in XNLI_LABELS:
        raise record.fail(f"label {shown(label)} is none of {', '.join(XNLI_LABELS)}")
    prompt, cut = xnli_prompt(record.text("sentence1"), record.text("sentence2"))
    return prompt, prompt, cut, label


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def corrected_number(text: str, language: Language | str | None = None) -> float | None:
    """Returns the last number of a text as a reader of a language would take it, or None where there is none.

    Args:
        language: the question's, also by name or code; None for English. `read_number` says what it decides.
    """
    return read_number(text, _code(language))


def _code(language: Language | str | None) -> str:
    if language is None:
        return "en"
    return (language if isinstance(language, Language) else find_language(language)).code


@dataclass(frozen=True)
class Score:
    """What an output was read as and whether that is right, by our reading and by the published one."""

    prediction: str | float | None
    correct: bool
    reference_prediction: str | float
    reference_correct: bool


# Raised when the same output may get another score: results folders of an older scorer are then evaluated anew.
NUMBER_SCORER_VERSION = 2


def score_number(output: str, target: str, language: Language | str | None = None) -> Score:
    """Scores a math output: right where its last number and the gold answer's are exactly equal as floats.

    Args:
        language: the question's, also by name or code; None for English.
    """
    prediction, reference = corrected_number(output, language), reference_number(output)
    try:
        correct = prediction == gold_number(target, _code(language))
    except ValueError:
        correct = False
    return Score(prediction, correct, reference, reference == reference_number(target))


def score_text(output: str, target: str, language: Language | str | None = None) -> Score:
    """Scores an option letter or label: right where the stripped output equals it, in any language."""
    prediction = output.strip()
    return Score(prediction, prediction == target, prediction, prediction == target)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Task:
    """Everything of one task: languages, files, what a row means, prompt, scoring, published numbers.

    In file patterns {code} and {name} stand for the language; a file without them mixes languages and tells each
    row's by `language_field`. `published` is {row label: {language name or "avg": accuracy in percent}}, measured on
    `published_rows` rows of each language; a label holds its LLM's name in PUBLISHED_LLMS.
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
    scorer_version: int | None = None  # None where no other version has ever scored the task

    def gold_key(self, target: str, language: str) -> str:
        """Returns a gold answer in a form that translations of one row share: 1,450 in English is 1.450 in German."""
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

    def check_augmentation(self) -> None:
        """Makes sure that the task has an augmentation stage.

        Raises:
            DataError: naming the tasks that have one.
        """
        if self.augmentation_file is None:
            raise DataError(
                f"task {self.name} has no augmentation stage: choose --task {', '.join(_stage_tasks())}, "
                "or --stage_name mapping"
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
            raise DataError(f"task {self.name} has no evaluation set: choose one of {', '.join(_evaluation_tasks())}")
        return self._read(self.evaluation_file, self.parse_evaluation, data_root, [language], None, faults)

    def _read(self, pattern, parse, data_root, languages, limit, faults=None) -> Iterator[Example]:
        mixed = "{" not in pattern
        files = [(pattern, None)] if mixed else [(_file_of(pattern, language), language) for language in languages]
        # All files are looked for before the first is read.
        files = [(find_file(data_root, relative), language) for relative, language in files]
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
                    if languages is not None and language not in languages or given[language.name] == limit:
                        continue
                    example = _example(parse, record, language, seen[language.name], mixed)
                except RowError as error:
                    if faults is None or language is None and parse is self.parse_evaluation:
                        raise
                    faults.append(str(error))
                    continue
                given[language.name] += 1
                yield example
                if not mixed and given[language.name] == limit:
                    break
        absent = [language.name for language in languages or () if not given[language.name]]
        if faults and (absent or not given):
            raise DataError(f"{path}: every row in {', '.join(absent) or 'it'} is faulty, the first: {faults[0]}")
        if absent:
            held = ", ".join(f"{name} ({count})" for name, count in seen.items())
            raise DataError(f"{path}: no rows in {', '.join(absent)}; the file holds {held}")


def _example(parse, record: Record, language: Language, number: int, mixed: bool) -> Example:
    source, prompt, cut, target = parse(record, language)
    # In a file of several languages an id would be a row's, not a question's.
    has_own = not mixed and isinstance(record.value, dict) and isinstance(record.value.get("id"), str)
    question = record.text("id", may_be_empty=True).strip() if has_own else ""
    return Example(f"{language.code}-{number}", language.name, source, prompt, target, cut, question)


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


_NINE = "bn th sw ja zh de fr ru es"
_MGSM = f"te {_NINE} en"
_X_CSQA = "sw ur hi ar vi ja pl zh nl ru it de pt fr es en"
_XNLI = "sw ur hi th ar tr el vi zh ru bg de fr es en"
_MATH = {
    "training_name": "math",
    "mapping_languages": _names(_NINE),
    "augmentation_languages": None,
    "max_new_tokens": 512,
    "augmentation_file": "query_translation/math.json",
    "language_field": "lang",
    "parse_augmentation": _math_training,
    "format_query": math_prompt,
    "score": score_number,
    "scorer_version": NUMBER_SCORER_VERSION,
}

# The LLMs of the published rows: the name that the rows' labels hold, and the hub's, where the LLM is there.
PUBLISHED_LLMS: dict[str, str | None] = {
    "MetaMath-7B": "meta-math/MetaMath-7B-V1.0",
    "Llama2-7B-X-CSQA": None,
    "LLaMAX-7B-X-CSQA": "LLaMAX/LLaMAX2-7B-X-CSQA",
    "Llama2-7B-X-XNLI": None,
    "LLaMAX-7B-X-XNLI": "LLaMAX/LLaMAX2-7B-XNLI",
}
PUBLISHED_ENCODER = "google/mt5-xl"

# Published numbers: Huang et al., NeurIPS 2024 (arXiv 2405.17386).
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="math_mgsm",
            evaluation_languages=_names(_MGSM),
            evaluation_file="evaluation/mgsm/mgsm_{code}.tsv",
            parse_evaluation=_mgsm,
            published_rows=250,
            published={
                "LLM alone (MetaMath-7B, over ten languages, Telugu left out)": {"avg": 37.9},
                "MindMerger-Soft (MetaMath-7B)": _row(
                    _MGSM, 57.6, "52.8 52.0 59.2 56.8 51.2 55.2 61.2 55.2 61.6 62.4 66.0"
                ),
            },
            **_MATH,
        ),
        Task(
            name="math_msvamp",
            evaluation_languages=_names(f"{_NINE} en"),
            evaluation_file="evaluation/msvamp/test_{name}.jsonl",
            parse_evaluation=_msvamp,
            published_rows=1000,
            published={
                "LLM alone (MetaMath-7B, over all ten languages)": {"avg": 47.5},
                "MindMerger-Soft (MetaMath-7B, over all ten languages)": {"avg": 58.0},
            },
            **_MATH,
        ),
        Task(
            name="x-csqa",
            training_name="x-csqa",
            mapping_languages=_names("ur hi sw ja vi pl zh nl ru it de pt fr es ar"),
            augmentation_languages=_names("ur sw hi ar vi ja pl zh nl ru it de pt fr es en"),
            evaluation_languages=_names("ur sw hi ar vi ja pl zh nl ru it de pt fr es en"),
            max_new_tokens=16,
            augmentation_file="query_translation/x-csqa/train_{code}.jsonl",
            evaluation_file="evaluation/x-csqa/{code}/dev.jsonl",
            language_field="lang",
            parse_augmentation=_x_csqa,
            parse_evaluation=_x_csqa,
            published_rows=1000,
            format_query=_whole_text,
            score=score_text,
            published={
                "Llama2-7B-X-CSQA": _row(
                    _X_CSQA, 50.9, "23.2 24.7 32.9 32.4 51.0 50.0 51.5 55.6 56.9 55.8 58.8 59.9 60.4 61.8 61.9 78.1"
                ),
                "Llama2-7B-X-CSQA + MindMerger": _row(
                    _X_CSQA, 61.0, "45.5 46.2 48.4 51.4 60.6 53.9 63.3 62.9 63.8 63.7 66.8 67.0 67.1 68.1 69.1 78.1"
                ),
                "LLaMAX-7B-X-CSQA": _row(
                    _X_CSQA, 55.1, "43.5 39.0 44.1 45.1 54.0 49.9 54.6 58.2 58.9 57.1 59.1 59.0 60.9 61.6 62.7 74.0"
                ),
                "LLaMAX-7B-X-CSQA + MindMerger": _row(
                    _X_CSQA, 61.2, "51.2 50.7 50.8 54.4 60.4 55.9 63.8 64.4 64.3 61.5 64.2 64.1 65.3 64.6 67.7 75.4"
                ),
            },
        ),
        Task(
            name="xnli",
            training_name="xnli",
            mapping_languages=_names("sw ur hi th ar tr el vi zh ru bg de fr es"),
            augmentation_languages=None,
            evaluation_languages=_names(_XNLI),
            max_new_tokens=16,
            augmentation_file="query_translation/xnli_dev.json",
            evaluation_file="evaluation/xnli/test.json",
            language_field="language",
            parse_augmentation=_xnli,
            parse_evaluation=_xnli,
            published_rows=5010,
            format_query=_whole_text,
            score=score_text,
            published={
                "Llama2-7B-X-XNLI": _row(
                    _XNLI, 70.6, "44.6 55.1 62.2 58.4 64.7 64.9 65.6 75.4 75.9 78.9 78.6 80.7 81.7 83.1 89.5"
                ),
                "Llama2-7B-X-XNLI + MindMerger": _row(
                    _XNLI, 78.4, "66.6 69.4 74.7 71.8 76.2 75.7 78.5 80.3 80.0 80.7 82.4 83.5 83.9 84.4 88.7"
                ),
                "LLaMAX-7B-X-XNLI": _row(
                    _XNLI, 76.2, "66.7 65.3 69.1 66.2 73.6 71.8 74.3 77.4 78.3 80.3 81.6 82.2 83.0 84.1 89.7"
                ),
                "LLaMAX-7B-X-XNLI + MindMerger": _row(
                    _XNLI, 79.2, "72.6 71.5 74.9 73.4 77.1 76.4 78.7 80.4 80.5 80.8 82.4 83.1 84.1 84.5 88.5"
                ),
            },
        ),
        # The released default task: the mapping stage alone, over XNLI's languages.
        Task(
            name="translation",
            training_name="translation",
            mapping_languages=_names("sw ur hi th ar tr el vi zh ru bg de fr es"),
            augmentation_languages=None,
            evaluation_languages=(),
            max_new_tokens=16,
            augmentation_file=None,
            evaluation_file=None,
            language_field="",
            parse_augmentation=None,
            parse_evaluation=None,
            format_query=_whole_text,
            score=score_text,
            published={},
        ),
    )
}
TASK_ALIASES = {"math": "math_mgsm", "x_csqa": "x-csqa"}


def _stage_tasks() -> list[str]:
    return list(dict.fromkeys(task.training_name for task in TASKS.values() if task.augmentation_file))


def _evaluation_tasks() -> list[str]:
    return [task.name for task in TASKS.values() if task.evaluation_file]


def find_task(name: str) -> Task:
    """Finds a task by its name or an alias (`math` is `math_mgsm`, `x_csqa` is `x-csqa`).

    Raises:
        DataError: with the known tasks and the nearest spelling.
    """
    wanted = name.strip().lower()
    task = TASKS.get(TASK_ALIASES.get(wanted, wanted))
    if task is None:
        known = [*TASKS, *TASK_ALIASES]
        raise DataError(f"unknown task {shown(name)}{_nearest(wanted, known)} (known: {', '.join(known)})")
    return task


# ---------------------------------------------------------------------------------------------------------------------
# Training examples of both stages


def _pair_files(language: Language) -> tuple[str, str]:
    folder = f"bilingual_pairs/en-{language.code}/train_100k"
    return f"{folder}.{language.code}", f"{folder}.en"


def read_pairs(
    data_root, language: Language, train_num: int | None = None, faults: list[str] | None = None
) -> Iterator[Example]:
    """Yields en–X sentence pairs, source X and target English, at most `train_num`.

    Pairs with an empty side teach nothing and are left out with a warning that counts them.

    Args:
        faults: takes the faults of single lines, whose pairs are then left out; without it the first one is raised.

    Raises:
        DataError: for a missing, empty or undecodable file, and where the two files differ in their number of lines.
    """
    sources, targets = (find_file(data_root, relative) for relative in _pair_files(language))
    lines = count_lines(sources), count_lines(targets)
    if lines[0] != lines[1]:
        raise DataError(f"{sources} has {lines[0]} lines but {targets} has {lines[1]}: line i of both must be a pair")
    given, empty = 0, []
    lines = zip(read_lines(sources, faults), read_lines(targets, faults), strict=True)
    for (line, source), (_, target) in lines:
        if train_num is not None and given >= train_num:
            break
        if source is None or target is None:
            continue
        source, target = source.strip(), target.strip()
        if not source or not target:
            empty.append(line)
            continue
        given += 1
        prompt, cut = translation_prompt(source, language.name)
        yield Example(f"{language.code}-{line}", language.name, source, prompt, target, cut)
    if not given:
        left_out = f" but {len(empty)} with an empty side" if empty else ""
        left_out += f" but faulty ones, the first: {faults[0]}" if faults else ""
        raise DataError(f"{sources} and {targets}: the files hold no pairs{left_out}")
    if empty:
        warn(f"{sources}: {len(empty)} pairs with an empty side are left out, the first at line {empty[0]}")


def _mapping_languages(task: Task, languages: Sequence[Language] | None) -> list[Language]:
    if languages is None:
        return [LANGUAGES[name] for name in task.mapping_languages]
    chosen = [language for language in languages if language.name != "English"]
    if not chosen:
        raise DataError("the mapping stage pairs English with other languages: --languages names English only")
    if len(chosen) < len(languages):
        warn("English is left out of the mapping stage, whose pairs have it on the target side")
    return chosen


def training_examples(
    task: Task,
    stage: str,
    data_root,
    languages: Sequence[Language] | None = None,
    train_num: int | None = None,
    faults: list[str] | None = None,
) -> Iterator[Example]:
    """Yields the examples of one stage ("mapping" or "augmentation"), at most `train_num` of each language.

    Args:
        languages: None for the task's own.
        faults: takes `file:line: why` of single faulty rows, which are then left out; without it the first one is
            raised.

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
    return (example for language in chosen for example in read_pairs(data_root, language, train_num, faults))


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
