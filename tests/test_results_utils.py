"""Statistics, tables and comparisons of results folders, on numbers made by hand."""

import json
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import results_utils
from results_utils import (
    ResultsError,
    append_records,
    bootstrap_intervals,
    compare_results,
    format_results,
    mcnemar_exact,
    open_results,
    open_shard,
    published_scores,
    read_finished,
)

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


def test_bootstrap_interval_is_a_function_of_seed_and_language_alone():
    """Adding a language must not move another one's interval between two tables of the same run."""
    one, _ = bootstrap_intervals({"Thai": (30, 100)}, seed=7)
    both, _ = bootstrap_intervals({"Swahili": (10, 100), "Thai": (30, 100)}, seed=7)
    assert one["Thai"] == both["Thai"]
    assert len({tuple(bootstrap_intervals({"Thai": (137, 250)}, seed)[1]) for seed in range(30)}) > 1


def test_bootstrap_interval_equals_resampling_the_items_themselves():
    items = np.array([1] * 150 + [0] * 100)
    drawn = np.random.default_rng(3).choice(items, size=(10_000, 250)).mean(axis=1)
    low, high = 100 * np.quantile(drawn, [0.025, 0.975])
    found, mean = bootstrap_intervals({"Thai": (150, 250)}, seed=0)
    assert abs(found["Thai"][0] - low) <= 0.8 and abs(found["Thai"][1] - high) <= 0.8
    assert mean == found["Thai"]


def test_bootstrap_interval_of_the_mean_is_narrower_than_one_language():
    found, mean = bootstrap_intervals(dict.fromkeys("abcd", (125, 250)), seed=0)
    width = found["a"][1] - found["a"][0]
    assert width / 2.3 < mean[1] - mean[0] < width / 1.7  # a half for four languages
    assert bootstrap_intervals({"a": (0, 9), "b": (9, 9)}, 0) == ({"a": [0, 0], "b": [100, 100]}, [50, 50])


# -- published numbers

PUBLISHED = {
    "Llama2-7B-X": {"avg": 50.0, "Thai": 40.0, "English": 60.0},
    "Llama2-7B-X + MindMerger": {"avg": 60.0, "Thai": 55.0, "English": 65.0},
    "LLaMAX-7B-X": {"avg": 52.0, "Thai": 44.0, "English": 60.0},
    "LLaMAX-7B-X + MindMerger": {"avg": 61.0, "Thai": 57.0, "English": 65.0},
}


@pytest.mark.parametrize(
    ("form", "llm_path", "label"),
    [
        ("soft", "LLaMAX/LLaMAX2-7B-X-CSQA", "LLaMAX-7B-X + MindMerger"),
        ("llm_only", "LLaMAX/LLaMAX2-7B-X-CSQA", "LLaMAX-7B-X"),
        ("soft", "../LLMs/Llama-2-7b-x", "Llama2-7B-X + MindMerger"),
        ("soft", "models/other", "LLaMAX-7B-X + MindMerger"),
    ],
)
def test_published_row_is_that_of_the_same_form_and_llm(form, llm_path, label):
    found = published_scores(PUBLISHED, form, llm_path, ["Thai", "English"])
    assert (found["label"], found["mean"], found["note"]) == (label, PUBLISHED[label]["avg"], "")


