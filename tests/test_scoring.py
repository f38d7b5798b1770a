"""Prompts and reference numbers equal the published implementation's; the corrected reading of numbers; scores."""

import json
from pathlib import Path

import pytest
from babel.numbers import format_decimal, format_scientific
from hypothesis import given, settings
from hypothesis import strategies as st

from mindmerger.tasks import TASKS, find_task
from mindmerger.tasks.examples import evaluation_examples
from mindmerger.tasks.languages import LANGUAGES, Language
from mindmerger.tasks.numbers import _symbols, reference_number
from mindmerger.tasks.readers import DataError
from mindmerger.tasks.scoring import corrected_number
from mindmerger.tasks.translation import translation_prompt
from mindmerger.tasks.x_csqa import x_csqa_prompt
from mindmerger.tasks.xnli import xnli_prompt

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


NOTATIONS = [
    ("The answer is: $9{,}500$", 9500),
    ("\\boxed{10,\\!000}", 10000),
    ("10\\,000", 10000),
    ("10\\ 000", 10000),
    ("9\\thinspace500", 9500),
    ("9\\thinspace 500", 9500),
    ("1{,}234{.}5", 1234.5),
    ("\\frac{1}{2}", 0.5),
    ("\\dfrac{10{,}000}{4}", 2500),
    ("-\\frac12", -0.5),
    ("\\frac{-1}{2}", -0.5),
    ("{1 \\over 2}", 0.5),
    ("{1\\over2}", 0.5),
    ("\\nicefrac{1}{2}", 0.5),
    ("3\\sfrac{1}{2}", 3.5),
    ("2 \\frac{1}{2}", 2.5),
    ("$2\\tfrac12$", 2.5),
    ("-\\left(\\frac{3}{4}\\right)", -0.75),
    ("-\\boxed{3}", -3),
    ("\\boxed{5}-3", 3),
    ("-\\text{3}", -3),
    ("\\(-5\\)", -5),
    ("-**5**", -5),
    ("20\\%", 20),
    ("2 1/2", 2.5),
    ("2 5/2", 2.5),
    ("2又1/2", 2.5),
    ("2と1/2", 2.5),
    ("½", 0.5),
    ("2½", 2.5),
    ("-2 ½", -2.5),
    ("14½-13½", 13.5),
    ("1\u20444", 0.25),
    ("答えは４５，０００円です", 45000),
    ("３．５", 3.5),
    ("答案是－5", -5),
    ("１／２", 0.5),
    ("第3，5，8条", 8),
    ("\u20135", -5),
    ("x = - 5", -5),
    ("x \\approx \u2212 5", -5),
    ("$- 5$", -5),
    ("(- 5)", -5),
    ("- 5", -5),
    ("The answer:\n- 5 apples", 5),
    ("Die Antwort \u2013 5 Äpfel", 5),
    ("3-5", 5),
    ("10\u201312", 12),
    ("$10\u2013$12", 12),
    ("10%-15%", 15),
    ("পাই-এর 14টি", 14),
    ("-₽5", -5),
    ("-฿5", -5),
    ("-৳5", -5),
    ("-￥5", -5),
    ("-R$ 5", -5),
    ("-USD 5", -5),
    ("1'000", 1000),
    ("1\u2019234\u2019567.5", 1234567.5),
    ("1,\u200b000", 1000),
    ("-\u200e5", -5),
    ("3\u200e.5", 3.5),
    ("5\ufe0f\u20e3", 5),
    ("١،٢٣٤", 1234),
    ("٣،٥", 3.5),
    ("٣،٥،٨", 8),
    ("१२,३४,५६७.५", 1234567.5),
    ("3 \\times 10^5", 3e5),
    ("2.5 \\cdot 10^{-3}", 2.5e-3),
    ("3×10⁵", 3e5),
    ("25 m^2", 25),
    ("25\\text{ m}^{2}", 25),
    ("100 m2", 100),
]


@pytest.mark.parametrize(("text", "value"), NOTATIONS)
def test_notations_of_any_script_and_of_latex_are_read_as_a_reader_would(text, value):
    assert corrected_number(text) == value


LARGE = [
    ("3万", 30000),
    ("答えは3万5千円です", 35000),
    ("1万2000円", 12000),
    ("1万500円", 10500),
    ("1.5万元", 15000),
    ("１，２００万人", 12000000),
    ("2千万", 20000000),
    ("三个人，每人5 萬元", 50000),
    ("1亿2345万", 123450000),
    ("1億", 100000000),
    ("1億2,500万ポンド", 125000000),
    ("1億2千万ポンド", 120000000),
    ("22億5000万人", 2250000000),
    ("3万5,000円", 35000),
    ("3万亿", 3000000000000),
    ("-3万", -30000),
    ("从3万增加到5万。", 50000),
    ("5 million", 5000000),
    ("It costs $1.2 million.", 1200000),
    ("**3** million people", 3000000),
    ("2 thousand", 2000),
    ("The answer is 3 billion", 3000000000),
    ("2 миллиона", 2000000),
    ("The answer is minus 5", -5),
    ("Minus 5", -5),
    ("It is negative $3.50.", -3.5),
    ("Die Antwort ist minus 5.", -5),
    ("x = minus 5", -5),
    ("5 and 1/2", 5.5),
    ("She walks 5 and \\frac{1}{2} hours", 5.5),
    ("2 und 1/2 Stunden", 2.5),
]


