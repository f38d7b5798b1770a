"""Parallel multilingual input: prompts, languages, pairing of parallel rows, and its way through the evaluation."""

import json
from dataclasses import replace

import pytest

import run_evaluation
from mindmerger.baselines import parallel_input as baselines_parallel_input
from mindmerger.evaluation import parallel_input as evaluation_parallel_input
from mindmerger.evaluation.comparison import compare_results
from mindmerger.evaluation.flags import build_parser
from mindmerger.evaluation.parallel_input import (
    ORDERS,
    ParallelInput,
    apply_parallel_input,
    choose_languages,
    default_languages,
)
from mindmerger.evaluation.settings import settle
from mindmerger.runtime.errors import UserError
from mindmerger.tasks import find_task
from mindmerger.tasks.examples import evaluation_examples, read_parallel
from mindmerger.tasks.languages import find_language
from run_evaluation import main

MGSM = find_task("math")


def examples_of(task, datas, code, limit=None):
    return evaluation_examples(task, datas, find_language(code), limit)


def codes(languages):
    return [language.code for language in languages]


@pytest.fixture
def x_csqa_data(tmp_path):
    """Two languages that hold the same ids in another order, with options in another order, as the real files do."""
    rows = {
        "en": [("a1", "Where is the cat?", ["roof", "sea"], "A"), ("b2", "What is hot?", ["fire", "ice"], "A")],
        "de": [("b2", "Was ist heiss?", ["Eis", "Feuer"], "B"), ("a1", "Wo ist die Katze?", ["Meer", "Dach"], "B")],
    }
    for code, items in rows.items():
        folder = tmp_path / "csqa/evaluation/x-csqa" / code
        folder.mkdir(parents=True)
        lines = []
        for id, stem, texts, answer in items:
            choices = [{"label": label, "text": text} for label, text in zip("AB", texts, strict=True)]
            lines.append({"id": id, "question": {"stem": stem, "choices": choices}, "answerKey": answer})
        (folder / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "csqa")


# -- prompts


def test_math_prompt_is_the_task_s_own_with_one_line_per_language(datas):
    [example] = examples_of(MGSM, datas, "sw", 1)
    [built], chosen = apply_parallel_input(MGSM, datas, [example], ParallelInput(3))
    assert chosen == {"Swahili": ["es", "ru", "fr"]}
    originals = {code: examples_of(MGSM, datas, code, 1)[0].source for code in ("es", "ru", "fr")}
    lines = [
        f"[Swahili] {example.source}",
        f"[Spanish] {originals['es']}",
        f"[Russian] {originals['ru']}",
        f"[French] {originals['fr']}",
    ]
    start, end = built.shrinkable
    assert built.prompt[start:end] == "\n".join(lines)
    preamble = evaluation_parallel_input.MATH_PREAMBLE.format(number=4)
    assert built.prompt == example.prompt.replace(example.source, preamble + "\n".join(lines))
    assert built.prompt.endswith("### Response: Let's think step by step.")
    # Everything that scoring and pairing use stays.
    assert replace(built, prompt=example.prompt, shrinkable=example.shrinkable) == example


def test_xnli_repeats_the_premise_alone_and_keeps_the_hypothesis_once(datas):
    task = find_task("xnli")
    [example] = examples_of(task, datas, "sw", 1)
    [spanish] = examples_of(task, datas, "es", 1)
    [built], _ = apply_parallel_input(task, datas, [example], ParallelInput(1))
    premise, hypothesis = example.prompt.split("\nHypothesis: ")
    swahili, translated = premise.removeprefix("Premise: "), spanish.prompt[slice(*spanish.shrinkable)]
    expected = f"Premise: [Swahili] {swahili}\n[Spanish] {translated}"
    assert built.prompt == f"{expected}\nHypothesis: {hypothesis}"


