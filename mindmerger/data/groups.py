"""Which examples are the same question: rows that a dev split keeps together. *(ours)*

The published dev split is drawn from single rows, so that most questions of it are trained on in another language.
Sentence pairs, and pairs of questions, are the same where their English sides are. Rows of a task are the same question

- where they have the record's own id in common, as X-CSQA's have;
- else where they have the same number within their languages, in a file whose languages hold their rows in one order:
  most rows then have the answer of their number's first row;
- else, in math, where their responses are the same text, as in the question stage;
- and, in one language, where the part of the prompt that varies is: premise, stem or question.

Each connects rows also by way of others. Arrays are (rows,), in the order of the data set.
"""

import hashlib
import io
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mindmerger.runtime.files import write_bytes_atomic
from mindmerger.runtime.processes import progress_bar
from mindmerger.tasks.base import Example
from mindmerger.tasks.examples import StageData, varying_text

# Beside the ids in a cache, older ones included. The number is raised when the meaning of groups changes.
GROUPS_FILE = "groups-1.npy"
# Share of rows with the answer of their number's first row, from which on a file counts as one order: of labels drawn
# at random a third agree, and of translated responses not all do.
IN_ONE_ORDER = 0.5


class GroupKeys:
    """What tells the questions of a stage's examples apart, noted as they pass: some 8 to 40 bytes of a row."""

    def __init__(self, stage: StageData):
        self.pairs = stage.stage != "augmentation"
        self.by_response = stage.task.training_name == "math"
        self.targets, self.texts, self.ids, self.numbers = array("Q"), array("Q"), array("Q"), array("q")

    def noting(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yields the examples, each noted."""
        for example in examples:
            self.targets.append(_digest(example.target))
            if not self.pairs:
                self.texts.append(_digest(f"{example.language}\n{varying_text(example)}"))
                self.ids.append(_digest(example.question) if example.question else 0)
                self.numbers.append(int(example.id.rsplit("-", 1)[1]))
            yield example

    def groups(self) -> np.ndarray:
        """Returns each noted row's group, int32, numbered in the order of their first rows."""
        targets = np.asarray(self.targets)
        if self.pairs:
            return connect([targets])
        translations = self._translations(targets)
        return connect([np.asarray(self.texts), *([] if translations is None else [translations])])

    def _translations(self, targets: np.ndarray) -> np.ndarray | None:
        """Returns values that are equal for translations of one row, None where nothing tells them."""
        ids, numbers = np.asarray(self.ids), np.asarray(self.numbers)
        if ids.all():
            return ids
        _, first, place = np.unique(numbers, return_index=True, return_inverse=True)
        first = first[place]
        others = np.flatnonzero(first != np.arange(len(first)))
        # By their numbers alone, rows in any order would be tied to strangers, and by their premises all to one group.
        if len(others) and (targets[others] == targets[first[others]]).mean() >= IN_ONE_ORDER:
            return numbers
        return targets if self.by_response else None


def _digest(text: str) -> int:
    # 64 bits: among 10^7 texts, two that differ fall together with a chance of 3 in 10^6, and then stay together.
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def connect(keys: list[np.ndarray]) -> np.ndarray:
    """Returns the groups of rows that have the value of any key in common, also by way of other rows; int32, numbered
    in the order of their first rows."""
    places = [np.unique(key, return_inverse=True)[1] for key in keys]
    first = np.arange(len(keys[0]))  # the first row that is known to be in each one's group
    while True:
        before = first
        for place in places:
            least = np.full(place.max(initial=-1) + 1, len(first))
            np.minimum.at(least, place, first)
            first = least[place]
        first = first[first]  # a chain of n rows takes log n rounds instead of n
        if np.array_equal(first, before):
            return np.unique(first, return_inverse=True)[1].astype(np.int32)


def load_groups(folder: Path, keys: GroupKeys, noted: Iterable[Example], rows: int) -> np.ndarray:
    """Returns the groups of a cache's rows, from its file; where that is missing or damaged, it is written first.

    Args:
        noted: the examples by way of `keys`; of a cache that was just built none are left, and all are noted.

    Raises:
        OSError: when the file cannot be written.
    """
    file = folder / GROUPS_FILE
    try:
        groups = np.load(file)
        if groups.shape == (rows,) and groups.dtype == np.int32:
            return groups
    except (FileNotFoundError, ValueError, EOFError):
        pass  # found anew from the data, which are as they were
    for _ in progress_bar(noted, desc="grouping", unit=" rows", delay=2):
        pass
    buffer = io.BytesIO()
    np.save(buffer, keys.groups())
    write_bytes_atomic(file, buffer.getvalue())
    return np.load(file)


def cross_languages(groups: np.ndarray, languages) -> bool:
    """Returns whether any group has rows in two languages.

    Args:
        languages: the column of the data set, an Arrow array.
    """
    codes = languages.combine_chunks().dictionary_encode().indices.to_numpy()
    pairs = np.unique(groups.astype(np.int64) * (int(codes.max(initial=0)) + 1) + codes)
    return len(pairs) > len(np.unique(groups))
