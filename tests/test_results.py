"""Statistics, tables and comparisons of results folders, on numbers made by hand."""

import json
import tracemalloc
from fractions import Fraction
from math import comb

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mindmerger.evaluation import results as evaluation_results
from mindmerger.evaluation.comparison import compare_results
from mindmerger.evaluation.results import ResultsError, append_records, open_results, open_shard, read_finished
from mindmerger.evaluation.statistics import (
    bootstrap_intervals,
    describe_questions,
    mcnemar_exact,
    mean_difference_test,
    questions_of,
)
from mindmerger.evaluation.tables import format_results, published_scores
from mindmerger.tasks import TASKS
from mindmerger.tasks.base import PUBLISHED_LLMS

# -- statistics


def test_mcnemar_equals_values_worked_out_by_hand():
    # 2 * (C(6,0) + C(6,1)) / 2^6
    assert mcnemar_exact(1, 5) == mcnemar_exact(5, 1) == 14 / 64
    assert mcnemar_exact(0, 8) == 2 / 256
    assert mcnemar_exact(2, 3) == mcnemar_exact(3, 3) == mcnemar_exact(0, 0) == mcnemar_exact(0, 1) == 1.0


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_two_sided_binomial_tail(first, second):
    n, smaller = first + second, min(first, second)
    tail = Fraction(2 * sum(comb(n, i) for i in range(smaller + 1)), 2**n)
    assert mcnemar_exact(first, second) == float(min(tail, 1))


def test_mcnemar_survives_counts_whose_binomials_overflow_floats():
    assert 0 < mcnemar_exact(9_800, 10_200) < 0.01
    assert mcnemar_exact(0, 30_000) == 0.0


def by_number(correct):
    """Questions of rows that are known by their numbers, all of the same gold answer in every language."""
    return {name: [(str(i), "", 0) for i in range(len(marks))] for name, marks in correct.items()}


def intervals_of(correct, seed=0, questions=None, **options):
    return bootstrap_intervals(questions or by_number(correct), correct, seed, **options)


def marks(right, n):
    return [True] * right + [False] * (n - right)


def test_bootstrap_interval_is_a_function_of_seed_and_language_alone():
    """Adding a language must not move another one's interval between two tables of the same run."""
    one, _ = intervals_of({"Thai": marks(30, 100)}, seed=7)
    both, _ = intervals_of({"Swahili": marks(10, 100), "Thai": marks(30, 100)}, seed=7)
    assert one["Thai"] == both["Thai"]
    assert len({tuple(intervals_of({"Thai": marks(137, 250)}, seed)[1]) for seed in range(30)}) > 1
    # As they were before the mean's interval took questions together.
    recorded, _ = intervals_of({"Thai": marks(137, 250), "Swahili": marks(10, 100)}, seed=7)
    assert recorded == {"Thai": [48.4, 60.8], "Swahili": [5.0, 16.0]}


def test_bootstrap_interval_equals_resampling_the_items_themselves():
    items = np.array([1] * 150 + [0] * 100)
    drawn = np.random.default_rng(3).choice(items, size=(10_000, 250)).mean(axis=1)
    low, high = 100 * np.quantile(drawn, [0.025, 0.975])
    found, mean = intervals_of({"Thai": marks(150, 250)})
    assert abs(found["Thai"][0] - low) <= 0.8 and abs(found["Thai"][1] - high) <= 0.8
    assert mean == found["Thai"]


def width(interval):
    return interval[1] - interval[0]


def test_interval_of_the_mean_is_as_wide_as_one_language_where_all_get_the_same_questions_right():
    """Ten copies of one language say no more than one; taken for independent they gave a third of the width."""
    found, mean = intervals_of({f"language {i}": marks(125, 250) for i in range(10)})
    assert abs(width(mean) - width(found["language 0"])) < 0.8
    # Where half of the languages are right on what the others get wrong, every question adds the same.
    opposite = {"a": marks(125, 250), "b": marks(125, 250)[::-1]}
    assert intervals_of(opposite)[1] == [50, 50]


