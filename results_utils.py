"""Results folders: how an interrupted evaluation goes on, intervals, tables, comparing. Needs no model and no torch.

A finished folder (`results/<save_name>/<task>/`) holds `results.json`, `scores.tsv` and `predictions/<language>.jsonl`.
An unfinished one holds `.partial/run.json` (what is being evaluated) and `.partial/*.jsonl` (one line per finished
example, a file per rank). `results.json` is written last, and then `.partial` goes.
"""

import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np

from runtime_utils import UserError, log, versions, warn, write_json_atomic, write_text_atomic

PARTIAL = ".partial"
RESAMPLES = 10_000
# What a line of an unfinished evaluation holds.
RECORD = {"index": int, "output": str, "generated_tokens": int, "hit_limit": bool, "batch": int, "batch_size": int}
# What a process that was killed while it wrote can leave beside the whole files.
LEFTOVERS = (".results.json.*.tmp", ".scores.tsv.*.tmp", "predictions/.*.jsonl.*.tmp", f"{PARTIAL}/.*.tmp")


class ResultsError(UserError):
    """A results folder that cannot be read or compared; the message is one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Folders of unfinished evaluations


def open_results(folder: Path, identity: dict, number: int, overwrite: bool) -> tuple[dict | None, dict[int, dict]]:
    """Makes a results folder ready for the evaluation that `identity` describes. Call it on rank 0 only.

    Arguments:
        identity: everything the answers and scores depend on, by the name the user knows it by.
        number: of examples.
        overwrite: delete what an earlier evaluation left.

    Returns:
        the results when this very evaluation is finished already, else None; and the finished records by example index.

    Raises:
        ResultsError: when the folder holds an evaluation of another identity, naming the first difference, or what it
            holds cannot be read, or the disk refuses it.
    """
    partial, final = folder / PARTIAL, folder / "results.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            # results.json first: without it nothing claims that the rest is complete.
            final.unlink(missing_ok=True)
            (folder / "scores.tsv").unlink(missing_ok=True)
            for part in (folder / "predictions", partial):
                if part.is_dir():
                    shutil.rmtree(part)
        if final.is_file():
            results = _read_json(final)
            _require_same(folder, identity, results, "a finished evaluation")
            _remove_leftovers(folder)
            shutil.rmtree(partial, ignore_errors=True)  # still there after a kill between results.json and its end
            return results, {}
        partial.mkdir(exist_ok=True)
        run_file = partial / "run.json"
        if run_file.is_file():
            _require_same(folder, identity, _read_json(run_file), "an unfinished evaluation")
        else:
            write_json_atomic(run_file, {"identity": identity, "versions": versions()})
        _remove_leftovers(folder)
        finished = read_finished(partial)
        # One clean file replaces the shards, so that new lines never follow a line that a crash cut short.
        records = sorted(finished.values(), key=lambda record: record["index"])
        write_text_atomic(partial / "finished.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        for shard in partial.glob("rank*.jsonl"):
            shard.unlink()
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        raise ResultsError(f"cannot use the results folder {folder}: {what}") from error
    if finished:
        log(f"continuing: {len(finished)} of {number} examples are finished")
    return None, finished


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


def _require_same(folder: Path, identity: dict, stored: dict, what: str) -> None:
    before = stored.get("identity", {})
    for name, now in identity.items():
        if before.get(name) != now:
            raise ResultsError(
                f"{folder} holds {what} with another {name}: {before.get(name)} then, {now} now: pass --overwrite to "
                "start over, or another --save_name or --results_dir to keep both"
            )
    installed = versions()
    changed = [f"{k} {v}" for k, v in stored.get("versions", {}).items() if installed.get(k) != v]
    if changed:
        warn(f"{what} in {folder} was made with {', '.join(changed)}")


def read_finished(partial: Path) -> dict[int, dict]:
    """Finished records by example index, from all files in `partial`, however many ranks wrote them.

    A batch counts when all of its examples are there: what a crash left of one is generated again as a whole, so that
    a continued run sees the same batches as an uninterrupted one. Lines that are no records are as good as lost.
    """
    finished = {}
    for shard in sorted(partial.glob("*.jsonl")):
        batches = {}
        for line in shard.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue  # the empty end of the file, or a line cut short, which its batch then lacks
            if isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in RECORD.items()):
                # By index, not as a list: a batch that was written twice is whole all the same.
                batches.setdefault((record["batch"], record["batch_size"]), {})[record["index"]] = record
        for (_, size), records in batches.items():
            if len(records) == size:
                finished.update(records)
    return finished


def open_shard(folder: Path, rank: int):
    """Opens the file that takes one rank's finished examples; close it when the rank has generated its share.

    It stays open: a rank that outlives its run then writes on into this very file, which the next run removes, and
    never into the next run's.

    Raises:
        ResultsError: when it cannot be opened.
    """
    path = folder / PARTIAL / f"rank{rank}.jsonl"
    try:
        # Unbuffered: what a full disk refuses must not be tried again when the file is closed.
        return open(path, "ab", buffering=0)
    except OSError as error:
        raise ResultsError(
            f"cannot write {path} ({error.strerror}): --results_dir must be on a file system that all machines of the "
            "run share"
        ) from error


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


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def bootstrap_intervals(
    counts: dict[str, tuple[int, int]], seed: int, resamples: int = RESAMPLES
) -> tuple[dict[str, list[float]], list[float]]:
    """95 % percentile bootstrap intervals (Efron 1979) of each language's accuracy and of their unweighted mean.

    Drawing n right-or-wrong items with replacement is drawing a Binomial(n, correct / n), so the resampled accuracies
    are drawn directly. The mean's interval resamples each language on its own. A language's interval depends on the
    seed and its name alone, not on which other languages were evaluated.

    Arguments:
        counts: language to (correct, n), n > 0.
        seed: of the resampling.

    Returns:
        language to [low, high], and [low, high] of the mean, in percent.
    """
    draws = {}
    for language, (correct, n) in counts.items():
        generator = np.random.default_rng([seed, zlib.crc32(language.encode())])
        draws[language] = 100 * generator.binomial(n, correct / n, size=resamples) / n
    intervals = {language: _percentiles(values) for language, values in draws.items()}
    return intervals, _percentiles(np.mean(list(draws.values()), axis=0))


def _percentiles(values: np.ndarray) -> list[float]:
    return [round(float(bound), 4) for bound in np.quantile(values, [0.025, 0.975])]


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar test (McNemar 1947): the p-value of as uneven a split of the items that one run alone
    got right, or a more uneven one, if both runs were equally good: 2 · P(Binomial(n, ½) ≤ min), at most 1.

    Arguments:
        only_first, only_second: how many items the first, respectively the second, run alone got right.
    """
    n, smaller = only_first + only_second, min(only_first, only_second)
    term = total = 1  # C(n, 0); exact integers, each binomial coefficient made from the one before
    for i in range(smaller):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**n)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