def test_x_csqa_rows_are_paired_by_their_id_and_not_by_their_position(x_csqa_data):
    """X-CSQA orders its rows differently in every language: row by row, the cat would be translated as fire."""
    task = find_task("x-csqa")
    examples = examples_of(task, x_csqa_data, "de")
    options = ParallelInput(1, languages=(find_language("en"),))
    built, _ = apply_parallel_input(task, x_csqa_data, examples, options)
    assert built[0].prompt == "[German] Was ist heiss?\n[English] What is hot?\nOptions:A. Eis\tB. Feuer\nAnswer:"
    assert (
        built[1].prompt == "[German] Wo ist die Katze?\n[English] Where is the cat?\nOptions:A. Meer\tB. Dach\nAnswer:"
    )


@pytest.mark.parametrize("order", ORDERS)
def test_order_moves_lines_and_changes_none(datas, order):
    examples = examples_of(MGSM, datas, "th")
    built, _ = apply_parallel_input(MGSM, datas, examples, ParallelInput(6, order=order))
    again, _ = apply_parallel_input(MGSM, datas, examples, ParallelInput(6, order=order))
    assert built == again
    heads = [[line.split("]")[0] for line in one.prompt[slice(*one.shrinkable)].split("\n")] for one in built]
    assert all(len(set(head)) == 7 for head in heads)
    if order == "source-first":
        assert all(head[0] == "[Thai" for head in heads)
    elif order == "english-first":
        assert all(head[:2] == ["[English", "[Thai"] for head in heads)
    else:
        assert len({tuple(head) for head in heads}) > 1
        other, _ = apply_parallel_input(MGSM, datas, examples, ParallelInput(6, order=order, seed=1))
        assert other != built


def test_line_breaks_inside_a_text_do_not_make_a_new_line(datas, tmp_path):
    [example] = examples_of(MGSM, datas, "sw", 1)
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"id": example.id, "language": "es", "text": "uno\ndos"}) + "\n")
    [built], _ = apply_parallel_input(MGSM, datas, [example], ParallelInput(1, str(file)))
    assert "[Spanish] uno dos\n" in built.prompt


def test_a_prompt_over_the_limit_loses_translations_and_never_the_template(datas, tiny_llm):
    from mindmerger.data.tokenising import load_tokenizers, tokenise

    [example] = examples_of(MGSM, datas, "sw", 1)
    [built], _ = apply_parallel_input(MGSM, datas, [example], ParallelInput(6))
    tokenizers = load_tokenizers(None, tiny_llm)
    limit = len(built.prompt[: built.shrinkable[0]].encode()) + 400
    columns = tokenise(
        tokenizers, [built], max_seq_len=8, max_gen_len=limit, with_prompt=True, with_target=False, with_source=False
    )
    text = tokenizers.llm.decode(columns["prompt_ids"][0])
    assert columns["prompt_cut"] == [True] and example.source in text
    assert text.endswith("### Response: Let's think step by step.")


# -- languages


@pytest.mark.parametrize(
    ("task", "source", "size", "expected"),
    [
        ("math", "sw", 3, "es ru fr"),
        ("math", "sw", 6, "es ru fr zh de ja"),
        ("math", "en", 6, "es ru fr zh de ja"),
        ("math", "ru", 3, "es fr zh"),
        ("math", "ru", 6, "es fr zh de ja en"),
        ("xnli", "sw", 6, "es ru fr zh de en"),  # XNLI has no Japanese
        ("xnli", "de", 6, "es ru fr zh en bg"),
    ],
)
def test_default_languages_never_hold_the_source_and_are_always_enough(task, source, size, expected):
    task = find_task(task)
    chosen = choose_languages(find_language(source), ParallelInput(size), default_languages(task))
    assert codes(chosen) == expected.split()


def test_english_first_brings_english_in():
    chosen = choose_languages(find_language("th"), ParallelInput(3, order="english-first"), default_languages(MGSM))
    assert codes(chosen) == ["en", "es", "ru"]


# -- wrong inputs


def test_rows_that_are_not_parallel_are_refused_by_both_ids(datas, tmp_path):
    """Rows paired by number in sets of different order would silently give a wrong translation."""
    import shutil

    shutil.copytree(f"{datas}/evaluation/mgsm", tmp_path / "evaluation/mgsm")
    file = tmp_path / "evaluation/mgsm/mgsm_es.tsv"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    examples = examples_of(MGSM, tmp_path, "sw")
    with pytest.raises(UserError, match=r"sw-1 has the answer .* but es-1 has .* not parallel"):
        apply_parallel_input(MGSM, tmp_path, examples, ParallelInput(1))
    file.write_text(lines[0] + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="item sw-2 .*no row in Spanish"):
        apply_parallel_input(MGSM, tmp_path, examples, ParallelInput(1))


