"""A finished evaluation extended: what a command for more rows or languages keeps of it, and what it generates.

An identity says two things. What decides the answer to a row (models, form, lengths, precision, seed) has to be the
same as then; which rows are asked (`WHICH_ROWS`) may grow. So rows are compared one by one, not by the flags: with
another `--limit` and the same rows nothing is generated. Needs no torch.
"""

import hashlib
import json
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

from mindmerger.evaluation.results import SCORER, START_OVER, ResultsError, read_items, read_results
from mindmerger.generation.vllm_engine import installed_version
from mindmerger.runtime.command import versions
from mindmerger.runtime.processes import log
from mindmerger.tasks.readers import preview

DATA = "data (sha256)"
OWN_LANGUAGES = "--languages_file"
# The entries of an identity that say which rows are asked.
WHICH_ROWS = ("--languages", "--limit", OWN_LANGUAGES, DATA)
# Of the versions that results.json names, those that can change an answer.
DECIDING_VERSIONS = ("mindmerger", "torch", "transformers", "tokenizers", "sentencepiece", "vllm")
# What a prediction holds of its row, and what scoring adds. All else in it is the model's: an answer's record.
ROW_FIELDS = ("id", "question", "source", "prompt", "answer", "prefix_of")
SCORE_FIELDS = ("prediction", "correct", "grade", "reference_prediction", "reference_correct")


class Row(NamedTuple):
    """A row that is asked: its example, and the id of the row whose prefix it gets where that is not its own."""

    example: object
    prefix_of: str | None


class Kept(NamedTuple):
    """What a finished evaluation gives to a larger one, or to one of a newer scorer.

    records: by the number of the example among the asked ones; `hit_limit` and `generated_tokens` are None, since
    predictions do not hold them. hit_limit: how many of each language's were, by language. carried: entries of the
    results.json that is to come.
    """

    records: dict[int, dict]
    hit_limit: dict[str, int]
    carried: dict


def asked_rows(settings) -> list[Row]:
    """Returns the rows of an evaluation's settings, in their order."""
    examples, partner = settings.examples, settings.prefix_of
    given = [None] * len(examples) if partner is None else [examples[i].id for i in partner]
    return [Row(example, prefix_of) for example, prefix_of in zip(examples, given, strict=True)]


def hash_rows(examples: list, with_labels: bool = False) -> str:
    """Returns the SHA-256 of everything in the rows that an answer or its score depends on.

    Args:
        with_labels: whether answers are chosen among them; generating does not know them.
    """
    # Without the question, which no answer depends on.
    rows = [astuple(example)[:6] + (example.labels,) * with_labels for example in examples]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def find_kept(folder: Path, identity: dict, rows: list[Row]) -> Kept | None:
    """Returns what the finished evaluation in a folder gives to this one, None where it holds all that is asked.

    Args:
        identity: of this evaluation, the same as the folder's in all that decides an answer.

    Raises:
        ResultsError: where a row that both have is another one, where each has rows that the other has not, and where
            new answers would come from other versions than the old ones.
    """
    results = read_results(str(folder))
    held = {name: read_items(str(folder), name) for name in results["languages"]}
    asked = {row.example.id: row for row in rows}
    _require_same_languages(folder, results["identity"], identity, {row.example.language for row in rows} & {*held})
    for items in held.values():
        for id, item in items.items():
            if id in asked:
                _require_same_row(folder, results["form"], item, asked[id])
    besides = Counter(name for name, items in held.items() for id in items if id not in asked)
    lacking = Counter(row.example.language for row in rows if row.example.id not in held.get(row.example.language, ()))
    scorers = results["identity"].get(SCORER), identity.get(SCORER)
    if besides and lacking:
        raise ResultsError(
            f"{folder} holds {_counted(besides)} that this command leaves out, and lacks {_counted(lacking)}: ask for "
            f"all of them together, or {START_OVER}"
        )
    if besides and scorers[0] != scorers[1]:
        raise ResultsError(
            f"{folder} was scored by version {scorers[0]} of the scorer, now {scorers[1]}, and holds "
            f"{_counted(besides)} that this command leaves out: ask for all its rows once, which scores them again "
            f"without generating, or {START_OVER}"
        )
    if besides:
        log(f"{folder} holds more than is asked for, {_counted(besides)} besides: the table is of all of it")
        return None
    if not lacking and scorers[0] == scorers[1]:
        return None
    # What no prediction shows: the span of a prompt that may be shortened.
    examples = [asked[id].example for items in held.values() for id in items]
    if hash_rows(examples, identity.get("--scoring") is not None) != results["identity"].get(DATA):
        raise ResultsError(f"{folder} holds a finished evaluation with another {DATA}: {START_OVER}")
    number = sum(map(len, held.values()))
    if lacking:
        _require_same_versions(folder, results)
        log(f"{folder} is extended: {number} answers are kept, {_counted(lacking)} are to come")
    if scorers[0] != scorers[1]:
        log(f"scored by version {scorers[0]} of the scorer, now {scorers[1]}: {number} kept answers are scored again")
    return _kept(folder, results, held, rows, scorers if not lacking else None)