def test_interval_of_the_mean_is_narrower_than_one_language_where_questions_have_nothing_in_common():
    own = {name: [(f"{name}{i}", "", 0) for i in range(250)] for name in "abcd"}
    found, mean = intervals_of({name: marks(125, 250) for name in "abcd"}, questions=own)
    assert width(found["a"]) / 2.3 < width(mean) < width(found["a"]) / 1.7  # a half for four languages
    assert intervals_of({"a": marks(0, 9), "b": marks(9, 9)}) == ({"a": [0, 0], "b": [100, 100]}, [50, 50])


def some_runs(seed, questions=120, languages=5, missing=0.0):
    """Marks of two runs on questions that are easy or hard in all languages alike, as {language: {number: bool}}."""
    rng = np.random.default_rng(seed)
    easy = rng.random(questions) < 0.5
    runs = [{}, {}]
    for i in range(languages):
        kept = np.flatnonzero(rng.random(questions) >= missing * (i > 0))
        for better, run in enumerate(runs):
            right = rng.random(questions) < 0.7 * easy + 0.1 + 0.08 * better
            run[f"language {i}"] = {str(k): bool(right[k]) for k in kept}
    return runs


def listed(run):
    return (
        {name: [(number, "", 0) for number in items] for name, items in run.items()},
        {name: list(items.values()) for name, items in run.items()},
    )


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_interval_of_the_mean_equals_scipys_bootstrap_of_questions(missing):
    [run, _] = some_runs(1, missing=missing)
    questions, correct = listed(run)
    value_KL = np.array([[items.get(str(k), np.nan) for items in run.values()] for k in range(120)], dtype=float)

    def mean_of(indices):
        return 100 * np.nanmean(np.nanmean(value_KL[indices], axis=0))

    expected = scipy.stats.bootstrap(
        (np.arange(120),), mean_of, vectorized=False, n_resamples=5000, method="percentile", rng=2
    ).confidence_interval
    _, (low, high) = bootstrap_intervals(questions, correct, 0)
    assert abs(low - expected.low) < 0.5 and abs(high - expected.high) < 0.5
    independent = {name: [(name + number, "", 0) for number, _, _ in asked] for name, asked in questions.items()}
    assert width([low, high]) > 1.3 * width(bootstrap_intervals(independent, correct, 0)[1])


def test_a_language_that_a_resample_misses_leaves_the_interval_finite():
    """Languages of few rows, as in the five-row excerpts of X-CSQA, are missed by one resample in e^5."""
    correct = {"English": marks(500, 1000)} | {f"language {i}": [True, False, True] for i in range(15)}
    _, (low, high) = intervals_of(correct)
    assert 0 <= low < 100 * (0.5 + 15 * 2 / 3) / 16 < high <= 100