@pytest.mark.parametrize(("text", "value"), LARGE)
def test_large_units_the_word_minus_and_mixed_numbers_in_words_are_read_as_a_reader_would(text, value):
    assert corrected_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3万5", 5),  # 35,000 as one says it, or 30,005
        ("3万5千克", 5),
        ("5千克", 5),
        ("5万一千", 5),
        ("3万分之1", 1),
        ("2万能", 2),
        ("1亿5000", 5000),
        ("3万5千2百万", 2),
        ("5 millionaires", 5),
        ("5 million-dollar houses", 5),
        ("2 thousand dollar bills", 2),
        ("5 thousandths", 5),
        ("10 minus 5", 5),
        ("the total minus 5", 5),
        ("x minus 5", 5),
        ("You earn 20 dollars every day at work and afterwards you have left minus 5", 5),
        ("between 5 and 1/2", 0.5),
        ("The solutions are 5 and 1/2", 0.5),
        ("1, 2 and 1/2", 0.5),
        ("He took 5 and 1/2 of the rest", 0.5),
        ("5 and 3/2", 1.5),
        ("the product of 5 and 1/2", 0.5),
    ],
)
def test_what_can_be_read_in_two_ways_is_read_as_before(text, value):
    assert corrected_number(text) == value


def test_a_billion_is_a_thousand_millions_in_english_alone():
    assert corrected_number("3 billion", "fr") == 3 and corrected_number("3 billion") == 3e9
    assert corrected_number("so she has 3 billion and that makes 3 billion", "fr") == 3e9


@pytest.mark.parametrize(
    ("text", "language", "value"),
    [
        ("1.450.000", "de", 1450000),
        ("1.450.000", None, 1450000),  # nothing else it could be
        ("1.234,56", "es", 1234.56),
        ("1.234,56", None, 1234.56),
        ("1,234.56", "de", 1234.56),
        ("1,234,567", "Russian", 1234567),
        ("72,5", "fr", 72.5),
        ("72,5", LANGUAGES["Russian"], 72.5),
        ("72,5", "en", 5),
        ("12.50", "de", 12.5),
        ("1.234", "de", 1234),
        ("1,234", "de", 1.234),
        ("1.234", "en", 1.234),
        ("1,234", "zh", 1234),
        ("0,125", "it", 0.125),
        ("The answer is: 2,125", "de", 2125),
        ("#### 2,125", "fr", 2125),
        ("Sie zahlt 1,200 $", "de", 1200),  # no third decimal of 0
        ("1 450 000 рублей", "ru", 1450000),
        ("una pensión anual de $50 000/año", "es", 50000),
        ("1 234,56 €", "de", 1234.56),
        ("1 234", "en", 234),
        ("7 8 9", "ru", 9),
        ("3,5,8", "de", 8),
        ("05.01.2024", "de", 2024),
    ],
)
def test_separators_are_told_apart_by_their_form_and_then_by_the_language(text, language, value):
    assert corrected_number(text, language) == value


SOLUTIONS = json.loads((Path(__file__).parent / "data/datas/query_translation/math.json").read_text("utf-8"))


@pytest.mark.parametrize("code", ["de", "es", "fr", "ru", "sw", "zh"])
def test_solutions_in_english_are_read_alike_whatever_the_language_of_the_question(code):
    for row in SOLUTIONS:
        assert corrected_number(row["response"], code) == corrected_number(row["response"])
    for text in ("So she makes ${} in a year.", "The answer is: {}", "#### {}"):
        for number in ("12", "1,200", "45,125", "45,125.5"):
            assert corrected_number(text.format(number), code) == float(number.replace(",", ""))


