"""The benchmarks, one file each; `TASKS` is the table that every command looks a name up in.

To add one, write `tasks/<name>.py` and add its `Task` to the table.
"""

from mindmerger.tasks.base import Task
from mindmerger.tasks.languages import _nearest
from mindmerger.tasks.math import MGSM, MSVAMP
from mindmerger.tasks.readers import DataError, preview
from mindmerger.tasks.translation import TRANSLATION
from mindmerger.tasks.x_csqa import X_CSQA
from mindmerger.tasks.xnli import XNLI

TASKS: dict[str, Task] = {task.name: task for task in (MGSM, MSVAMP, X_CSQA, XNLI, TRANSLATION)}
# The released commands write math and x_csqa; both sets of math are evaluated by one training task.
TASK_ALIASES = {"math": "math_mgsm", "x_csqa": "x-csqa"}


def _stage_tasks() -> list[str]:
    return list(dict.fromkeys(task.training_name for task in TASKS.values() if task.augmentation_file))


def _evaluation_tasks() -> list[str]:
    return [task.name for task in TASKS.values() if task.evaluation_file]


def find_task(name: str) -> Task:
    """Finds a task by its name or an alias (`math` is `math_mgsm`, `x_csqa` is `x-csqa`).

    Raises:
        DataError: with the known tasks and the nearest spelling.
    """
    # Exactly one of the names, never a part of one: a typing error is answered with the nearest, not trained as
    # something.
    wanted = name.strip().lower()
    task = TASKS.get(TASK_ALIASES.get(wanted, wanted))
    if task is None:
        known = [*TASKS, *TASK_ALIASES]
        raise DataError(f"unknown task {preview(name)}{_nearest(wanted, known)} (known: {', '.join(known)})")
    return task
