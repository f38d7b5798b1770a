"""XNLI: does the premise entail the hypothesis? The answer is the label as a word.

Example: Premise: A man sleeps.\nHypothesis: He is awake.\nLabel:    ->  contradiction
"""

from mindmerger.tasks.base import Parsed, Task, _fill, _row, _whole_text
from mindmerger.tasks.languages import Language, _names
from mindmerger.tasks.readers import Record, preview
from mindmerger.tasks.scoring import score_text


def xnli_prompt(premise: str, hypothesis: str) -> tuple[str, tuple[int, int]]:
    """Returns the XNLI prompt and the span of the premise in it."""
    return _fill("Premise: ", premise, f"\nHypothesis: {hypothesis}\nLabel:")


XNLI_LABELS = ("entailment", "neutral", "contradiction")


def _xnli(record: Record, language: Language) -> Parsed:
    label = record.text("label")
    # Translations of MultiNLI's training part spell it so.
    label = "contradiction" if label == "contradictory" else label
    if label not in XNLI_LABELS:
        raise record.fail(f"label {preview(label)} is none of {', '.join(XNLI_LABELS)}")
    prompt, shrinkable = xnli_prompt(record.text("sentence1"), record.text("sentence2"))
    # As in X-CSQA, the encoder reads the whole prompt.
    return prompt, prompt, shrinkable, label


_XNLI = "sw ur hi th ar tr el vi zh ru bg de fr es en"


XNLI = Task(
    name="xnli",
    training_name="xnli",
    mapping_languages=_names("sw ur hi th ar tr el vi zh ru bg de fr es"),
    augmentation_languages=None,
    evaluation_languages=_names(_XNLI),
    max_new_tokens=16,
    # XNLI's dev set is the stage's training data, as released: scores on dev would be on seen items.
    augmentation_file="query_translation/xnli_dev.json",
    evaluation_file="evaluation/xnli/test.json",
    language_field="language",
    parse_augmentation=_xnli,
    parse_evaluation=_xnli,
    text_fields=(("sentence1",), ("sentence2",)),
    hub_dataset="facebook/xnli",
    training_dataset="facebook/xnli",
    published_rows=5010,
    format_query=_whole_text,
    score=score_text,
    labels=XNLI_LABELS,
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
)
