"""docs/quickstart.ipynb, executed as a user would and compared with the quickstart; its commands are also checked among
those of the pages, in test_scripts.py."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, clean_environment
from test_scripts import parser_named

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
# What keeps each program short; given after the notebook's own flags, so that these count.
SHORTER = {
    "scripts.tiny_world": "--pairs 40 --problems 12 --test_problems 3 --vocabulary 600 --llm_steps 2 --encoder_steps 2",
    "run_training.py": "--max_steps 2 --dev_size 4 --train_batch_size 4 --train_micro_batch_size_per_gpu 2",
    "run_evaluation.py": "--languages English,Swahili --limit 2 --max_new_tokens 4",
    "mindmerger.evaluation.comparison_table": "",
}


def code_cells() -> dict[str, str]:
    """Source of the code cells by their id, in order."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


def parsed(words: list[str]) -> tuple[str, dict]:
    """A command's program and what its flags come to."""
    words = words[words.index("-m") + 1 :] if "-m" in words else words[words.index("python") + 1 :]
    return words[0], vars(parser_named(words[0]).parse_args(words[1:]))


def commands() -> list[tuple[str, dict]]:
    """The notebook's commands; each shell cell is one."""
    shell = [source for source in code_cells().values() if source.startswith("%%bash\n")]
    return [parsed(shlex.split(source.removeprefix("%%bash\n").replace("\\\n", " "))) for source in shell]


def copy_project(folder) -> None:
    """A clone as far as the notebook needs one."""
    for name in ("mindmerger", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_training.py", "run_evaluation.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "docs").mkdir()


def test_the_notebook_is_committed_without_outputs():
    """Outputs would show a machine's paths, and numbers that no command stands beside."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 8
    assert [cell["id"] for cell in cells if cell["outputs"] or cell["execution_count"] is not None] == []
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


def test_the_notebook_takes_the_settings_of_the_quickstart(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "setup_venv.sh").write_text("")
    (tmp_path / "bin").mkdir()
    for name in ("python", "deepspeed"):
        note = f'[[ $1 == -c ]] && echo 2 && exit; printf "%q " {name} "$@" >>{tmp_path}/calls; echo >>{tmp_path}/calls'
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{note}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "QUICKSTART_DIR": "outputs/notebook"}
    subprocess.run(["bash", "scripts/quickstart.sh"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    calls = [re.sub(r"^deepspeed .* run_training.py --deepspeed ", "python run_training.py ", call) for call in calls]
    theirs = [parsed(shlex.split(call)) for call in calls]
    (world, made), *middle, (table, shown) = commands()
    assert (world, made | {"overwrite": False}) == theirs[0]
    assert len(middle) == 4 and [command for command in middle if command not in theirs] == []
    # MindMerger's row is Soft, the main form.
    program, flags = theirs[-1]
    folders = {label: folder for _, label, folder in flags["entries"]}
    rows = [("row", "LLM alone", folders["LLM alone"]), ("row", "MindMerger", folders["MindMerger-Soft"])]
    assert (table, shown) == (program, flags | {"entries": rows})


def test_on_a_hosted_runtime_the_first_cell_clones_once_and_without_an_address_it_says_so(tmp_path):
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "run_training.py").write_text("")
    git = ["git", "-C", origin, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    runtime = tmp_path / "content"
    runtime.mkdir()
    cell = code_cells()["clone"]
    given = cell.replace('CLONE_FROM = ""', f"CLONE_FROM = {str(origin)!r}")
    assert given != cell
    command = [sys.executable, "-c", f"{given}\nexec({given!r})\nprint(Path.cwd())"]  # the cell run twice
    for _ in range(2):  # and the kernel started again
        done = subprocess.run(command, cwd=runtime, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, str(runtime / "MindMerger")), done.stderr
    refused = subprocess.run([sys.executable, "-c", cell], cwd=runtime, capture_output=True, text=True)
    assert refused.returncode == 1 and "CLONE_FROM" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_notebook_runs_from_installing_to_a_table_and_an_answer(tmp_path, monkeypatch):
    """Every cell in a real kernel, the programs with few steps and problems."""
    pytest.importorskip("ipykernel", reason="pip install ipykernel nbclient")
    nbclient = pytest.importorskip("nbclient", reason="pip install ipykernel nbclient")
    import nbformat

    project = tmp_path / "project"
    project.mkdir()
    copy_project(project)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    # pip resolves the package against what is installed, and neither asks an index nor changes the environment.
    for name, value in (("DRY_RUN", "1"), ("NO_INDEX", "1"), ("NO_BUILD_ISOLATION", "0")):  # 0: pip reads it so
        monkeypatch.setenv(f"PIP_{name}", value)
    environment = clean_environment(tmp_path)
    # The notebook itself has to put its Python first.
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith("%%bash"):
            (program,) = [name for name in SHORTER if name in cell.source]
            cell.source = f"{cell.source.rstrip()} {SHORTER[program]}"
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(project / "docs")}})
    client.execute(env=environment)

    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert [one for each in outputs.values() for one in each if one.output_type == "error"] == []
    (shown,) = outputs["show-table"]
    table = shown.data["text/markdown"]
    assert re.search(r"^\| method \| en \| sw \|", table, flags=re.MULTILINE), table
    assert re.search(r"^\| LLM alone \| \d", table, flags=re.MULTILINE), table
    assert re.search(r"^\| MindMerger \| \d", table, flags=re.MULTILINE), table
    said = "".join(one.text for one in outputs["answer"] if one.get("name") == "stdout")
    rows = (project / "outputs/notebook/datas/evaluation/mgsm/mgsm_sw.tsv").read_text(encoding="utf-8").splitlines()
    question, gold = rows[0].split("\t")
    assert said.startswith(f"question: {question}\nanswer: ") and said.endswith(f"gold:     {gold}\n")
    # A short run trained: the mapping is there, in the place that the quickstart's commands look for.
    steps = (project / "outputs/notebook/outputs/quickstart/math/augmentation/log.jsonl").read_text().splitlines()
    assert sum("grad_norm" in json.loads(line) for line in steps) == 2