def test_published_mean_covers_the_languages_of_the_table():
    """The published average over all languages beside a run on one would compare different things."""
    found = published_scores(PUBLISHED, "soft", "LLaMAX", ["Thai"])
    assert found["mean"] == 57.0 and "of this table" in found["note"]
    assert published_scores(PUBLISHED, "hard", "LLaMAX", ["Thai"]) is None
    average_only = published_scores({"LLM alone": {"avg": 37.9}}, "llm_only", "x", ["Thai"])
    assert average_only["mean"] == 37.9 and "the average alone" in average_only["note"]
    assert published_scores(PUBLISHED, "soft", "LLaMAX", ["Amharic"]) is None


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
    assert rows["Thai"] == ["Thai", "8", "25.0", "75.0", "+50.0", "1", "5", "0.22"]
    assert rows["all items"][2:] == ["8", "25.0", "75.0", "+50.0", "1", "5", "0.22"]
    assert "German" not in rows
    assert "8 items in common (A has 9, B has 9)" in lines[-1]


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
    (tmp_path / results_utils.PARTIAL).mkdir()
    return tmp_path / results_utils.PARTIAL


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
def test_a_line_that_is_no_record_is_as_good_as_lost(partial, line):
    shard = append(partial, 0, batch(5, 2))
    with open(shard, "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    append(partial, 0, batch(7))
    assert read_finished(partial).keys() == {5, 2, 7}


def test_a_rank_that_outlives_its_run_writes_nothing_into_the_next_ones_folder(tmp_path):
    open_results(tmp_path, {"--limit": 1}, 9, overwrite=False)
    with open_shard(tmp_path, 1) as of_the_dead_run:
        open_results(tmp_path, {"--limit": 2}, 9, overwrite=True)
        append_records(of_the_dead_run, batch(1))
    assert read_finished(tmp_path / results_utils.PARTIAL) == {}


def test_a_full_disk_names_file_and_bytes(partial, tmp_path):
    no_space = pytest.raises(ResultsError, match=r"cannot write /dev/full \(\d\d+ bytes\): No space left")
    with open("/dev/full", "ab", buffering=0) as full, no_space:
        append_records(full, batch(1))
    with pytest.raises(ResultsError, match=r"cannot write .*rank0.jsonl \(No such file"):
        open_shard(tmp_path / "absent", 0)


def test_reopening_leaves_no_cut_line_for_new_ones_to_follow(tmp_path):
    """A line appended to one without its end would be lost, and then be generated for ever."""
    assert open_results(tmp_path, {"--limit": 1}, 9, overwrite=False) == (None, {})
    partial = tmp_path / results_utils.PARTIAL
    append(partial, 0, batch(5, 2))
    with open(partial / "rank0.jsonl", "a") as file:
        file.write('{"index": 7, "outp')
    for _ in range(2):
        results, finished = open_results(tmp_path, {"--limit": 1}, 9, overwrite=False)
        assert results is None and finished.keys() == {5, 2}
        append(partial, 0, batch(1))
        assert read_finished(partial).keys() == {1, 2, 5}
        (partial / "rank0.jsonl").unlink()


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_another_identity_is_refused_by_name_and_loses_nothing(tmp_path, state):
    open_results(tmp_path, {"--task": "xnli", "--limit": 1}, 9, overwrite=False)
    if state == "finished":
        (tmp_path / "results.json").write_text(json.dumps({"identity": {"--task": "xnli", "--limit": 1}}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ResultsError, match=rf"{state} evaluation with another --limit: 1 then, 2 now.*--overwrite"):
        open_results(tmp_path, {"--task": "xnli", "--limit": 2}, 9, overwrite=False)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert open_results(tmp_path, {"--task": "xnli", "--limit": 2}, 9, overwrite=True) == (None, {})


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_what_a_killed_writer_left_goes_at_the_next_start(tmp_path, state):
    open_results(tmp_path, {}, 9, overwrite=False)
    (tmp_path / "predictions").mkdir()
    expected = {".notes.tmp", "predictions"}
    if state == "finished":  # and .partial was not removed any more
        (tmp_path / "results.json").write_text('{"identity": {}}')
        expected |= {"results.json"}
    else:
        expected |= {results_utils.PARTIAL}
    names = (".results.json.1.tmp", ".scores.tsv.1.tmp", "predictions/.Thai.jsonl.1.tmp", ".partial/.run.json.1.tmp")
    for name in (*names, ".notes.tmp"):
        (tmp_path / name).write_text("{")
    open_results(tmp_path, {}, 9, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert not [path for path in tmp_path.glob("*/*") if path.suffix == ".tmp"]


def test_overwrite_leaves_what_is_not_an_evaluations(tmp_path):
    open_results(tmp_path, {}, 9, overwrite=False)
    append(tmp_path / results_utils.PARTIAL, 0, batch(1))
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "Thai.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    assert open_results(tmp_path, {}, 9, overwrite=True) == (None, {})
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", results_utils.PARTIAL}


def test_unreadable_state_is_one_line(tmp_path):
    (tmp_path / "results.json").write_text('{"identity": ')
    with pytest.raises(ResultsError, match="results.json cannot be read.*--overwrite"):
        open_results(tmp_path, {}, 9, overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot use the results folder .*file/xnli: Not a directory"):
        open_results(tmp_path / "file" / "xnli", {}, 9, overwrite=False)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"identity": [1]}', '{"identity": {}, "versions": [1]}'])
@pytest.mark.parametrize("name", ["results.json", ".partial/run.json"])
def test_hostile_state_is_one_line(tmp_path, name, content):
    open_results(tmp_path, {}, 9, overwrite=False)
    (tmp_path / name).write_text(content)
    with pytest.raises(ResultsError, match=f"{name} (cannot be read|is not what an evaluation writes).*--overwrite"):
        open_results(tmp_path, {}, 9, overwrite=False)
