"""Dev accuracy of training: an evaluation's, on any number of ranks and at any ZeRO stage; selection by it."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, read_log, run_many

import run_training
from mindmerger.data.batches import draw_rows, split_dev
from mindmerger.evaluation.flags import build_parser as evaluation_parser
from mindmerger.runtime.errors import UserError
from mindmerger.training import checkpoints
from mindmerger.training import settings as training_settings
from mindmerger.training.dev_accuracy import is_best, read_labels
from mindmerger.training.trainer import Progress
from run_evaluation import main

LANGUAGES = ("sw", "de", "en")
ROWS, DEV, COUNTED = 14, 20, 16  # rows of each language, of the dev split, and those of it with an accuracy


def option_rows(code):
    """Questions in X-CSQA's form, with two to five options each."""
    draw = random.Random(code)
    rows = []
    for i in range(ROWS):
        letters = "ABCDE"[: draw.randint(2, 5)]
        words = [draw.choice(("bird", "stone", "river", "cloud", "house")) for _ in letters]
        choices = [{"label": letter, "text": word} for letter, word in zip(letters, words, strict=True)]
        question = {"stem": f"{code}: what is {draw.random():.4f}?", "choices": choices}
        rows.append({"id": f"q{i}", "lang": code, "question": question, "answerKey": draw.choice(letters)})
    return rows


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stage_flags(flags, data):
    """Flags of a short run of the stage on these rows."""
    more = ["--data_root", str(data), "--task", "x-csqa", "--stage_name", "augmentation", "--init_checkpoint", "none"]
    more += ["--languages", ",".join(LANGUAGES), "--dev_size", str(DEV), "--max_seq_len", "200", "--max_gen_len", "200"]
    return [*flags, *more, "--dev_accuracy_rows", str(COUNTED), "--eval_steps", "1", "--max_steps", "3"]


@pytest.fixture
def stage(flags, tmp_path):
    """Flags of a short run of the stage on rows with options, which lie in a fresh folder."""
    for code in LANGUAGES:
        write_rows(tmp_path / f"data/query_translation/x-csqa/train_{code}.jsonl", option_rows(code))
    return stage_flags(flags, tmp_path / "data")


def folder_of(tmp_path, name):
    return tmp_path / "outputs" / name / "x-csqa/augmentation"


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_dev_accuracy_is_that_of_an_evaluation_of_the_same_rows(stage, tmp_path, monkeypatch):
    [outcome] = run_many(tmp_path, [[*stage, "--dev_split", "rows", "--save_name", "one"]])
    assert outcome["code"] == 0, outcome
    folder = folder_of(tmp_path, "one")
    accuracies = read_log(folder, "dev_accuracy")
    assert len(accuracies) == len(read_log(folder, "dev_loss")) == 3
    assert f"accuracy {accuracies[-1]:.1f} %" in outcome["printed"]
    rows = [row for code in LANGUAGES for row in option_rows(code)]
    counted = draw_rows(split_dev(len(rows), DEV, 0)[0], COUNTED, 0)
    assert len(counted) == COUNTED
    for code in LANGUAGES:
        write_rows(
            tmp_path / f"same/evaluation/x-csqa/{code}/dev.jsonl", [rows[i] for i in counted if rows[i]["lang"] == code]
        )
    monkeypatch.chdir(tmp_path)
    common = ["--task", "x-csqa", "--languages", ",".join(LANGUAGES), "--data_root", str(tmp_path / "same")]
    common += ["--init_checkpoint", str(folder / "last"), "--max_seq_len", "200", "--max_gen_len", "200"]
    assert main([*common, "--scoring", "likelihood"]) == 0
    results = json.loads((tmp_path / "results/MindMerger/x-csqa-likelihood/results.json").read_text())
    right = sum(one["correct"] for one in results["languages"].values())
    assert sum(one["n"] for one in results["languages"].values()) == COUNTED
    assert accuracies[-1] == pytest.approx(100 * right / COUNTED)
    assert 0 < accuracies[-1] < 100, "all or none would show little"