def test_bootstrap_of_as_many_questions_as_xnli_has_takes_little_memory():
    correct = {name: marks(2500, 5010) for name in "ab"}
    tracemalloc.start()
    intervals_of(correct, resamples=4000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20  # the weights alone would take 160 MB at once


def test_mcnemar_equals_scipys_binomial_test():
    for first, second in ((1, 5), (18, 0), (40, 61), (7, 7)):
        p = scipy.stats.binomtest(first, first + second).pvalue
        assert abs(mcnemar_exact(first, second) - p) < 1e-12


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_test_of_the_mean_equals_scipys_permutation_of_whole_questions(missing):
    """Twelve questions, so that scipy walks all 2^12 exchanges of the two runs' answers."""
    first, second = some_runs(4, questions=12, missing=missing)
    numbers = sorted({number for items in first.values() for number in items})
    both = [
        [np.mean([items.get(k, 0) / len(items) for items in run.values()]) for k in numbers] for run in (first, second)
    ]

    def difference(a, b, axis):
        return b.sum(axis=axis) - a.sum(axis=axis)

    expected = scipy.stats.permutation_test(both, difference, permutation_type="samples", n_resamples=np.inf).pvalue
    questions, _ = listed(first)
    changes = {name: [second[name][k] - right for k, right in items.items()] for name, items in first.items()}
    assert abs(mean_difference_test(questions, changes, 0) - expected) < 0.006
    assert 0.001 < expected < 0.9


def test_test_of_the_mean_is_mcnemars_in_one_language_and_never_gains_from_copies_of_it():
    """Pooled over ten copies of a language, 4 against 12 changed answers would look like 40 against 120."""
    changes = [1] * 12 + [-1] * 4 + [0] * 34
    exact = mcnemar_exact(12, 4)
    for copies in (1, 10):
        differences = {f"language {i}": changes for i in range(copies)}
        for over_rows in (False, True):
            p = mean_difference_test(by_number(differences), differences, 0, over_rows)
            assert abs(p - exact) < 0.004
    assert mean_difference_test(by_number({"a": [0, 0]}), {"a": [0, 0]}, 0) == 1.0


# -- which rows ask the same question


def test_rows_are_one_question_by_number_and_answer_or_by_their_own_id():
    answers = {
        "English": ("8.0", "9", "2,125", "72.5"),
        "German": ("8", "7", "2,125", "72,5"),  # as MGSM's German file writes it, and as a German would
    }
    questions = {}
    for name, golds in answers.items():
        rows = [{"id": f"{name[:2]}-{i}", "answer": gold} for i, gold in enumerate(golds, 1)]
        questions[name] = questions_of("math_mgsm", name, rows)
    same = [a == b for a, b in zip(*questions.values(), strict=True)]
    assert same == [True, False, True, True]
    assert describe_questions(questions) == {
        "unit": "question",
        "rows": 8,
        "questions": 5,
        "questions_in_every_language": 3,
        "numbers_with_different_answers": 1,
    }
    # X-CSQA: other order, other letters, the same two questions.
    english = [{"id": "en-1", "question": "a", "answer": "A"}, {"id": "en-2", "question": "b", "answer": "B"}]
    german = [{"id": "de-1", "question": "b", "answer": "C"}, {"id": "de-2", "question": "a", "answer": "D"}]
    assert questions_of("x-csqa", "English", english) == questions_of("x-csqa", "German", german)[::-1]


def test_an_id_that_stands_several_times_makes_no_question_of_several_rows():
    rows = [{"id": f"en-{i}", "question": "x", "answer": "A"} for i in range(9)]
    questions = {"English": questions_of("x-csqa", "English", rows)}
    assert len(set(questions["English"])) == 9
    assert describe_questions(questions)["unit"] == "row"


# -- published numbers

MSVAMP, MGSM, XNLI, X_CSQA = TASKS["math_msvamp"], TASKS["math_mgsm"], TASKS["xnli"], TASKS["x-csqa"]
MGSM_ROWS = dict.fromkeys(MGSM.evaluation_languages, 250)
XNLI_ROWS = dict.fromkeys(XNLI.evaluation_languages, 5010)


def published_label(task, form, llm, mt="google/mt5-xl", rows=MGSM_ROWS):
    found = published_scores(task, form, str(llm), mt and str(mt), rows)
    return found and found["label"]


@pytest.mark.parametrize(
    ("task", "rows", "form", "llm", "label"),
    [
        (MGSM, MGSM_ROWS, "soft", "meta-math/MetaMath-7B-V1.0", "MindMerger-Soft (MetaMath-7B)"),
        (
            MGSM,
            MGSM_ROWS,
            "llm_only",
            "meta-math/MetaMath-7B-V1.0",
            "LLM alone (MetaMath-7B, over ten languages, Telugu left out)",
        ),
        (XNLI, XNLI_ROWS, "soft", "LLaMAX/LLaMAX2-7B-XNLI", "LLaMAX-7B-X-XNLI + MindMerger"),
        (XNLI, XNLI_ROWS, "llm_only", "llamax/llamax2-7b-xnli", "LLaMAX-7B-X-XNLI"),
        # Other LLMs, and the right LLM in the Hard form, which has no row.
        (MGSM, MGSM_ROWS, "hard", "meta-math/MetaMath-7B-V1.0", None),
        (MGSM, MGSM_ROWS, "llm_only", "meta-math/MetaMath-13B-V1.0", None),
        (MGSM, MGSM_ROWS, "llm_only", "someone/MetaMath-7B-V1.0", None),
        (MGSM, MGSM_ROWS, "llm_only", "LLaMAX/LLaMAX2-7B-XNLI", None),
        (XNLI, XNLI_ROWS, "soft", "LLaMAX/LLaMAX2-7B-X-CSQA", None),
        (XNLI, XNLI_ROWS, "llm_only", "meta-llama/Llama-2-7b-hf", None),
    ],
)
def test_published_row_is_that_of_the_same_form_and_llm_or_none(task, rows, form, llm, label):
    assert published_label(task, form, llm, rows=rows) == label


def test_published_row_of_mindmerger_is_for_its_encoder_only():
    llm = "meta-math/MetaMath-7B-V1.0"
    assert published_label(MGSM, "soft", llm, "google/mt5-xl")
    for encoder in ("google/mt5-base", "facebook/nllb-200-distilled-600M", "google/mt5-xxl"):
        assert published_label(MGSM, "soft", llm, encoder) is None
    assert published_label(MGSM, "llm_only", llm, None)


def test_a_folder_is_the_published_llm_by_its_name_or_its_place_in_the_hubs_cache(tmp_path):
    cache = tmp_path / "hub/models--meta-math--MetaMath-7B-V1.0/snapshots/0123abcd"
    other_cache = tmp_path / "hub/models--someone--MetaMath-7B-V1.0/snapshots/0123abcd"
    named, renamed = tmp_path / "LLMs/metamath-7b-v1.0", tmp_path / "LLMs/math-7b"
    fine_tuned, nested = tmp_path / "LLMs/MetaMath-7B-V1.0-swahili", tmp_path / "MetaMath-7B-V1.0/checkpoint-500"
    for folder in (cache, other_cache, named, renamed, fine_tuned, nested):
        folder.mkdir(parents=True)
        # What transformers 4 left in every folder that was tuned from the model, too.
        (folder / "config.json").write_text('{"_name_or_path": "meta-math/MetaMath-7B-V1.0"}')
    (tmp_path / "link").symlink_to(cache)
    shown = [
        f for f in (cache, other_cache, named, renamed, fine_tuned, nested) if published_label(MGSM, "llm_only", f)
    ]
    assert shown == [cache, named] and published_label(MGSM, "llm_only", tmp_path / "link")
    # A merge under the model's own name is another model.
    (named / "merge.json").write_text("{}")
    assert published_label(MGSM, "llm_only", named) is None


def test_published_numbers_say_which_languages_and_items_they_cover():
    """Beside a run on the first hundred questions the published mean would look like a target for them."""
    llm, encoder = "LLaMAX/LLaMAX2-7B-XNLI", "google/mt5-xl"
    whole = published_scores(XNLI, "soft", llm, encoder, XNLI_ROWS)
    assert (whole["mean"], whole["note"]) == (79.2, "")
    thai = published_scores(XNLI, "soft", llm, encoder, {"Thai": 5010})
    assert thai["mean"] == 73.4 and thai["note"] == "; mean over the languages of this table"
    few = published_scores(XNLI, "soft", llm, encoder, dict.fromkeys(XNLI.evaluation_languages, 100))
    assert few["mean"] == 79.2 and few["note"] == "; on other items: 5010 rows of each language, here 100"
    assert published_scores(XNLI, "soft", llm, encoder, {"Amharic": 5010}) is None
    # An average alone has no place beside fewer languages than it covers.
    metamath = "meta-math/MetaMath-7B-V1.0"
    alone = published_scores(MGSM, "llm_only", metamath, None, MGSM_ROWS)
    assert alone["mean"] == 37.9 and alone["note"] == "; of which the average alone is published"
    assert published_scores(MGSM, "llm_only", metamath, None, {"Thai": 250}) is None


def test_every_published_row_names_its_llm():
    for task in TASKS.values():
        for label in task.published:
            assert len([name for name in PUBLISHED_LLMS if name in label]) == 1, label


# -- results folders


def make_results(folder, correct, task="math_mgsm", form="soft", sources=None):
    """A finished folder; `correct` is {language: {id: bool}}."""
    languages = {}
    for language, items in correct.items():
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
        rows = [
            {"id": id, "source": (sources or {}).get(id, f"question {id}\u2028"), "answer": "1", "correct": right}
            for id, right in items.items()
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "predictions" / f"{language}.jsonl").write_text(lines, encoding="utf-8")
        languages[language] = {"n": len(items)}
    (folder / "results.json").write_text(json.dumps({"task": task, "form": form, "languages": languages}))
    return str(folder)


def test_comparison_shows_both_accuracies_difference_and_p_on_common_items(tmp_path):
    ids = [f"th-{i}" for i in range(8)]
    a = make_results(
        tmp_path / "a", {"Thai": dict(zip(ids, [1, 1, 0, 0, 0, 0, 0, 0], strict=True)), "German": {"de-1": 1}}
    )
    b = make_results(
        tmp_path / "b", {"Thai": dict(zip(ids, [1, 0, 1, 1, 1, 1, 1, 0], strict=True) | {"th-99": 1}.items())}
    )
    lines = compare_results([a + "/", b]).splitlines()
    rows = {line.split("  ")[0]: line.split() for line in lines}
    # common: 8 items, A 2 right, B 6 right, 1 only A, 5 only B: p = 14/64
    assert rows["Thai"] == ["Thai", "8", "25.0", "75.0", "+50.0", "1", "5", "0.22", "0.22"]
    assert rows["all items"][2:] == ["8", "25.0", "75.0", "+50.0", "1", "5", "0.22"]
    assert rows["mean of languages"][3:] == ["25.0", "75.0", "+50.0", "0.22"]
    assert "German" not in rows
    assert "8 items in common (A has 9, B has 9)" in lines[-1]


def test_comparison_corrects_over_languages_and_tests_the_mean_on_whole_questions(tmp_path):
    """The same eight questions change in all of three languages: that is one piece of evidence, not three."""
    names = {"Thai": "th", "Swahili": "sw", "German": "de"}
    runs = {
        "a": {name: {f"{code}-{i}": i >= 8 for i in range(30)} for name, code in names.items()},
        "b": {name: {f"{code}-{i}": i > 0 for i in range(30)} for name, code in names.items()},
    }
    folders = [make_results(tmp_path / name, correct) for name, correct in runs.items()]
    lines = {line.split("  ")[0]: line.split() for line in compare_results(folders).splitlines()}
    p = 2 / 2**7  # 7 against 0
    assert lines["Thai"][-2:] == [f"{p:.2g}", f"{3 * p:.2g}"]
    for row in ("all items", "mean of languages"):
        assert abs(float(lines[row][-1]) - p) < 0.002
    text = compare_results(folders)
    assert "30 questions are flipped, each with its rows in all languages" in text


def test_comparison_of_three_puts_each_beside_the_first(tmp_path):
    folders = [make_results(tmp_path / name, {"Thai": {"th-1": name != "a"}}) for name in "abc"]
    text = compare_results(folders)
    assert text.count(f"A: {folders[0]} ") == 2
    assert f"B: {folders[1]} " in text and f"B: {folders[2]} " in text


def test_comparison_refuses_what_is_not_the_same_items(tmp_path):
    a = make_results(tmp_path / "a", {"Thai": {"th-1": True}})
    cases = {
        "math_mgsm but .* is xnli": make_results(tmp_path / "task", {"Thai": {"th-1": True}}, task="xnli"),
        "no item in common": make_results(tmp_path / "items", {"Thai": {"th-2": True}}),
        "another question": make_results(tmp_path / "text", {"Thai": {"th-1": True}}, sources={"th-1": "other"}),
        "no results folder": str(tmp_path / "absent"),
        r"it holds .*a, ": str(tmp_path),
    }
    for message, b in cases.items():
        with pytest.raises(ResultsError, match=message) as caught:
            compare_results([a, b])
        assert "\n" not in str(caught.value)
    with pytest.raises(ResultsError, match="at least two"):
        compare_results([a])


def test_comparison_names_file_and_line_of_a_broken_prediction(tmp_path):
    a = make_results(tmp_path / "a", {"Thai": {"th-1": True, "th-2": True}})
    b = make_results(tmp_path / "b", {"Thai": {"th-1": True, "th-2": True}})
    file = tmp_path / "b" / "predictions" / "Thai.jsonl"
    file.write_text(file.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    with pytest.raises(ResultsError, match=r"Thai.jsonl:2: not a prediction"):
        compare_results([a, b])
    (tmp_path / "b" / "results.json").write_text("[]")
    with pytest.raises(ResultsError, match="not the results of an evaluation"):
        compare_results([a, b])


BAD_PREDICTIONS = {
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"id": "th-1", "source": "\xff", "answer": "1", "correct": true}',
    "no truth value": b'{"id": "th-1", "source": "question", "answer": "1", "correct": "yes"}',
    "a list as id": b'{"id": [], "source": "question", "answer": "1", "correct": true}',
    "a number as answer": b'{"id": "th-1", "source": "question", "answer": 1, "correct": true}',
    "a list as question": b'{"id": "th-1", "question": [], "source": "question", "answer": "1", "correct": true}',
}


@pytest.mark.parametrize("line", BAD_PREDICTIONS.values(), ids=BAD_PREDICTIONS.keys())
def test_comparison_refuses_hostile_predictions_in_one_line(tmp_path, line):
    folders = [make_results(tmp_path / name, {"Thai": {"th-1": True}}) for name in "ab"]
    (tmp_path / "b/predictions/Thai.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ResultsError, match="Thai.jsonl:1: not a prediction"):
        compare_results(folders)


def test_comparison_refuses_a_lost_prediction(tmp_path):
    folders = [make_results(tmp_path / name, {"Thai": {"th-1": True, "th-2": True}}) for name in "ab"]
    file = tmp_path / "b/predictions/Thai.jsonl"
    file.write_bytes(file.read_bytes().split(b"\n")[0] + b"\n")
    with pytest.raises(ResultsError, match=r"b/.*Thai.jsonl holds 1 predictions but results.json counts 2"):
        compare_results(folders)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"task": "math_mgsm", "form": "soft", "languages": {"Thai": {}}}',
        '{"task": "math_mgsm", "form": "soft", "languages": {"Thai": {"n": "1"}}}',
        '{"task": "math_mgsm", "form": [], "languages": {"Thai": {"n": 1}}}',
        "\u00e9",
    ],
)
def test_comparison_refuses_hostile_results_in_one_line(tmp_path, content):
    folders = [make_results(tmp_path / name, {"Thai": {"th-1": True}}) for name in "ab"]
    (tmp_path / "b/results.json").write_text(content, encoding="latin-1")
    with pytest.raises(ResultsError, match="b/results.json is not the results of an evaluation") as caught:
        compare_results(folders)
    assert "\n" not in str(caught.value)


