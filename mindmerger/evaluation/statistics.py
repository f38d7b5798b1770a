"""Intervals, tests and corrections for accuracies, or mean grades, on the same questions; numpy alone."""

import zlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from mindmerger.tasks import TASKS

RESAMPLES = 10_000
FLIPS = 100_000
# Weights of about this many questions are drawn at once: 5010 questions 10,000 times over would take 400 MB.
DRAWN_AT_ONCE = 500_000
# With more sizes of differences than these, signs are drawn together; as many at once take 50 MB.
MANY_SIZES = 64


# A question, told apart from every other one of its test set: its number or own id, its gold answer where rows are
# known by their number alone, and how often it stood in the language before.
Question = tuple[str, str, int]


def questions_of(task: str, language: str, rows: list[dict]) -> list[Question]:
    """Returns the question that each row of one language asks; its translations give the same one.

    A record's own id says which question it is: X-CSQA's files hold their rows, and their options, in another order in
    every language. Elsewhere the number of a row says it, as long as the gold answer is the same: rows that share a
    number and not the answer count as different questions.

    Args:
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

    Args:
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
    """Returns (rows_KL, values_KL): rows of each question in each language, and the sum of their values."""
    # Sorted: which question a draw hits must depend neither on a set's order nor on that of the languages.
    place = {question: k for k, question in enumerate(sorted({q for asked in questions.values() for q in asked}))}
    rows_KL, values_KL = np.zeros((2, len(place), len(questions)))
    for language, (name, asked) in enumerate(questions.items()):
        at = [place[question] for question in asked]
        # Added up: what is drawn together may have several rows in a language, as hypotheses of one premise.
        np.add.at(rows_KL[:, language], at, 1)
        np.add.at(values_KL[:, language], at, values[name])
    return rows_KL, values_KL


def bootstrap_intervals(
    questions: dict[str, list[Question]], correct: dict[str, list[float]], seed: int, resamples: int = RESAMPLES
) -> tuple[dict[str, list[float]], list[float]]:
    """Computes 95 % percentile bootstrap intervals (Efron 1979) of each language's accuracy and of the unweighted mean.

    Languages: drawing n right-or-wrong rows with replacement is drawing a Binomial(n, correct / n), so the resampled
    accuracies are drawn directly; of graded rows, the rows are. A language's interval depends on the seed and its name
    alone, not on which other languages were evaluated.

    Mean: rows that ask one question in different languages tend to be right together, so questions are drawn with
    replacement, each with its rows in all languages (cluster bootstrap, Field and Welsh 2007). With w_k the number of
    times that question k was drawn, y_kl whether its row in language l is right, 0 where it has none, and r_kl whether
    it has one,

        mean* = 1/L sum_l (sum_k w_k y_kl / sum_k w_k r_kl),  w ~ Multinomial(K; 1/K, ..., 1/K).

    A language that a resample misses counts with its accuracy over all its rows. Where no question stands in two
    languages there is nothing to draw together: the mean is that of the languages' own draws.

    Args:
        questions: language to the question of each row, at least one, as `questions_of` gives them.
        correct: language to whether each row is right, or its grade from 0 to 1.
        seed: of the resampling.

    Returns:
        language to [low, high], and [low, high] of the mean, in percent.
    """
    draws = {}
    for language, marks in correct.items():
        # crc32 and not hash(), which Python salts anew in every process.
        generator = np.random.default_rng([seed, zlib.crc32(language.encode())])
        if is_right_or_wrong(marks):
            drawn = generator.binomial(len(marks), sum(marks) / len(marks), size=resamples) / len(marks)
        else:
            drawn = _resampled_means(np.asarray(marks, dtype=float), generator, resamples)
        draws[language] = 100 * drawn
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
        # A language of few rows, as in the five-row excerpts of X-CSQA, is missed by one resample in e^5: no 0 / 0
        # then.
        np.divide(times_RK @ right_KL, rows_RL, out=accuracy_RL, where=rows_RL > 0)
        means.append(100 * accuracy_RL.mean(1))
        left -= size
    return intervals, _percentiles(np.concatenate(means))


def is_right_or_wrong(marks: Iterable[float]) -> bool:
    """Returns whether marks are right or wrong, 1 or 0, and not grades between."""
    return all(mark in (0, 1) for mark in marks)


def _resampled_means(marks_N: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    number = len(marks_N)
    # In parts: ten thousand times a thousand rows at once are 160 MB.
    step = max(1, DRAWN_AT_ONCE // number)
    sizes = [min(step, resamples - done) for done in range(0, resamples, step)]
    return np.concatenate([marks_N[generator.integers(number, size=(size, number))].mean(1) for size in sizes])


def _percentiles(values: np.ndarray) -> list[float]:
    return [round(float(bound), 4) for bound in np.quantile(values, [0.025, 0.975])]


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Computes the two-sided exact McNemar test (McNemar 1947): the p-value of as uneven a split of the items that one
    run alone got right, or a more uneven one, if both runs were equally good: 2 · P(Binomial(n, ½) ≤ min), at most 1.

    Args:
        only_first, only_second: how many items the first, respectively the second, run alone got right.
    """
    n, smaller = only_first + only_second, min(only_first, only_second)
    term = total = 1  # C(n, 0); exact integers, each binomial coefficient made from the one before
    for i in range(smaller):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**n)