@pytest.mark.slow
def test_dev_accuracy_is_the_same_on_two_ranks_and_at_every_zero_stage(stage, tmp_path):
    # Two rows a pass and 16 rows: an odd number of passes on two ranks would not be shared evenly, hence 13.
    stage = [*stage, "--dev_accuracy_rows", "13", "--eval_batch_size", "2"]
    [alone] = run_many(tmp_path, [[*stage, "--save_name", "alone"]])
    assert alone["code"] == 0, alone
    expected = read_log(folder_of(tmp_path, "alone"), "dev_accuracy")
    presets = ["ds_zero0", "ds_zero1", "ds_zero2", "ds_zero3"]
    runs = [[*stage, "--save_name", name, "--deepspeed_config", f"{ROOT}/scripts/{name}.json"] for name in presets]
    for outcome in run_many(tmp_path, runs, ranks=2):
        assert outcome["code"] == 0, outcome
    for name in presets:
        assert read_log(folder_of(tmp_path, name), "dev_accuracy") == pytest.approx(expected), name


def test_selection_by_accuracy_takes_the_most_accurate_mapping_and_of_equal_ones_the_lowest_loss():
    def chosen(select_by, evaluations):
        progress, best = Progress(), None
        for number, (loss, accuracy) in enumerate(evaluations):
            if is_best(progress, select_by, loss, accuracy):
                progress.best_dev_loss, progress.best_dev_accuracy, best = loss, accuracy, number
        return best

    evaluations = [(3.0, 40.0), (2.0, 60.0), (1.0, 50.0), (1.9, 60.0), (1.95, 60.0)]
    assert chosen("loss", evaluations) == 2
    assert chosen("accuracy", evaluations) == 3
    assert chosen("loss", [(3.0, None), (2.0, None)]) == 1


def test_the_best_mapping_is_the_most_accurate_one_and_the_checkpoint_knows_it(stage, tmp_path):
    """Dev accuracies as a test has them: the second evaluation is the most accurate, the last has the lowest loss."""
    driver = tmp_path / "selecting.py"
    driver.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import run_training\n"
        "from mindmerger.runtime.command import run_main\n"
        "scores = iter([(3.0, 40.0), (2.0, 60.0), (1.0, 50.0)])\n"
        "now = [None]\n"
        "def loss(run):\n    now[0] = next(scores)\n    return now[0][0], 0\n"
        "run_training.dev_loss, run_training.dev_accuracy = loss, lambda run: (now[0][1], 0)\n"
        "run_main(run_training.main)\n"
    )
    from conftest import run_prepared

    codes, (printed,) = run_prepared(driver, *stage, "--select_by", "accuracy", cwd=tmp_path)
    assert codes == [0], printed[-2000:]
    folder = folder_of(tmp_path, "MindMerger")
    lines = [line for line in printed.splitlines() if "dev loss" in line]
    assert ["best so far" in line for line in lines] == [True, True, False]
    assert (folder / "mapping.safetensors").read_bytes() != (folder / "last/mapping.safetensors").read_bytes()
    state = json.loads((folder / "checkpoint-000003/state.json").read_text())
    assert (state["best_dev_loss"], state["best_dev_accuracy"]) == (2.0, 60.0)
    assert (state["identity"]["select_by"], state["identity"]["dev_accuracy_rows"]) == ("accuracy", COUNTED)
    assert Progress.from_state(state, 8).best_dev_accuracy == 60.0
    # Resumed with another selection the best one would be chosen by two measures.
    [other] = run_many(tmp_path, [[*stage, "--max_steps", "4"]])
    assert (
        other["code"] == 2 and "was trained with another select_by ('accuracy', this run has 'loss')" in other["error"]
    )


def test_states_of_earlier_versions_have_no_accuracy_and_a_wrong_one_is_refused():
    state = Progress().state(8) | {"identity": {}}
    del state["best_dev_accuracy"]
    checkpoints.check_state("folder", state)
    assert Progress.from_state(state, 8) == Progress()
    with pytest.raises(UserError, match="best_dev_accuracy in state.json is 101"):
        checkpoints.check_state("folder", state | {"best_dev_accuracy": 101})


