"""Finished evaluations compared on the items that they share."""

from dataclasses import dataclass, field

from mindmerger.evaluation.measures import CORPUS_NOTE, CORPUS_TITLES, MEASURES, measure_key, score_corpus
from mindmerger.evaluation.results import ResultsError, find_results, read_predictions, read_results, warn_of_scorers
from mindmerger.evaluation.scoring import LIKELIHOOD, note_of_scoring
from mindmerger.evaluation.statistics import (
    Question,
    bootstrap_intervals,
    describe_questions,
    format_p,
    holm,
    mean_difference_test,
    questions_of,
    resampling_note,
    row_test,
)
from mindmerger.evaluation.tables import align, form_title
from mindmerger.runtime.files import model_path


def compare_results(folders: list[str], seed: int = 0) -> str:
    """Returns tables of the first results folder against each other one: accuracies on the items both have, their
    difference, an exact McNemar test per language with Holm's correction, and a sign-flip test of the mean. Of graded
    answers: mean grades, sign-flip tests throughout, and scores of all rows together.

    Args:
        seed: of the sign-flip test.

    Raises:
        ResultsError: fewer than two folders, different tasks, no common item, or other questions under one id.
    """
    if len(folders) < 2:
        raise ResultsError(f"--compare needs at least two results folders, got {len(folders)}")
    folders = [find_results(model_path(folder)) for folder in folders]
    results = [read_results(folder) for folder in folders]
    tasks = [one["task"] for one in results]
    for folder, task in zip(folders, tasks, strict=True):
        if task != tasks[0]:
            raise ResultsError(f"{folders[0]} is {tasks[0]} but {folder} is {task}: only one task's results compare")
    warn_of_scorers(folders, results)
    others = zip(folders[1:], results[1:], strict=True)
    return "\n\n".join(_compare_two(folders[0], folder, results[0], one, seed) for folder, one in others)


def _compare_two(first: str, second: str, first_results: dict, second_results: dict, seed: int) -> str:
    pairs = {}
    for language in first_results["languages"]:
        if language in second_results["languages"]:
            found = paired_items(first, second, language)
            if found:
                pairs[language] = found
    if not pairs:
        raise ResultsError(f"{first} and {second} have no item in common")
    task, measure = first_results["task"], measure_key(first_results)
    graded = measure != "accuracy"
    questions = {language: questions_of(task, language, [a for a, _ in found]) for language, found in pairs.items()}
    differences = {name: [b["mark"] - a["mark"] for a, b in found] for name, found in pairs.items()}
    # Paired tests, not two intervals side by side: both runs answered the same questions, and what both got right or
    # both got wrong says nothing of the difference.
    tallies = {language: _tally(found) for language, found in pairs.items()}
    p_values = [row_test(questions[name], differences[name], seed) for name in pairs]
    alone = ["A better", "B better"] if graded else ["only A", "only B"]
    rows = [["language", "items", "A", "B", "B - A", *alone, "p", "p (Holm)"]]
    for (language, tally), p, p_holm in zip(tallies.items(), p_values, holm(p_values), strict=True):
        rows.append([language, *_cells(*tally), format_p(p), format_p(p_holm)])
    n, sum_a, sum_b, only_a, only_b = (sum(column) for column in zip(*tallies.values(), strict=True))
    # Not McNemar's over all rows: a question's translations change together, and ten copies of one language would make
    # 4 against 12 changed answers look like 40 against 120.
    p = mean_difference_test(questions, differences, seed, over_rows=True)
    rows.append(["all items", *_cells(n, sum_a, sum_b, only_a, only_b), format_p(p), ""])
    mean_a = sum(100 * a / n for n, a, *_ in tallies.values()) / len(tallies)
    mean_b = sum(100 * b / n for n, _, b, *_ in tallies.values()) / len(tallies)
    p = mean_difference_test(questions, differences, seed)
    means = [f"{mean_a:.1f}", f"{mean_b:.1f}", f"{mean_b - mean_a:+.1f}"]
    rows.append(["mean of languages", "", *means, "", "", format_p(p), ""])
    totals = [sum(one["n"] for one in results["languages"].values()) for results in (first_results, second_results)]
    what = "sign-flip test of its rows" if graded else "exact two-sided McNemar test"
    lines = [
        f"{task}: {MEASURES[measure][0]} on the same items",
        f"A: {first} ({form_title(first_results)})",
        f"B: {second} ({form_title(second_results)})",
        align(rows),
        f"p of a language: {what}; (Holm): corrected over the languages; p of the last two rows: "
        f"sign-flip test, {resampling_note(describe_questions(questions)).replace('resampled', 'flipped')}",
        f"{n} items in common (A has {totals[0]}, B has {totals[1]}); {', '.join(alone)}: items that run "
        + ("did better on" if graded else "alone got right"),
    ]
    if note := note_of_scoring([first_results, second_results]):
        lines.append(note)
    # Over other items than these a loss says nothing about the difference.
    if all("gold" in one for one in (first_results, second_results)) and totals == [n, n]:
        losses = [one["gold"]["gold_loss"] for one in (first_results, second_results)]
        lines.append(f"gold loss in nats per token: A {losses[0]:.4f}, B {losses[1]:.4f}")
    if graded:
        lines += ["", _corpus_table(task, pairs)]
    return "\n".join(lines)


