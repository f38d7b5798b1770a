"""The comparison table: same items, intervals, paired tests with Holm's correction, labels, missing rows, script."""

import csv
import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

from mindmerger.evaluation.comparison import build_cells, keep_common, read_row
from mindmerger.evaluation.comparison_table import main, make_figure
from mindmerger.evaluation.results import SCORER
from mindmerger.evaluation.statistics import bootstrap_intervals, holm, mcnemar_exact, mean_difference_test
from mindmerger.runtime.errors import UserError


def write_results(folder, correct, task="math_mgsm", parallel=None, source="question"):
    """A finished evaluation's files as far as they are read. correct: {language: string of 1 and 0, one per item}."""
    (folder / "predictions").mkdir(parents=True)
    for language, marks in correct.items():
        rows = [
            {"id": f"{language}-{i}", "source": f"{source} {i}", "answer": "1", "correct": mark == "1"}
            for i, mark in enumerate(marks)
            if mark != " "
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"predictions/{language}.jsonl").write_text(text)
    counts = {language: {"n": len(marks.replace(" ", ""))} for language, marks in correct.items()}
    results = {"task": task, "form": "llm_only", "languages": counts, "parallel_input": parallel}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def three(tmp_path):
    """Folders of three evaluations in two languages."""
    return [
        write_results(tmp_path / "a", {"Swahili": "1100000000" * 3, "Thai": "1111100000" * 3}),
        write_results(tmp_path / "b", {"Swahili": "1111111100" * 3, "Thai": "1111100001" * 3}),
        write_results(tmp_path / "c", {"Swahili": "0000000000" * 3, "Thai": "1111100000" * 3}),
    ]


def table_of(tmp_path, *flags):
    assert main([*map(str, flags), "--output_dir", str(tmp_path / "out")]) == 0
    rows = csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines())
    return {(row["method"], row["language"]): row for row in rows}


def test_holm_equals_a_computation_by_hand():
    # 3 * 0.01, 2 * 0.02, 1 * 0.04: rising as they are.
    assert holm([0.04, 0.01, 0.02]) == [0.04, 0.03, 0.04]
    # A later p-value is never below an earlier one, and none is above 1.
    assert holm([0.02, 0.03, 0.6, 0.9]) == [0.08, 0.09, 1.0, 1.0]
    assert holm([0.3]) == [0.3] and holm([]) == []


def test_cells_hold_accuracy_interval_and_the_corrected_test(three, tmp_path):
    a, b, c = three
    found = table_of(tmp_path, "--row", f"A={a}", "--row", f"B={b}", "--row", f"C={c}", "--against", "A")
    marks = {"Swahili": [*[1] * 8, 0, 0] * 3, "Thai": [*[1] * 5, 0, 0, 0, 0, 1] * 3}
    questions = {language: [(str(i), "1.0", 0) for i in range(30)] for language in marks}
    intervals, mean_interval = bootstrap_intervals(questions, marks, 0)
    row = found["B", "sw"]
    assert (row["items"], row["correct"], row["accuracy"]) == ("30", "24", "80.0")
    assert [float(row["low"]), float(row["high"])] == intervals["Swahili"]
    assert (row["only_method"], row["only_against"], row["difference"]) == ("18", "0", "60.0")
    p = [mcnemar_exact(18, 0), mcnemar_exact(3, 0)]
    assert [float(found["B", code]["p"]) for code in ("sw", "th")] == p
    assert [float(found["B", code]["p_holm"]) for code in ("sw", "th")] == [2 * p[0], p[1]]
    assert found["B", "avg"]["accuracy"] == "70.0" and found["B", "avg"]["difference"] == "35.0"
    assert [float(found["B", "avg"][name]) for name in ("low", "high")] == mean_interval
    assert found["C", "th"]["p"] == "1.0" and found["A", "sw"]["p"] == found["A", "avg"]["p"] == ""
    # C lost Swahili's six right answers: six questions that changed, all for the worse.
    lost = [-1, -1, *[0] * 8] * 3
    p = mean_difference_test(questions, {"Swahili": lost, "Thai": [0] * 30}, 0)
    assert float(found["C", "avg"]["p"]) == p and abs(p - 2 / 2**6) < 0.002


