"""X-CSQA: a question and five options; the answer is the option's letter.

Example: What flies?\nOptions:A. a bird\tB. a stone ...\nAnswer:    ->  A
"""

from collections.abc import Sequence

from mindmerger.tasks.base import Parsed, Task, _fill, _row, _whole_text
from mindmerger.tasks.languages import Language, _names
from mindmerger.tasks.readers import Record, preview
from mindmerger.tasks.scoring import score_text


def x_csqa_prompt(stem: str, choices: Sequence[tuple[str, str]]) -> tuple[str, tuple[int, int]]:
    """Returns the X-CSQA prompt of a question and its (label, text) options, and the span of the question in it."""
    options = "\t".join(f"{label}. {text}" for label, text in choices)
    # No blank before A. and tabs between options: as released, to the character.
    return _fill("", stem, f"\nOptions:{options}\nAnswer:")


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
        raise record.fail(f"question.choices must be a list, got {preview(choices)}")
    options = [(record.text(*label), record.text(*text, may_be_empty=True)) for label, text in fields]
    labels = [label for label, _ in options]
    # Equal letters would make two options right at once; equal texts occur in the data and harm nobody.
    if not labels or len(set(labels)) < len(labels):
        raise record.fail(f"question.choices needs options with different labels, got {preview(labels)}")
    answer = record.value.get("answerKey")
    if answer not in labels:
        found = preview(answer) if answer else "none (test files come without)"
        raise record.fail(f"answerKey must be one of {preview(', '.join(labels))}, found {found}")
    prompt, shrinkable = x_csqa_prompt(stem, options)
    # The encoder reads what the LLM reads, as released; in math it reads the bare question.
    return prompt, prompt, shrinkable, answer, tuple(labels)


_X_CSQA = "sw ur hi ar vi ja pl zh nl ru it de pt fr es en"


X_CSQA = Task(
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
    text_fields=(
        ("question", "stem"),
        ("question", "choices", "*", "text"),
        ("question", "choices", "text", "*"),
    ),
    hub_dataset="INK-USC/xcsr",
    training_dataset="INK-USC/xcsr",
    published_rows=1000,
    format_query=_whole_text,
    score=score_text,
    labels=("A", "B", "C", "D", "E"),
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
)
