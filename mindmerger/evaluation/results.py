"""Results folders: how an interrupted evaluation is continued, and how finished ones are read. Needs no torch.

A finished folder (`results/<save_name>/<task>/`) holds `results.json`, `scores.tsv` and `predictions/<language>.jsonl`.
An unfinished one holds `.partial/run.json` (what is being evaluated) and `.partial/*.jsonl` (one line per finished
example, a file per rank). `results.json` is written last, and then `.partial` is removed. A finished one that is being
extended has both: until the new answers are complete, the old files stay as they are.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from mindmerger.evaluation.probes import PROBES
from mindmerger.evaluation.scoring import LIKELIHOOD
from mindmerger.runtime.command import versions
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import remove, unfollowed, write_json_atomic, write_text_atomic
from mindmerger.runtime.processes import log, warn

PARTIAL = ".partial"

# The entry of an identity that no answer depends on: an unfinished evaluation is scored when it ends.
SCORER = "version of the scorer"
# What a line of an unfinished evaluation holds; None for what is not known of an answer that a finished one gave.
RECORD = {"index": int, "output": str, "generated_tokens": int | None, "hit_limit": bool | None}
RECORD |= {"batch": int, "batch_size": int}
START_OVER = "pass --overwrite to start over, or another --save_name or --results_dir to keep both"
# What a process that was killed while it wrote can leave beside the whole files.
LEFTOVERS = (".results.json.*.tmp", ".scores.tsv.*.tmp", "predictions/.*.jsonl.*.tmp", f"{PARTIAL}/.*.tmp")


class ResultsError(UserError):
    """A results folder that cannot be read or compared; the message is one line."""


def open_results(folder: Path, identity: dict, rows: list, overwrite: bool) -> tuple[dict | None, dict[int, dict]]:
    """Makes a results folder ready for the evaluation that `identity` describes. Call it on rank 0 only.

    Args:
        identity: everything the answers and scores depend on, by the name the user knows it by.
        rows: that are asked, as `extension.asked_rows` returns them.
        overwrite: delete what an earlier evaluation left.

    Returns:
        the results when the folder holds all that is asked, else None; and the finished records by example index.

    Raises:
        ResultsError: when the folder holds an evaluation of another identity that cannot be extended to this one,
            naming the first difference, or what it holds cannot be read, or the disk refuses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            clear_results(folder)
        kept = None
        if (folder / "results.json").is_file():
            results, kept = reopen_finished(folder, identity, rows)
            if kept is None:
                return results, {}
        finished = open_unfinished(folder, identity, kept)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        raise ResultsError(f"cannot use the results folder {folder}: {what}") from error
    if len(finished) > (len(kept.records) if kept is not None else 0):
        log(f"continuing: {len(finished)} of {len(rows)} examples are finished")
    return None, finished


def clear_results(folder: Path) -> None:
    """Removes what an evaluation left in a folder, finished or not; anything else in it stays.

    Raises:
        ResultsError: when something cannot be removed.
    """
    # results.json first: without it nothing claims that the rest is complete.
    (folder / "results.json").unlink(missing_ok=True)
    (folder / "scores.tsv").unlink(missing_ok=True)
    for part in (folder / "predictions", folder / PARTIAL):
        remove(part)
        if os.path.lexists(part):
            raise ResultsError(f"--overwrite cannot remove {part}: remove it, or use another --save_name")


def reopen_finished(folder: Path, identity: dict, rows: list) -> tuple:
    """Looks into a finished evaluation, and removes what a kill at its end left beside it.

    Returns:
        its results, and what a larger evaluation keeps of it: None where it holds all that is asked.

    Raises:
        ResultsError: when it is of another identity, or cannot be read.
    """
    from mindmerger.evaluation.extension import WHICH_ROWS, find_kept

    results, kept = _read_json(folder / "results.json"), None
    if _difference(identity, results) is not None:
        deciding = {name: value for name, value in identity.items() if name not in (*WHICH_ROWS, SCORER)}
        _require_same(folder, deciding, results, "a finished evaluation")
        kept = find_kept(folder, identity, rows)
    if kept is None:
        _warn_of_versions(folder, results, "a finished evaluation")
    _remove_leftovers(folder)
    if not _is_being_extended(folder, results):
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    return results, kept


