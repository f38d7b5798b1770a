"""XCOPA: which of two sentences is the cause, or the effect, of a premise? The answer is the option's letter.

Example: The glass broke.\nWhat was the cause of this?\nOptions:A. It fell.\tB. It was full.\nAnswer:    ->  A
"""

from mindmerger.tasks.base import Parsed, Task, _fill, _whole_text
from mindmerger.tasks.languages import Language, _tagged
from mindmerger.tasks.readers import Record, preview
from mindmerger.tasks.scoring import score_text
from mindmerger.tasks.x_csqa import X_CSQA

XCOPA_LETTERS = ("A", "B")
# COPA's own two questions, in its order of words.
XCOPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


def xcopa_prompt(premise: str, question: str, choices: tuple[str, str]) -> tuple[str, tuple[int, int]]:
    """Returns the XCOPA prompt *(ours)*, in the form of X-CSQA's, and the span of the premise in it.

    Args:
        question: cause or effect.
    """
    options = "\t".join(f"{letter}. {choice}" for letter, choice in zip(XCOPA_LETTERS, choices, strict=True))
    return _fill("", premise, f"\n{XCOPA_QUESTIONS[question]}\nOptions:{options}\nAnswer:")


def _xcopa(record: Record, language: Language) -> Parsed:
    question, label = record.text("question"), record.get("label")
    if question not in XCOPA_QUESTIONS:
        raise record.fail(f"question {preview(question)} is none of {', '.join(XCOPA_QUESTIONS)}")
    # A bool is an int to Python, and -1 would take the last option.
    if isinstance(label, bool) or label not in (0, 1):
        raise record.fail(f"label {preview(label)} is neither 0 nor 1 (test files may come without)")
    choices = record.text("choice1"), record.text("choice2")
    prompt, shrinkable = xcopa_prompt(record.text("premise"), question, choices)
    # As in X-CSQA, the encoder reads the whole prompt.
    return prompt, prompt, shrinkable, XCOPA_LETTERS[label]


XCOPA = Task(
    name="xcopa",
    # No training set: the models and mappings of X-CSQA answer with a letter too.
    training_name=X_CSQA.training_name,
    mapping_languages=X_CSQA.mapping_languages,
    augmentation_languages=None,
    evaluation_languages=_tagged(
        "est_Latn hat_Latn ind_Latn ita_Latn quy_Latn swh_Latn tam_Taml tha_Thai tur_Latn vie_Latn zho_Hans"
    ),
    max_new_tokens=16,
    augmentation_file=None,
    evaluation_file="evaluation/xcopa/{code}.jsonl",
    language_field="",
    parse_augmentation=None,
    parse_evaluation=_xcopa,
    format_query=_whole_text,
    score=score_text,
    labels=XCOPA_LETTERS,
    text_fields=(("premise",), ("choice1",), ("choice2",)),
    hub_dataset="cambridgeltl/xcopa",
    published={},
)
