"""Benchmarks that the method was not published on: rows, prompts, gold answers, grades, and how the hub's rows come.

All rows are made up here in the form of the data sets; no text of theirs is in them.
"""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from scipy.stats import norm

import run_evaluation
from mindmerger.evaluation import bridge_table, comparison_table, statistics
from mindmerger.evaluation.statistics import bootstrap_intervals, mcnemar_exact, mean_difference_test, row_test
from mindmerger.generation import answers
from mindmerger.generation.answers import Generation
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from mindmerger.tasks import TASKS, find_task, scoring
from mindmerger.tasks.languages import LANGUAGES, find_language
from mindmerger.tasks.readers import DataError
from mindmerger.tasks.texts import fill_row, read_rows
from scripts import hub_formats, prepare_data

XCOPA = {"id": "7", "premise": "Kioo kilivunjika.", "question": "cause", "label": 0}
XCOPA |= {"choice1": "Kilianguka.", "choice2": "Kilijaa."}
BELEBELE = {"id": "a 1", "flores_passage": "Ndege huruka.", "question": "Nani huruka?", "correct_answer_num": "2"}
BELEBELE |= {"mc_answer1": "mawe", "mc_answer2": "ndege", "mc_answer3": "miti", "mc_answer4": "maji"}
NLI = {"sentence1": "Mtu analala.", "sentence2": "Yuko macho.", "label": "contradiction"}
FLORES = {"id": "1", "sentence": "Ndege huruka.", "english": "Birds fly."}
ROWS = {"xcopa": XCOPA, "belebele": BELEBELE, "afrixnli": NLI, "americas_nli": NLI, "flores": FLORES}


