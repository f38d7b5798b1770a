"""What surrounds the code: its types as users' tools see them, the hooks before a commit, and CI's matrix."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.slow
def test_what_users_import_has_types_that_their_checker_sees(tmp_path):
    """The package fetches its names when they are used: a type checker saw none of them, and took any name for one."""
    wrong = (
        "import torch\n"
        "from mindmerger import MindMerger, answer, nothing\n"
        "from modeling_mindmerger import read_config\n"
        "model = MindMerger.from_pretrained(1)\n"
        "answer(model, 'one text')\n"
        "answer(model, ['a'], tasks='math')\n"
        "answer(model, ['a'])[0].missing\n"
        "read_config('folder').stage\n"
        "model.save_pretrained()\n"
    )
    (tmp_path / "wrong.py").write_text(wrong)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", tmp_path / "cache"]
    files = ["tests/data/user_code.py", "modeling_mindmerger.py", "data_utils.py", tmp_path / "wrong.py"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found = [re.search(r"^(.*?):(\d+): error: .*\[(.*)\]$", line) for line in done.stdout.splitlines()]
    assert [(Path(one[1]).name, int(one[2]), one[3]) for one in found if one] == [
        ("wrong.py", 2, "attr-defined"),
        ("wrong.py", 4, "arg-type"),
        ("wrong.py", 5, "arg-type"),
        ("wrong.py", 6, "call-arg"),
        ("wrong.py", 7, "attr-defined"),
        ("wrong.py", 8, "union-attr"),
        ("wrong.py", 9, "call-arg"),
    ]


def test_the_hooks_before_a_commit_run_ruff_as_requirements_pin_it():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    hooks = {hook["id"]: hook for repo in yaml.safe_load(text)["repos"] for hook in repo["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format"}
    for name, hook in hooks.items():
        assert hook["additional_dependencies"] == [f"ruff=={PINS['ruff']}"]
        assert hook["entry"].startswith(name.replace("-", " "))


@pytest.fixture(scope="module")
def workflow():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    return job


def test_ci_runs_every_python_that_the_package_names_and_makes_its_environment_with_it(workflow):
    """setup_venv.sh takes the first Python on PATH, and a runner has several."""
    named = [one.rsplit(" ", 1)[1] for one in PROJECT["classifiers"] if one.startswith("Programming Language")]
    assert workflow["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert workflow["env"]["PYTHON"] == "python"
    assert workflow["steps"][-1] == {"run": "bash .ci/run"}


def test_ci_runs_the_oldest_versions_by_the_variable_that_the_setup_script_reads(workflow):
    assert {"python": named_oldest(), "libraries": "oldest"} in workflow["strategy"]["matrix"]["include"]
    (step,) = [step for step in workflow["steps"] if step.get("if") == "matrix.libraries == 'oldest'"]
    assert "--resolution lowest-direct --extra dev" in step["run"] and step["run"].count("$RUNNER_TEMP/oldest.txt") == 2
    assert 'echo "REQUIREMENTS=' in step["run"]
    assert "${REQUIREMENTS:-$root/requirements.txt}" in (ROOT / "scripts/setup_venv.sh").read_text(encoding="utf-8")


def named_oldest() -> str:
    """The oldest Python that the package runs with."""
    return PROJECT["requires-python"].removeprefix(">=")
