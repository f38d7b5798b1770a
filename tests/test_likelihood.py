"""Labels of a task, and answers chosen among them by their log-probabilities."""

import json

import pytest

from mindmerger.tasks import TASKS, find_task
from mindmerger.tasks.languages import find_language


def option_row(letters, answer):
    """A row in X-CSQA's form."""
    choices = [{"label": letter, "text": f"thing {i}"} for i, letter in enumerate(letters)]
    return {"id": "q1", "lang": "en", "question": {"stem": "What flies?", "choices": choices}, "answerKey": answer}


def write_options(root, rows):
    """Writes rows as X-CSQA's English test set; returns the data folder."""
    file = root / "evaluation/x-csqa/en/dev.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row | {"id": f"q{i}"}) + "\n" for i, row in enumerate(rows)))
    return root


def test_rows_have_the_labels_of_their_task_or_their_own_options(tmp_path, datas):
    english = find_language("en")
    rows = [option_row("ABCDE", "E"), option_row("BA", "A"), option_row("12", "2")]
    examples = list(find_task("x-csqa").read_evaluation(write_options(tmp_path, rows), english))
    assert [example.labels for example in examples] == [tuple("ABCDE"), tuple("BA"), tuple("12")]
    xnli, math = (next(find_task(name).read_evaluation(datas, english)) for name in ("xnli", "math"))
    assert xnli.labels == ("entailment", "neutral", "contradiction") == find_task("xnli").labels
    assert math.labels == ()
    assert find_task("math").labels is None


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.labels and task.evaluation_file])
def test_the_gold_answer_of_every_row_is_one_of_its_labels(name, datas):
    task = find_task(name)
    examples = list(task.read_evaluation(datas, find_language("en")))
    assert examples and all(example.target in example.labels for example in examples)
