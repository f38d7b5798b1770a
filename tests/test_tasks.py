"""A further benchmark is one file, one line in the table, and two scripts: here a quiz of yes and no."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

QUIZ = '''"""Quiz: is the statement true? The answer is yes or no.

Example: Statement: Snow is black.\\nTrue?    ->  no
"""

from mindmerger.tasks.base import Parsed, Task, _fill
from mindmerger.tasks.languages import Language, _names
from mindmerger.tasks.readers import Record
from mindmerger.tasks.scoring import score_text


def _quiz(record: Record, language: Language) -> Parsed:
    prompt, shrinkable = _fill("Statement: ", record.text("statement"), "\\nTrue?")
    if record.text("answer") not in ("yes", "no"):
        raise record.fail("answer must be yes or no")
    return prompt, prompt, shrinkable, record.text("answer")


QUIZ = Task(
    name="quiz",
    training_name="quiz",
    mapping_languages=_names("sw de"),
    augmentation_languages=None,
    evaluation_languages=_names("sw en"),
    max_new_tokens=4,
    augmentation_file="query_translation/quiz.json",
    evaluation_file="evaluation/quiz/{code}.jsonl",
    language_field="language",
    parse_augmentation=_quiz,
    parse_evaluation=_quiz,
    published_rows=0,
    format_query=lambda text: (text, (0, len(text))),
    score=score_text,
    published={},
)
'''
RUN = """
import sys
import run_evaluation, run_training
data, llm, encoder = sys.argv[1:]
models = ["--llm_path", llm, "--mt_path", encoder, "--data_root", data, "--task", "quiz"]
more = ["--stage_name", "augmentation", "--init_checkpoint", "none", "--dev_size", "1", "--dry_run"]
assert run_training.main([*models, *more, "--train_batch_size", "2"]) == 0
assert run_evaluation.main([*models[:2], *models[4:], "--llm_only", "--precision", "fp32"]) == 0
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project with the quiz added to it."""
    root = tmp_path / "project"
    for name in ("mindmerger", "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_training.py", "run_evaluation.py"):
        shutil.copy(ROOT / name, root)
    (root / "mindmerger/tasks/quiz.py").write_text(QUIZ)
    table = root / "mindmerger/tasks/__init__.py"
    text = table.read_text().replace("TASKS: dict", "from mindmerger.tasks.quiz import QUIZ\n\nTASKS: dict", 1)
    table.write_text(text.replace("_FURTHER, TRANSLATION)", "_FURTHER, QUIZ, TRANSLATION)", 1))
    for kind in ("training", "evaluation"):
        script = (root / f"scripts/{kind}_xnli.sh").read_text()
        (root / f"scripts/{kind}_quiz.sh").write_text(
            script.replace("train xnli", "train quiz").replace("xnli xnli", "quiz quiz")
        )
    data = root / "datas"
    (data / "query_translation").mkdir(parents=True)
    (data / "evaluation/quiz").mkdir(parents=True)
    rows = [{"statement": f"Wild {i}", "answer": "yes", "language": "Swahili"} for i in range(5)]
    (data / "query_translation/quiz.json").write_text(json.dumps(rows))
    for code in ("sw", "en"):
        (data / f"evaluation/quiz/{code}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    return root


@pytest.mark.slow
def test_a_task_is_one_file_and_one_line_and_both_programs_know_it(project, tiny_llm, tiny_encoder):
    command = [sys.executable, "-c", RUN, "datas", tiny_llm, tiny_encoder]
    environment = os.environ | {"HF_DATASETS_CACHE": str(project / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "examples: 4 training, 1 dev; " in done.stdout
    results = json.loads((project / "results/MindMerger/quiz-llm_only/results.json").read_text())
    assert results["task"] == "quiz" and results["counts"]["examples"] == 4
    predictions = (project / "results/MindMerger/quiz-llm_only/predictions/Swahili.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in predictions] == ["yes", "yes"]
    assert json.loads(predictions[0])["prompt"] == "Statement: Wild 0\nTrue?"


def test_its_two_scripts_name_it_to_the_programs(project, tmp_path):
    (project / "scripts/setup_venv.sh").write_text("")
    launcher = tmp_path / "bin/deepspeed"
    launcher.parent.mkdir()
    launcher.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    launcher.chmod(0o755)
    environment = {"PATH": f"{launcher.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"}
    for kind in ("training", "evaluation"):
        command = ["bash", f"scripts/{kind}_quiz.sh"]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 and all("--task quiz" in call for call in calls)
    assert ["run_training.py" in call for call in calls] == [True, True, False]
