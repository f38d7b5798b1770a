"""Results folders: how an interrupted evaluation goes on, intervals, tables, comparing. Needs no model and no torch.

A finished folder (`results/<save_name>/<task>/`) holds `results.json`, `scores.tsv` and `predictions/<language>.jsonl`.
An unfinished one holds `.partial/run.json` (what is being evaluated) and `.partial/*.jsonl` (one line per finished
example, a file per rank). `results.json` is written last, and then `.partial` goes.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from data_tasks import PUBLISHED_ENCODER, PUBLISHED_LLMS, TASKS, Task
from runtime_utils import UserError, log, unfollowed, versions, warn, write_json_atomic, write_text_atomic

PARTIAL = ".partial"
RESAMPLES = 10_000
FLIPS = 100_000
# Weights of about this many questions are drawn at once: 5010 questions 10,000 times over would take 400 MB.
DRAWN_AT_ONCE = 500_000
# The entry of an identity that no answer depends on: an unfinished evaluation is scored when it ends.
SCORER = "version of the scorer"
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
        if partial.is_symlink():  # not ours: what it leads to is not to be written into
            partial.unlink()
        partial.mkdir(exist_ok=True)
        run_file = partial / "run.json"
        if run_file.is_file():
            unscored = {name: value for name, value in identity.items() if name != SCORER}
            _require_same(folder, unscored, _read_json(run_file), "an unfinished evaluation")
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


def join_results(folder: Path, identity: dict, overwrite: bool) -> dict[int, dict]:
    """Makes a results folder ready on a rank that does not share rank 0's, after `open_results` there: what this
    machine finishes stays for a continuation. In rank 0's own folder it changes nothing.

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


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


# A question, told apart from every other one of its test set: its number or own id, its gold answer where rows are
# known by their number alone, and how often it stood in the language before.
Question = tuple[str, str, int]


def questions_of(task: str, language: str, rows: list[dict]) -> list[Question]:
    """Returns the question that each row of one language asks; its translations give the same one.

    A record's own id says which question it is: X-CSQA's files hold their rows, and their options, in another order in
    every language. Elsewhere the number of a row says it, as long as the gold answer is the same: rows that share a
    number and not the answer count as different questions.

    Arguments:
        task: by whose reading gold answers are the same ("8.0" is "8").
        language: of the rows, by name.
        rows: predictions: `id`, `answer` and, where the data have one, `question`.
    """
    known, before, questions = TASKS.get(task), Counter(), []
    for row in rows:
        if row.get("question"):
            key = row["question"], ""
        else:
            gold = known.gold_key(row["answer"], language) if known else row["answer"]
            key = row["id"].partition("-")[2] or row["id"], gold
        questions.append((*key, before[key]))
        before[key] += 1
    return questions


def describe_questions(questions: dict[str, list[Question]]) -> dict:
    """Returns what `bootstrap_intervals` resamples for the mean, for results.json.

    Arguments:
        questions: language to the questions of its rows.

    Returns:
        unit: "question", or "row" where no question stands in two languages; the number of rows and of questions; how
        many questions stand in every language; how many row numbers have different gold answers.
    """
    languages = Counter(question for asked in questions.values() for question in asked)
    numbers = Counter((number, before) for number, _, before in languages)
    return {
        "unit": "question" if len(languages) < languages.total() else "row",
        "rows": languages.total(),
        "questions": len(languages),
        "questions_in_every_language": sum(times == len(questions) for times in languages.values()),
        "numbers_with_different_answers": sum(times > 1 for times in numbers.values()),
    }


def resampling_note(described: dict) -> str:
    """Returns what `describe_questions` found, in a sentence for readers of a table."""
    if described["unit"] == "row":
        text = "no question stands in two languages, so rows are resampled in each language alone"
    else:
        text = f"{described['questions']} questions are resampled, each with its rows in all languages"
        if described["questions_in_every_language"] < described["questions"]:
            text += f" ({described['questions_in_every_language']} stand in every language)"
    if described["numbers_with_different_answers"]:
        text += (
            f"; {described['numbers_with_different_answers']} row numbers have different gold answers in different "
            "languages, so these rows count as different questions"
        )
    return text


def _by_question(questions: dict[str, list[Question]], values: dict[str, list]) -> tuple[np.ndarray, np.ndarray]:
    """(rows_KL, values_KL): how many rows (0 or 1) each question has in each language, and their values, else 0."""
    place = {question: k for k, question in enumerate(sorted({q for asked in questions.values() for q in asked}))}
    rows_KL, values_KL = np.zeros((2, len(place), len(questions)))
    for language, (name, asked) in enumerate(questions.items()):
        at = [place[question] for question in asked]
        rows_KL[at, language], values_KL[at, language] = 1, values[name]
    return rows_KL, values_KL


