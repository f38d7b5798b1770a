"""Readers: real quirks load as they are, every fault is one `file:line: what`, nothing is lost silently."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindmerger.tasks import find_task
from mindmerger.tasks.examples import StageData, evaluation_examples
from mindmerger.tasks.languages import LANGUAGES, parse_languages
from mindmerger.tasks.readers import DataError, read_lines, read_records
from mindmerger.tasks.translation import read_pairs

DATAS = Path(__file__).parent / "data" / "datas"
GERMAN, SWAHILI, THAI = (LANGUAGES[name] for name in ("German", "Swahili", "Thai"))


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(root: Path, sources: bytes | str, targets: bytes | str) -> None:
    write(root / "bilingual_pairs/en-de/train_100k.de", sources)
    write(root / "bilingual_pairs/en-de/train_100k.en", targets)


def math_rows(root: Path, rows) -> Path:
    return write(root / "query_translation/math.json", rows if isinstance(rows, bytes | str) else json.dumps(rows))


def x_csqa_row(**changes) -> dict:
    choices = [{"label": label, "text": f"option {label}"} for label in "ABCDE"]
    return {"id": "1", "lang": "de", "question": {"stem": "Wo?", "choices": choices}, "answerKey": "B"} | changes


def error_of(call) -> str:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message


# ---------------------------------------------------------------------------------------------------------------------
# The excerpts


@pytest.mark.parametrize("name", ["math_mgsm", "math_msvamp", "x-csqa", "xnli"])
def test_every_evaluation_language_of_the_excerpts_loads(name):
    task = find_task(name)
    for language in task.evaluation_languages:
        examples = evaluation_examples(task, DATAS, LANGUAGES[language])
        assert len(examples) == (3 if name == "xnli" else 4)
        assert {example.language for example in examples} == {language}
        assert len({example.id for example in examples}) == len(examples)
        for example in examples:
            assert example.prompt[slice(*example.shrinkable)].strip()
            assert task.score(example.target, example.target).correct


@pytest.mark.parametrize("name", ["math", "x-csqa", "xnli", "translation"])
def test_every_mapping_language_of_the_excerpts_loads_in_the_tasks_order(name):
    task = find_task(name)
    languages = [example.language for example in StageData(task, "mapping", DATAS).examples()]
    assert tuple(dict.fromkeys(languages)) == task.mapping_languages
    assert len(languages) == 12 * len(task.mapping_languages)


@pytest.mark.parametrize(("name", "languages", "rows"), [("math", 11, 4), ("x-csqa", 16, 5), ("xnli", 15, 3)])
def test_augmentation_takes_every_language_of_the_excerpts(name, languages, rows):
    examples = list(StageData(find_task(name), "augmentation", DATAS).examples())
    assert len(examples) == languages * rows
    assert len({example.language for example in examples}) == languages


def test_augmentation_examples_hold_raw_question_for_math_and_the_prompt_for_the_others():
    for name in ("math", "x-csqa", "xnli"):
        for example in StageData(find_task(name), "augmentation", DATAS).examples():
            if name == "math":
                assert example.prompt[slice(*example.shrinkable)] == example.source != example.prompt
            else:
                assert example.source == example.prompt


@pytest.mark.parametrize(("name", "stage"), [("math", "mapping"), ("math", "augmentation"), ("xnli", "augmentation")])
def test_train_num_limits_each_language_in_mixed_and_separate_files(name, stage):
    examples = list(StageData(find_task(name), stage, DATAS, [SWAHILI, GERMAN], train_num=2).examples())
    assert sorted(example.language for example in examples) == ["German"] * 2 + ["Swahili"] * 2


def test_unicode_line_separators_do_not_split_a_line():
    """str.splitlines breaks on U+0085, U+001D and U+2028, which stand inside real sentences."""
    greek = evaluation_examples(find_task("xnli"), DATAS, LANGUAGES["Greek"])
    assert "\x1d" in greek[0].prompt


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def test_tasks_are_found_by_alias_and_unknown_ones_get_the_list():
    assert find_task("math").name == "math_mgsm" and find_task("X_CSQA").name == "x-csqa"
    message = error_of(lambda: find_task("xnl"))
    assert "did you mean xnli?" in message and "math_msvamp" in message
    for near in ("mgms", "mgsm"):
        assert "did you mean math_mgsm?" in error_of(lambda near=near: find_task(near))


def test_translation_task_has_a_mapping_stage_only():
    task = find_task("translation")
    assert "no rows of its own" in error_of(lambda: list(StageData(task, "augmentation", DATAS).examples()))
    assert "math_mgsm" in error_of(lambda: evaluation_examples(task, DATAS, GERMAN))


def test_english_is_left_out_of_the_mapping_stage_with_a_warning(capsys):
    languages = parse_languages("English,German")
    assert {e.language for e in StageData(find_task("math"), "mapping", DATAS, languages).examples()} == {"German"}
    assert "English" in capsys.readouterr().err
    error_of(lambda: StageData(find_task("math"), "mapping", DATAS, languages[:1]).examples())


@pytest.mark.parametrize("train_num", [0, -3])
def test_train_num_below_one_is_refused(train_num):
    assert "--train_num" in error_of(lambda: StageData(find_task("math"), "mapping", DATAS, None, train_num).examples())


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def test_missing_file_names_the_path_and_lists_what_is_there(tmp_path):
    shutil.copytree(DATAS / "evaluation/mgsm", tmp_path / "evaluation/mgsm")
    message = error_of(lambda: evaluation_examples(find_task("math"), tmp_path, LANGUAGES["Hindi"]))
    assert "mgsm_hi.tsv" in message and "mgsm_bn.tsv" in message and "1 more" in message
    message = error_of(lambda: list(StageData(find_task("math"), "mapping", tmp_path / "nowhere").examples()))
    assert "evaluation" in message and "--data_root" in message


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "a link to nowhere, which is not there"])
def test_what_is_not_a_file_in_a_data_files_place_is_named_and_never_waited_for(tmp_path, kind):
    file = tmp_path / "evaluation/mgsm/mgsm_de.tsv"
    file.parent.mkdir(parents=True)
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a folder":
        file.mkdir()
    else:
        file.symlink_to(os.devnull if kind == "a device" else "nowhere")
    message = error_of(lambda: evaluation_examples(find_task("math"), tmp_path, GERMAN))
    assert message == f"{file} is {kind}: a file is expected there"


def test_folder_in_a_files_place_and_an_impossible_path_are_one_line(tmp_path):
    (tmp_path / "evaluation/mgsm/mgsm_de.tsv").mkdir(parents=True)
    assert "is a folder" in error_of(lambda: evaluation_examples(find_task("math"), tmp_path, GERMAN))
    assert "cannot look for" in error_of(lambda: evaluation_examples(find_task("math"), "x" * 300, GERMAN))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0007\nsize 123456\n"


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("bilingual_pairs/en-de/train_100k.de", lambda root: StageData(find_task("math"), "mapping", root).examples()),
        ("bilingual_pairs/en-de/train_100k.en", lambda root: read_pairs(root, GERMAN)),
        ("query_translation/math.json", lambda root: StageData(find_task("math"), "augmentation", root).examples()),
        ("query_translation/x-csqa/train_de.jsonl", lambda root: find_task("x-csqa").read_augmentation(root)),
        ("evaluation/mgsm/mgsm_de.tsv", lambda root: evaluation_examples(find_task("math"), root, GERMAN)),
        ("evaluation/msvamp/test_German.jsonl", lambda root: find_task("math_msvamp").read_evaluation(root, GERMAN)),
        ("evaluation/xnli/test.json", lambda root: evaluation_examples(find_task("xnli"), root, GERMAN)),
    ],
)
def test_a_git_lfs_pointer_in_any_files_place_is_named_as_one(tmp_path, path, read):
    shutil.copytree(DATAS, tmp_path, dirs_exist_ok=True)
    (tmp_path / path).write_text(POINTER, encoding="utf-8")
    message = error_of(lambda: list(read(tmp_path)))
    assert message == f"{tmp_path / path} is a Git LFS pointer, not the data: run git lfs pull"


def test_two_git_lfs_pointers_are_not_three_sentence_pairs(tmp_path):
    pairs(tmp_path, POINTER, POINTER)
    assert "Git LFS" in error_of(lambda: list(read_pairs(tmp_path, GERMAN)))


@pytest.mark.parametrize("closed", ["evaluation/mgsm/mgsm_de.tsv", "evaluation/mgsm"])
def test_a_file_that_may_not_be_read_is_said_to_lack_permission(closed):
    with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to other users
        shutil.copytree(DATAS / "evaluation", Path(root) / "evaluation")
        for path in [Path(root), *Path(root).rglob("*")]:
            path.chmod(0o755)
        (Path(root) / closed).chmod(0)
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(65534)  # root may read everything
        try:
            message = error_of(lambda: evaluation_examples(find_task("math"), root, GERMAN))
        finally:
            if was_root:
                os.seteuid(0)
            (Path(root) / closed).chmod(0o755)
    assert "mgsm_de.tsv: Permission denied" in message


def test_missing_file_of_a_late_language_is_found_before_any_is_read(tmp_path):
    pairs(tmp_path, "eins\n", "one\n")
    languages = parse_languages("German,Thai")
    assert "train_100k.th" in error_of(lambda: StageData(find_task("math"), "mapping", tmp_path, languages).examples())


def test_pair_files_of_unequal_length_are_refused_with_both_counts(tmp_path):
    pairs(tmp_path, "eins\nzwei\ndrei\n", "one\ntwo\n")
    message = error_of(lambda: list(read_pairs(tmp_path, GERMAN, 1)))
    assert "3 lines" in message and "2" in message


def test_pairs_are_stripped_and_survive_crlf_bom_and_a_missing_last_newline(tmp_path):
    pairs(tmp_path, b"\xef\xbb\xbf eins \r\nzw\rei\x1d\xc2\x85x", b"one\r\ntwo\r\n")
    examples = list(read_pairs(tmp_path, GERMAN))
    assert [(e.source, e.target) for e in examples] == [("eins", "one"), ("zw\rei\x1d\x85x", "two")]


def test_pairs_with_an_empty_side_are_left_out_with_a_count(tmp_path, capsys):
    pairs(tmp_path, "eins\n \ndrei\n", "one\ntwo\nthree\n")
    assert [e.id for e in read_pairs(tmp_path, GERMAN)] == ["de-1", "de-3"]
    assert "1 pairs" in capsys.readouterr().err


def test_duplicate_pairs_are_kept(tmp_path):
    pairs(tmp_path, "eins\neins\n", "one\none\n")
    assert len(list(read_pairs(tmp_path, GERMAN))) == 2


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        (b"", "", "no pairs"),
        (b"\n \n", "", "no pairs"),
        (b"eins\nzw\xffei\n", ":2:", "not UTF-8"),
        (b"eins\nzw\0ei\n", ":2:", "NUL"),
        ("eins\n".encode("utf-16"), ":1:", "NUL"),
        (b"eins\rzwei\rdrei", ":1:", "CR alone"),
    ],
)
def test_faulty_pair_file_names_file_and_line(tmp_path, content, place, what):
    lines = content.count(b"\n") + (not content.endswith(b"\n") and bool(content))
    pairs(tmp_path, content, b"one\n" * lines)
    message = error_of(lambda: list(read_pairs(tmp_path, GERMAN)))
    assert f"train_100k.de{place}" in message and what in message


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        ("", "", "no rows"),
        ("[]", "", "no rows"),
        ('{"data": []}', "", "no rows"),
        ('{"rows": []}', ":1:", '{"data": [...]}'),
        ("{}", ":1:", ""),
        ("7", ":1:", "JSON list"),
        ('"text"', ":1:", "JSON list"),
        ('[\n{"lang": "German", "query": "q",', ":2:", "not valid JSON"),
        ('[\n{"lang": "German", "query": "q", "response": "1"}\n', ":3:", "end of the file"),
        ('[\n{"lang": "German", "query": "q", "response": "1"},\n]', ":3:", "comma"),
        ('[{"lang": "German", "query": "q", "response": "1"}]\n]', ":2:", "more text"),
        ('[\n\n{"lang": "German", "query": "q"}]', ":3:", "'response' is missing"),
        ('[\n{"lang": "German", "query": 7, "response": "1"}]', ":2:", "must be text, got 7"),
        ('[\n{"lang": "German", "query": " ", "response": "1"}]', ":2:", "'query' is empty"),
        ('[\n{"lang": "German", "query": null, "response": "1"}]', ":2:", "must be text"),
        ('[\n{"lang": "Germann", "query": "q", "response": "1"}]', ":2:", "did you mean German?"),
        ('[\n{"lang": 3, "query": "q", "response": "1"}]', ":2:", "'lang'"),
        ('[\n["German", "q", "1"]]', ":2:", "JSON object"),
        ('[\n{"lang": "German", "lang": "Thai", "query": "q", "response": "1"}]', ":2:", "twice"),
        ('[\n{"lang": "German", "query": "\\ud800", "response": "1"}]', ":2:", "surrogate"),
        ('[\n{"lang": "German", "query": "a\nb", "response": "1"}]', ":2:", "control character"),
        ("[\n" + "[" * 200_000, ":2:", "too deeply"),
        ('[\n{"lang": ' + "9" * 5000 + "}]", ":2:", "digits"),
        (b'[\n{"lang": "\xff"}]', ":2:", "not UTF-8"),
        (b'[\n{"lang": "\0"}]', ":2:", "control character"),
    ],
)
def test_faulty_json_list_names_file_and_line(tmp_path, content, place, what):
    math_rows(tmp_path, content)
    message = error_of(lambda: list(StageData(find_task("math"), "augmentation", tmp_path).examples()))
    assert f"math.json{place}" in message and what in message


def test_json_list_under_data_loads_with_the_right_lines(tmp_path):
    row = {"lang": "German", "query": "q", "response": "1"}
    text = '\ufeff{"version": [1, {"data": 2}],\r\n"data": [\r\n' + json.dumps(row) + ',\n{}],\n"more": null}\n'
    math_rows(tmp_path, text)
    examples = StageData(find_task("math"), "augmentation", tmp_path).examples()
    assert next(examples).source == "q"
    assert "math.json:4: field 'lang' is missing" in error_of(lambda: next(examples))


def test_chosen_language_without_rows_is_named_with_what_the_file_holds(tmp_path):
    math_rows(tmp_path, [{"lang": "German", "query": "q", "response": "1"}])
    message = error_of(lambda: list(StageData(find_task("math"), "augmentation", tmp_path, [THAI, GERMAN]).examples()))
    assert "no rows in Thai" in message and "German (1)" in message


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (x_csqa_row(answerKey=""), "answerKey"),
        ({key: value for key, value in x_csqa_row().items() if key != "answerKey"}, "found none"),
        (x_csqa_row(answerKey="F"), "A, B, C, D, E"),
        (x_csqa_row(answerKey=["A"]), "answerKey"),
        (x_csqa_row(question="Wo?"), "question must be a JSON object"),
        (x_csqa_row(question={"stem": "Wo?", "choices": []}), "options"),
        (x_csqa_row(question={"stem": "Wo?", "choices": ["A"]}), "must be a JSON object"),
        (x_csqa_row(question={"stem": "Wo?", "choices": {"label": ["A"], "text": []}}), "equal length"),
        (x_csqa_row(question={"stem": "Wo?", "choices": {"label": ["A"]}}), "missing"),
        (x_csqa_row(question={"stem": "Wo?", "choices": "AB"}), "must be a list"),
        (x_csqa_row(question={"stem": "Wo?", "choices": [{"label": "A", "text": "x"}] * 2}), "different labels"),
        ([], "JSON object"),
        (None, "JSON object"),
    ],
)
def test_faulty_x_csqa_row_names_file_line_and_field(tmp_path, row, what):
    path = tmp_path / "evaluation/x-csqa/de/dev.jsonl"
    write(path, json.dumps(x_csqa_row()) + "\n\n" + json.dumps(row) + "\n")
    message = error_of(lambda: evaluation_examples(find_task("x-csqa"), tmp_path, GERMAN))
    assert "dev.jsonl:3: " in message and what in message


def test_x_csqa_takes_both_public_forms_equal_options_and_a_foreign_lang_code(tmp_path):
    labels, texts = list("ABCDE"), ["tree", "tree", "", "sky", "oven"]
    as_list = [{"label": label, "text": text} for label, text in zip(labels, texts, strict=True)]
    rows = [
        x_csqa_row(lang="jap", question={"stem": "Wo?", "choices": choices})
        for choices in (as_list, {"label": labels, "text": texts})
    ]
    write(tmp_path / "evaluation/x-csqa/de/dev.jsonl", "\r\n".join(map(json.dumps, rows)))
    first, second = evaluation_examples(find_task("x-csqa"), tmp_path, GERMAN)
    assert first.prompt == second.prompt == "Wo?\nOptions:A. tree\tB. tree\tC. \tD. sky\tE. oven\nAnswer:"
    assert first.target == "B"


def test_truncated_jsonl_line_is_named(tmp_path):
    line = json.dumps({"m_query": "Wie viele?", "response": "3.0"})
    write(tmp_path / "evaluation/msvamp/test_German.jsonl", f"{line}\n{line[:20]}")
    assert "test_German.jsonl:2: not valid JSON" in error_of(
        lambda: evaluation_examples(find_task("math_msvamp"), tmp_path, GERMAN, limit=1)
    )


def test_msvamp_keeps_edge_blanks_and_mgsm_strips(tmp_path):
    write(tmp_path / "evaluation/msvamp/test_German.jsonl", json.dumps({"m_query": " Wie? ", "response": "3.0"}))
    write(tmp_path / "evaluation/mgsm/mgsm_de.tsv", ' "Wie? \t 2,125 \r\n')
    assert evaluation_examples(find_task("math_msvamp"), tmp_path, GERMAN)[0].source == " Wie? "
    (mgsm,) = evaluation_examples(find_task("math_mgsm"), tmp_path, GERMAN)
    assert (mgsm.source, mgsm.target) == ('"Wie?', "2,125")


@pytest.mark.parametrize("line", ["Wie viele?", "Wie viele?\t", "\t3", "Wie?\t3\t4", "Wie?\tdrei"])
def test_faulty_mgsm_line_is_named(tmp_path, line):
    write(tmp_path / "evaluation/mgsm/mgsm_de.tsv", f"Wie?\t3\n{line}\n")
    assert "mgsm_de.tsv:2: " in error_of(lambda: evaluation_examples(find_task("math"), tmp_path, GERMAN))


def test_xnli_maps_the_known_spelling_and_refuses_other_labels(tmp_path):
    row = {"sentence1": "a", "sentence2": "b", "label": "contradictory", "language": "German"}
    path = write(tmp_path / "evaluation/xnli/test.json", json.dumps([row]))
    assert evaluation_examples(find_task("xnli"), tmp_path, GERMAN)[0].target == "contradiction"
    path.write_text(json.dumps([row | {"label": "Neutral"}], indent=1))
    message = error_of(lambda: evaluation_examples(find_task("xnli"), tmp_path, GERMAN))
    assert "test.json:2: " in message and "entailment, neutral, contradiction" in message


def test_line_of_ten_megabytes_loads_whole(tmp_path):
    pairs(tmp_path, "ä" * 5_000_000 + "\nzwei\n", "one\ntwo\n")
    assert [len(e.source) for e in read_pairs(tmp_path, GERMAN)] == [5_000_000, 4]


def test_limit_takes_the_first_rows():
    task = find_task("math")
    assert evaluation_examples(task, DATAS, THAI, 2) == evaluation_examples(task, DATAS, THAI)[:2]


# ---------------------------------------------------------------------------------------------------------------------
# Round trips

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
REUSE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@REUSE
@given(lines=st.lists(TEXT.map(lambda text: text.replace("\n", " ").rstrip("\r") or "x"), min_size=1))
def test_lines_come_back_as_written(tmp_path, lines):
    path = write(tmp_path / "lines.tsv", "".join(f"{line}\n" for line in ["first", *lines]))
    assert [text for _, text in read_lines(path)] == ["first", *lines]


@REUSE
@given(
    values=st.lists(st.dictionaries(TEXT, TEXT | st.lists(st.integers())), min_size=1),
    indent=st.sampled_from([None, 1]),
)
def test_json_values_come_back_as_written_whatever_the_form(tmp_path, values, indent):
    for form in (values, {"data": values}, {"a": {"data": 1}, "data": values, "z": [1]}):
        path = write(tmp_path / "rows.json", json.dumps(form, indent=indent, ensure_ascii=False))
        assert [record.value for record in read_records(path)] == values
    path = write(tmp_path / "rows.jsonl", "\n".join(json.dumps(value, ensure_ascii=False) for value in values))
    assert [(r.line, r.value) for r in read_records(path)] == list(enumerate(values, start=1))


@REUSE
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".json", ".jsonl", ".tsv"]), cut=st.integers(0, 200))
def test_any_bytes_load_or_give_one_line(tmp_path, content, suffix, cut):
    """A traceback for some byte sequence, or half a file taken for a whole one."""
    real = json.dumps([{"lang": "German", "query": "wie?\n", "response": "ä"}] * 2, indent=1).encode()
    for data in (content, real[:cut] + content, real[:cut] + content + real[cut:]):
        path = write(tmp_path / f"rows{suffix}", data)
        try:
            list(read_records(path))
        except DataError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Faulty rows that are left out on request


def faults_of(read) -> tuple[list[str], list[str]]:
    """The ids that `read` gives when it takes a list of faults, and that list."""
    faults: list[str] = []
    return [example.id for example in read(faults)], faults


def test_faulty_pairs_are_left_out_and_listed_by_line(tmp_path):
    pairs(tmp_path, b"eins\nzw\xffei\ndrei\nvier\n", b"one\ntwo\nth\0ree\nfour\n")
    ids, faults = faults_of(lambda faults: read_pairs(tmp_path, GERMAN, None, faults))
    assert ids == ["de-1", "de-4"]
    assert [fault.removeprefix(f"{tmp_path}/bilingual_pairs/en-de/train_100k.")[:17] for fault in faults] == [
        "de:2: not UTF-8 (",
        "en:3: NUL byte: t",
    ]


def test_faulty_rows_of_a_list_are_left_out_whatever_ails_them(tmp_path):
    good = {"lang": "German", "query": "q", "response": "1"}
    bad = [
        {"lang": "Germann"},
        {"lang": "German", "query": 7},
        "text",
        good | {"response": " "},
        good | {"query": "\ud800"},
    ]
    math_rows(tmp_path, "[\n" + ",\n".join(map(json.dumps, [good, *bad, good])) + "\n]")
    task = find_task("math")
    ids, faults = faults_of(lambda faults: StageData(task, "augmentation", tmp_path, None, 2).examples(faults))
    assert ids[0] == "de-1" and len(ids) == 2
    assert [fault.split("math.json:")[1].split(":")[0] for fault in faults] == ["3", "4", "5", "6", "7"]


def test_broken_lines_of_jsonl_are_left_out_and_do_not_count_as_given(tmp_path):
    lines = [json.dumps(x_csqa_row()), "{broken", json.dumps(x_csqa_row(answerKey="Z")), json.dumps(x_csqa_row())]
    write(tmp_path / "query_translation/x-csqa/train_de.jsonl", "\n".join(lines * 2))
    task = find_task("x-csqa")
    ids, faults = faults_of(lambda faults: StageData(task, "augmentation", tmp_path, [GERMAN], 3).examples(faults))
    assert ids == ["de-1", "de-4", "de-5"]
    assert [":".join(fault.split(":")[1:2]) for fault in faults] == ["2", "3"]


def test_a_file_of_faulty_rows_alone_and_one_that_is_not_a_list_are_refused_all_the_same(tmp_path):
    task = find_task("math")
    for content, message in (
        ('[{"lang": "x"}]', "every row in it is faulty"),
        ('[{"lang": "German",', "not valid JSON"),
    ):
        math_rows(tmp_path, content)
        assert message in error_of(lambda: list(StageData(task, "augmentation", tmp_path).examples([])))


def test_a_test_set_keeps_its_ids_so_that_a_row_of_unknown_language_is_never_left_out(tmp_path):
    row = {"sentence1": "a", "sentence2": "b", "label": "neutral", "language": "German"}
    path = tmp_path / "evaluation/xnli/test.json"
    task = find_task("xnli")
    write(path, json.dumps([row, row | {"label": "x"}, row]))
    ids, faults = faults_of(lambda faults: evaluation_examples(task, tmp_path, GERMAN, None, faults))
    assert ids == ["de-1", "de-3"] and len(faults) == 1
    write(path, json.dumps([row, row | {"language": "?"}, row]))
    assert "unknown language" in error_of(lambda: evaluation_examples(task, tmp_path, GERMAN, None, []))