def put(root, task: str, language: str, *rows) -> Path:
    """Writes rows where a task looks for a language's."""
    known, language = find_task(task), find_language(language)
    path = Path(root) / known.evaluation_file.format(code=language.code, name=language.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(root, task: str, language: str, faults=None) -> list:
    return list(find_task(task).read_evaluation(root, find_language(language), faults))


# -- rows, prompts, gold answers


@pytest.mark.parametrize(
    ("task", "language", "prompt", "target", "varying"),
    [
        (
            "xcopa",
            "Swahili",
            "Kioo kilivunjika.\nWhat was the cause of this?\nOptions:A. Kilianguka.\tB. Kilijaa.\nAnswer:",
            "A",
            "Kioo kilivunjika.",
        ),
        (
            "belebele",
            "Swahili",
            "Ndege huruka.\nNani huruka?\nOptions:A. mawe\tB. ndege\tC. miti\tD. maji\nAnswer:",
            "B",
            "Ndege huruka.",
        ),
        (
            "afrixnli",
            "Swahili",
            "Premise: Mtu analala.\nHypothesis: Yuko macho.\nLabel:",
            "contradiction",
            "Mtu analala.",
        ),
        (
            "americas_nli",
            "Bribri",
            "Premise: Mtu analala.\nHypothesis: Yuko macho.\nLabel:",
            "contradiction",
            "Mtu analala.",
        ),
    ],
)
def test_a_row_becomes_this_prompt_and_the_encoder_reads_all_of_it(tmp_path, task, language, prompt, target, varying):
    put(tmp_path, task, language, ROWS[task])
    [example] = read(tmp_path, task, language)
    assert example.prompt == example.source == prompt and example.target == target
    assert example.prompt[slice(*example.shrinkable)] == varying
    assert example.target in example.labels == find_task(task).labels
    score = find_task(task).score
    assert score(f" {target}\n", example.target).correct and not score("E", example.target).correct


def test_an_effect_is_asked_for_in_other_words_than_a_cause(tmp_path):
    put(tmp_path, "xcopa", "Quechua", XCOPA | {"question": "effect", "label": 1})
    [example] = read(tmp_path, "xcopa", "qu")
    assert "\nWhat happened as a result?\n" in example.prompt and example.target == "B"


def test_a_flores_row_is_a_bare_sentence_with_the_prompt_of_translation_beside_it(tmp_path):
    put(tmp_path, "flores", "Swahili", FLORES)
    [example] = read(tmp_path, "flores", "Swahili")
    assert (example.source, example.target) == ("Ndege huruka.", "Birds fly.")
    assert "Translate the following sentences from Swahili to English.\n### Input:\nNdege huruka.\n" in example.prompt


@pytest.mark.parametrize(("task", "language"), [("mgsm_rev2", "Telugu"), ("afrimgsm", "Yoruba"), ("afrimgsm", "Vai")])
def test_further_sets_of_math_are_read_and_scored_as_mgsm_is(tmp_path, task, language):
    put(tmp_path, task, language, "How many are 2 and 3?\t5", "And 1,000 and 1?\t1,001")
    first, second = read(tmp_path, task, language)
    assert first.source == "How many are 2 and 3?" and first.prompt.endswith("### Response: Let's think step by step.")
    known = find_task(task)
    assert known.name == f"math_{task}" and known.training_name == "math"
    assert known.score("It is 1001.", second.target, language).correct
    assert known.scorer_version == TASKS["math_mgsm"].scorer_version
    assert not known.published  # numbers of the uncorrected rows would be taken for these


def test_rows_in_another_order_share_the_question_by_their_own_id(tmp_path):
    put(tmp_path, "belebele", "Swahili", BELEBELE, BELEBELE | {"id": "b 2"})
    put(tmp_path, "belebele", "English", BELEBELE | {"id": "b 2"}, BELEBELE)
    assert [one.question for one in read(tmp_path, "belebele", "sw")] == ["a 1", "b 2"]
    assert [one.question for one in read(tmp_path, "belebele", "en")] == ["b 2", "a 1"]


@pytest.mark.parametrize(
    ("task", "change", "what"),
    [
        ("xcopa", {"question": "reason"}, "question 'reason' is none of cause, effect"),
        ("xcopa", {"label": 2}, "label 2 is neither 0 nor 1"),
        ("xcopa", {"label": -1}, "label -1 is neither 0 nor 1"),
        ("xcopa", {"label": True}, "label True is neither 0 nor 1"),
        ("xcopa", {"choice2": " "}, "field 'choice2' is empty"),
        ("belebele", {"correct_answer_num": "0"}, "correct_answer_num '0' is none of 1, 2, 3, 4"),
        ("belebele", {"correct_answer_num": 5}, "correct_answer_num 5 is none of 1, 2, 3, 4"),
        ("belebele", {"correct_answer_num": True}, "correct_answer_num True is none of 1, 2, 3, 4"),
        ("belebele", {"mc_answer3": None}, "field 'mc_answer3' must be text, got None"),
        ("afrixnli", {"label": "0"}, "label '0' is none of entailment, neutral, contradiction"),
        ("flores", {"english": ""}, "field 'english' is empty"),
    ],
)
def test_a_faulty_row_is_refused_with_file_and_line_or_left_out_and_listed(tmp_path, task, change, what):
    path = put(tmp_path, task, "Swahili", ROWS[task], ROWS[task] | change)
    with pytest.raises(DataError) as refused:
        read(tmp_path, task, "Swahili")
    assert str(refused.value).startswith(f"{path}:2: {what}")
    faults = []
    assert [one.id for one in read(tmp_path, task, "Swahili", faults)] == ["sw-1"]
    assert faults == [str(refused.value)]


def test_a_missing_field_names_those_that_are_there(tmp_path):
    path = put(tmp_path, "flores", "Swahili", {"text": "Ndege huruka."})
    with pytest.raises(DataError, match=f"{path}:1: field 'sentence' is missing; the row has \\['text'\\]"):
        read(tmp_path, "flores", "Swahili")


def test_each_benchmark_has_its_languages_and_none_has_an_augmentation_stage_of_its_own():
    numbers = {"math_mgsm_rev2": 11, "math_afrimgsm": 19, "afrixnli": 18, "americas_nli": 10, "xcopa": 11}
    numbers |= {"belebele": 122, "flores": 203}
    assert {name: len(set(find_task(name).evaluation_languages)) for name in numbers} == numbers
    assert "English" not in find_task("flores").evaluation_languages
    for name in ("xcopa", "belebele", "flores"):
        with pytest.raises(DataError, match=f"task {name} has no rows of its own to train on"):
            find_task(name).check_augmentation()


# -- grades of translations


def test_translations_are_graded_by_sacrebleu_sentence_by_sentence_and_all_together():
    outputs, targets = ["The cat sat on the mat.", "A dog"], ["The cat sat on a mat.", "Two dogs run fast."]
    found = scoring.corpus_scores(outputs, targets)
    assert found == {
        "chrf2": round(CHRF().corpus_score(outputs, [targets]).score, 4),
        "bleu": round(BLEU().corpus_score(outputs, [targets]).score, 4),
    }
    score = scoring.score_translation(f" {outputs[0]}\n", targets[0])
    assert score.grade == round(CHRF().sentence_score(outputs[0], [targets[0]]).score, 4) and not score.correct
    assert score.prediction == outputs[0]
    same = scoring.score_translation(targets[1], targets[1])
    assert (same.grade, same.correct) == (100, True)
    assert scoring.score_translation("", targets[1]).grade == 0
    assert "version:" in scoring.signatures()["bleu"] and "tok:13a" in scoring.signatures()["bleu"]


def test_without_sacrebleu_the_evaluation_says_so_before_anything_loads(monkeypatch, tmp_path):
    scoring._metrics.cache_clear()
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match="sacrebleu, which is not installed: pip install sacrebleu"):
        run_evaluation.main(["--task", "flores", "--llm_only", "--llm_path", str(tmp_path / "absent")])