def test_table_shows_what_a_reader_needs():
    one = {"n": 4, "accuracy": 75.0, "interval": [25.0, 100.0]}
    results = {
        "task": "xnli",
        "form": "soft",
        "max_new_tokens": 16,
        "languages": {"Thai": one},
        "mean": {"accuracy": 75.0, "interval": [25.0, 100.0]},
        "published": {"label": "Paper", "note": "", "scores": {"Thai": 73.4}, "mean": 79.2},
        "counts": {"examples": 4, "hit_limit": 1, "cut_sources": 0, "cut_prompts": 0},
    }
    assert format_results(results).splitlines() == [
        "xnli, MindMerger-Soft (mapped source and prompt): accuracy in percent",
        "language  n  accuracy  95 % interval  published",
        "-----------------------------------------------",
        "Thai      4      75.0   25.0 – 100.0       73.4",
        "-----------------------------------------------",
        "mean      4      75.0   25.0 – 100.0       79.2",
        "published: Paper",
        "1 of 4 answers stopped at the limit of 16 new tokens",
    ]


# -- unfinished folders


def batch(*indices):
    whole = {"generated_tokens": 1, "hit_limit": False, "batch": indices[0], "batch_size": len(indices)}
    return [{"index": i, "output": f"{i}", **whole} for i in indices]


