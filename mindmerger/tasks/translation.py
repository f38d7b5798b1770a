"""Sentence pairs of the mapping stage: a sentence in any language in, its English translation out."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mindmerger.runtime.processes import warn
from mindmerger.tasks.base import Example, Task, _fill, _whole_text
from mindmerger.tasks.languages import LANGUAGES, Language, _names
from mindmerger.tasks.readers import DataError, count_lines, find_file, read_lines
from mindmerger.tasks.scoring import score_text


# By default the stage has none; this one is for --augmentation True alone.
def translation_prompt(sentence: str, language: str) -> tuple[str, tuple[int, int]]:
    """Returns the prompt of the mapping stage, where one is asked for."""
    return _fill(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n### Instruction:\n"
        f"Translate the following sentences from {language} to English.\n### Input:\n",
        sentence,
        "\n### Response:",
    )


def _pair_files(language: Language) -> tuple[str, str]:
    # The released name, whatever the number of lines: it is not a limit.
    folder = f"bilingual_pairs/en-{language.code}/train_100k"
    return f"{folder}.{language.code}", f"{folder}.en"


def read_pairs(
    data_root,
    language: Language,
    train_num: int | None = None,
    faults: list[str] | None = None,
    empty: dict[str, tuple[int, int]] | None = None,
) -> Iterator[Example]:
    """Yields en–X sentence pairs, source X and target English, at most `train_num`.

    Pairs with an empty side teach nothing and are left out with a warning that counts them.

    Args:
        faults: takes the faults of single lines, whose pairs are then left out; without it the first one is raised.
        empty: takes for the source file how many pairs have an empty side and the line of the first, for a caller that
            warns of them itself.

    Raises:
        DataError: for a missing, empty or undecodable file, and where the two files differ in their number of lines.
    """
    sources, targets = (find_file(data_root, relative) for relative in _pair_files(language))
    # Counted before the first pair: a missing line in the middle shifts all later pairs, and training would not notice.
    lines = count_lines(sources), count_lines(targets)
    if lines[0] != lines[1]:
        raise DataError(f"{sources} has {lines[0]} lines but {targets} has {lines[1]}: line i of both must be a pair")
    given, left_out, first_left_out = 0, 0, 0
    lines = zip(read_lines(sources, faults), read_lines(targets, faults), strict=True)
    for (line, source), (_, target) in lines:
        # Checked before the pair, not after the last one, so that empty pairs are counted only as far as was looked.
        if train_num is not None and given >= train_num:
            break
        if source is None or target is None:
            continue
        source, target = source.strip(), target.strip()
        if not source or not target:
            left_out += 1
            first_left_out = first_left_out or line
            continue
        given += 1
        prompt, shrinkable = translation_prompt(source, language.name)
        # By line, not by number given: an id leads to its place in both files.
        yield Example(f"{language.code}-{line}", language.name, source, prompt, target, shrinkable)
    if not given:
        but = f" but {left_out} with an empty side" if left_out else ""
        but += f" but faulty ones, the first: {faults[0]}" if faults else ""
        raise DataError(f"{sources} and {targets}: the files hold no pairs{but}")
    if left_out and empty is not None:
        empty[str(sources)] = left_out, first_left_out
    elif left_out:
        warn_of_empty_pairs(sources, left_out, first_left_out)


def warn_of_empty_pairs(sources: str | Path, number: int, first: int) -> None:
    """Says how many pairs of a file were left out for an empty side, and the line of the first."""
    warn(f"{sources}: {number} pairs with an empty side are left out, the first at line {first}")


def _mapping_languages(task: Task, languages: Sequence[Language] | None) -> list[Language]:
    if languages is None:
        return [LANGUAGES[name] for name in task.mapping_languages]
    # Users give one list for both stages, and the second one has English.
    chosen = [language for language in languages if language.name != "English"]
    if not chosen:
        raise DataError("the mapping stage pairs English with other languages: --languages names English only")
    if len(chosen) < len(languages):
        warn("English is left out of the mapping stage, whose pairs have it on the target side")
    return chosen


TRANSLATION = Task(
    name="translation",
    training_name="translation",
    # XNLI's: the released default of --task, with which one of the published commands trains.
    mapping_languages=_names("sw ur hi th ar tr el vi zh ru bg de fr es"),
    augmentation_languages=None,
    evaluation_languages=(),
    max_new_tokens=16,
    augmentation_file=None,
    evaluation_file=None,
    language_field="",
    parse_augmentation=None,
    parse_evaluation=None,
    format_query=_whole_text,
    score=score_text,
    published={},
)
