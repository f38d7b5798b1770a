"""The benchmarks, one file each; `TASKS` is the table that every command looks a name up in.

To add one, write `tasks/<name>.py` and add its `Task` to the table.
"""

from mindmerger.tasks.afrimgsm import AFRIMGSM
from mindmerger.tasks.afrixnli import AFRIXNLI
from mindmerger.tasks.americas_nli import AMERICAS_NLI
from mindmerger.tasks.base import Task
from mindmerger.tasks.belebele import BELEBELE
from mindmerger.tasks.flores import FLORES
from mindmerger.tasks.languages import _nearest
from mindmerger.tasks.math import MGSM, MSVAMP
from mindmerger.tasks.mgsm_rev2 import MGSM_REV2
from mindmerger.tasks.readers import DataError, preview
from mindmerger.tasks.translation import TRANSLATION
from mindmerger.tasks.x_csqa import X_CSQA
from mindmerger.tasks.xcopa import XCOPA
from mindmerger.tasks.xnli import XNLI

# Those that the method was not published on: evaluations of mappings that the others train.
_FURTHER = (MGSM_REV2, AFRIMGSM, AFRIXNLI, AMERICAS_NLI, XCOPA, BELEBELE, FLORES)
TASKS: dict[str, Task] = {task.name: task for task in (MGSM, MSVAMP, X_CSQA, XNLI, *_FURTHER, TRANSLATION)}
# The released commands write math and x_csqa; all sets of math are evaluated by one training task.
TASK_ALIASES = {"math": "math_mgsm", "x_csqa": "x-csqa", "mgsm_rev2": "math_mgsm_rev2", "afrimgsm": "math_afrimgsm"}


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
