"""The texts of a test row that stand in the question's language, and the same row with other texts in their place."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mindmerger.tasks.base import Example, Task
from mindmerger.tasks.languages import Language, find_language
from mindmerger.tasks.readers import DataError, Record


@dataclass(frozen=True)
class Row:
    """A test row: the example made of it, the record behind it, and its texts by field.

    The first text, which is the question, the stem or the premise, has the field "".
    """

    example: Example
    record: Record
    texts: dict[str, str]


def check_text_fields(task: Task) -> None:
    """Makes sure that a task says which fields of its test rows are texts in the question's language.

    Raises:
        DataError: naming the tasks that do.
    """
    from mindmerger.tasks import TASKS

    if not task.text_fields:
        known = ", ".join(name for name, one in TASKS.items() if one.text_fields)
        raise DataError(f"task {task.name} has no test rows to translate: choose --task {known}")


def read_rows(task: Task, data_root, language: Language, faults: list[str] | None = None) -> Iterator[Row]:
    """Yields the test rows of one language.

    Args:
        faults: as for `Task.read_evaluation`.

    Raises:
        DataError: as `Task.read_evaluation` does, and for a task without `text_fields`.
    """
    check_text_fields(task)
    latest = []

    def parse(record: Record, language: Language):
        latest[:] = [record]
        return task.parse_evaluation(record, language)

    # Through the task's own reader, so that a row has the id that an evaluation gives it.
    for example in replace(task, parse_evaluation=parse).read_evaluation(data_root, language, faults):
        places = text_places(task, latest[0].value)
        yield Row(example, latest[0], {name: latest[0].get(*place) for name, place in places.items()})


def text_places(task: Task, value) -> dict[str, tuple]:
    """Returns {field: the keys that lead to it} for the texts of a record's value, in the order of `text_fields`."""
    places = [place for path in task.text_fields for place in _expand(value, path)]
    return {".".join(map(str, place)) if i else "": place for i, place in enumerate(places)}


def _expand(value, path: tuple) -> list[tuple]:
    if not path:
        return [()]
    key, rest = path[0], path[1:]
    # A path that the record does not have is another layout's: X-CSQA's options come in two.
    if key == "*":
        keys = range(len(value)) if isinstance(value, list) else ()
    elif isinstance(value, dict):
        keys = (key,) if key in value else ()
    else:
        keys = (key,) if isinstance(value, list) and isinstance(key, int) and key < len(value) else ()
    return [(one, *place) for one in keys for place in _expand(value[one], rest)]


def fill_row(task: Task, row: Row, texts: Mapping[str, str]) -> Example:
    """Returns a row's example with the prompt that the task makes of other texts; source, target and id stay.

    Args:
        texts: one for each field of `row.texts`.
    """
    value = copy.deepcopy(row.record.value)
    for field, place in text_places(task, value).items():
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = texts[field]
    # The task's own template, by its own parser: no second one could be the same in every character.
    language = find_language(row.example.language)
    _, prompt, shrinkable, *_ = task.parse_evaluation(Record(row.record.path, row.record.line, value), language)
    return replace(row.example, prompt=prompt, shrinkable=shrinkable)