def test_markdown_marks_what_differs_after_the_correction(three, tmp_path, capsys):
    a, b, c = three
    table_of(tmp_path, "--row", f"A={a}", "--row", f"B={b}", "--row", f"C={c}")
    text = (tmp_path / "out/table.md").read_text()
    assert capsys.readouterr().out == text
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert text.splitlines()[4] == "| method | sw | th | avg |"
    accuracy = [line for line in text.splitlines() if line.startswith("| B |")][0]
    # p of Swahili is 2 * 2^-17, that of Thai 0.25; C lost all six Swahili items: p 0.03, after Holm 0.06.
    assert accuracy.startswith("| B | 80.0* [") and " 60.0 [" in accuracy
    assert "+60.0 (p <0.0001)" in lines["B"] and "-20.0 (p 0.0" in lines["C"]
    assert "differs from **A**" in text and "30 items per language" in text
    assert (tmp_path / "out/table.png").read_bytes().startswith(b"\x89PNG")


def test_rows_that_could_not_be_made_are_listed_with_the_reason(three, tmp_path):
    gone = "soup=LANGUAGE_EXPERT is not given"
    found = table_of(tmp_path, "--row", f"A={three[0]}", "--missing", gone, "--row", f"B={three[1]}")
    assert found["soup", ""]["missing"] == "LANGUAGE_EXPERT is not given"
    text = (tmp_path / "out/table.md").read_text()
    # In its place, between A and B.
    assert "|\n| soup | missing | missing | missing |\n| B |" in text
    assert "- soup: LANGUAGE_EXPERT is not given" in text


def test_parallel_input_is_never_shown_without_who_translated(three, tmp_path):
    """An oracle beside a machine's row, unlabelled, would be read as the fair setting."""
    for kind in ("oracle", "machine"):
        parallel = {"translations": kind, "order": "source-first", "name": "PMI-3"}
        write_results(tmp_path / kind, {"Swahili": "1" * 30, "Thai": "1" * 30}, parallel=parallel)
    found = table_of(
        tmp_path,
        "--row",
        f"A={three[0]}",
        "--row",
        f"PMI-3={tmp_path / 'oracle'}",
        "--row",
        f"PMI-3={tmp_path / 'machine'}",
    )
    assert found["PMI-3 (oracle)", "sw"]["translations"] == "oracle"
    assert found["PMI-3 (machine)", "sw"]["translations"] == "machine"
    text = (tmp_path / "out/table.md").read_text()
    assert "| PMI-3 (oracle) |" in text and "| PMI-3 (machine) |" in text and "| PMI-3 |" not in text


def test_only_items_that_all_rows_have_are_counted_and_the_rest_is_noted(three, tmp_path):
    """A row over the first ten items must not stand beside one over thirty as if they were the same."""
    few = write_results(tmp_path / "few", {"Thai": "11" + " " * 28, "Swahili": "01" * 15, "German": "1"})
    found = table_of(tmp_path, "--row", f"A={three[0]}", "--row", f"B={few}")
    assert found["A", "th"]["items"] == found["B", "th"]["items"] == "2"
    assert found["A", "th"]["accuracy"] == "100.0" and ("B", "de") not in found
    text = (tmp_path / "out/table.md").read_text()
    assert "Left out, since not every row has them: German." in text
    assert "Thai: 2 of up to 30 items stand in every row." in text and "2 to 30 items per language" in text
    assert "30 questions are resampled, each with its rows in all languages (2 stand in every language)" in text