def test_stages_without_labels_have_no_accuracy(stage, flags, tmp_path):
    runs = [[*flags, "--save_name", "pairs", "--max_steps", "1"]]
    runs += [[*stage, "--save_name", "none", "--dev_accuracy_rows", "0", "--max_steps", "1"]]
    for outcome in run_many(tmp_path, runs):
        assert outcome["code"] == 0 and ", accuracy" not in outcome["printed"]
    for folder in (tmp_path / "outputs/pairs/math/mapping", folder_of(tmp_path, "none")):
        assert read_log(folder, "dev_loss") and not read_log(folder, "dev_accuracy")
        assert {"step", "dev_loss", "dev_perplexity"} in [set(line) for line in lines_of(folder)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "math"], "but the answers of task math_mgsm are no labels: leave it out"),
        (["--task", "xnli", "--stage_name", "mapping"], "but --stage_name mapping does not train on the task's rows"),
        (
            ["--task", "xnli", "--dev_accuracy_rows", "0"],
            r"without rows \(--dev_size, --dev_accuracy_rows\) there is none",
        ),
        (["--task", "xnli", "--dev_size", "0"], r"without rows \(--dev_size, --dev_accuracy_rows\) there is none"),
    ],
)
def test_selection_by_an_accuracy_that_there_is_none_of_is_refused(flags, more, message):
    given = [*flags, "--stage_name", "augmentation", "--init_checkpoint", "none", "--select_by", "accuracy", *more]
    with pytest.raises(UserError, match=message) as caught:
        training_settings.settle(training_settings.parse(given))
    assert "\n" not in str(caught.value)


class Examples:
    """A data set that knows its ids."""

    def __init__(self, ids):
        self.dataset = self
        self.ids = ids

    def __getitem__(self, rows):
        return {"id": [self.ids[i] for i in rows]}


def test_labels_are_read_for_the_rows_of_the_data_set_and_a_changed_file_is_refused():
    row = SimpleNamespace(id="a", target="x", labels=("x", "y"))
    rows = [
        row,
        SimpleNamespace(id="b", target="z", labels=("y", "z")),
        SimpleNamespace(id="c", target="q", labels=("y",)),
    ]
    stage = SimpleNamespace(examples=lambda faults: iter(rows), skip_faulty_rows=False)
    tokenizers = SimpleNamespace(llm=lambda texts, **_: {"input_ids": [[ord(t)] for t in texts]}, eos_id=2)
    args = SimpleNamespace(dev_accuracy_rows=9, seed=0)
    found = read_labels(args, stage, tokenizers, np.array([1, 0]), Examples("abc"))
    assert found.rows.tolist() == [0, 1] and found.target == {0: "x", 1: "z"}
    assert found.labels == {0: ("x", "y"), 1: ("y", "z")} and found.size == (2, 2)
    assert found.ids_of["z"] == [ord("z"), 2]
    with pytest.raises(UserError, match="row 1 of the data was c when it was tokenised and is b now"):
        read_labels(args, stage, tokenizers, np.array([1]), Examples("acb"))
    with pytest.raises(UserError, match=r"the answer 'q' of c is none of its labels \(y\)"):
        read_labels(args, stage, tokenizers, np.array([2]), Examples("abc"))


@pytest.mark.parametrize(
    ("loss", "accuracy", "due"), [(math.nan, None, True), (1.0, math.nan, True), (1.0, 50.0, False)]
)
def test_an_evaluation_that_a_signal_cuts_short_is_due_again(monkeypatch, loss, accuracy, due):
    noted = []
    engine = SimpleNamespace(eval=lambda: None, train=lambda: None)
    run = SimpleNamespace(
        engine=engine,
        args=SimpleNamespace(select_by="loss"),
        loader=SimpleNamespace(data=SimpleNamespace(labels=object())),
        record=SimpleNamespace(evaluation=lambda *values: noted.append(values)),
        settings=SimpleNamespace(output_dir=ROOT),
    )
    monkeypatch.setattr(run_training, "dev_loss", lambda run: (loss, 143 if math.isnan(loss) else 0))
    monkeypatch.setattr(run_training, "dev_accuracy", lambda run: (accuracy, 143))
    monkeypatch.setattr(run_training, "save_mapping", lambda run, folder: None)
    progress = Progress(step=3, evaluation_due=True)
    assert run_training.evaluate_and_save(run, progress) == 143
    assert progress.evaluation_due == due and noted == ([] if due else [(3, 1.0, 50.0)])


def test_rows_with_an_accuracy_are_drawn_from_the_dev_split_by_the_seed():
    dev = np.arange(100, 200)
    drawn = draw_rows(dev, 10, 0)
    assert len(set(drawn.tolist())) == 10 and set(drawn.tolist()) <= set(dev.tolist())
    assert (np.sort(drawn) == drawn).all() and (draw_rows(dev, 10, 0) == drawn).all()
    assert (draw_rows(dev, 10, 1) != drawn).any() and (draw_rows(dev, 500, 0) == dev).all()
    assert evaluation_parser().parse_args([]).scoring == "generate"