def test_graded_rows_are_resampled_themselves_and_right_or_wrong_ones_as_before():
    grades = {"Swahili": [0.1, 0.5, 0.9, 0.3], "Thai": [0.2, 0.2, 0.2, 0.2]}
    asked = {name: [(str(i), "", 0) for i in range(4)] for name in grades}
    intervals, mean = bootstrap_intervals(asked, grades, 0)
    assert np.allclose(intervals["Thai"], [20, 20]), "equal grades have no spread"
    low, high = intervals["Swahili"]
    # The spread of a mean of four, sd / 2: a binomial of mean 0.45 would spread 1.7 times as far.
    assert 45 - 2.3 * 14.8 < low < 45 - 1.4 * 14.8 and 45 + 1.4 * 14.8 < high < 45 + 2.3 * 14.8
    assert np.allclose(mean, [(low + 20) / 2, (high + 20) / 2], atol=3), "the mean resamples questions in all languages"
    marks = {name: [True, False, True, False] for name in grades}
    assert bootstrap_intervals(asked, marks, 0) == bootstrap_intervals(
        asked, {name: [float(one) for one in rows] for name, rows in marks.items()}, 0
    )


def test_a_languages_test_is_mcnemars_for_right_or_wrong_and_a_sign_flip_for_grades():
    asked = [(str(i), "", 0) for i in range(10)]
    marks = [1, 1, 1, 1, 1, 1, -1, 0, 0, 0]
    assert row_test(asked, marks, 0) == mcnemar_exact(1, 6)
    grades = [0.1, 0.2, 0.3, 0.1, 0.2, 0.05, 0.4, 0.1, 0.2, 0.3]
    # All ten one way: the exact p is 2 / 2^10.
    assert abs(row_test(asked, grades, 0) - 2 / 1024) < 5e-4
    assert row_test(asked, grades, 0) == mean_difference_test({"": asked}, {"": grades}, 0)


def test_a_sign_flip_test_of_a_thousand_sizes_is_the_one_of_few(monkeypatch):
    asked = [(str(i), "", 0) for i in range(400)]
    grades = list(np.random.default_rng(1).normal(0.1, 1, 400))
    p = row_test(asked, grades, 0)
    # A sum of so many signs is normal.
    assert abs(p - 2 * norm.sf(abs(sum(grades)) / np.sqrt(np.square(grades).sum()))) < 0.01
    monkeypatch.setattr(statistics, "MANY_SIZES", 1000)
    assert abs(p - row_test(asked, grades, 0)) < 0.01


# -- evaluations from start to end