def test_an_id_that_stands_twice_is_refused(x_csqa_data):
    file = f"{x_csqa_data}/evaluation/x-csqa/en/dev.jsonl"
    with open(file) as content:
        text = content.read()
    with open(file, "w") as content:
        content.write(text.replace("b2", "a1"))
    with pytest.raises(UserError, match="'a1' stands twice"):
        read_parallel(find_task("x-csqa"), x_csqa_data, find_language("en"))


def test_answers_written_as_each_language_writes_them_are_the_same_item(tmp_path):
    """Read as English, 72,5 would be several numbers, and the rows no translations of each other."""
    folder = tmp_path / "evaluation/mgsm"
    folder.mkdir(parents=True)
    for code, answer in (("en", "72.5"), ("de", "72,5")):
        (folder / f"mgsm_{code}.tsv").write_text(f"question {code}\t{answer}\n")
    [built], _ = apply_parallel_input(
        MGSM, tmp_path, examples_of(MGSM, tmp_path, "de"), ParallelInput(1, languages=(find_language("en"),))
    )
    assert "[English] question en" in built.prompt


MACHINE = [
    ("not json", "t.jsonl:1: not valid JSON"),
    ('{"id": "sw-1", "language": "Klingon", "text": "x"}', "t.jsonl:1: unknown language 'Klingon'"),
    ('{"id": "sw-1", "language": "es"}', "t.jsonl:1: field 'text' is missing"),
    ('{"id": "sw-1", "language": "es", "text": ""}', "t.jsonl:1: field 'text' is empty"),
    ('{"id": "sw-1", "language": "es", "text": "x"}\n' * 2, "t.jsonl:2: item sw-1 has a second translation"),
    ('{"id": "sw-1", "language": "fr", "text": "x"}', r"no translation of item sw-1 into Spanish \(it has: fr\)"),
    (None, "no file .*t.jsonl"),
]