SENTENCES = ["{}", " {}.", "x = {}", "**{}**", "$\\boxed{{{}}}$", "（{}）", "7: {}\n", "({} %)", "2 + 2 = {}!"]
SPELLINGS = {
    "full width": {ord("0") + i: 0xFF10 + i for i in range(10)} | {ord(","): "，", ord("."): "．", ord("-"): "－"},
    "Arabic": {ord("0") + i: 0x0660 + i for i in range(10)},
    "Bengali": {ord("0") + i: 0x09E6 + i for i in range(10)},
    "bidirectional marks": {ord("-"): "\u2066-\u2069"},
    "U+2212": {ord("-"): "\u2212"},
    "thin blanks": {0xA0: "\u2009", 0x202F: "\u2009"},
    "LaTeX blanks": {0xA0: "\\,", 0x202F: "\\;"},
    "LaTeX separators": {ord(","): "{,}"},
    "as it is": {},
}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([language.code for language in LANGUAGES.values() if _symbols(language.code)]),
    st.decimals(-(10**9), 10**9, places=2) | st.decimals(-99, 99, places=3) | st.integers(-(10**9), 10**9),
    st.sampled_from(SENTENCES),
    st.sampled_from(sorted(SPELLINGS)),
)
def test_numbers_that_babel_formats_for_a_language_are_read_back(code, value, sentence, spelling):
    written = format_decimal(value, locale=code).translate(SPELLINGS[spelling])
    assert corrected_number(sentence.format(written), code) == float(value)


# Babel writes a numbering system's separators, but ASCII digits.
ZEROS = {"ar arab": "٠", "ur arabext": "۰", "bn beng": "০", "hi deva": "०", "te telu": "౦", "th thai": "๐"}


@settings(deadline=None)
@given(st.sampled_from(sorted(ZEROS)), st.decimals(-(10**9), 10**9, places=2))
def test_numbers_in_the_digits_of_a_language_are_read_back(system, value):
    code, numbering = system.split()
    written = format_decimal(value, locale=code, numbering_system=numbering)
    written = written.translate({ord("0") + i: ord(ZEROS[system]) + i for i in range(10)})
    assert corrected_number(written, code) == float(value)


@given(st.sampled_from(["en", "de", "fr"]), st.integers(-999, 999), st.integers(-9, 9))
def test_powers_of_ten_are_read_back(code, value, exponent):
    written = format_scientific(value * 10.0**exponent, locale=code, decimal_quantization=False)
    assert corrected_number(written, code) == pytest.approx(value * 10.0**exponent)


@given(st.integers(0, 99), st.integers(1, 9), st.integers(2, 99), st.booleans())
def test_fractions_and_mixed_numbers_are_read_back(whole, above, below, negative):
    """To the last bit: 1 2/3 is right where the gold answer is 5/3."""
    mixed = above < below
    value = (whole * below + above) / below if mixed else above / below
    for form in ("{w} {a}/{b}", "{w}\\frac{{{a}}}{{{b}}}", "${w}\\ \\dfrac {{{a}}}{{{b}}}$", "{w}\u2064{a}\u2044{b}"):
        text = "-" * negative + form.format(w=whole, a=above, b=below)
        assert corrected_number(text) == (-value if negative and mixed else value)


GOLD = [
    ("２，１２５", 2125),
    ("2,125", 2125),
    ("8.0", 8),
    ("#### 72", 72),
    ("-3 1/2", -3.5),
    ("$1,000", 1000),
    ("72,5", 72.5),
]


@pytest.mark.parametrize(("answer", "value"), GOLD)
def test_gold_answers_go_through_the_same_reading(tmp_path, answer, value):
    file = tmp_path / "evaluation/mgsm/mgsm_de.tsv"
    file.parent.mkdir(parents=True)
    file.write_text(f"Wie viel?\t{answer}\n", encoding="utf-8")
    task = find_task("math")
    (example,) = evaluation_examples(task, tmp_path, LANGUAGES["German"])
    assert task.score(f"= {value}", example.target, example.language).correct
    assert not task.score(f"= {value}1", example.target, example.language).correct


@pytest.mark.parametrize("answer", ["3-5", "3 or 4", "12:30", "3,5,8", "1.234", "none"])
def test_gold_answer_that_can_be_read_in_two_ways_is_refused_with_file_and_line(tmp_path, answer):
    file = tmp_path / "evaluation/mgsm/mgsm_de.tsv"
    file.parent.mkdir(parents=True)
    file.write_text(f"Wie viel?\t4\nUnd?\t{answer}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"mgsm_de\.tsv:2: the answer '{answer}' (holds|can be read)"):
        evaluation_examples(find_task("math"), tmp_path, LANGUAGES["German"])


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


@pytest.mark.parametrize("code", ["ber", "lzh", "x1"])
def test_a_language_that_cldr_does_not_have_is_scored_as_english(code):
    """A row added to LANGUAGES ended the scoring, after everything had been generated."""
    added = Language("Added", code, None, None, None)
    score = find_task("math").score("It is 1,234.5", "1234.5", added)
    assert score.correct and score.prediction == 1234.5
    assert corrected_number("1,234", added) == 1234


def test_a_code_with_its_region_is_read_as_that_language():
    assert corrected_number("1.234", Language("Added", "pt-BR", None, None, None)) == 1234