@pytest.fixture
def pairs_mapping(tmp_path, tiny_llm, tiny_encoder):
    """Folder of a mapping as math's mapping stage leaves it."""
    torch.manual_seed(5)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    model.config.task, model.config.stage, model.config.augmentation = "math", "mapping", False
    model.save_pretrained(tmp_path / "mapping")
    return str(tmp_path / "mapping")


def evaluate(capsys, *arguments) -> tuple[str, str]:
    assert run_evaluation.main([*map(str, arguments), "--precision", "fp32", "--data_root", "datas"]) == 0
    return capsys.readouterr()


def test_xcopa_is_evaluated_from_its_rows_to_the_table(tmp_path, monkeypatch, capsys, tiny_llm):
    monkeypatch.chdir(tmp_path)
    for language in ("Estonian", "Quechua"):
        put("datas", "xcopa", language, XCOPA, XCOPA | {"id": "8", "label": 1})
    monkeypatch.setattr(answers, "generate_batch", lambda m, t, c, batch, n: [Generation(" A", 1, False)] * len(batch))
    out, _ = evaluate(capsys, "--task", "xcopa", "--llm_only", "--llm_path", tiny_llm, "--languages", "et,qu")
    results = json.loads(Path("results/MindMerger/xcopa-llm_only/results.json").read_text())
    assert {name: one["accuracy"] for name, one in results["languages"].items()} == {
        "Estonian": 50,
        "Ayacucho Quechua": 50,
    }
    assert results["resampling"]["questions_in_every_language"] == 2, "rows of one idx are one question"
    assert "xcopa, LLM alone (prompt only): accuracy in percent" in out


def translate_as(monkeypatch, texts: dict[str, str]) -> None:
    """Makes every answer a text that its source decides."""

    def fixed(model, tokenizers, columns, batch, max_new_tokens):
        ids = columns.get("encoder_ids") or columns["prompt_ids"]
        decode = tokenizers.encoder.decode if "encoder_ids" in columns else tokenizers.llm.decode
        return [Generation(next(t for s, t in texts.items() if s in decode(ids[i])), 3, False) for i in batch]

    monkeypatch.setattr(answers, "generate_batch", fixed)


@pytest.fixture
def translated(tmp_path, monkeypatch, capsys, pairs_mapping, tiny_llm):
    """Two evaluations on FLORES, of a mapping (the better one) and of the LLM alone: (stdout, stderr) of the first."""
    monkeypatch.chdir(tmp_path)
    english = ["Birds fly over the sea.", "Stones lie on the ground.", "Trees grow in the sun."]
    for language in ("Swahili", "German"):
        rows = [{"id": str(i), "sentence": f"{language} {i}", "english": text} for i, text in enumerate(english)]
        put("datas", "flores", language, *rows)
    task = ("--task", "flores", "--languages", "sw,de")
    translate_as(monkeypatch, {" 0": english[0], " 1": "Stones lie here.", " 2": "Trees grow in the sun"})
    first = evaluate(capsys, *task, "--init_checkpoint", pairs_mapping)
    translate_as(monkeypatch, {" 0": "Birds.", " 1": "Stones lie here.", " 2": "No trees at all."})
    evaluate(capsys, *task, "--llm_only", "--llm_path", tiny_llm)
    return first


HARD, ALONE = "results/MindMerger/flores-hard", "results/MindMerger/flores-llm_only"


def test_a_mapping_of_the_mapping_stage_translates_in_the_form_it_was_trained_in_without_a_warning(translated):
    assert Path(HARD, "results.json").is_file(), "without --augmentation it is the form that the mapping stage trains"
    assert "warning" not in translated.err.lower()


def test_results_hold_chrf_and_bleu_of_all_rows_beside_the_mean_of_sentences(translated):
    results = json.loads(Path(HARD, "results.json").read_text())
    rows = [json.loads(line) for line in Path(HARD, "predictions/Swahili.jsonl").read_text().splitlines()]
    one = results["languages"]["Swahili"]
    outputs, targets = [row["prediction"] for row in rows], [row["answer"] for row in rows]
    assert one["chrf2"] == round(CHRF().corpus_score(outputs, [targets]).score, 4)
    assert one["bleu"] == round(BLEU().corpus_score(outputs, [targets]).score, 4)
    assert one["sentence_chrf2"] == round(sum(row["grade"] for row in rows) / 3, 4) != one["chrf2"]
    assert one["interval"][0] < one["sentence_chrf2"] < one["interval"][1]
    assert [row["correct"] for row in rows] == [True, False, False] and "accuracy" not in one
    assert set(results["mean"]) == {"chrf2", "bleu", "sentence_chrf2", "interval"}
    assert "version:" in results["signatures"]["chrf2"] and results["published"] is None
    assert Path(HARD, "scores.tsv").read_text() == f"Swahili\t{one['chrf2']}\nGerman\t{one['chrf2']}\n"
    assert results["resampling"]["questions"] == 3, "a sentence is one question in all languages"