def test_wrong_input_is_one_line_and_leaves_nothing(three, tmp_path):
    a, b, _ = three
    other = write_results(tmp_path / "x", {"Swahili": "1"}, task="xnli")
    renamed = write_results(tmp_path / "y", {"Swahili": "1" * 30}, source="another question")
    german = write_results(tmp_path / "z", {"German": "1"})
    first = ["--row", f"A={a}"]
    for flags, message in (
        (["--row", f"X={other}"], "x is xnli but .*a is math_mgsm"),
        (["--row", f"Y={renamed}"], "is another question in"),
        (["--row", f"Z={german}"], "no item in common"),
        (["--row", f"A={b}"], "two rows are called 'A'"),
        (["--missing", "A=gone"], "two rows are called 'A'"),
        (["--against", "B"], "--against 'B' is none of the rows: A"),
        (["--row", "N=absent"], "no results folder absent"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            main([*first, *flags, "--output_dir", str(tmp_path / "out")])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="expected LABEL=VALUE, got 'nothing'"):
        main(["--row", "nothing"])
    assert not (tmp_path / "out").exists()


def test_rows_scored_by_different_versions_are_warned_of(three, tmp_path, capsys):
    """What one version reads as 1,234 and another one as 234 is not a difference between methods."""
    results = json.loads((three[1] / "results.json").read_text())
    (three[1] / "results.json").write_text(json.dumps(results | {"identity": {SCORER: 2}}))
    table_of(tmp_path, "--row", f"A={three[0]}", "--row", f"C={three[2]}")
    assert "different versions" not in capsys.readouterr().err
    table_of(tmp_path, "--row", f"A={three[0]}", "--row", f"B={three[1]}")
    assert "were scored by different versions" in capsys.readouterr().err


def test_every_row_of_the_picture_has_a_look_of_its_own(tmp_path):
    """Ten rows, as compare_all makes them: the ninth had the first one's colour, and Soft the language expert's."""
    for i in range(10):
        write_results(tmp_path / str(i), {"Thai": "1100", "Swahili": "1000"})
    rows = [read_row(f"method {i}", str(tmp_path / str(i))) for i in range(10)]
    keep_common(rows)
    figure = make_figure("math_mgsm", build_cells(rows, rows[0], 0))
    bars = [container for container in figure.axes[0].containers if hasattr(container, "patches")]
    looks = [{(bar.get_facecolor(), bar.get_hatch()) for bar in one.patches} for one in bars]
    assert len(looks) == 10 and all(len(look) == 1 for look in looks)
    assert len({colour for [(colour, _)] in looks}) == 10
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [row.label for row in rows]


@pytest.mark.parametrize("label", [os.fsdecode(b"model \xff"), "a $\\nonsense$ b", "5 $ and $ 7"])
def test_a_label_that_no_font_can_draw_and_one_with_dollars_are_drawn_as_text(three, tmp_path, label):
    """They ended in a traceback of the drawing library, once the tables were written."""
    table_of(tmp_path, "--row", f"{label}={three[0]}", "--row", f"B={three[1]}")
    assert (tmp_path / "out/table.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_whose_name_begins_with_an_underscore_stands_in_the_legend(three):
    """The drawing library leaves such names out."""
    rows = [read_row(name, str(folder)) for name, folder in zip(("_a", "b"), three, strict=False)]
    keep_common(rows)
    legend = make_figure("math_mgsm", build_cells(rows, rows[0], 0)).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [" _a", "b"]


def test_the_mean_s_interval_takes_questions_together(tmp_path):
    """Three languages that get the same questions right tell as much of the mean as one of them."""
    folder = write_results(tmp_path / "a", dict.fromkeys(("Swahili", "Thai", "German"), "1" * 15 + "0" * 15))
    found = table_of(tmp_path, "--row", f"A={folder}")
    low, high = (float(found["A", "avg"][name]) for name in ("low", "high"))
    assert high - low > 0.8 * (float(found["A", "th"]["high"]) - float(found["A", "th"]["low"]))
    text = (tmp_path / "out/table.md").read_text()
    assert "Interval of avg: 30 questions are resampled, each with its rows in all languages." in text


def test_ten_rows_and_sixteen_languages_fit_into_the_picture(tmp_path):
    names = [
        "Urdu",
        "Swahili",
        "Hindi",
        "Arabic",
        "Vietnamese",
        "Japanese",
        "Polish",
        "Chinese",
        "Flemish",
        "Russian",
        "Italian",
        "German",
    ]
    flags = []
    for i in range(10):
        # Other lengths would be other items.
        write_results(tmp_path / str(i), dict.fromkeys(names, ("1" * (i + 1) + "0" * 10)[:11]))
        flags += ["--row", f"method {i}={tmp_path / str(i)}"]
    found = table_of(tmp_path, *flags)
    assert len(found) == 10 * 13 and found["method 9", "nl"]["items"] == "11"


# -- the script


@pytest.mark.slow
def test_the_script_fills_the_rows_it_can_and_lists_the_others(datas, tmp_path, tiny_llm, tiny_encoder):
    """Only the task's LLM and a translator are given, so the LLM's own row, PMI and translate-test are made."""
    environment = clean_environment(tmp_path) | {"LLM_PATH": tiny_llm, "DATA_ROOT": datas, "LANGUAGES": "sw,th"}
    environment |= {"LIMIT": "1", "MAX_NEW_TOKENS": "2", "RESULTS_DIR": str(tmp_path / "r"), "HF_HUB_OFFLINE": "1"}
    environment |= {"TRANSLATOR": tiny_encoder, "TRANSLATOR_ARGS": "--untagged --max_new_tokens 4"}
    # PMI-6 is refused for want of languages: a missing row with the command's own reason.
    environment |= {"PARALLEL_LANGUAGES": "es,de,fr", "PATH": environment["PATH"] + os.pathsep + os.environ["PATH"]}
    command = ["bash", str(ROOT / "scripts/compare_all.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "r/table.csv").read_text().splitlines()))
    assert {row["method"] for row in rows if not row["missing"]} == {
        "task LLM alone",
        "PMI-3 (oracle)",
        "translate-test (machine)",
    }
    assert {row["translations"] for row in rows if row["method"] == "translate-test (machine)"} == {"machine"}
    assert len((tmp_path / "r/translations/math_mgsm/translations.jsonl").read_text().splitlines()) == 2
    assert {row["method"]: row["missing"] for row in rows if row["missing"]} == {
        "language expert alone": "LANGUAGE_EXPERT is not given",
        "soup": "LANGUAGE_EXPERT is not given",
        "task arithmetic": "BASE_PATH is not given",
        "layer swap": "LANGUAGE_EXPERT is not given",
        "MAET-style": "BASE_PATH is not given",
        "PMI-6 (oracle)": "--parallel_input 6 needs 6 languages besides Swahili, there are 3 (es, de, fr): name more "
        "by --parallel_languages or take a smaller number",
        "MindMerger-Hard": "HARD_CHECKPOINT is not given",
        "MindMerger-Soft": "SOFT_CHECKPOINT is not given",
    }
    assert {path.name for path in (tmp_path / "r").iterdir()} == {
        "compare",
        "logs",
        "translations",
        "table.md",
        "table.csv",
        "table.png",
    }


@pytest.mark.slow
def test_the_script_shows_both_ways_to_an_answer_as_rows_of_their_own(datas, tmp_path, tiny_llm):
    environment = clean_environment(tmp_path) | {"LLM_PATH": tiny_llm, "DATA_ROOT": datas, "LANGUAGES": "sw,en"}
    environment |= {"TASK": "x-csqa", "SCORING": "both", "LIMIT": "2", "PARALLEL_LANGUAGES": "es,de,fr"}
    environment |= {"RESULTS_DIR": str(tmp_path / "r"), "MAX_NEW_TOKENS": "2", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] += os.pathsep + os.environ["PATH"]
    command = ["bash", str(ROOT / "scripts/compare_all.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "r/table.csv").read_text().splitlines()))
    made = {row["method"]: row["folder"] for row in rows if not row["missing"]}
    assert {"task LLM alone", "task LLM alone, likelihood"} <= made.keys()
    for label, folder in made.items():
        results = json.loads((Path(folder) / "results.json").read_text())
        assert (results.get("scoring") == "likelihood") == label.endswith(", likelihood"), label
    assert "Not all answers were found alike" in (tmp_path / "r/table.md").read_text()


def test_the_script_asks_for_the_llm_in_one_line(tmp_path):
    environment = clean_environment(tmp_path) | {"RESULTS_DIR": str(tmp_path / "r")}
    environment["PATH"] += os.pathsep + os.environ["PATH"]
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/compare_all.sh")], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and not (tmp_path / "r").exists()
    assert done.stderr.splitlines() == [
        "error: LLM_PATH is not given: the task's LLM, which every other row is compared with"
    ]
