"""What a table's numbers measure: accuracy where answers are right or wrong, and where they are graded (translations)
the mean grade of single rows beside scores of all rows together."""

from collections.abc import Mapping, Sequence

GRADE_KEY = "sentence_chrf2"
# By the key of `results.json`, where it is a mean of rows: the words of a title, and of an axis.
MEASURES = {
    "accuracy": ("accuracy in percent", "accuracy, %"),
    GRADE_KEY: ("mean sentence chrF2, from 0 to 100", "mean sentence chrF2"),
}
# How tables call the scores of all rows together.
CORPUS_TITLES = {"chrf2": "chrF2", "bleu": "BLEU"}
CORPUS_NOTE = "chrF2 and BLEU are sacrebleu's over all rows of a language, not means of single rows"


def measure_key(results: dict) -> str:
    """Returns the key of the mean of rows in the content of a `results.json`."""
    return next((key for key in MEASURES if key in results.get("mean", {})), "accuracy")


def score_corpus(task: str, pairs: Mapping[str, Sequence[dict]]) -> dict[str, dict[str, float]]:
    """Returns scores of all rows of each language together, and their unweighted mean as "mean".

    Args:
        task: by name; graded.
        pairs: language to its predictions.

    Raises:
        DataError: without sacrebleu.
    """
    from mindmerger.tasks import find_task

    score = find_task(task).corpus_scores
    found = {
        language: score([one["prediction"] for one in items], [one["answer"] for one in items])
        for language, items in pairs.items()
    }
    names = next(iter(found.values()))
    return found | {"mean": {name: sum(one[name] for one in found.values()) / len(found) for name in names}}
