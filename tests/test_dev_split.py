"""The dev split by groups: no question of it is trained on, in any language, and runs begun by rows go on by rows."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import read_log, run_many
from hypothesis import given
from hypothesis import strategies as st

import run_training
from mindmerger.data import groups as data_groups
from mindmerger.data.batches import split_dev
from mindmerger.data.groups import GROUPS_FILE, GroupKeys, connect, cross_languages
from mindmerger.data.tokenising import load_tokenizers
from mindmerger.data.training_set import open_or_build
from mindmerger.runtime.errors import UserError
from mindmerger.tasks import find_task
from mindmerger.tasks.examples import StageData, varying_text
from mindmerger.training.checkpoints import write_checkpoint
from mindmerger.training.dev_split import describe_dev_split, settle_dev_split
from mindmerger.training.flags import build_parser

LABELS = ("entailment", "neutral", "contradiction")
XNLI_NAMES = {"en": "English", "sw": "Swahili", "de": "German"}


def write_xnli(folder, order=None, premises=20):
    """Writes rows of XNLI's form: three of each premise in three languages, in `order(language)` where it is given."""
    rows = []
    for code, name in XNLI_NAMES.items():
        own = []
        for premise in range(premises):
            for number, label in enumerate(LABELS):
                first, second = f"{code} premise {premise}", f"{code} hypothesis {premise}.{number}"
                own.append({"sentence1": first, "sentence2": second, "label": label, "language": name})
        rows += [own[i] for i in order(code)] if order else own
    (folder / "query_translation").mkdir(parents=True)
    (folder / "query_translation/xnli_dev.json").write_text(json.dumps(rows))
    return folder


def write_pairs(folder):
    """Writes pairs of two languages that have a third of their English sentences in common, at other lines."""
    english = {"sw": [f"sentence {i}" for i in range(60)], "de": [f"sentence {i}" for i in range(79, 39, -1)]}
    for code, sentences in english.items():
        place = folder / f"bilingual_pairs/en-{code}"
        place.mkdir(parents=True)
        (place / "train_100k.en").write_text("".join(f"{one}\n" for one in sentences))
        (place / f"train_100k.{code}").write_text("".join(f"{code} {one}\n" for one in sentences))
    return folder


def write_x_csqa(folder):
    """Writes records whose ids stand in another order in every language, with other letters."""
    (folder / "query_translation/x-csqa").mkdir(parents=True)
    for code in ("en", "de"):
        rows = []
        for number in range(30) if code == "en" else range(29, -1, -1):
            choices = [{"label": letter, "text": f"{letter} of {number}"} for letter in "AB"]
            stem = f"{code} stem {number}"
            rows.append(
                {"id": f"q{number}", "question": {"stem": stem, "choices": choices}, "answerKey": "AB"[len(rows) % 2]}
            )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"query_translation/x-csqa/train_{code}.jsonl").write_text(text)
    return folder


def write_math(folder, order=None, responses=lambda code, number: f"It is {number}. The answer is {number}."):
    """Writes questions in three languages with English responses."""
    rows = []
    for code, name in XNLI_NAMES.items():
        own = [{"lang": name, "query": f"{code} {i}?", "response": responses(code, i)} for i in range(40)]
        rows += [own[i] for i in order(code)] if order else own
    (folder / "query_translation").mkdir(parents=True)
    (folder / "query_translation/math.json").write_text(json.dumps(rows))
    return folder


def shuffled(rows):
    """Returns an order of its own for each language."""
    return lambda code: np.random.RandomState(sum(map(ord, code))).permutation(rows)


def examples_and_groups(task, stage, folder):
    """Returns a stage's examples and their groups."""
    data = StageData(find_task(task), stage, folder)
    if stage == "mapping":
        data = StageData(find_task(task), stage, folder, languages_of("sw", "de"))
    elif task == "x-csqa":
        data = StageData(find_task(task), stage, folder, languages_of("en", "de"))
    keys = GroupKeys(data)
    return list(keys.noting(data.examples())), keys.groups()


def languages_of(*codes):
    """Returns languages by their codes."""
    from mindmerger.tasks.languages import find_language

    return [find_language(code) for code in codes]


