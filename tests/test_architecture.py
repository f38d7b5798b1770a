"""The shape of the house: imports point downwards, files stay small, and the top level holds what belongs there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "mindmerger"
# What each part may import besides itself and `runtime`.
BELOW = {
    "runtime": set(),
    "hub": set(),
    "bridges": set(),
    "tasks": set(),
    "data": {"hub", "tasks"},
    "model": {"hub", "bridges"},
    "generation": {"hub", "data", "tasks", "model", "bridges"},
    "training": {"hub", "generation", "data", "tasks", "model", "bridges"},
    "evaluation": {"hub", "generation", "data", "tasks", "model", "bridges"},
    "baselines": {"hub", "training", "evaluation", "generation", "data", "tasks", "model", "bridges"},
    "analysis": {"hub", "training", "evaluation", "generation", "data", "tasks", "model", "bridges"},
    "integrations": {"hub", "training", "evaluation", "generation", "data", "tasks", "model", "bridges"},
}
DOORS = {"modeling_mindmerger", "data_utils"}
RUNS = {"run_training", "run_evaluation"}


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found += [(node.lineno, node.module), *((node.lineno, f"{node.module}.{one.name}") for one in node.names)]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, one.name) for one in node.names]
    return found


def test_imports_of_the_package_point_downwards_only():
    wrong, seen = [], set()
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0]
        if part not in BELOW:  # mindmerger/__init__.py, the front of all
            continue
        seen.add(part)
        for line, module in imported(path):
            first, *rest = module.split(".")
            below = first != "mindmerger" or not rest or rest[0] in {part, "runtime"} | BELOW[part]
            if not below or first in DOORS | RUNS | {"scripts", "tests"}:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong
    assert seen == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(BELOW)


def test_a_bridge_knows_nothing_but_torch():
    known = set(sys.stdlib_module_names) | {"torch", "mindmerger"}
    for path in (PACKAGE / "bridges").glob("*.py"):
        assert {module.split(".")[0] for _, module in imported(path)} <= known, path


def test_the_doors_are_for_users_alone():
    for path in [*ROOT.glob("*.py"), *PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        assert not DOORS & {module.split(".")[0] for _, module in imported(path)}, path
    for door in DOORS:
        text = (ROOT / f"{door}.py").read_text(encoding="utf-8")
        nodes = ast.parse(text).body[1:]
        assert all(isinstance(node, ast.ImportFrom | ast.Assign) for node in nodes), f"{door} does more than re-export"


def test_nothing_lies_at_the_top_but_what_belongs_there():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout: the top level may hold a user's own files")
    top = {Path(name).parts[0] for name in tracked.stdout.splitlines()}
    expected = {".ci", ".github", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"}
    expected |= {"README.md", "docs", "mindmerger", "pyproject.toml", "requirements.txt", "scripts", "tests"}
    expected |= {".pre-commit-config.yaml", "SECURITY.md"}
    assert top == expected | {f"{name}.py" for name in DOORS | RUNS}


def functions(path: Path):
    """(name, lines) of every function in a file, decorators and docstring included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_file_and_no_function_is_too_long_to_hold_in_the_head():
    for path in [*ROOT.glob("*.py"), *PACKAGE.rglob("*.py")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 460, f"{path.relative_to(ROOT)} has {lines} lines"
    for path in [*ROOT.glob("*.py"), *PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        long = [(name, lines) for name, lines in functions(path) if lines > 80]
        assert not long, f"{path.relative_to(ROOT)}: {long}"


@pytest.mark.parametrize(
    "command",
    [
        ["run_training.py"],
        ["run_evaluation.py"],
        ["-m", "mindmerger.baselines.layer_swap"],
        ["-m", "mindmerger.baselines.maet"],
        ["-m", "mindmerger.baselines.merge_adapter"],
        ["-m", "mindmerger.baselines.parallel_input"],
        ["-m", "mindmerger.baselines.translate_test"],
        ["-m", "mindmerger.analysis.neurons"],
        ["-m", "mindmerger.analysis.contamination"],
        ["-m", "mindmerger.analysis.embeddings"],
        ["-m", "mindmerger.evaluation.comparison_table"],
        ["-m", "mindmerger.evaluation.bridge_table"],
        ["-m", "mindmerger.evaluation.upload"],
        ["-m", "mindmerger.integrations.demo"],
        ["-m", "scripts.benchmarks.speed"],
        ["-m", "scripts.benchmarks.growth"],
        ["-m", "scripts.benchmarks.merge_memory"],
        ["-m", "scripts.benchmarks.threads"],
        ["-m", "scripts.small_models"],
        ["-m", "scripts.bridge_plan"],
        ["-m", "scripts.prepare_data"],
        ["-m", "scripts.tune_llm"],
        ["-m", "scripts.start_mapping"],
        ["-m", "scripts.tiny_world.__main__"],
    ],
    ids=lambda command: command[-1],
)
def test_help_imports_no_heavy_library(command):
    code = (
        "import runpy, sys\nsys.argv = [*sys.argv[1:], '--help']\ntry:\n"
        "    runpy.run_module(sys.argv.pop(0), run_name='__main__', alter_sys=True)\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)))\n"
    )
    module = command[-1].removesuffix(".py")
    done = subprocess.run(
        [sys.executable, "-c", code, module, module], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("[]"), done.stdout[-300:] + done.stderr
    assert "usage: " in done.stdout
