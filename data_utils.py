"""Front door to the data, station by station.

1. raw file → `Example`, validated, errors say file:line: `find_task`, `StageData`, `evaluation_examples` (mindmerger/tasks)
2. `Example` → ids on disk, tokenised once and memory-mapped: `load_tokenizers`, `tokenise`, `open_or_build` (mindmerger/data)
3. ids → global batches, a function of (seed, epoch): `split_dev`, `epoch_batches`
4. global batch → micro-batches of each rank → tensors: `split_global_batch`, `collate`
5. answer → score: `corrected_number`, `reference_number`, `Task.score` (mindmerger/tasks/scoring.py)
"""  # noqa: E501

from mindmerger.data.batches import MicroBatch, collate, epoch_batches, split_dev, split_global_batch
from mindmerger.data.tokenising import Tokenizers, load_tokenizers, source_language_code, tokenise
from mindmerger.data.training_set import TrainingSet, open_or_build
from mindmerger.tasks import TASKS, find_task
from mindmerger.tasks.base import Example, Task
from mindmerger.tasks.examples import StageData, evaluation_examples
from mindmerger.tasks.languages import LANGUAGES, Language, find_language, parse_languages, use_languages_file
from mindmerger.tasks.readers import DataError
from mindmerger.tasks.scoring import Score, corrected_number, reference_number
from mindmerger.tasks.translation import read_pairs

__all__ = [
    "LANGUAGES",
    "TASKS",
    "DataError",
    "Example",
    "Language",
    "MicroBatch",
    "Score",
    "StageData",
    "Task",
    "Tokenizers",
    "TrainingSet",
    "collate",
    "corrected_number",
    "epoch_batches",
    "evaluation_examples",
    "find_language",
    "find_task",
    "load_tokenizers",
    "open_or_build",
    "parse_languages",
    "read_pairs",
    "reference_number",
    "source_language_code",
    "split_dev",
    "split_global_batch",
    "tokenise",
    "use_languages_file",
]