def test_the_table_shows_both_scores_of_all_rows_and_says_what_the_interval_is_of(translated):
    lines = translated.out.splitlines()
    assert lines[0] == "flores, MindMerger-Hard (mapped source only): mean sentence chrF2, from 0 to 100"
    assert lines[1].split() == ["language", "n", "chrF2", "BLEU", "sentence", "chrF2", "95", "%", "interval"]
    results = json.loads(Path(HARD, "results.json").read_text())["languages"]["German"]
    shown = next(line.split() for line in lines if line.startswith("German"))
    assert shown[1:5] == ["3", *(f"{results[key]:.1f}" for key in ("chrf2", "bleu", "sentence_chrf2"))]
    assert "not means of single rows; the interval is that of the mean of rows" in translated.out


def test_a_finished_evaluation_of_translations_opens_again(translated, capsys, pairs_mapping):
    out, err = evaluate(capsys, "--task", "flores", "--languages", "sw,de", "--init_checkpoint", pairs_mapping)
    assert "holds this evaluation already" in err and out == translated.out


def test_two_translators_are_compared_by_paired_grades_and_by_corpus_scores(translated, capsys):
    assert run_evaluation.main(["--compare", ALONE, HARD]) == 0
    out = capsys.readouterr().out
    assert "flores: mean sentence chrF2, from 0 to 100 on the same items" in out and "McNemar" not in out
    swahili = next(line.split() for line in out.splitlines() if line.startswith("Swahili"))
    assert swahili[1] == "3" and swahili[5:7] == ["0", "2"], "two sentences are better, one is equal"
    both = [json.loads(Path(folder, "results.json").read_text())["languages"] for folder in (ALONE, HARD)]
    corpus = [line.split() for line in out.splitlines() if line.startswith("Swahili")][1]
    assert corpus[1:] == [f"{one['Swahili'][key]:.1f}" for key in ("chrf2", "bleu") for one in both]


def test_one_table_of_translators_has_grades_with_tests_and_corpus_scores(translated, capsys):
    rows = ["--row", f"LLM alone={ALONE}", "--row", f"Hard={HARD}"]
    assert comparison_table.main([*rows, "--output_dir", "tables"]) == 0
    text = Path("tables/table.md").read_text()
    assert text.startswith("# flores: mean sentence chrF2, from 0 to 100 on the same items")
    assert "sign-flip test over rows" in text and "## chrF2 / BLEU of all rows" in text
    results = json.loads(Path(HARD, "results.json").read_text())
    both = [" / ".join(f"{one[key]:.1f}" for key in ("chrf2", "bleu")) for one in results["languages"].values()]
    mean = " / ".join(f"{results['mean'][key]:.1f}" for key in ("chrf2", "bleu"))
    assert f"| Hard | {both[0]} | {both[1]} | {mean} |" in text
    lines = list(csv.DictReader(io.StringIO(Path("tables/table.csv").read_text())))
    found = {(line["method"], line["language"]): line for line in lines}
    assert float(found["Hard", "sw"]["bleu"]) == results["languages"]["Swahili"]["bleu"]
    assert found["Hard", "sw"]["only_method"] == "2" and Path("tables/table.png").is_file()


def test_bridges_are_compared_by_mean_grades(translated):
    assert bridge_table.main(["--row", f"mindmerger={HARD}", "--row", f"other={ALONE}", "--output_dir", "tables"]) == 0
    text = Path("tables/bridges.md").read_text()
    assert text.startswith("# flores: bridges on the same items, mean sentence chrF2, from 0 to 100\n")
    mean = json.loads(Path(HARD, "results.json").read_text())["mean"]["sentence_chrf2"]
    assert f"{mean:.1f}" in next(line for line in text.splitlines() if line.startswith("| mindmerger |"))