CASES = {
    "pairs": ("math", "mapping", write_pairs, lambda e: e.target),
    "xnli": ("xnli", "augmentation", write_xnli, lambda e: varying_text(e).split()[-1]),
    "x-csqa": ("x-csqa", "augmentation", write_x_csqa, lambda e: e.question),
    "math": ("math", "augmentation", write_math, lambda e: e.source.split()[1]),
    "math in any order": ("math", "augmentation", lambda f: write_math(f, shuffled(40)), lambda e: e.source.split()[1]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_question_of_the_dev_split_is_trained_on_in_any_language(tmp_path, case, seed):
    task, stage, write, question = CASES[case]
    examples, groups = examples_and_groups(task, stage, write(tmp_path))
    dev, train = split_dev(len(examples), 20, seed, groups)
    assert sorted([*dev, *train]) == list(range(len(examples))) and dev.dtype == train.dtype == np.int64
    questions = [{question(examples[i]) for i in side} for side in (dev, train)]
    assert not questions[0] & questions[1] and all(questions)
    assert abs(len(dev) - 20) <= np.bincount(groups).max() / 2
    again = split_dev(len(examples), 20, seed, groups)
    assert np.array_equal(dev, again[0]) and np.array_equal(train, again[1])
    # By rows the same seed does mix them: the test would else pass without groups.
    dev, train = split_dev(len(examples), 20, seed)
    assert {question(examples[i]) for i in dev} & {question(examples[i]) for i in train}


def test_groups_are_the_questions_and_no_larger(tmp_path):
    for case, (task, stage, write, question) in CASES.items():
        examples, groups = examples_and_groups(task, stage, write(tmp_path / case))
        by_question = {question(example): group for example, group in zip(examples, groups, strict=True)}
        assert [by_question[question(example)] for example in examples] == groups.tolist(), case
        assert len(set(by_question.values())) == len(by_question), case


def test_premises_stay_together_in_a_file_of_no_order_and_the_rest_is_said(tmp_path, folders, capsys):
    """By their numbers, rows of a shuffled file would be tied to strangers, and by their premises all to one group."""
    folder = write_xnli(tmp_path, shuffled(60))
    examples, groups = examples_and_groups("xnli", "augmentation", folder)
    assert np.bincount(groups).tolist() == [3] * 60
    assert {tuple({varying_text(examples[i]) for i in np.flatnonzero(groups == g)}) for g in range(60)} == {
        (f"{code} premise {number}",) for code in XNLI_NAMES for number in range(20)
    }
    data, stage = opened(folder, folders, "xnli", "augmentation")
    describe_dev_split(SimpleNamespace(dev_size=18), stage, data, range(18))
    assert "neither ids nor row numbers tell which rows of different languages" in capsys.readouterr().err


def test_a_file_in_one_order_with_some_other_answers_is_still_one_order(tmp_path):
    """The released math data have translations whose responses differ in wording."""
    folder = write_math(tmp_path, responses=lambda code, i: f"{code if i % 3 == 0 else ''}. The answer is {i}.")
    examples, groups = examples_and_groups("math", "augmentation", folder)
    assert np.bincount(groups).tolist() == [3] * 40


# -- the split


@given(st.lists(st.integers(0, 30), min_size=2, max_size=200), st.data(), st.integers(0, 99))
def test_whole_groups_are_split_as_near_to_the_size_as_they_come(labels, data, seed):
    groups = connect([np.array(labels)])
    number, sizes = len(labels), np.bincount(groups)
    dev_size = data.draw(st.integers(0, number - 1))
    if len(sizes) == 1 and dev_size:
        with pytest.raises(UserError, match="are one question and its translations.*--dev_split rows"):
            split_dev(number, dev_size, seed, groups)
        return
    dev, train = split_dev(number, dev_size, seed, groups)
    assert sorted([*dev, *train]) == list(range(number)) and len(train)
    assert not set(groups[dev]) & set(groups[train])
    assert bool(len(dev)) == bool(dev_size)
    if len(set(groups[dev])) > 1 and len(set(groups[train])) > 1:
        assert abs(len(dev) - dev_size) <= sizes.max() / 2


@given(st.integers(2, 300), st.data(), st.integers(0, 2**40))
def test_data_in_which_no_question_stands_twice_is_split_as_single_rows_are(number, data, seed):
    dev_size = data.draw(st.integers(0, number - 1))
    for one, other in zip(
        split_dev(number, dev_size, seed), split_dev(number, dev_size, seed, np.arange(number)), strict=True
    ):
        assert np.array_equal(one, other) and one.dtype == other.dtype


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=60))
def test_rows_are_connected_by_way_of_others(rows):
    keys = [np.array(column) for column in zip(*rows, strict=True)]
    found = connect(keys)
    group = list(range(len(rows)))  # slowly, by merging two groups at a time
    for i, one in enumerate(rows):
        for j, other in enumerate(rows[:i]):
            if one[0] == other[0] or one[1] == other[1]:
                group = [group[j] if number == group[i] else number for number in group]
    assert [[a == b for b in group] for a in group] == (found[:, None] == found).tolist()
    assert list(dict.fromkeys(found.tolist())) == list(range(found.max() + 1))


