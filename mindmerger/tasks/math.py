"""Math word problems (MGSM, MSVAMP): the MetaMath prompt, and the last number of an answer as its score.

Example: How many are 2 and 3?    ->  ... ### Response: Let's think step by step.    ->  2 and 3 are 5. The answer is: 5
"""

from mindmerger.tasks.base import Parsed, Task, _fill, _row
from mindmerger.tasks.languages import Language, _names
from mindmerger.tasks.numbers import gold_number
from mindmerger.tasks.readers import Record, preview
from mindmerger.tasks.scoring import NUMBER_SCORER_VERSION, score_number


# To the character: released mappings were trained with these prompts. The same holds for the other tasks' prompts.
def math_prompt(query: str) -> tuple[str, tuple[int, int]]:
    """Returns the prompt MetaMath was tuned with, and the span of the query in it."""
    return _fill(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n",
        query,
        "\n\n### Response: Let's think step by step.",
    )


def _math_training(record: Record, language: Language) -> Parsed:
    query = record.text("query")
    return (query, *math_prompt(query), record.text("response"))


def _mgsm(record: Record, language: Language) -> Parsed:
    columns = [column.strip() for column in record.value]
    if len(columns) != 2 or not all(columns):
        raise record.fail(f"expected question TAB answer, found {len(columns)} columns: {preview(columns)}")
    # Stripped, unlike MSVAMP's texts: there the blanks at the edges are part of the data.
    question, answer = columns
    return (question, *math_prompt(question), _check_gold(record, answer, language))


def _msvamp(record: Record, language: Language) -> Parsed:
    question = record.text("m_query")
    return (question, *math_prompt(question), _check_gold(record, record.text("response"), language))


def _check_gold(record: Record, answer: str, language: Language) -> str:
    # A gold answer without a number could never be matched, one with two readings would be matched by the wrong answer.
    try:
        gold_number(answer, language.code)
    except ValueError as error:
        raise record.fail(f"the answer {preview(answer)} {error}") from None
    return answer


# Telugu is MGSM's alone: the mapping stage has no pairs in it.
_NINE = "bn th sw ja zh de fr ru es"
_MGSM = f"te {_NINE} en"


_MATH = {
    "training_name": "math",
    "mapping_languages": _names(_NINE),
    # Whatever the file holds; the released one has the nine and English.
    "augmentation_languages": None,
    "max_new_tokens": 512,
    "augmentation_file": "query_translation/math.json",
    "language_field": "lang",
    "parse_augmentation": _math_training,
    "format_query": math_prompt,
    "score": score_number,
    "scorer_version": NUMBER_SCORER_VERSION,
    # Responses are English whatever the question's language, and long enough to be one question's alone.
    "pairs_by_target": True,
}


MGSM = Task(
    name="math_mgsm",
    evaluation_languages=_names(_MGSM),
    evaluation_file="evaluation/mgsm/mgsm_{code}.tsv",
    parse_evaluation=_mgsm,
    text_fields=((0,),),
    hub_dataset="juletxara/mgsm",
    published_rows=250,
    published={
        # Only the average is published, without Telugu.
        "LLM alone (MetaMath-7B, over ten languages, Telugu left out)": {"avg": 37.9},
        "MindMerger-Soft (MetaMath-7B)": _row(_MGSM, 57.6, "52.8 52.0 59.2 56.8 51.2 55.2 61.2 55.2 61.6 62.4 66.0"),
    },
    **_MATH,
)

MSVAMP = Task(
    name="math_msvamp",
    evaluation_languages=_names(f"{_NINE} en"),
    evaluation_file="evaluation/msvamp/test_{name}.jsonl",
    parse_evaluation=_msvamp,
    text_fields=(("m_query",),),
    published_rows=1000,
    published={
        "LLM alone (MetaMath-7B, over all ten languages)": {"avg": 47.5},
        "MindMerger-Soft (MetaMath-7B, over all ten languages)": {"avg": 58.0},
    },
    **_MATH,
)