def test_an_extended_evaluation_of_translations_keeps_its_answers_and_grades(translated, capsys, pairs_mapping):
    task = ("--task", "flores", "--init_checkpoint", pairs_mapping)
    put("datas", "flores", "Thai", *({"sentence": f"Thai {i}", "english": "Birds fly."} for i in (0, 1, 2)))
    before = Path(HARD, "predictions/Swahili.jsonl").read_text()
    one = json.loads(Path(HARD, "results.json").read_text())["languages"]["Swahili"]
    evaluate(capsys, *task, "--languages", "sw,de,th")
    results = json.loads(Path(HARD, "results.json").read_text())
    assert Path(HARD, "predictions/Swahili.jsonl").read_text() == before
    assert results["languages"]["Swahili"] == one and results["languages"]["Thai"]["n"] == 3
    assert results["timing"]["examples"] == 3, "three rows are generated, not nine"


def test_a_damaged_grade_is_named_with_its_line(translated, capsys):
    path = Path(HARD, "predictions/Swahili.jsonl")
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"grade": 101}), *others]) + "\n")
    with pytest.raises(UserError, match="Swahili.jsonl:1: not a prediction .*grade is 101, not a number from 0 to 100"):
        run_evaluation.main(["--compare", ALONE, HARD])


def test_parallel_input_is_refused_where_the_english_side_is_the_answer(translated, tiny_llm):
    arguments = ["--task", "flores", "--languages", "sw", "--data_root", "datas", "--llm_only", "--llm_path", tiny_llm]
    with pytest.raises(UserError, match="task flores has no parallel input: the English translation is the answer"):
        run_evaluation.main([*arguments, "--parallel_input", "1", "--translations", "aligned"])


@pytest.mark.parametrize(("task", "fields"), [("xcopa", 3), ("belebele", 6), ("afrixnli", 2), ("afrimgsm", 1)])
def test_translate_test_knows_the_texts_of_a_row(tmp_path, task, fields):
    put(tmp_path, task, "Swahili", ROWS.get(task, "How many are 2 and 3?\t5"))
    [row] = read_rows(find_task(task), tmp_path, find_language("Swahili"))
    assert len(row.texts) == fields
    filled = fill_row(find_task(task), row, {name: f"text {i}" for i, name in enumerate(row.texts)})
    assert all(f"text {i}" in filled.prompt for i in range(fields))
    assert (filled.target, filled.source) == (row.example.target, row.example.source)


def test_translate_test_is_refused_where_the_translation_is_the_answer(tmp_path):
    put(tmp_path, "flores", "Swahili", FLORES)
    with pytest.raises(DataError, match="task flores has no test rows to translate"):
        next(read_rows(find_task("flores"), tmp_path, find_language("Swahili")))