def test_a_chain_of_many_rows_is_connected_in_few_rounds(monkeypatch):
    rounds, number, equal = [], 1000, np.array_equal
    monkeypatch.setattr(np, "array_equal", lambda *both: rounds.append(1) or equal(*both))
    ends = np.arange(number) // 2, (np.arange(number) + 1) // 2
    assert not connect(list(ends)).any() and len(rounds) < 20


def test_groups_across_languages_are_known():
    import pyarrow as pa

    languages = pa.chunked_array([["sw", "sw"], ["de"]])
    assert cross_languages(np.array([0, 1, 0]), languages)
    assert not cross_languages(np.array([0, 0, 1]), languages)


# -- the cache


@pytest.fixture(scope="module")
def folders(tiny_encoder, tiny_llm):
    """Both tokenizers."""
    return load_tokenizers(tiny_encoder, tiny_llm)


def opened(folder, tokenizers, task="math", kind="mapping", **more):
    """Returns the tokenised data with its groups, and what it was made of."""
    stage = StageData(find_task(task), kind, folder, languages_of("sw", "de") if kind == "mapping" else None)
    limits = {"max_seq_len": 40, "max_gen_len": 60, "with_prompt": False, "cache_dir": folder / "cache"}
    return open_or_build(stage, tokenizers, **limits, **{"with_groups": True} | more), stage


def test_a_cache_without_groups_gets_them_and_keeps_name_and_ids(tmp_path, folders, monkeypatch):
    write_pairs(tmp_path)
    before, _ = opened(tmp_path, folders, with_groups=False)
    [folder] = [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.groups is None and GROUPS_FILE not in files
    after, _ = opened(tmp_path, folders)
    assert after.fingerprint == before.fingerprint == folder.name
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != GROUPS_FILE} == files
    expected = examples_and_groups("math", "mapping", tmp_path)[1]
    assert np.array_equal(after.groups, expected)
    # Built at once with them, and found again without reading the data.
    shutil.rmtree(tmp_path / "cache")
    assert np.array_equal(opened(tmp_path, folders)[0].groups, expected)
    monkeypatch.setattr(data_groups, "connect", None)
    assert np.array_equal(opened(tmp_path, folders)[0].groups, expected)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"no numbers", "short"])
def test_a_damaged_file_of_groups_is_made_anew(tmp_path, folders, damage):
    write_pairs(tmp_path)
    expected = opened(tmp_path, folders)[0].groups
    [file] = (tmp_path / "cache").glob(f"*/{GROUPS_FILE}")
    whole = file.read_bytes()
    if damage == "short":
        np.save(file, expected[:-1])
    else:
        file.write_bytes(damage)
    assert np.array_equal(opened(tmp_path, folders)[0].groups, expected)
    assert file.read_bytes() == whole


# -- runs


