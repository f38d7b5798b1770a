"""Answers read and scored: numbers as the released code reads them and as a reader would, labels as text."""

from dataclasses import dataclass

from mindmerger.tasks.languages import Language, find_language
from mindmerger.tasks.numbers import gold_number, read_number, reference_number


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
    """Reading of an output and whether it is right, by our rules and by the published ones."""

    prediction: str | float | None
    correct: bool
    reference_prediction: str | float
    reference_correct: bool


# Raised when the same output may get another score: results folders of an older scorer are then evaluated anew.
NUMBER_SCORER_VERSION = 3


def score_number(output: str, target: str, language: Language | str | None = None) -> Score:
    """Scores a math output: right where its last number and the gold answer's are exactly equal as floats.

    Args:
        language: the question's, also by name or code; None for English.
    """
    prediction, reference = corrected_number(output, language), reference_number(output)
    try:
        # Exactly equal, without a tolerance: 1 2/3 and 5/3 are read to the last bit, and near misses are wrong answers.
        correct = prediction == gold_number(target, _code(language))
    except ValueError:
        correct = False
    return Score(prediction, correct, reference, reference == reference_number(target))


def score_text(output: str, target: str, language: Language | str | None = None) -> Score:
    """Scores an option letter or label: right where the stripped output equals it, in any language."""
    prediction = output.strip()
    # Both scores alike: the released code compares texts in this way too.
    return Score(prediction, prediction == target, prediction, prediction == target)