def append(partial, rank, *batches):
    """Writes batches as that rank would; returns its file."""
    with open_shard(partial.parent, rank) as shard:
        for records in batches:
            append_records(shard, records)
    return partial / f"rank{rank}.jsonl"


@pytest.fixture
def partial(tmp_path):
    """The folder of an unfinished evaluation's records."""
    (tmp_path / evaluation_results.PARTIAL).mkdir()
    return tmp_path / evaluation_results.PARTIAL


def test_only_whole_batches_count_as_finished_wherever_the_crash_cut(partial):
    """A batch half on disk must be generated again as a whole, or padding would differ from an uninterrupted run."""
    shard = append(partial, 0, batch(5, 2))
    whole = shard.stat().st_size
    append(partial, 0, batch(7, 1, 3))
    content = shard.read_bytes()
    append(partial, 1, batch(4, 0))
    for size in range(whole, len(content)):
        shard.write_bytes(content[:size])
        expected = {5, 2, 4, 0} | ({7, 1, 3} if size == len(content) - 1 else set())  # only the last "\n" is missing
        assert read_finished(partial).keys() == expected


def test_a_batch_written_twice_is_whole_and_one_with_a_line_twice_is_not(partial):
    append(partial, 0, batch(5, 2), batch(5, 2))
    append(partial, 1, batch(4, 0)[:1], batch(4, 0)[:1])
    assert read_finished(partial).keys() == {5, 2}