def _corpus_table(task: str, pairs: dict[str, list[tuple[dict, dict]]]) -> str:
    """Returns the scores of all rows together, of both runs on the items that both have."""
    sides = [score_corpus(task, {name: [pair[i] for pair in found] for name, found in pairs.items()}) for i in (0, 1)]
    names = list(sides[0]["mean"])
    rows = [["language", *(f"{CORPUS_TITLES[name]} {side}" for name in names for side in "AB")]]
    for language in sides[0]:
        rows.append([language, *(f"{side[language][name]:.1f}" for name in names for side in sides)])
    return f"{align(rows, rule_before_last=True)}\n{CORPUS_NOTE}"


def paired_items(first: str, second: str, language: str) -> list[tuple[dict, dict]]:
    """Returns the predictions of both folders on the items that both have, in the first one's order.

    Raises:
        ResultsError: where an id stands for another question in one folder than in the other.
    """
    items_a, items_b = read_predictions(first, language), read_predictions(second, language)
    # By id, not by position: one of the two may have been evaluated with --limit, or without faulty rows.
    pairs = [(items_a[id], items_b[id]) for id in items_a if id in items_b]
    for a, b in pairs:
        # An id is a language's code and a row's number: other data give the same ids to other questions.
        if (a["source"], a["answer"]) != (b["source"], b["answer"]):
            raise ResultsError(
                f"item {a['id']} ({language}) is another question in {first} than in {second}: they were evaluated on "
                "different data"
            )
    return pairs


def _tally(pairs: list[tuple[dict, dict]]) -> tuple[int, float, float, int, int]:
    """Counts (items, sum of the first's marks, of the second's, items the first did better on, items the second)."""
    marks = [(a["mark"], b["mark"]) for a, b in pairs]
    first, second = map(sum, zip(*marks, strict=True))
    return len(pairs), first, second, sum(a > b for a, b in marks), sum(a < b for a, b in marks)


def _cells(n: int, sum_a: float, sum_b: float, only_a: int, only_b: int) -> list[str]:
    a, b = 100 * sum_a / n, 100 * sum_b / n
    return [str(n), f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}", str(only_a), str(only_b)]


@dataclass
class Row:
    """One evaluation. {language: {item id: …}}: `correct`, whether the item was right (or its grade from 0 to 1),
    `asked`, its question, and `texts`, the predictions themselves, of graded ones alone."""

    label: str
    folder: str
    results: dict
    correct: dict[str, dict[str, float]]
    asked: dict[str, dict[str, Question]]
    texts: dict[str, dict[str, dict]] = field(default_factory=dict)

    @property
    def questions(self) -> dict[str, list[Question]]:
        """Questions of the items, in the order of `correct`."""
        return {language: [self.asked[language][id] for id in items] for language, items in self.correct.items()}

    def corpus_scores(self) -> dict[str, dict[str, float]]:
        """Returns scores of all rows together by language and as "mean", of the items in `correct`; none where answers
        are not graded."""
        if not self.texts:
            return {}
        kept = {name: [self.texts[name][id] for id in items] for name, items in self.correct.items()}
        return score_corpus(self.results["task"], kept)


@dataclass
class Cell:
    """Accuracy of one row in one language, and its test against the chosen row (None for the chosen one itself).

    Of graded answers `correct` is the sum of the grades, and `only_row` counts the items with a higher one.
    """

    n: int
    correct: float
    interval: list[float]
    only_row: int | None = None
    only_against: int | None = None
    p: float | None = None
    p_holm: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of right answers in percent, or mean grade."""
        return 100 * self.correct / self.n


@dataclass
class Mean:
    """Unweighted mean of a row's accuracies, and its test against the chosen row."""

    accuracy: float
    interval: list[float]
    p: float | None = None


