"""Tables of the lm-evaluation-harness adapter: what the encoder reads of a task's row, and the rows of our own tasks.

The harness hands a model the finished prompt. MindMerger's encoder reads something else: the question alone in math,
and where an answer is a letter or a label the whole text that mappings are trained on, whatever the harness's own
prompt looks like *(ours)*.
"""

import re
from collections.abc import Callable, Mapping
from string import Formatter
from typing import NamedTuple

from mindmerger.runtime.errors import UserError
from mindmerger.tasks import find_task
from mindmerger.tasks.belebele import belebele_prompt
from mindmerger.tasks.examples import evaluation_examples
from mindmerger.tasks.languages import find_language
from mindmerger.tasks.x_csqa import x_csqa_prompt
from mindmerger.tasks.xnli import xnli_prompt


class Query(NamedTuple):
    """What the encoder reads of a row, and how the row's language is found.

    language: name or code; None where nothing says it. end_token: whether a continuation is scored with the LLM's end
    token behind it, as training has it in its targets; the harness scores the bare text.
    """

    text: Callable[[Mapping], str]
    language: str | None
    end_token: bool = False


def _question(row: Mapping) -> str:
    return row["question"]


def _premise_and_hypothesis(row: Mapping) -> str:
    return xnli_prompt(row["premise"], row["hypothesis"])[0]


def _passage_and_options(row: Mapping) -> str:
    return belebele_prompt(row["flores_passage"], row["question"], [row[f"mc_answer{i}"] for i in range(1, 5)])[0]


def _question_and_options(row: Mapping) -> str:
    return x_csqa_prompt(row["question"], [(letter, row[f"option_{letter.lower()}"]) for letter in "ABCD"])[0]


def _source(row: Mapping) -> str:
    return row["source"]


# (name of a task, what the encoder reads of its rows). A name that has a `translate` holds English texts.
TABLE: tuple[tuple[str, Callable[[Mapping], str]], ...] = (
    (r"mgsm_(direct|en_cot|native_cot)_(?P<language>[a-z]{2})(_\w+)?", _question),
    (r"afrimgsm_(cot_)?(?P<translate>translate_)?(?P<language>[a-z]{3})_prompt_\d", _question),
    (
        r"afrixnli_((en|native|manual)_direct_|(?P<translate>(manual_)?translate_))?(?P<language>[a-z]{3})(_prompt_\d)?",
        _premise_and_hypothesis,
    ),
    (r"belebele_(?P<language>[a-z]{3}(_[A-Z][a-z]{3})?)(_prompt_\d)?", _passage_and_options),
    (r"global_mmlu_(full_)?(?P<language>[a-z]{2,3})_\w+", _question_and_options),
    (r"mindmerger_(mgsm|xnli)_(?P<language>\w+)", _source),
)
KNOWN = "mgsm_{direct,en_cot,native_cot}_*, afrimgsm_*, afrixnli_*, belebele_*, global_mmlu_*, mindmerger_*"


def find_query(task: str, template: str | None = None, required: bool = True) -> Query:
    """Returns what the encoder reads of a task's rows.

    Args:
        template: a field of the rows, or a text with fields in braces, in the table's place.
        required: whether a task that the table lacks is refused.

    Raises:
        UserError: for such a task, without a template.
    """
    for pattern, text in TABLE:
        if match := re.fullmatch(pattern, task):
            found = match.groupdict()
            language = "English" if found.get("translate") else found["language"]
            return Query(text if template is None else _read_template(template), language, text is _source)
    if template is not None or not required:
        return Query(_read_template(template or "text"), None)
    raise UserError(
        f"what the encoder reads of task {task} is not known: pass query=FIELD, or a template such as "
        f'query="{{premise}}\\n{{hypothesis}}", among the model arguments, or take one of {KNOWN}'
    )


def _read_template(template: str) -> Callable[[Mapping], str]:
    # A bare name for the usual case: the harness's command line takes braces only as JSON.
    text = (template if "{" in template else f"{{{template}}}").replace("\\n", "\n")
    try:
        fields = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise UserError(f"query={template!r} is no template: {error}") from error
    # Fields alone: an attribute or an index would be looked up in whatever object the row holds.
    if not fields or not all(name.isidentifier() for name in fields):
        raise UserError(f"query={template!r} needs the names of a row's fields, in braces where there are several")
    return lambda row: text.format_map(row)


def source_text(query: Query, task: str, row: Mapping) -> str:
    """Returns what the encoder reads of a row.

    Raises:
        UserError: for a field that the row lacks, naming those that it has.
    """
    try:
        return query.text(row)
    except KeyError as error:
        raise UserError(
            f"task {task}: the rows have no field {error}, which the encoder's text is made of: they have "
            f"{', '.join(row)}; pass query=FIELD"
        ) from error


# -- our own task files, lm_eval_tasks/*.yaml


def read_dataset(benchmark: str, code: str, data_root: str = "./datas", **_) -> dict:
    """Returns the test set of one language as the harness's `custom_dataset` wants it: the rows that run_evaluation.py
    reads, with the prompt that mappings are trained with.

    Args:
        data_root: a model argument, which the harness hands on to its tasks with all others.
    """
    from datasets import Dataset

    examples = evaluation_examples(find_task(benchmark), data_root, find_language(code))
    fields = ("id", "language", "source", "prompt", "target")
    return {"test": Dataset.from_list([{name: getattr(one, name) for name in fields} for one in examples])}


def math_scores(row: Mapping, results: list[str]) -> dict[str, float]:
    """Returns both scores of a math answer (docs/evaluation.md) as the harness's `process_results` wants them."""
    score = find_task("math").score(results[0], row["target"], row["language"])
    return {"corrected": float(score.correct), "reference": float(score.reference_correct)}