@pytest.mark.parametrize(
    "line", ["1", "{}", "[]", "null", "[" * 100_000, '{"index": 1, "batch": [], "batch_size": {}}', "\xff"]
)
def test_a_line_that_is_not_a_record_counts_as_lost(partial, line):
    shard = append(partial, 0, batch(5, 2))
    with open(shard, "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    append(partial, 0, batch(7))
    assert read_finished(partial).keys() == {5, 2, 7}


def test_a_rank_that_outlives_its_run_writes_nothing_into_the_next_ones_folder(tmp_path):
    open_results(tmp_path, {"--limit": 1}, [], overwrite=False)
    with open_shard(tmp_path, 1) as of_the_dead_run:
        open_results(tmp_path, {"--limit": 2}, [], overwrite=True)
        append_records(of_the_dead_run, batch(1))
    assert read_finished(tmp_path / evaluation_results.PARTIAL) == {}


def test_a_full_disk_names_file_and_bytes(partial, tmp_path):
    no_space = pytest.raises(ResultsError, match=r"cannot write /dev/full \(\d\d+ bytes\): No space left")
    with open("/dev/full", "ab", buffering=0) as full, no_space:
        append_records(full, batch(1))
    with pytest.raises(ResultsError, match=r"cannot write .*rank0.jsonl \(No such file"):
        open_shard(tmp_path / "absent", 0)


def test_reopening_leaves_no_cut_line_for_new_ones_to_follow(tmp_path):
    """A line appended to one without its end would be lost, and then be generated for ever."""
    assert open_results(tmp_path, {"--limit": 1}, [], overwrite=False) == (None, {})
    partial = tmp_path / evaluation_results.PARTIAL
    append(partial, 0, batch(5, 2))
    with open(partial / "rank0.jsonl", "a") as file:
        file.write('{"index": 7, "outp')
    for _ in range(2):
        results, finished = open_results(tmp_path, {"--limit": 1}, [], overwrite=False)
        assert results is None and finished.keys() == {5, 2}
        append(partial, 0, batch(1))
        assert read_finished(partial).keys() == {1, 2, 5}
        (partial / "rank0.jsonl").unlink()


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_another_identity_is_refused_by_name_and_loses_nothing(tmp_path, state):
    open_results(tmp_path, {"--task": "xnli", "--max_gen_len": 1}, [], overwrite=False)
    if state == "finished":
        (tmp_path / "results.json").write_text(json.dumps({"identity": {"--task": "xnli", "--max_gen_len": 1}}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ResultsError, match=rf"{state} evaluation with another --max_gen_len: 1 then, 2 now.*overwrite"):
        open_results(tmp_path, {"--task": "xnli", "--max_gen_len": 2}, [], overwrite=False)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert open_results(tmp_path, {"--task": "xnli", "--max_gen_len": 2}, [], overwrite=True) == (None, {})


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_what_a_killed_writer_left_goes_at_the_next_start(tmp_path, state):
    open_results(tmp_path, {}, [], overwrite=False)
    (tmp_path / "predictions").mkdir()
    expected = {".notes.tmp", "predictions"}
    if state == "finished":  # and .partial was not removed any more
        (tmp_path / "results.json").write_text('{"identity": {}}')
        expected |= {"results.json"}
    else:
        expected |= {evaluation_results.PARTIAL}
    names = (".results.json.1.tmp", ".scores.tsv.1.tmp", "predictions/.Thai.jsonl.1.tmp", ".partial/.run.json.1.tmp")
    for name in (*names, ".notes.tmp"):
        (tmp_path / name).write_text("{")
    open_results(tmp_path, {}, [], overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert not [path for path in tmp_path.glob("*/*") if path.suffix == ".tmp"]


def test_overwrite_leaves_what_is_not_an_evaluations(tmp_path):
    open_results(tmp_path, {}, [], overwrite=False)
    append(tmp_path / evaluation_results.PARTIAL, 0, batch(1))
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "Thai.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    assert open_results(tmp_path, {}, [], overwrite=True) == (None, {})
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", evaluation_results.PARTIAL}


def test_unreadable_state_is_one_line(tmp_path):
    (tmp_path / "results.json").write_text('{"identity": ')
    with pytest.raises(ResultsError, match="results.json cannot be read.*--overwrite"):
        open_results(tmp_path, {}, [], overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot use the results folder .*file/xnli: Not a directory"):
        open_results(tmp_path / "file" / "xnli", {}, [], overwrite=False)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"identity": [1]}', '{"identity": {}, "versions": [1]}'])
@pytest.mark.parametrize("name", ["results.json", ".partial/run.json"])
def test_hostile_state_is_one_line(tmp_path, name, content):
    open_results(tmp_path, {}, [], overwrite=False)
    (tmp_path / name).write_text(content)
    with pytest.raises(ResultsError, match=f"{name} (cannot be read|is not what an evaluation writes).*--overwrite"):
        open_results(tmp_path, {}, [], overwrite=False)


@pytest.mark.parametrize(
    ("parallel", "wrong"),
    [(5, "translations"), ({}, "translations"), ({"translations": "oracle", "name": "PMI-1", "order": 1}, "order")],
)
def test_results_of_odd_parallel_input_are_one_line(tmp_path, parallel, wrong):
    """Folders written elsewhere, or by hand, were a traceback in the title of a table."""
    folders = [make_results(tmp_path / name, {"Thai": {"th-0": True}}) for name in "ab"]
    file = tmp_path / "b" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"parallel_input": parallel}))
    with pytest.raises(ResultsError, match=f"b/results.json is not .* {wrong} of parallel_input is of a wrong type$"):
        compare_results(folders)