def read_row(label: str, folder: str) -> Row:
    """Reads a results folder; a row with translations gets "oracle" or "machine" into its label, one with
    a probe "shuffled prefix" or "zero prefix", one of likeliest labels "likelihood".

    Raises:
        ResultsError: when the folder holds no finished evaluation.
    """
    results = read_results(folder)
    parallel = results.get("parallel_input") or results.get("translate_test")
    # An oracle beside a machine's row, unlabelled, would be read as the fair setting.
    if parallel is not None and parallel["translations"] not in label:
        label = f"{label} ({parallel['translations']})"
    probe = results.get("probe_prefix")
    if probe is not None and f"{probe['kind']} prefix" not in label:
        label = f"{label} ({probe['kind']} prefix)"
    # The two ways to an answer are different measures of one model: a row has to say which one it shows.
    if results.get("scoring") == LIKELIHOOD and LIKELIHOOD not in label:
        label = f"{label} ({LIKELIHOOD})"
    row = Row(label, folder, results, {}, {})
    for language in results["languages"]:
        items = read_predictions(folder, language)
        row.correct[language] = {id: item["mark"] for id, item in items.items()}
        if measure_key(results) != "accuracy":
            row.texts[language] = items
        questions = questions_of(results["task"], language, list(items.values()))
        row.asked[language] = dict(zip(items, questions, strict=True))
    return row


def keep_common(rows: list[Row]) -> list[str]:
    """Reduces every row to the languages and items that all have; returns notes on what was left out, and on answers
    that were not found alike.

    Raises:
        ResultsError: for other tasks, nothing in common, or other questions under one id.
    """
    first, notes = rows[0], []
    for row in rows[1:]:
        if row.results["task"] != first.results["task"]:
            raise ResultsError(
                f"{row.folder} is {row.results['task']} but {first.folder} is {first.results['task']}: one table holds "
                "one task"
            )
    languages = [language for language in first.correct if all(language in row.correct for row in rows)]
    left_out = dict.fromkeys(name for row in rows for name in row.correct if name not in languages)
    if left_out:
        notes.append(f"Left out, since not every row has them: {', '.join(left_out)}.")
    for language in languages:
        for row in rows[1:]:
            # Reads both files once more: rows keep marks and questions, but no texts.
            paired_items(first.folder, row.folder, language)  # refuses other questions under one id
    kept = {}
    for language in languages:
        kept[language] = [id for id in first.correct[language] if all(id in row.correct[language] for row in rows)]
        # A row over the first ten items must not stand beside one over thirty as if they were the same.
        longest = max(len(row.correct[language]) for row in rows)
        if len(kept[language]) < longest:
            notes.append(f"{language}: {len(kept[language])} of up to {longest} items stand in every row.")
    kept = {language: ids for language, ids in kept.items() if ids}
    if not kept:
        raise ResultsError("these evaluations have no item in common: no table can be made of them")
    for row in rows:
        row.correct = {language: {id: row.correct[language][id] for id in ids} for language, ids in kept.items()}
    note = note_of_scoring([row.results for row in rows])
    return notes + [note] * (note is not None)


def build_cells(rows: list[Row], against: Row, seed: int) -> dict[str, tuple[dict[str, Cell], Mean]]:
    """Computes {row label: (cell of each language, mean)}, with tests of every row against one of them."""
    table = {}
    for row in rows:
        marks = {language: list(items.values()) for language, items in row.correct.items()}
        # The same seed for every row: an interval is a function of seed and language, so adding a row moves no other
        # one's.
        intervals, mean_interval = bootstrap_intervals(row.questions, marks, seed)
        cells = {language: Cell(len(one), sum(one), intervals[language]) for language, one in marks.items()}
        mean = Mean(sum(cell.accuracy for cell in cells.values()) / len(cells), mean_interval)
        if row is not against:
            differences = {}
            for language, cell in cells.items():
                other = against.correct[language]
                differences[language] = [right - other[id] for id, right in row.correct[language].items()]
                cell.only_row = sum(one > 0 for one in differences[language])
                cell.only_against = sum(one < 0 for one in differences[language])
                cell.p = row_test(row.questions[language], differences[language], seed)
            # Over the languages of this row alone: each row is a claim of its own.
            for cell, p in zip(cells.values(), holm([cell.p for cell in cells.values()]), strict=True):
                cell.p_holm = p
            mean.p = mean_difference_test(row.questions, differences, seed)
        table[row.label] = cells, mean
    return table
