"""Answers read and scored: numbers as the released code reads them and as a reader would, labels as text, translations
by sacrebleu."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from mindmerger.tasks.languages import Language, find_language
from mindmerger.tasks.numbers import gold_number, read_number, reference_number
from mindmerger.tasks.readers import DataError


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
    """Reading of an output and whether it is right, by our rules and by the published ones.

    `grade` is how good it is, from 0 to 100, where answers are not simply right or wrong.
    """

    prediction: str | float | None
    correct: bool
    reference_prediction: str | float
    reference_correct: bool
    grade: float | None = None


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


def score_translation(output: str, target: str, language: Language | str | None = None) -> Score:
    """Scores a translation into English by its sentence chrF2 (Popović 2016); right where it is the reference itself.

    Raises:
        DataError: without sacrebleu.
    """
    prediction = output.strip()
    # Sentence by sentence chrF only: BLEU of one sentence is mostly smoothing.
    grade = round(_metrics()["chrf2"].sentence_score(prediction, [target]).score, 4)
    return Score(prediction, prediction == target, prediction, prediction == target, grade)


def corpus_scores(predictions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Returns chrF2 and BLEU, from 0 to 100, of all translations of one language together.

    Neither is the mean of its sentences': both count over the whole corpus, as translations are reported.

    Raises:
        DataError: without sacrebleu.
    """
    return {name: round(one.corpus_score(predictions, [targets]).score, 4) for name, one in _metrics().items()}


def signatures() -> dict[str, str]:
    """Returns sacrebleu's own description of each score, version included, by which others can repeat it.

    Raises:
        DataError: without sacrebleu.
    """
    # They know the number of references only after a first score.
    corpus_scores(["a"], ["a"])
    return {name: str(one.get_signature()) for name, one in _metrics().items()}


@functools.cache
def _metrics() -> dict:
    # Here, so that the other tasks neither need sacrebleu nor wait for it.
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise DataError("translations are scored by sacrebleu, which is not installed: pip install sacrebleu") from None
    return {"chrf2": CHRF(), "bleu": BLEU()}