def test_a_run_splits_by_groups_and_records_it(flags, datas, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stage = ["--task", "xnli", "--stage_name", "augmentation", "--init_checkpoint", "none", "--max_gen_len", "300"]
    write_xnli(tmp_path / "xnli")
    given = [*flags, *stage, "--data_root", str(tmp_path / "xnli"), "--dev_size", "20"]
    settings, data = run_training.prepare(build_parser().parse_args(given))
    assert settings.args.dev_split == "groups"
    assert (len(data.dev), len(data.train)) == (18, 162)
    assert "--dev_split groups: 18 examples, as near to --dev_size 20 as whole groups come" in capsys.readouterr().err
    ids = data.examples.dataset["id"]
    premises = [{(int(ids[i].split("-")[1]) - 1) // 3 for i in side} for side in (data.dev, data.train)]
    assert len(premises[0]) == 2 and not premises[0] & premises[1]
    _, by_rows = run_training.prepare(build_parser().parse_args([*given, "--dev_split", "rows"]))
    expected = split_dev(180, 20, 0)
    assert np.array_equal(by_rows.dev, expected[0]) and np.array_equal(by_rows.train, expected[1])


def test_a_run_begun_by_rows_is_resumed_by_rows_and_no_other_split_is_taken_silently(flags, tmp_path):
    write_pairs(tmp_path / "datas")
    base = [*flags, "--data_root", str(tmp_path / "datas"), "--languages", "sw,de", "--dev_size", "12"]
    base += ["--allow_changed", "max_steps", "--eval_steps", "2"]
    more = {name: ["--save_name", name] for name in ("old", "rows", "groups")}
    whole, old, rows, groups = run_many(
        tmp_path,
        [
            [*base, "--dev_split", "rows", "--max_steps", "4"],
            [*base, *more["old"], "--dev_split", "rows", "--max_steps", "2"],
            [*base, *more["rows"], "--dev_split", "rows", "--max_steps", "2"],
            [*base, *more["groups"], "--max_steps", "2"],
        ],
    )
    assert [one["code"] for one in (whole, old, rows, groups)] == [0] * 4, (whole, old, rows, groups)
    outputs = {name: tmp_path / "outputs" / name / "math/mapping" for name in (*more, "MindMerger")}
    forget_the_split(outputs["old"] / "checkpoint-000002")
    old, rows, groups, refused, other = run_many(
        tmp_path,
        [
            *([*base, *more[name], "--max_steps", "4"] for name in more),
            [*base, *more["groups"], "--dev_split", "rows", "--max_steps", "4"],
            [*base, *more["rows"], "--dev_split", "groups", "--max_steps", "4"],
        ],
    )
    assert [one["code"] for one in (old, rows, groups)] == [0] * 3, (old, rows, groups)
    for name in ("old", "rows"):
        assert read_log(outputs[name]) == read_log(outputs["MindMerger"]), name
        assert read_log(outputs[name], "dev_loss") == read_log(outputs["MindMerger"], "dev_loss"), name
    assert read_log(outputs["groups"]) != read_log(outputs["MindMerger"])
    assert "another dev_split ('groups', this run has 'rows')" in refused["error"]
    assert "another dev_split ('rows', this run has 'groups')" in other["error"]
    recorded = {name: json.loads((folder / "args.json").read_text()) for name, folder in outputs.items()}
    assert {name: one["arguments"]["dev_split"] for name, one in recorded.items()} == {
        **{"old": "rows", "rows": "rows", "groups": "groups", "MindMerger": "rows"}
    }
    assert all(one["data"]["dev_examples"] == 12 for one in recorded.values())


def forget_the_split(checkpoint):
    """Makes a checkpoint one of an earlier version, which knew no other split."""
    from mindmerger.runtime.files import describe_file, write_json_atomic

    state = json.loads((checkpoint / "state.json").read_text())
    del state["identity"]["dev_split"]
    write_json_atomic(checkpoint / "state.json", state)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = describe_file(checkpoint / "state.json")
    write_json_atomic(checkpoint / "manifest.json", manifest)


def test_a_fresh_start_over_an_old_run_and_a_dry_run_split_by_groups(tmp_path):
    write_checkpoint(tmp_path, 2, {"w": torch.zeros(1)}, {"identity": {}}, None)
    args = {"dev_split": None, "overwrite_output_dir": False, "dry_run": False, "resume_from_checkpoint": "auto"}
    for changed, expected in (
        ({}, "rows"),
        ({"resume_from_checkpoint": str(tmp_path / "checkpoint-000002")}, "rows"),
        ({"dry_run": True}, "groups"),
        ({"overwrite_output_dir": True}, "groups"),
        ({"dev_split": "groups"}, "groups"),
    ):
        assert settle_dev_split(SimpleNamespace(**args | changed), tmp_path) == expected, changed
    assert settle_dev_split(SimpleNamespace(**args), tmp_path / "nothing") == "groups"