FORM_TITLES = {
    "soft": "MindMerger-Soft (mapped source and prompt)",
    "hard": "MindMerger-Hard (mapped source only)",
    "llm_only": "LLM alone (prompt only)",
}


def form_title(results: dict) -> str:
    """What was evaluated, in words, from the content of a `results.json`; parallel input says who translated."""
    title = FORM_TITLES.get(results["form"], results["form"])
    parallel = results.get("parallel_input")
    if parallel is None:
        return title
    who = "the benchmark's own rows" if parallel["translations"] == "oracle" else "machine translations"
    return f"LLM alone with parallel input, {parallel['name']}: {who}, {parallel['order']}"


def align(rows: list[list[str]], rule_before_last: bool = False) -> str:
    """Rows of cells as lines of text: first column left, others right, a rule below the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = "-" * len(lines[0])
    lines.insert(1, rule)
    if rule_before_last:
        lines.insert(-1, rule)
    return "\n".join(line.rstrip() for line in lines)


def format_results(results: dict) -> str:
    """The table of one evaluation, from the content of its `results.json`."""
    languages, mean, published = results["languages"], results["mean"], results["published"]
    both_scorers = "reference_accuracy" in mean
    head = ["language", "n", "accuracy", "95 % interval"]
    rows = [head + ["reference"] * both_scorers + ["published"] * bool(published)]
    for name, one in [*languages.items(), ("mean", {"n": results["counts"]["examples"], **mean})]:
        row = [name, str(one["n"]), f"{one['accuracy']:.1f}", "{:.1f} – {:.1f}".format(*one["interval"])]
        if both_scorers:
            row.append(f"{one['reference_accuracy']:.1f}")
        if published:
            score = published["mean"] if name == "mean" else published["scores"].get(name)
            row.append("–" if score is None else f"{score:.1f}")
        rows.append(row)
    lines = [
        f"{results['task']}, {form_title(results)}: accuracy in percent",
        align(rows, rule_before_last=True),
    ]
    if both_scorers:
        lines.append("reference: scored as the released code does (no minus signs, a missing number counts as 0)")
    if published:
        lines.append(f"published: {published['label']}" + published["note"])
    counts = results["counts"]
    for key, text in (
        ("hit_limit", f"answers stopped at the limit of {results['max_new_tokens']} new tokens"),
        ("cut_sources", "questions were cut for the encoder (--max_seq_len)"),
        ("cut_prompts", "prompts were cut for the LLM (--max_gen_len)"),
    ):
        if counts[key]:
            lines.append(f"{counts[key]} of {counts['examples']} {text}")
    return "\n".join(lines)


def published_scores(
    published: dict[str, dict[str, float]], form: str, llm_path: str, languages: list[str]
) -> dict | None:
    """The published row that belongs beside a run, None where there is none (the Hard form has none).

    Arguments:
        published: {row label: {language or "avg": accuracy}}, as a task holds it.
        llm_path: where rows of several LLMs exist, the one whose name it holds is taken, else the last.

    Returns:
        label, note (what the mean covers), scores by language, mean.
    """
    labels = [label for label in published if ("MindMerger" in label) == (form == "soft")]
    if form == "hard" or not labels:
        return None

    def letters(text):
        return "".join(c for c in text.lower() if c.isalnum())

    same_llm = [label for label in labels if letters(label.split("-")[0]) in letters(Path(llm_path).name)]
    label = (same_llm or labels)[-1]
    scores = {name: score for name, score in published[label].items() if name != "avg"}
    mean, note = published[label].get("avg"), ""
    if not scores:
        note = ", of which the average alone is published"
    elif set(scores) != set(languages):
        shown = [scores[name] for name in languages if name in scores]
        if not shown:
            return None
        mean = sum(shown) / len(shown)
        note = " (mean over the languages of this table)"
    return {"label": label, "note": note, "scores": scores, "mean": mean}


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def find_results(folder: str) -> str:
    """The folder itself, or the finished evaluation inside it where it holds exactly one."""
    inside = [found.parent for found in Path(folder).glob("*/results.json")]
    return str(inside[0]) if len(inside) == 1 and not (Path(folder) / "results.json").is_file() else folder


def read_results(folder: str) -> dict:
    """The content of a finished evaluation's `results.json`.

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
        wrong = [name for name in ("task", "form") if not isinstance(results[name], str)]
        wrong += [f"n of {name}" for name, one in results["languages"].items() if not isinstance(one["n"], int)]
        if wrong:
            raise ValueError(f"{wrong[0]} is of a wrong type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResultsError(f"{file} is not the results of an evaluation: {type(error).__name__} {error}") from error
    return results


def read_predictions(folder: str, language: str) -> dict[str, dict]:
    """One language's predictions by item id.

    Raises:
        ResultsError: naming file and line, or both numbers where `results.json` counts other than are there.
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
            items[item["id"]] = {"source": item["source"], "answer": item["answer"], "correct": item["correct"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ResultsError(f"{file}:{number}: not a prediction ({type(error).__name__} {error})") from error
    counted = read_results(folder)["languages"].get(language, {"n": len(items)})["n"]
    if len(items) != counted:
        raise ResultsError(f"{file} holds {len(items)} predictions but results.json counts {counted}: evaluate again")
    return items


def compare_results(folders: list[str]) -> str:
    """Tables of the first results folder against each other one: accuracies on the items both have, their difference
    and an exact McNemar test.

    Raises:
        ResultsError: fewer than two folders, different tasks, no common item, or other questions under one id.
    """
    if len(folders) < 2:
        raise ResultsError(f"--compare needs at least two results folders, got {len(folders)}")
    folders = [find_results(folder.rstrip("/") or "/") for folder in folders]
    results = [read_results(folder) for folder in folders]
    tasks = [one["task"] for one in results]
    for folder, task in zip(folders, tasks, strict=True):
        if task != tasks[0]:
            raise ResultsError(f"{folders[0]} is {tasks[0]} but {folder} is {task}: only one task's results compare")
    return "\n\n".join(_compare_two(folders[0], folders[i], results[0], results[i]) for i in range(1, len(folders)))


def _compare_two(first: str, second: str, first_results: dict, second_results: dict) -> str:
    rows = [["language", "items", "A", "B", "B - A", "only A", "only B", "McNemar p"]]
    tallies, totals = [], {first: 0, second: 0}
    for language in first_results["languages"]:
        if language not in second_results["languages"]:
            continue
        tally = paired_counts(first, second, language)
        if tally is not None:
            tallies.append(tally)
            rows.append([language, *_cells(*tally)])
    for folder, results in ((first, first_results), (second, second_results)):
        totals[folder] = sum(one["n"] for one in results["languages"].values())
    if not tallies:
        raise ResultsError(f"{first} and {second} have no item in common")
    n, both, only_a, only_b = (sum(column) for column in zip(*tallies, strict=True))
    rows.append(["all items", *_cells(n, both, only_a, only_b)])
    mean_a = sum(100 * (both + a) / n for n, both, a, _ in tallies) / len(tallies)
    mean_b = sum(100 * (both + b) / n for n, both, _, b in tallies) / len(tallies)
    rows.append(["mean of languages", "", f"{mean_a:.1f}", f"{mean_b:.1f}", f"{mean_b - mean_a:+.1f}", "", "", ""])
    return "\n".join(
        [
            f"{first_results['task']}: accuracy in percent on the same items",
            f"A: {first} ({form_title(first_results)})",
            f"B: {second} ({form_title(second_results)})",
            align(rows),
            f"{n} items in common (A has {totals[first]}, B has {totals[second]}); only A, only B: items that run "
            "alone got right; p: exact two-sided McNemar test",
        ]
    )


def paired_counts(first: str, second: str, language: str) -> tuple[int, int, int, int] | None:
    """(common items, both right, only the first right, only the second right), None without common items."""
    items_a, items_b = read_predictions(first, language), read_predictions(second, language)
    common = items_a.keys() & items_b.keys()
    both = only_a = only_b = 0
    for key in common:
        a, b = items_a[key], items_b[key]
        if (a["source"], a["answer"]) != (b["source"], b["answer"]):
            raise ResultsError(
                f"item {key} ({language}) is another question in {first} than in {second}: they were evaluated on "
                "different data"
            )
        both += a["correct"] and b["correct"]
        only_a += a["correct"] and not b["correct"]
        only_b += b["correct"] and not a["correct"]
    return (len(common), both, only_a, only_b) if common else None


def _cells(n: int, both: int, only_a: int, only_b: int) -> list[str]:
    a, b = 100 * (both + only_a) / n, 100 * (both + only_b) / n
    p = mcnemar_exact(only_a, only_b)
    return [
        str(n),
        f"{a:.1f}",
        f"{b:.1f}",
        f"{b - a:+.1f}",
        str(only_a),
        str(only_b),
        f"{p:.2g}" if p >= 1e-4 else "<0.0001",
    ]