def row_test(questions: list[Question], differences: list[float], seed: int) -> float:
    """Computes the p-value of one language's difference: the exact McNemar test where rows are right or wrong, else,
    where they are graded, `mean_difference_test`.

    Args:
        questions: of each row.
        differences: second run minus first, of each row.
        seed: of the signs.
    """
    if is_right_or_wrong(map(abs, differences)):
        return mcnemar_exact(differences.count(-1), differences.count(1))
    return mean_difference_test({"": questions}, {"": differences}, seed)


def mean_difference_test(
    questions: dict[str, list[Question]], differences: dict[str, list[float]], seed: int, over_rows: bool = False
) -> float:
    """Computes a two-sided sign-flip test (Fisher 1935) of the difference in mean accuracy of two runs on equal rows.

    With d_kl = 1, 0 or -1 as the second run is better, equal or worse on question k in language l (of graded rows: the
    difference of their grades), and n_l rows in language l, the difference is the sum over questions of
    D_k = 1/L sum_l d_kl / n_l. If both runs were equally good, exchanging their answers to a question, in all languages
    together, would change nothing: every D_k could as well have the other sign. So with signs drawn at random (Phipson
    and Smyth 2010),

        p = (1 + number of flips with |sum_k s_k D_k| >= |sum_k D_k|) / (1 + number of flips).

    In one language this is the exact McNemar test, up to the drawing of 100,000 flips.

    Args:
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
    flipped, once = np.zeros(FLIPS), times == 1
    # Grades differ in size from question to question: their signs are drawn many at once, in a fraction of the time.
    if once.sum() > MANY_SIZES:
        for part in np.array_split(sizes[once], -(-once.sum() // MANY_SIZES)):
            flipped += (2.0 * generator.integers(2, size=(FLIPS, len(part)), dtype=np.int8) - 1) @ part
        sizes, times = sizes[~once], times[~once]
    for size, m in zip(sizes[sizes > 0], times[sizes > 0], strict=True):
        flipped += size * (2.0 * generator.binomial(m, 0.5, size=FLIPS) - m)
    # What differs by rounding alone is as far away.
    as_far = np.abs(flipped) >= abs(differences_K.sum()) - 1e-9
    return (1 + int(as_far.sum())) / (1 + FLIPS)


def holm(p_values: list[float]) -> list[float]:
    """Returns Holm's step-down adjusted p-values (Holm 1979), in the order given."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def format_p(value: float) -> str:
    """Writes a p-value for a table."""
    return "<0.0001" if value < 1e-4 else f"{value:.2g}"