def bootstrap_intervals(
    questions: dict[str, list[Question]], correct: dict[str, list[bool]], seed: int, resamples: int = RESAMPLES
) -> tuple[dict[str, list[float]], list[float]]:
    """95 % percentile bootstrap intervals (Efron 1979) of each language's accuracy and of their unweighted mean.

    Languages: drawing n right-or-wrong rows with replacement is drawing a Binomial(n, correct / n), so the resampled
    accuracies are drawn directly. A language's interval depends on the seed and its name alone, not on which other
    languages were evaluated.

    Mean: rows that ask one question in different languages tend to be right together, so questions are drawn with
    replacement, each with its rows in all languages (cluster bootstrap, Field and Welsh 2007). With w_k the number of
    times that question k was drawn, y_kl whether its row in language l is right, 0 where it has none, and r_kl whether
    it has one,

        mean* = 1/L sum_l (sum_k w_k y_kl / sum_k w_k r_kl),  w ~ Multinomial(K; 1/K, ..., 1/K).

    A language that a resample misses counts with its accuracy over all its rows. Where no question stands in two
    languages there is nothing to draw together: the mean is that of the languages' own draws.

    Arguments:
        questions: language to the question of each row, at least one, as `questions_of` gives them.
        correct: language to whether each row is right.
        seed: of the resampling.

    Returns:
        language to [low, high], and [low, high] of the mean, in percent.
    """
    draws = {}
    for language, marks in correct.items():
        generator = np.random.default_rng([seed, zlib.crc32(language.encode())])
        draws[language] = 100 * generator.binomial(len(marks), sum(marks) / len(marks), size=resamples) / len(marks)
    intervals = {language: _percentiles(values) for language, values in draws.items()}
    rows_KL, right_KL = _by_question(questions, correct)
    if rows_KL.sum(1).max() == 1:
        return intervals, _percentiles(np.mean(list(draws.values()), axis=0))
    number, means = len(rows_KL), []
    accuracy_L = right_KL.sum(0) / rows_KL.sum(0)
    generator = np.random.default_rng([seed, zlib.crc32(b"questions")])
    left = resamples
    while left:
        size = min(left, max(1, DRAWN_AT_ONCE // number))
        drawn_RK = generator.integers(number, size=(size, number)) + number * np.arange(size)[:, None]
        times_RK = np.bincount(drawn_RK.ravel(), minlength=size * number).reshape(size, number).astype(float)
        rows_RL = times_RK @ rows_KL
        accuracy_RL = np.tile(accuracy_L, (size, 1))
        np.divide(times_RK @ right_KL, rows_RL, out=accuracy_RL, where=rows_RL > 0)
        means.append(100 * accuracy_RL.mean(1))
        left -= size
    return intervals, _percentiles(np.concatenate(means))


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


def mean_difference_test(
    questions: dict[str, list[Question]], differences: dict[str, list[int]], seed: int, over_rows: bool = False
) -> float:
    """Two-sided sign-flip test (Fisher 1935) of the difference in mean accuracy of two runs on the same rows.

    With d_kl = 1, 0 or -1 as the second run is better, equal or worse on question k in language l, and n_l rows in
    language l, the difference is the sum over questions of D_k = 1/L sum_l d_kl / n_l. If both runs were equally good,
    exchanging their answers to a question, in all languages together, would change nothing: every D_k could as well
    have the other sign. So with signs drawn at random (Phipson and Smyth 2010),

        p = (1 + number of flips with |sum_k s_k D_k| >= |sum_k D_k|) / (1 + number of flips).

    In one language this is the exact McNemar test, up to the drawing of 100,000 flips.

    Arguments:
        questions: language to the question of each row, as `questions_of` gives them.
        differences: language to d of each row.
        seed: of the signs.
        over_rows: of the difference over all rows instead, each of the same weight.
    """
    rows_KL, differences_KL = _by_question(questions, differences)
    rows_L = np.full(len(questions), rows_KL.sum() / len(questions)) if over_rows else rows_KL.sum(0)
    # Rounded, so that equal ones are equal whatever the order of the languages.
    differences_K = (differences_KL / rows_L).mean(1).round(12)
    # Flipping m differences of one size by themselves is drawing a Binomial(m, 1/2): no matrix of signs is needed.
    sizes, times = np.unique(np.abs(differences_K), return_counts=True)
    generator = np.random.default_rng([seed, zlib.crc32(b"signs")])
    flipped = np.zeros(FLIPS)
    for size, m in zip(sizes[sizes > 0], times[sizes > 0], strict=True):
        flipped += size * (2.0 * generator.binomial(m, 0.5, size=FLIPS) - m)
    # What differs by rounding alone is as far away.
    as_far = np.abs(flipped) >= abs(differences_K.sum()) - 1e-9
    return (1 + int(as_far.sum())) / (1 + FLIPS)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def format_p(value: float) -> str:
    """A p-value for a table."""
    return "<0.0001" if value < 1e-4 else f"{value:.2g}"


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
    if len(languages) > 1 and "resampling" in results:
        lines.append(f"interval of the mean: {resampling_note(results['resampling'])}")
    counts = results["counts"]
    for key, text in (
        ("hit_limit", f"answers stopped at the limit of {results['max_new_tokens']} new tokens"),
        ("cut_sources", "questions were cut for the encoder (--max_seq_len)"),
        ("cut_prompts", "prompts were cut for the LLM (--max_gen_len)"),
    ):
        if counts[key]:
            lines.append(f"{counts[key]} of {counts['examples']} {text}")
    if results.get("faulty_rows"):
        lines.append(f"{len(results['faulty_rows'])} faulty rows were left out (--skip_faulty_rows)")
    return "\n".join(lines)


# What a merge or an adapter leaves in a model folder: then it is no longer the model that its name says.
CHANGED_MODEL = ("merge.json", "mergekit_config.yml", "adapter_config.json")


def is_model(path: str, hub_name: str | None, name: str) -> bool:
    """Whether a model, as given on the command line, is a certain published one.

    It is by its hub name, by its place in the hub's cache, or by its folder's name. The `_name_or_path` of a config
    says nothing: it names what a folder was tuned from as often as what it is.

    Arguments:
        hub_name: `organisation/name`, None for a model that is not on the hub.
        name: the other name that its folder may have.
    """
    folder = Path(path)
    if not folder.is_dir():
        return hub_name is not None and path.lower() == hub_name.lower()
    if any((folder / file).exists() for file in CHANGED_MODEL):
        return False
    folder = folder.resolve()
    cached = [part for part in folder.parts if part.startswith("models--")]
    if cached:
        return hub_name is not None and cached[-1].lower() == f"models--{hub_name.replace('/', '--')}".lower()

    def letters(text):
        return "".join(c for c in text.lower() if c.isalnum())

    names = [name] if hub_name is None else [name, hub_name.split("/")[-1]]
    return letters(folder.name) in map(letters, names)


def published_scores(task: Task, form: str, llm_path: str, mt_path: str | None, rows: dict[str, int]) -> dict | None:
    """The published row that belongs beside a run: of the same form, the same LLM and the same encoder.

    Arguments:
        rows: language to its number of rows in the run.

    Returns:
        label, note (what the mean covers, and whether the rows are others), scores by language, mean; None where there
        is no such row: the Hard form has none, nor has an average alone a place beside fewer languages than it covers.
    """
    if form == "hard" or (form == "soft" and not is_model(mt_path, PUBLISHED_ENCODER, "mt5-xl")):
        return None
    llms = [name for name, hub_name in PUBLISHED_LLMS.items() if is_model(llm_path, hub_name, name)]
    same_form = [label for label in task.published if ("MindMerger" in label) == (form == "soft")]
    found = [label for label in same_form if any(name in label for name in llms)]
    if not found:
        return None
    label = found[0]
    scores = {name: score for name, score in task.published[label].items() if name != "avg"}
    mean, notes = task.published[label]["avg"], []
    if not scores:
        if len(rows) < len(task.evaluation_languages):
            return None
        notes.append("of which the average alone is published")
    elif set(scores) != set(rows):
        shown = [scores[name] for name in rows if name in scores]
        if not shown:
            return None
        mean = sum(shown) / len(shown)
        notes.append("mean over the languages of this table")
    if task.published_rows is not None and set(rows.values()) != {task.published_rows}:
        here = sorted({min(rows.values()), max(rows.values())})
        notes.append(f"on other items: {task.published_rows} rows of each language, here {' to '.join(map(str, here))}")
    return {"label": label, "note": "".join(f"; {note}" for note in notes), "scores": scores, "mean": mean}


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
            texts = {name: item[name] for name in ("id", "source", "answer")} | {"question": item.get("question", "")}
            wrong = [name for name, text in texts.items() if not isinstance(text, str)]
            if wrong:
                raise TypeError(f"{wrong[0]} is {texts[wrong[0]]!r:.40}, not text")
            items[item["id"]] = {**texts, "correct": bool(item["correct"])}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ResultsError(f"{file}:{number}: not a prediction ({type(error).__name__} {error})") from error
    counted = read_results(folder)["languages"].get(language, {"n": len(items)})["n"]
    if len(items) != counted:
        raise ResultsError(f"{file} holds {len(items)} predictions but results.json counts {counted}: evaluate again")
    return items


def compare_results(folders: list[str], seed: int = 0) -> str:
    """Tables of the first results folder against each other one: accuracies on the items both have, their difference,
    an exact McNemar test per language with Holm's correction, and a sign-flip test of the mean.

    Arguments:
        seed: of the sign-flip test.

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
    warn_of_scorers(folders, results)
    others = zip(folders[1:], results[1:], strict=True)
    return "\n\n".join(_compare_two(folders[0], folder, results[0], one, seed) for folder, one in others)


def warn_of_scorers(folders: list[str], results: list[dict]) -> None:
    """Warns of folders whose answers were scored by another version than the first one's."""
    identities = [one.get("identity") for one in results]
    versions = [identity.get(SCORER) if isinstance(identity, dict) else None for identity in identities]
    for folder, version in zip(folders, versions, strict=True):
        if version != versions[0]:
            warn(f"{folders[0]} and {folder} were scored by different versions: evaluate the older one anew")


def _compare_two(first: str, second: str, first_results: dict, second_results: dict, seed: int) -> str:
    pairs = {}
    for language in first_results["languages"]:
        if language in second_results["languages"]:
            found = paired_items(first, second, language)
            if found:
                pairs[language] = found
    if not pairs:
        raise ResultsError(f"{first} and {second} have no item in common")
    task = first_results["task"]
    questions = {language: questions_of(task, language, [a for a, _ in found]) for language, found in pairs.items()}
    differences = {name: [b["correct"] - a["correct"] for a, b in found] for name, found in pairs.items()}
    tallies = {language: _tally(found) for language, found in pairs.items()}
    p_values = [mcnemar_exact(only_a, only_b) for _, _, only_a, only_b in tallies.values()]
    rows = [["language", "items", "A", "B", "B - A", "only A", "only B", "p", "p (Holm)"]]
    for (language, tally), p, p_holm in zip(tallies.items(), p_values, holm(p_values), strict=True):
        rows.append([language, *_cells(*tally), format_p(p), format_p(p_holm)])
    n, both, only_a, only_b = (sum(column) for column in zip(*tallies.values(), strict=True))
    p = mean_difference_test(questions, differences, seed, over_rows=True)
    rows.append(["all items", *_cells(n, both, only_a, only_b), format_p(p), ""])
    mean_a = sum(100 * (both + a) / n for n, both, a, _ in tallies.values()) / len(tallies)
    mean_b = sum(100 * (both + b) / n for n, both, _, b in tallies.values()) / len(tallies)
    p = mean_difference_test(questions, differences, seed)
    means = [f"{mean_a:.1f}", f"{mean_b:.1f}", f"{mean_b - mean_a:+.1f}"]
    rows.append(["mean of languages", "", *means, "", "", format_p(p), ""])
    totals = [sum(one["n"] for one in results["languages"].values()) for results in (first_results, second_results)]
    lines = [
        f"{task}: accuracy in percent on the same items",
        f"A: {first} ({form_title(first_results)})",
        f"B: {second} ({form_title(second_results)})",
        align(rows),
        "p of a language: exact two-sided McNemar test; (Holm): corrected over the languages; p of the last two rows: "
        f"sign-flip test, {resampling_note(describe_questions(questions)).replace('resampled', 'flipped')}",
        f"{n} items in common (A has {totals[0]}, B has {totals[1]}); only A, only B: items that run alone got right",
    ]
    return "\n".join(lines)


def paired_items(first: str, second: str, language: str) -> list[tuple[dict, dict]]:
    """The predictions of both folders on the items that both have, in the first one's order.

    Raises:
        ResultsError: where an id stands for another question in one folder than in the other.
    """
    items_a, items_b = read_predictions(first, language), read_predictions(second, language)
    pairs = [(items_a[id], items_b[id]) for id in items_a if id in items_b]
    for a, b in pairs:
        if (a["source"], a["answer"]) != (b["source"], b["answer"]):
            raise ResultsError(
                f"item {a['id']} ({language}) is another question in {first} than in {second}: they were evaluated on "
                "different data"
            )
    return pairs


def _tally(pairs: list[tuple[dict, dict]]) -> tuple[int, int, int, int]:
    """(items, both right, only the first right, only the second right)."""
    marks = Counter((a["correct"], b["correct"]) for a, b in pairs)
    return len(pairs), marks[True, True], marks[True, False], marks[False, True]


def _cells(n: int, both: int, only_a: int, only_b: int) -> list[str]:
    a, b = 100 * (both + only_a) / n, 100 * (both + only_b) / n
    return [str(n), f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}", str(only_a), str(only_b)]
