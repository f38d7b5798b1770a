"""The question stage: a question in any language and the same one in English, from the task's own rows."""

import json
import shutil

import pytest
from conftest import read_log, run_many

from mindmerger.bridges import BRIDGES
from mindmerger.model.mapping_files import stages_of
from mindmerger.tasks import find_task
from mindmerger.tasks.examples import StageData
from mindmerger.tasks.languages import parse_languages
from mindmerger.tasks.readers import DataError
from mindmerger.training.settings import parse, settle

ROWS = [
    ("Swahili", "Moja?", "1 + 0 = 1"),
    ("Swahili", "Mbili?", "1 + 1 = 2"),
    ("Swahili", "Mbili tena?", "1 + 1 = 2"),
    ("Swahili", "Peke yake?", "nobody's"),
    ("English", "Two?", "1 + 1 = 2"),
    ("English", "One?", "1 + 0 = 1"),
    ("English", "Two again?", "1 + 1 = 2"),
    ("German", "Zwei?", "1 + 1 = 2"),
    ("German", "Eins?", "1 + 0 = 1"),
]


@pytest.fixture
def root(tmp_path):
    """A data folder with rows in three languages."""
    write(tmp_path, ROWS)
    return tmp_path


def write(folder, rows):
    """Writes math.json."""
    (folder / "query_translation").mkdir(exist_ok=True)
    values = [{"lang": language, "query": query, "response": response} for language, query, response in rows]
    (folder / "query_translation/math.json").write_text(json.dumps(values))


def pairs(root, languages=None, **more):
    """The pairs, with each one's language."""
    chosen = parse_languages(languages) if languages else None
    stage = StageData(find_task("math"), "question", root, chosen, **more)
    return [(example.id, example.source, example.target) for example in stage.examples()]


def test_questions_pair_by_their_response_and_the_nth_of_several_with_the_nth(root, capsys):
    expected = [("sw-1", "Moja?", "One?"), ("sw-2", "Mbili?", "Two?"), ("sw-3", "Mbili tena?", "Two again?")]
    german = [("de-1", "Zwei?", "Two?"), ("de-2", "Eins?", "One?")]
    assert pairs(root) == expected + german
    said = "questions without an English one of the same response are left out: Swahili (1)"
    assert capsys.readouterr().err.count(said) == 1
    assert pairs(root, "de,en") == german and not capsys.readouterr().err
    assert pairs(root, train_num=1) == [expected[0], german[0]]


def test_what_cannot_be_paired_is_refused_by_name(root, tmp_path, flags, datas):
    write(root, [row for row in ROWS if row[0] != "English"] + [("English", "Other?", "other")])
    with pytest.raises(DataError, match="no question in Swahili, German has the response of an English one"):
        pairs(root)
    with pytest.raises(DataError, match="--languages names English only"):
        pairs(root, "en")
    stage = ["--stage_name", "question", "--init_checkpoint", "none"]
    with pytest.raises(DataError, match="task xnli has no question stage: .* choose --task math, or another"):
        settle(parse([*flags, *stage, "--task", "xnli"]))
    with pytest.raises(DataError, match="no rows in English"):
        write(root, [row for row in ROWS if row[0] != "English"])
        pairs(root)


@pytest.mark.slow
def test_the_question_stage_trains_from_the_mapping_stage_and_a_later_stage_from_it(flags, tmp_path, datas):
    data = tmp_path / "datas"
    shutil.copytree(datas, data)
    write(data, ROWS * 3)
    common = [*flags, "--data_root", str(data), "--max_steps", "2", "--train_batch_size", "4", "--max_gen_len", "300"]
    ways = [
        ["--stage_name", "mapping"],
        ["--stage_name", "question"],
        ["--stage_name", "augmentation", "--init_checkpoint", "outputs/MindMerger/math/question"],
        # Named before it is there, as a script does that is asked for a dry run of all stages.
        ["--stage_name", "augmentation", "--init_checkpoint", "outputs/new/math/question", "--save_name", "new",
         "--dry_run"],
    ]  # fmt: skip
    outcomes = run_many(tmp_path, [[*common, *one] for one in ways])
    assert [one["code"] for one in outcomes] == [0] * 4, outcomes
    assert "mapping: starts from outputs/MindMerger/math/mapping/mapping.safetensors" in outcomes[1]["printed"]
    assert "mapping: starts from outputs/MindMerger/math/question/mapping.safetensors" in outcomes[2]["printed"]
    assert "there is no outputs/new/math/question yet: the question stage has to run first" in outcomes[3]["printed"]
    counts = json.loads((tmp_path / "outputs/MindMerger/math/question/args.json").read_text())["data"]["counts"]
    assert (
        counts["rows"] == {"Swahili": 9, "German": 6}
        and len(read_log(tmp_path / "outputs/MindMerger/math/question")) == 2
    )


def test_the_question_stage_is_no_part_of_mindmergers_own_curriculum():
    """What trains a bridge stage by stage, as published, would else train it too."""
    assert list(BRIDGES["mindmerger"].stages) == ["mapping", "augmentation"]
    assert list(stages_of("mindmerger", {})) == ["mapping", "augmentation", "question", "adapter"]
    assert stages_of("mindmerger", {})["adapter"].starts_from == "augmentation"