@pytest.mark.parametrize(
    "odd", [{"probe_prefix": 5}, {"probe_prefix": {"kind": ["zero"]}}, {"gold": {"gold_loss": "low"}}, {"bridge": 1}]
)
def test_results_of_an_odd_probe_loss_or_bridge_are_one_line(tmp_path, odd):
    folders = [make_results(tmp_path / name, {"Thai": {"th-0": True}}) for name in "ab"]
    file = tmp_path / "b" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    with pytest.raises(ResultsError, match=f"b/results.json is not .* {next(iter(odd))} is of a wrong type$"):
        compare_results(folders)


def test_an_id_that_stands_twice_is_refused_with_file_and_line(tmp_path):
    """The later row replaced the earlier one, unseen where `results.json` counted the ids."""
    folders = [make_results(tmp_path / name, {"Thai": {"th-0": True, "th-1": False}}) for name in "ab"]
    file = tmp_path / "b" / "predictions" / "Thai.jsonl"
    lines = file.read_text().split("\n")
    file.write_text("\n".join([*lines[:2], lines[0]]))
    with pytest.raises(ResultsError, match=r"b/predictions/Thai\.jsonl:3: the id 'th-0' stands twice"):
        compare_results(folders)


@pytest.mark.parametrize("name", ["predictions", evaluation_results.PARTIAL])
def test_overwrite_removes_a_link_and_leaves_what_it_points_to(tmp_path, name):
    """The end came after results.json was gone: "Cannot call rmtree on a symbolic link"."""
    folder, target = tmp_path / "results", tmp_path / "elsewhere"
    folder.mkdir()
    target.mkdir()
    (target / "Thai.jsonl").write_text("{}\n")
    (folder / "results.json").write_text("{}")
    (folder / name).symlink_to(target)
    assert open_results(folder, {}, [], overwrite=True) == (None, {})
    assert {path.name for path in folder.iterdir()} == {evaluation_results.PARTIAL}
    assert not (folder / name).is_symlink() and (target / "Thai.jsonl").read_text() == "{}\n"


def test_overwrite_never_continues_over_what_it_cannot_remove(tmp_path, monkeypatch):
    open_results(tmp_path, {}, [], overwrite=False)
    append(tmp_path / evaluation_results.PARTIAL, 0, batch(1))
    # As a folder of another user: root may remove any.
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None)
    with pytest.raises(ResultsError, match="--overwrite cannot remove .*/.partial: remove it"):
        open_results(tmp_path, {}, [], overwrite=True)