def _require_same_languages(folder: Path, before: dict, now: dict, names: set[str]) -> None:
    # A user's own: another code or tag makes other ids or encoder inputs, which no prediction shows.
    then, rows = ({row[0]: row for row in identity.get(OWN_LANGUAGES) or ()} for identity in (before, now))
    for name in sorted(names):
        if then.get(name) != rows.get(name):
            raise ResultsError(
                f"{folder} holds a finished evaluation with another row for {name} in {OWN_LANGUAGES}, "
                f"{then.get(name)} then, {rows.get(name)} now: {START_OVER}"
            )


def _require_same_row(folder: Path, form: str, item: dict, row: Row) -> None:
    example = row.example
    now = {"source": example.source, "answer": example.target, "prefix_of": row.prefix_of}
    # As in the predictions: the Hard form has no prompt.
    now["prompt"] = example.prompt if form != "hard" else ""
    for name, value in now.items():
        if item.get(name) == value:
            continue
        if name == "prefix_of":
            why = f"{example.id} got the prefix of {item.get(name)}, now of {value}: rows exchange them among all asked"
        else:
            why = f"the data have changed: {name} of {example.id} was {preview(item.get(name))}, now {preview(value)}"
        raise ResultsError(f"{folder} holds a finished evaluation of other rows, {why}: {START_OVER}")


def _require_same_versions(folder: Path, results: dict) -> None:
    # Refused here, though a continuation only warns: the answers are complete, and nothing forces them to be mixed.
    installed, before = versions(), dict(results.get("versions", {}))
    engine, _, version = results.get("engine", "hf").partition(" ")
    if engine == "vllm":
        before["vllm"], installed["vllm"] = version, installed_version()
    names = DECIDING_VERSIONS
    if results["identity"].get("--quantization") is not None:
        names += ("bitsandbytes",)
    changed = [name for name in names if name in before and before[name] != installed.get(name)]
    if changed:
        then, now = (", ".join(f"{name} {of[name]}" for name in changed) for of in (before, installed))
        raise ResultsError(
            f"{folder} was generated with {then}, now installed: {now}; one table does not mix them: install that "
            f"version again, or {START_OVER}"
        )


def _kept(folder: Path, results: dict, held: dict, rows: list[Row], rescored: tuple | None) -> Kept:
    number = {row.example.id: i for i, row in enumerate(rows)}
    records = {}
    for items in held.values():
        for id, item in items.items():
            own = {name: value for name, value in item.items() if name not in ROW_FIELDS + SCORE_FIELDS}
            i = number[id]
            if not isinstance(own.get("output"), str):
                raise ResultsError(f"{folder}/predictions: {id} has no output: {START_OVER}")
            records[i] = {"index": i, **own, "generated_tokens": None, "hit_limit": None, "batch": i, "batch_size": 1}
    try:
        hit_limit = {name: int(one["hit_limit"]) for name, one in results["languages"].items()}
        earlier = results.get("earlier_runs", [])
        before = Counter()
        for one in earlier:
            before.update(one["rows"])
        if rescored is not None:
            # Speed, versions and command stay those of the run that has generated.
            names = ("timing", "versions", "command", "arguments", *(["earlier_runs"] if earlier else []))
            scorers = {"from": rescored[0], "to": rescored[1], "versions": versions()}
            return Kept(records, hit_limit, {name: results[name] for name in names} | {"rescored": scorers})
        run = {"rows": {name: len(items) - before[name] for name, items in held.items() if len(items) > before[name]}}
        run |= {name: results[name] for name in ("command", "versions", "timing")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(
            f"{folder}/results.json is not what an evaluation writes ({type(error).__name__} {error}): {START_OVER}"
        ) from error
    return Kept(records, hit_limit, {"earlier_runs": [*earlier, run]})


def _counted(rows: Counter) -> str:
    total = sum(rows.values())
    return f"{total} row{'s' * (total > 1)} ({', '.join(f'{name} {n}' for name, n in rows.items())})"