def _is_being_extended(folder: Path, results: dict) -> bool:
    run_file = folder / PARTIAL / "run.json"
    try:
        return run_file.is_file() and _read_json(run_file).get("identity") != results.get("identity")
    except ResultsError:
        return False  # answers of nobody knows what, which no run could take up


def open_unfinished(folder: Path, identity: dict, kept=None) -> dict[int, dict]:
    """Begins an evaluation in a folder, or continues one.

    Args:
        kept: what the finished evaluation in the folder gives to it, as `extension.find_kept` returns it.

    Returns:
        the finished records by example index, the kept ones too.

    Raises:
        ResultsError: when the folder holds an unfinished evaluation of another identity, or it cannot be read.
    """
    partial = folder / PARTIAL
    if partial.is_symlink():  # not ours: what it leads to is not to be written into
        partial.unlink()
    partial.mkdir(exist_ok=True)
    run_file = partial / "run.json"
    run = {"versions": versions()}
    if run_file.is_file():
        run = _read_json(run_file)
        # Outputs are kept and scored at the end: a new scorer costs no second generation.
        unscored = {name: value for name, value in identity.items() if name != SCORER}
        _require_same(folder, unscored, run, "an unfinished evaluation")
        _warn_of_versions(folder, run, "an unfinished evaluation")
    run |= {"identity": identity} | ({"kept": {"hit_limit": kept.hit_limit, "carried": kept.carried}} if kept else {})
    # Written again where nothing differs but the scorer, too: ranks know this evaluation's folder by the identity.
    write_json_atomic(run_file, run)
    _remove_leftovers(folder)
    finished = read_finished(partial) | (kept.records if kept is not None else {})
    # One clean file replaces the shards, so that new lines never follow a line that a crash cut short.
    records = [finished[i] for i in sorted(finished)]
    write_text_atomic(partial / "finished.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for shard in partial.glob("rank*.jsonl"):
        shard.unlink()
    return finished


def read_kept(folder: Path) -> tuple[dict[str, int], dict]:
    """Reads what an unfinished evaluation took over from a finished one besides its answers: how many of them hit the
    limit, by language, and entries of results.json. Both are empty where it took over none."""
    kept = _read_json(folder / PARTIAL / "run.json").get("kept", {})
    return kept.get("hit_limit", {}), kept.get("carried", {})


def join_results(folder: Path, identity: dict, overwrite: bool) -> dict[int, dict]:
    """Makes a results folder ready on a rank that does not share rank 0's, after `open_results` there: what this node
    finishes stays for a continuation. In rank 0's own folder it changes nothing.

    Args:
        identity: rank 0's.
        overwrite: leave out what an earlier evaluation finished.

    Returns:
        the finished records in the folder, by example index.

    Raises:
        ResultsError: when the folder cannot be used.
    """
    partial = folder / PARTIAL
    run_file = partial / "run.json"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        # Cleared where it differs, not refused as on rank 0: a node's own folder holds unfinished answers alone.
        same = run_file.is_file() and _read_json(run_file).get("identity") == identity
        if overwrite or not same:
            for shard in partial.glob("*.jsonl"):
                shard.unlink(missing_ok=True)
        if not same:
            write_json_atomic(run_file, {"identity": identity, "versions": versions()})
        return read_finished(partial)
    except OSError as error:
        raise ResultsError(f"cannot use the results folder {folder}: {error.strerror or error}") from error


def leave_results(folder: Path) -> None:
    """Removes what `join_results` made, once rank 0 has all answers."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    with contextlib.suppress(OSError):  # holds rank 0's results
        folder.rmdir()


def _remove_leftovers(folder: Path) -> None:
    for pattern in LEFTOVERS:
        for file in folder.glob(pattern):
            file.unlink()


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path} cannot be read ({error}): pass --overwrite to start over") from error
    parts = [content, content.get("identity", {}), content.get("versions", {})] if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ResultsError(f"{path} is not what an evaluation writes: pass --overwrite to start over")
    return content


def _difference(identity: dict, stored: dict) -> str | None:
    before = stored.get("identity", {})
    return next((name for name, now in identity.items() if before.get(name) != now), None)


def _require_same(folder: Path, identity: dict, stored: dict, what: str) -> None:
    from mindmerger.evaluation.extension import WHICH_ROWS

    name = _difference(identity, stored)
    if name is None:
        return
    # Only what is finished is extended: unfinished answers are numbered among the rows that were asked then.
    first = "finish it as it was begun, then it can be extended, or " if name in WHICH_ROWS else ""
    before = stored.get("identity", {}).get(name)
    raise ResultsError(
        f"{folder} holds {what} with another {name}: {before} then, {identity[name]} now: {first}{START_OVER}"
    )


def _warn_of_versions(folder: Path, stored: dict, what: str) -> None:
    # A warning alone: were versions part of the identity, an update would start a long evaluation over.
    installed = versions()
    changed = [f"{k} {v}" for k, v in stored.get("versions", {}).items() if installed.get(k) != v]
    if changed:
        warn(f"{what} in {folder} was made with {', '.join(changed)}")


def read_finished(partial: Path) -> dict[int, dict]:
    """Reads the finished records by example index, from all files in `partial`, however many ranks wrote them.

    A batch counts when all of its examples are there: what a crash left of one is generated again as a whole, so that
    a continued run sees the same batches as an uninterrupted one. Lines that are not records count as lost.
    """
    finished = {}
    for shard in sorted(partial.glob("*.jsonl")):
        batches = {}
        # Bytes: half a character at a cut end would stop a text file's reader before the lines that are whole.
        for line in shard.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue  # the empty end of the file, or a line cut short, which its batch then lacks
            if isinstance(record, dict) and all(isinstance(record.get(name, ...), RECORD[name]) for name in RECORD):
                # By index, not as a list: a batch that was written twice is whole all the same.
                batches.setdefault((record["batch"], record["batch_size"]), {})[record["index"]] = record
        for (_, size), records in batches.items():
            if len(records) == size:
                finished.update(records)
    return finished


def open_shard(folder: Path, rank: int):
    """Opens the file that takes one rank's finished examples; close it when the rank has generated its share.

    It stays open: a rank that outlives its run then continues to write into this very file, which the next run removes,
    and never into the next run's.

    Raises:
        ResultsError: when it cannot be opened.
    """
    path = folder / PARTIAL / f"rank{rank}.jsonl"
    try:
        # Unbuffered: what a full disk refuses must not be tried again when the file is closed.
        return open(path, "ab", buffering=0, opener=unfollowed)
    except OSError as error:
        raise ResultsError(f"cannot write {path} ({error.strerror})") from error


def append_records(shard, records: list[dict]) -> None:
    """Adds one batch's lines to a file of `open_shard` and returns when they are on disk.

    Raises:
        ResultsError: naming file and bytes when the disk refuses them.
    """
    left = data = "".join(json.dumps(record) + "\n" for record in records).encode()
    try:
        while left:
            left = left[shard.write(left) :]
        os.fsync(shard.fileno())
    except OSError as error:
        raise ResultsError(
            f"cannot write {shard.name} ({len(data)} bytes): {error.strerror or error}; what is finished is kept: the "
            "same command continues"
        ) from error


def find_results(folder: str) -> str:
    """Returns the folder itself, or the finished evaluation inside it where it holds exactly one."""
    # So that results/<save_name> may be given where one task was evaluated under that name.
    inside = [found.parent for found in Path(folder).glob("*/results.json")]
    return str(inside[0]) if len(inside) == 1 and not (Path(folder) / "results.json").is_file() else folder


def read_results(folder: str) -> dict:
    """Reads a finished evaluation's `results.json`.

    Raises:
        ResultsError: when there is none, or it cannot be read.
    """
    file = Path(folder) / "results.json"
    if not file.is_file():
        if not Path(folder).is_dir():
            raise ResultsError(f"no results folder {folder}")
        inside = sorted(str(found.parent) for found in Path(folder).glob("**/results.json"))
        hint = f"it holds {', '.join(inside[:5])}" if inside else "no finished evaluation is in it"
        raise ResultsError(f"{folder} has no results.json: {hint}")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        # What tables read is checked here: folders written elsewhere, or by hand, ended in a traceback in a table's
        # title.
        wrong = [name for name in ("task", "form") if not isinstance(results[name], str)]
        wrong += [f"n of {name}" for name, one in results["languages"].items() if not isinstance(one["n"], int)]
        if (parallel := results.get("parallel_input")) is not None:
            found = parallel if isinstance(parallel, dict) else {}
            texts = ("translations", "order", "name")
            wrong += [f"{name} of parallel_input" for name in texts if not isinstance(found.get(name), str)]
        if (translated := results.get("translate_test")) is not None:
            found = translated if isinstance(translated, dict) else {}
            texts = ("translations", "name")
            wrong += [f"{name} of translate_test" for name in texts if not isinstance(found.get(name), str)]
        probe, gold = results.get("probe_prefix", {"kind": PROBES[0]}), results.get("gold", {"gold_loss": 0.0})
        wrong += ["probe_prefix"] * (not isinstance(probe, dict) or probe.get("kind") not in PROBES)
        wrong += ["scoring"] * (results.get("scoring", LIKELIHOOD) != LIKELIHOOD)
        wrong += ["chat_template"] * (not isinstance(results.get("chat_template"), dict | None))
        wrong += ["bridge"] * (not isinstance(results.get("bridge"), str | None))
        wrong += ["gold"] * (not isinstance(gold, dict) or not isinstance(gold.get("gold_loss"), float))
        if wrong:
            raise ValueError(f"{wrong[0]} is of a wrong type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResultsError(f"{file} is not the results of an evaluation: {type(error).__name__} {error}") from error
    return results


def read_predictions(folder: str, language: str) -> dict[str, dict]:
    """Reads of one language's predictions what comparisons need, by item id.

    `mark` is what is averaged: whether an item is right, or the grade of a graded one, from 0 to 1; graded ones have
    their `prediction` too.

    Raises:
        ResultsError: as `read_items`.
    """
    # Scores of all rows together are made from the predictions again.
    names = ("id", "source", "answer", "question", "correct", "mark", "prediction")
    found = {}
    for id, item in read_items(folder, language).items():
        graded = "grade" in item
        item = item | {"mark": item["grade"] / 100 if graded else item["correct"]}
        found[id] = {name: item[name] for name in (names if graded else names[:-1])}
    return found


def read_items(folder: str, language: str) -> dict[str, dict]:
    """Reads one language's predictions whole, by item id.

    Raises:
        ResultsError: naming file and line, and the id where one stands twice, or both numbers where `results.json`
            counts another number than are there.
    """
    file = Path(folder) / "predictions" / f"{language}.jsonl"
    if not file.is_file():
        raise ResultsError(f"{file} is missing although results.json counts that language")
    items = {}
    # Splitting on "\n" alone: outputs may hold characters that splitlines() takes for line ends.
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            item = json.loads(line)
            if item["correct"] not in (True, False):
                raise TypeError(f"correct is {item['correct']!r:.40}, not true or false")
            item |= {"question": item.get("question", ""), "correct": bool(item["correct"])}
            grade = item.get("grade", 0.0)
            if isinstance(grade, bool) or not isinstance(grade, int | float) or not 0 <= grade <= 100:
                raise TypeError(f"grade is {grade!r:.40}, not a number from 0 to 100")
            texts = ("id", "source", "answer", "question", *(("prediction",) if "grade" in item else ()))
            wrong = [name for name in texts if not isinstance(item[name], str)]
            if wrong:
                raise TypeError(f"{wrong[0]} is {item[wrong[0]]!r:.40}, not text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ResultsError(f"{file}:{number}: not a prediction ({type(error).__name__} {error})") from error
        if item["id"] in items:
            raise ResultsError(f"{file}:{number}: the id {item['id']!r:.80} stands twice: evaluate again")
        items[item["id"]] = item
    # A lost last line leaves a valid file, and an accuracy over fewer items.
    counted = read_results(folder)["languages"].get(language, {"n": len(items)})["n"]
    if len(items) != counted:
        raise ResultsError(f"{file} holds {len(items)} predictions but results.json counts {counted}: evaluate again")
    return items


def warn_of_scorers(folders: list[str], results: list[dict]) -> None:
    """Warns of folders whose answers were scored by another version than the first one's."""
    identities = [one.get("identity") for one in results]
    versions = [identity.get(SCORER) if isinstance(identity, dict) else None for identity in identities]
    for folder, version in zip(folders, versions, strict=True):
        if version != versions[0]:
            warn(f"{folders[0]} and {folder} were scored by different versions: evaluate the older one anew")