@pytest.mark.parametrize(("content", "message"), MACHINE)
def test_faulty_translation_files_are_named_with_their_line(datas, tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        apply_parallel_input(MGSM, datas, examples_of(MGSM, datas, "sw"), ParallelInput(1, str(tmp_path / "t.jsonl")))
    assert "\n" not in str(caught.value)


WRONG = {
    "no translations": (["--llm_only", "--parallel_input", "3"], "needs --translations"),
    "no size": (["--llm_only", "--translations", "aligned"], "--translations belongs to --parallel_input"),
    "order alone": (["--llm_only", "--order", "shuffled"], "--order belongs to --parallel_input"),
    "not the LLM alone": (["--parallel_input", "1", "--translations", "aligned"], "pass --llm_only too"),
    "other size": (["--llm_only", "--parallel_input", "2", "--translations", "aligned"], "invalid choice"),
    "too few languages": (
        ["--llm_only", "--parallel_input", "3", "--translations", "aligned", "--parallel_languages", "es,fr"],
        "needs 3 languages besides Swahili, there are 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags_are_one_line_before_any_model_loads(case, datas, tiny_llm, tmp_path, monkeypatch):
    monkeypatch.setattr(run_evaluation, "load_model", None)
    flags, message = WRONG[case]
    given = ["--llm_path", tiny_llm, "--data_root", datas, "--languages", "sw", "--results_dir", str(tmp_path / "r")]
    with pytest.raises(UserError, match=message) as caught:
        main([*given, *flags])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


# -- through the evaluation


@pytest.fixture
def evaluate(datas, tiny_llm, tmp_path, capsys):
    def call(*flags):
        given = ["--llm_only", "--llm_path", tiny_llm, "--data_root", datas, "--languages", "sw,es", "--limit", "2"]
        given += ["--max_new_tokens", "4", "--results_dir", str(tmp_path / "results"), "--precision", "fp32"]
        assert main([*given, *map(str, flags)]) == 0
        return capsys.readouterr()

    return call


def write_translations(datas, path, codes_):
    """Writes what a machine would have made: here simply marked texts."""
    with open(path, "w", encoding="utf-8") as file:
        for source in ("sw", "es"):
            for example in examples_of(MGSM, datas, source):
                for code in codes_:
                    row = {"id": example.id, "language": code, "text": f"{code} of {example.id}"}
                    file.write(json.dumps(row) + "\n")


def test_results_say_oracle_or_machine_wherever_they_are_shown(evaluate, datas, tmp_path):
    out, _ = evaluate("--parallel_input", 3, "--translations", "aligned")
    assert "PMI-3 (oracle): the benchmark's own rows" in out and "published" not in out
    write_translations(datas, tmp_path / "t.jsonl", ("es", "ru", "fr", "zh"))
    out, _ = evaluate("--parallel_input", 3, "--translations", tmp_path / "t.jsonl")
    assert "PMI-3 (machine): machine translations" in out
    evaluate()
    root = tmp_path / "results/MindMerger"
    assert {p.name for p in root.iterdir()} == {
        "math_mgsm-llm_only",
        "math_mgsm-pmi3-oracle",
        "math_mgsm-pmi3-machine",
    }
    results = json.loads((root / "math_mgsm-pmi3-oracle/results.json").read_text())
    assert results["parallel_input"] == {
        "name": "PMI-3 (oracle)",
        "k": 3,
        "translations": "oracle",
        "source": "aligned",
        "order": "source-first",
        "languages": {"Swahili": ["es", "ru", "fr"], "Spanish": ["ru", "fr", "zh"]},
    }
    table = compare_results([str(root / name) for name in ("math_mgsm-llm_only", "math_mgsm-pmi3-machine")])
    assert "LLM alone (prompt only)" in table and "PMI-3 (machine)" in table
    rows = (root / "math_mgsm-pmi3-machine/predictions/Swahili.jsonl").read_text(encoding="utf-8")
    assert "[Spanish] es of sw-1" in json.loads(rows.split("\n")[0])["prompt"]


def test_a_finished_run_with_another_order_or_translation_is_not_taken_for_this_one(evaluate, datas, tmp_path):
    write_translations(datas, tmp_path / "t.jsonl", ("es", "ru"))
    flags = ("--parallel_input", 1, "--translations", tmp_path / "t.jsonl")
    evaluate(*flags)
    _, err = evaluate(*flags)
    assert "nothing is generated" in err
    with pytest.raises(UserError, match="finished evaluation with another --order: source-first then, shuffled now"):
        evaluate(*flags, "--order", "shuffled")
    (tmp_path / "t.jsonl").write_text((tmp_path / "t.jsonl").read_text().replace("es of", "otra"))
    with pytest.raises(UserError, match="finished evaluation of other rows, the data have changed: prompt of sw-1"):
        evaluate(*flags)


def test_prompt_limit_grows_with_the_number_of_texts_unless_given(datas, tiny_llm):
    given = ["--llm_only", "--llm_path", tiny_llm, "--data_root", datas, "--languages", "sw", "--limit", "1"]
    given += ["--parallel_input", "6", "--translations", "aligned"]
    assert settle(build_parser().parse_args(given), False).identity["--max_gen_len"] == 7 * 512
    given += ["--max_gen_len", "600"]
    assert settle(build_parser().parse_args(given), False).identity["--max_gen_len"] == 600


# -- the command


def test_a_filled_translation_list_is_a_translation_file(datas, tmp_path, capsys):
    file = tmp_path / "list.jsonl"
    flags = ["--data_root", datas, "--languages", "sw,th", "--parallel_input", "3"]
    assert baselines_parallel_input.main([*flags, "--to_translate", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * 4 * 3 and all(row["text"] == "" and row["source"] for row in rows)
    file.write_text("".join(json.dumps(row | {"text": "T" + row["language"]}) + "\n" for row in rows))
    capsys.readouterr()
    assert baselines_parallel_input.main([*flags, "--translations", str(file), "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("[Spanish] Tes\n[Russian] Tru\n[French] Tfr") == 4 and out.count("PMI-3 (machine)") == 4
