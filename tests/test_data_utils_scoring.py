"""Prompts and reference numbers equal the published implementation's; the corrected reading of numbers; scores."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tasks import TASKS, translation_prompt, x_csqa_prompt, xnli_prompt
from data_utils import LANGUAGES, corrected_number, find_task, reference_number

PARITY = json.loads((Path(__file__).parent / "data" / "parity" / "text.json").read_text("utf-8"))


@pytest.mark.parametrize("case", PARITY["number"], ids=lambda case: repr(case["text"]))
def test_reference_number_equals_the_published_extractor(case):
    assert reference_number(case["text"]) == case["reference"]


def prompt_of(task, case):
    if task == "math":
        return find_task("math").format_query(case["query"])
    if task == "xnli":
        return xnli_prompt(case["sentence1"], case["sentence2"])
    if task == "translation":
        return translation_prompt(case["query"], case["source_language"])
    question = case["question"]
    return x_csqa_prompt(question["stem"], [(choice["label"], choice["text"]) for choice in question["choices"]])


@pytest.mark.parametrize(
    ("task", "case"), [(task, case) for task in PARITY["prompt"] for case in PARITY["prompt"][task]]
)
def test_prompts_equal_the_published_ones_to_the_character(task, case):
    prompt, (start, end) = prompt_of(task, case)
    assert prompt == case["prompt"]
    query = case.get("query") or case.get("sentence1") or case["question"]["stem"]
    assert prompt[start:end] == query


@pytest.mark.parametrize("name", ["x-csqa", "xnli"])
def test_formatted_text_is_its_own_prompt(name):
    assert find_task(name).format_query("Premise: a\nLabel:") == ("Premise: a\nLabel:", (0, 0))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("no number here", None),
        ("...", None),
        ("-5", -5),
        ("The temperature is -12 degrees", -12),
        ("Final: \u22128", -8),
        ("\\boxed{-25}", -25),
        ("\\boxed{25}", 25),
        ("so -$3.50.", -3.5),
        ("so $-3.50.", -3.5),
        ("-\\$7", -7),
        ("(-4)", -4),
        ("= -4", -4),
        ("It costs $3.50.", 3.5),
        ("5-3", 3),
        ("10 - 3", 3),
        ("10 -3", 3),
        ("(2+5)-3", 3),
        ("50%-3", 3),
        ("COVID-19", 19),
        ("Ковид-19", 19),
        ("pages 10\u22123", 3),
        ("- 7 apples", 7),
        ("2024-01-05", 5),
        ("2024/01/05", 5),
        ("12:30", 30),
        ("3.14.15", 15),
        ("...5", 5),
        ("No.5", 5),
        ("it is .5", 0.5),
        ("$-.25", -0.25),
        ("10%", 10),
        ("1.", 1),
        ("5.0", 5),
        ("1,234.50", 1234.5),
        ("-1,000,000", -1000000),
        ("1,00,000", 100000),
        ("12,34", 34),
        ("1,2,3", 3),
        ("1 234", 234),
        ("1\u202f234\u202f567", 1234567),
        ("1\u00a0234,", 1234),
        ("1e5", 1e5),
        ("it is 2.5e-3.", 0.0025),
        ("1e5 and 2", 2),
        ("5exams", 5),
        ("1/2", 0.5),
        ("-1/2", -0.5),
        ("1/2 of 9 is 4.5", 4.5),
        ("1/0", 0),
        ("\u096a\u0968", 42),
        ("\u09ea\u09e8\u0964", 42),
        ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665", 1234.5),
        ("\u06f4\u06f2", 42),
        ("\uff11\uff12", 12),
        ("答案是-42。", -42),
        ("25 m\u00b2", 25),
        ("9" * 400, None),
        ("7 8 9", 9),
        ("10-3=7\n#### 7", 7),
    ],
)
def test_corrected_number_reads_as_a_reader_would(text, value):
    assert corrected_number(text) == value


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "The answer is: {}.", "${:,}", "\\boxed{{{}}}"]))
def test_corrected_number_reads_back_every_integer(value, form):
    assert corrected_number(form.format(value)) == value


@given(st.text())
def test_number_extraction_takes_any_text(text):
    assert isinstance(reference_number(text), float)
    assert corrected_number(text) is None or isinstance(corrected_number(text), float)


def test_output_without_number_is_never_right_though_the_reference_reads_it_as_zero():
    score = find_task("math").score("I do not know.", "0")
    assert (score.prediction, score.correct) == (None, False)
    assert (score.reference_prediction, score.reference_correct) == (0.0, True)


def test_lost_sign_is_wrong_though_the_reference_takes_it():
    score = find_task("math").score("The answer is: -5", "5")
    assert (score.prediction, score.correct, score.reference_correct) == (-5.0, False, True)


@pytest.mark.parametrize(("output", "gold"), [("The answer is: 2125", "2,125"), ("so 8", "8.0"), ("1/4", "0.25")])
def test_equal_numbers_in_other_spellings_are_right(output, gold):
    assert find_task("math").score(output, gold).correct


@pytest.mark.parametrize(("output", "correct"), [(" B\n", True), ("b", False), ("B.", False), ("", False)])
def test_letters_must_equal_after_stripping(output, correct):
    score = find_task("x-csqa").score(output, "B")
    assert score.correct is score.reference_correct is correct
    assert score.prediction == output.strip()


def test_published_averages_are_the_means_of_their_rows():
    for task in TASKS.values():
        for scores in task.published.values():
            languages = [value for name, value in scores.items() if name != "avg"]
            assert set(scores) - {"avg"} <= set(LANGUAGES)
            if languages:
                assert abs(sum(languages) / len(languages) - scores["avg"]) < 0.075
                assert set(scores) - {"avg"} == set(task.evaluation_languages)