@pytest.mark.parametrize("task", ["xcopa", "belebele", "afrixnli"])
def test_labels_of_a_benchmark_can_be_chosen_by_likelihood(tmp_path, monkeypatch, capsys, tiny_llm, task):
    monkeypatch.chdir(tmp_path)
    put("datas", task, "Swahili", ROWS[task], ROWS[task])
    arguments = ("--task", task, "--llm_only", "--llm_path", tiny_llm, "--languages", "sw", "--scoring", "likelihood")
    evaluate(capsys, *arguments)
    lines = Path(f"results/MindMerger/{task}-llm_only-likelihood/predictions/Swahili.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line)["label_log_probs"]) for line in lines] == [find_task(task).labels] * 2


def test_a_mapping_that_saw_the_task_last_is_warned_of(tmp_path, monkeypatch, capsys, tiny_llm, tiny_encoder):
    monkeypatch.chdir(tmp_path)
    put("datas", "flores", "Swahili", FLORES)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    model.config.task, model.config.stage, model.config.augmentation = "math", "augmentation", True
    model.save_pretrained("mapping")
    arguments = ("--task", "flores", "--languages", "sw", "--init_checkpoint", "mapping", "--max_new_tokens", "2")
    _, err = evaluate(capsys, *arguments)
    assert "comes from the augmentation stage: translations are what the stage over pairs trains" in err


# -- from the hub


AFRIXNLI_TSV = 'premise\thypothesis\tlabel\n"Alisema ""ndiyo""."\tAlisema.\t0\nMtu analala.\tYuko macho.\t2\n'
AFRIMGSM_TSV = "question\tanswer\tanswer_number\tequation_solution\n2 na 3?\t\t5\t\n1 na 1?\t\t2\t\n"
HUB_XCOPA = {"premise": "Kioo.", "choice1": "a", "choice2": "b", "question": "cause", "label": 1, "idx": 3}
HUB_XCOPA |= {"changed": False}
HUB_BELEBELE = {"link": "https://example.org/a", "question_number": 1, "ds": "2023-05-03", "dialect": "swh_Latn"}
HUB_BELEBELE |= {name: value for name, value in BELEBELE.items() if name != "id"}


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Fetches one benchmark in some languages, by the hub's names of them, from clones of its repositories."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def call(name: str, files: dict[str, str | list[dict]], configs: set[str]) -> list[str]:
        sources = [one for one in hub_formats.hub_sources()[name] if one.config in configs]
        assert {one.config for one in sources} == configs
        folder = tmp_path / "mirror" / sources[0].repository
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if path.endswith(".parquet"):
                datasets.Dataset.from_list(content).to_parquet(folder / path)
            else:
                lines = content if isinstance(content, str) else "".join(f"{json.dumps(row)}\n" for row in content)
                (folder / path).write_text(lines)
        monkeypatch.setattr(prepare_data, "hub_sources", lambda: {name: sources})
        return prepare_data.fetch(tmp_path / "datas", [name], tmp_path / "mirror", False)

    return call


def test_mgsm_rev2_and_afrimgsm_arrive_as_mgsm_does(fetch, tmp_path):
    rows = [{"question": "2 na 3?", "answer_number": "5"}, {"question": "1 na 1?", "answer_number": "2"}]
    assert fetch("mgsm_rev2", {"sw/test-00000-of-00001.parquet": rows}, {"sw"}) == []
    assert fetch("afrimgsm", {"data/swa/test.tsv": AFRIMGSM_TSV, "data/swa/dev.tsv": AFRIMGSM_TSV}, {"swa"}) == []
    for task in ("mgsm_rev2", "afrimgsm"):
        assert [(one.source, one.target) for one in read(tmp_path / "datas", task, "sw")] == [
            ("2 na 3?", "5"),
            ("1 na 1?", "2"),
        ]


CARD = "---\nconfigs:\n- config_name: swa\n  data_files:\n  - split: test\n    path: data/swa/test.tsv\n---\n"


@pytest.mark.parametrize("card", [{}, {"README.md": CARD}], ids=["by file names", "by the card"])
def test_afrixnli_arrives_with_words_for_labels_and_without_the_quotes_of_its_tsv(fetch, tmp_path, card):
    files = {"data/swa/test.tsv": AFRIXNLI_TSV, "data/swa/dev.tsv": AFRIXNLI_TSV.replace("Mtu", "Mwingine")}
    assert fetch("afrixnli", files | card, {"swa"}) == []
    first, second = read(tmp_path / "datas", "afrixnli", "Swahili")
    assert first.prompt == 'Premise: Alisema "ndiyo".\nHypothesis: Alisema.\nLabel:' and first.target == "entailment"
    assert "Mtu analala." in second.prompt and second.target == "contradiction"


def test_americas_nli_xcopa_and_belebele_arrive_from_the_files_of_the_hub(fetch, tmp_path):
    nli = [{"premise": "a", "hypothesis": "b", "label": 1}]
    assert fetch("americas_nli", {"aym/test-00000-of-00001.parquet": nli}, {"aym"}) == []
    assert [one.target for one in read(tmp_path / "datas", "americas_nli", "Aymara")] == ["neutral"]
    assert fetch("xcopa", {"qu/test-00000-of-00001.parquet": [HUB_XCOPA]}, {"qu"}) == []
    [xcopa] = read(tmp_path / "datas", "xcopa", "Quechua")
    assert (xcopa.target, xcopa.question) == ("B", "3")
    assert fetch("belebele", {"data/swh_Latn.jsonl": [HUB_BELEBELE]}, {"swh_Latn"}) == []
    [belebele] = read(tmp_path / "datas", "belebele", "Swahili")
    assert (belebele.target, belebele.question) == ("B", "https://example.org/a 1")


def flores(*texts) -> list[dict]:
    return [{"id": i, "text": text, "iso_639_3": "x", "url": "y"} for i, text in enumerate(texts)]


def test_flores_arrives_with_the_english_sentence_beside_each(fetch, tmp_path):
    files = {"devtest/eng_Latn.parquet": flores("Birds fly.", "Trees grow."), "dev/eng_Latn.parquet": flores("Dev.")}
    files |= {"devtest/cmn_Hans.parquet": flores("鸟飞。", "树长。"), "dev/cmn_Hans.parquet": flores("X")}
    assert fetch("flores", files, {"cmn_Hans"}) == []
    assert [(one.source, one.target) for one in read(tmp_path / "datas", "flores", "Chinese")] == [
        ("鸟飞。", "Birds fly."),
        ("树长。", "Trees grow."),
    ]


def test_flores_rows_that_are_not_the_english_ones_are_refused_and_nothing_is_written(fetch, tmp_path, capsys):
    files = {"devtest/eng_Latn.parquet": flores("Birds fly."), "devtest/cmn_Hans.parquet": flores("鸟飞。", "树长。")}
    assert fetch("flores", files, {"cmn_Hans"}) == ["flores"]
    assert "the rows of cmn_Hans are not those of eng_Latn" in capsys.readouterr().err
    assert not list((tmp_path / "datas").rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("line", "row", "what"),
    [
        (hub_formats.nli_line, {"premise": "a", "hypothesis": "b", "label": 3}, "label 3 is none of entailment"),
        (hub_formats.nli_line, {"premise": "a", "hypothesis": "b", "label": "-1"}, "label '-1' is none of"),
        (hub_formats.xcopa_line, {"premise": "a"}, "no 'idx' among premise"),
        (hub_formats.belebele_line, {"link": "a", "question_number": 1}, "no 'flores_passage' among link"),
        (hub_formats.flores_line, {"id": 1, "sentence": "a"}, "no 'text' among id, sentence"),
    ],
)
def test_a_hub_row_of_another_form_is_refused(line, row, what):
    with pytest.raises(UserError, match=what):
        line(row)


def test_every_language_of_a_benchmark_has_one_config_and_one_file():
    sources = hub_formats.hub_sources()
    for name in ("mgsm_rev2", "afrimgsm", "afrixnli", "americas_nli", "xcopa", "belebele", "flores"):
        assert len({one.config for one in sources[name]}) == len({one.path for one in sources[name]})
        assert len(sources[name]) == len(find_task(name).evaluation_languages)
    codes = {
        "afrimgsm": "amh eng ewe fra hau ibo kin lin lug orm sna sot swa twi vai wol xho yor zul",
        "afrixnli": "amh eng ewe fra hau ibo kin lin lug orm sna sot swa twi wol xho yor zul",
        "americas_nli": "aym bzd cni gn hch nah oto quy shp tar",
        "xcopa": "et ht id it qu sw ta th tr vi zh",
    }
    assert {name: " ".join(sorted(one.config for one in sources[name])) for name in codes} == codes
    assert set(hub_formats.FLORES_CONFIGS) <= {one.nllb for one in LANGUAGES.values()}


def test_the_list_of_what_is_there_names_a_benchmark_that_was_asked_for_or_is_there(tmp_path):
    assert "xcopa" not in prepare_data.report(tmp_path)
    assert "xcopa: test             0 of 11 files" in prepare_data.report(tmp_path, ["xcopa"])
    put(tmp_path, "xcopa", "Estonian", XCOPA)
    told = prepare_data.report(tmp_path)
    assert "xcopa: test             1 of 11 files" in told and "--tasks xcopa" in told and "flores" not in told
