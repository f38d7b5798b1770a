"""Question pairs of the question stage: a question in any language in, the same question in English out.

MERLIN's curriculum (EACL 2026, arXiv 2509.08105) has this stage between general sentence pairs and the task. *(ours)*:
two rows of the task's file are the same question where their responses are the same text, since responses stay English
whatever the question's language; of several such rows the n-th goes with the n-th.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from mindmerger.runtime.processes import warn
from mindmerger.tasks.base import Example, Task
from mindmerger.tasks.languages import LANGUAGES, Language
from mindmerger.tasks.readers import DataError
from mindmerger.tasks.translation import translation_prompt


def check_questions(task: Task, languages: Sequence[Language] | None) -> None:
    """Makes sure that a task's rows can be paired by their responses.

    Raises:
        DataError: for a task that does not have them so (`Task.pairs_by_target`), and for English alone.
    """
    if not task.pairs_by_target:
        from mindmerger.tasks import TASKS

        known = dict.fromkeys(one.training_name for one in TASKS.values() if one.pairs_by_target)
        raise DataError(
            f"task {task.name} has no question stage: its targets do not tell which rows are the same question: "
            f"choose --task {', '.join(known)}, or another --stage_name"
        )
    if languages is not None and not [one for one in languages if one.name != "English"]:
        raise DataError("the question stage pairs English with other languages: --languages names English only")


def read_question_pairs(
    task: Task,
    data_root,
    languages: Sequence[Language] | None = None,
    train_num: int | None = None,
    faults: list[str] | None = None,
) -> Iterator[Example]:
    """Yields pairs of questions, source X and target English, at most `train_num` of each language.

    The English questions are held in memory. Rows without an English partner are left out, with a warning that counts
    them.

    Args:
        faults: takes the faults of single rows, which are then left out; without it the first one is raised.

    Raises:
        DataError: for a missing or faulty file, and a language without pairs.
    """
    check_questions(task, languages)
    english = LANGUAGES["English"]
    questions = defaultdict(list)  # by response, in the order of the file
    for example in task.read_augmentation(data_root, [english], None, [] if faults is not None else None):
        questions[example.target].append(example.source)
    others = None if languages is None else [one for one in languages if one != english]
    used, given, alone = defaultdict(int), defaultdict(int), defaultdict(int)
    for example in task.read_augmentation(data_root, others, None, faults):
        name = example.language
        if name == english.name or given[name] == train_num:
            continue
        place = (name, example.target)
        partners, number = questions.get(example.target, ()), used[place]
        used[place] += 1
        if number >= len(partners):
            alone[name] += 1
            given.setdefault(name, 0)
            continue
        given[name] += 1
        prompt, shrinkable = translation_prompt(example.source, name)
        yield Example(example.id, name, example.source, prompt, partners[number], shrinkable)
    empty = [name for name, number in given.items() if not number]
    if empty or not given:
        raise DataError(
            f"{task.augmentation_file}: no question in {', '.join(empty) or 'another language'} has the response of an "
            "English one, by which rows are paired: add the English rows, or leave the language out with --languages"
        )
    if alone:
        shown = ", ".join(f"{name} ({number})" for name, number in alone.items())
        warn(f"{task.augmentation_file}: questions without an English one of the same response are left out: {shown}")
