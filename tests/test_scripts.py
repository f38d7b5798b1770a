"""The scripts, the presets and the README, checked against the programs they speak of."""

import ast
import importlib
import io
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
from conftest import clean_environment, free_port

from mindmerger.runtime.errors import UserError
from mindmerger.tasks import find_task
from mindmerger.tasks.languages import find_language
from scripts import hub_formats
from scripts import prepare_data as scripts_prepare_data

ROOT = Path(__file__).resolve().parent.parent
HUB = ROOT / "tests" / "data" / "hub"
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
PRESETS = sorted((ROOT / "scripts").glob("ds_*.json"))
TRAINING = {"math": "training_math.sh", "x-csqa": "training_x_csqa.sh", "xnli": "training_xnli.sh"}


# ---------------------------------------------------------------------------------------------------------------------
# Reproduction scripts: a launcher on PATH that only notes down what it was given


@pytest.fixture
def run_script(tmp_path):
    """Returns a function that runs a script and gives back every command line the launcher was called with."""
    record = tmp_path / "record"
    fake = tmp_path / "bin" / "deepspeed"
    fake.parent.mkdir()
    fake.write_text(
        f"#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" >> {record}\necho ---- >> {record}\nexit ${{FAKE_EXIT:-0}}\n"
    )
    fake.chmod(0o755)
    # The scripts ask the program's parser for its flags.
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)

    def run(name, *arguments, expected_exit=0, **environment):
        record.unlink(missing_ok=True)
        path = f"{fake.parent}:{os.environ['PATH']}"
        clean = {"PATH": path, "HOME": str(tmp_path), **environment}
        # From another folder: the scripts find the project themselves.
        done = subprocess.run(
            ["bash", ROOT / "scripts" / name, *arguments], env=clean, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == expected_exit, done.stderr
        calls = record.read_text().split("----\n")[:-1] if record.exists() else []
        return [call.splitlines() for call in calls], done.stderr

    return run


def make_executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def bare(tmp_path):
    """A copy of the scripts in a project without .venv, and an environment whose PATH begins with a python that has no
    package."""
    shutil.copytree(ROOT / "scripts", tmp_path / "project/scripts", ignore=shutil.ignore_patterns("__pycache__"))
    make_executable(tmp_path / "bare/python", f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    make_executable(tmp_path / "bare/deepspeed", "#!/bin/sh\necho launched\n")
    return tmp_path / "project", {"PATH": f"{tmp_path}/bare:/usr/bin:/bin", "HOME": str(tmp_path)}


def add_venv(project: Path) -> Path:
    """Makes what `source .venv/bin/activate` needs, with a python that has the packages."""
    folder = project / ".venv/bin"
    make_executable(folder / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    make_executable(folder / "deepspeed", "#!/bin/sh\necho launched\n")
    (folder / "activate").write_text(f'PATH="{folder}:$PATH"\n')
    return folder


def environment_of(project: Path, program: str, environment: dict) -> subprocess.CompletedProcess:
    """Asks common.sh for a program, and prints where it was found."""
    command = f"set -euo pipefail; source scripts/common.sh; use_environment {program}; command -v {program}"
    return subprocess.run(["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("program", ["python", "deepspeed"])
def test_a_python_without_the_packages_gives_way_to_the_project_s_environment(bare, program):
    """A machine's own python came first on PATH: the scripts died in a traceback, the environment beside them."""
    project, environment = bare
    done = environment_of(project, program, environment)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {environment['PATH'].split(':')[0]}/python lacks torch, transformers, ")
    folder = add_venv(project)
    done = environment_of(project, program, environment)
    assert (done.stdout, done.stderr) == (f"{folder}/{program}\n", "")


@pytest.mark.parametrize("program", ["python", "deepspeed"])
def test_an_environment_that_has_the_packages_comes_before_the_project_s_own(bare, program, tmp_path):
    project, environment = bare
    add_venv(project)
    mine = add_venv(tmp_path / "mine")
    done = environment_of(project, program, environment | {"PATH": f"{mine}:{environment['PATH']}"})
    assert (done.stdout, done.stderr) == (f"{mine}/{program}\n", "")
    # Without the launcher it is not enough.
    (mine / "deepspeed").unlink()
    done = environment_of(project, "deepspeed", environment | {"PATH": f"{mine}:/usr/bin:/bin"})
    assert (done.stdout, done.stderr) == (f"{project}/.venv/bin/deepspeed\n", "")


NEEDING = [path.name for path in SCRIPTS if "scripts/common.sh" in path.read_text() and path.name != "common.sh"]


@pytest.mark.parametrize("name", NEEDING)
def test_a_script_without_the_packages_ends_in_one_line(bare, name):
    project, environment = bare
    environment |= {"LLM_PATH": "a", "MT_PATH": "b"}
    done = subprocess.run(["bash", project / "scripts" / name], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*/bare/python lacks torch, .*: run 'source scripts/setup_venv.sh', .*\n", done.stderr)


def test_every_script_that_starts_a_program_finds_its_environment_in_the_same_way():
    assert {"prepare_data.sh", "compare_bridges.sh", "compare_all.sh", "training_math.sh"} < set(NEEDING)
    others = {path.name for path in SCRIPTS} - {*NEEDING, "common.sh", "setup_venv.sh"}
    assert all("setup_venv.sh" in (ROOT / "scripts" / name).read_text() for name in others)


def split_launcher(call: list[str]) -> tuple[list[str], str, list[str]]:
    at = next(index for index, word in enumerate(call) if word.endswith(".py"))
    return call[:at], call[at], call[at + 1 :]


def flags_of(call: list[str]) -> dict:
    _, program, arguments = split_launcher(call)
    return vars(parser_named(program).parse_args(arguments))


def published_command(task: str, stage: str) -> str:
    """The published command line of a stage; where the README of the release and its scripts differ, the scripts'."""
    llm = {
        "math": "meta-math/MetaMath-7B-V1.0",
        "x-csqa": "LLaMAX/LLaMAX2-7B-X-CSQA",
        "xnli": "LLaMAX/LLaMAX2-7B-XNLI",
    }[task]
    math_augmentation = task == "math" and stage == "augmentation"
    length = 512 if math_augmentation else 200
    return (
        f"--deepspeed --llm_path {llm} --mt_path google/mt5-xl --task {task} --stage_name {stage} "
        f"--train_num {30000 if math_augmentation else 100000} --train_batch_size 128 "
        f"--train_micro_batch_size_per_gpu {2 if math_augmentation else 8} --augmentation {stage == 'augmentation'} "
        f"--epoch_num 3 --max_seq_len {length} --max_gen_len {length}"
    )


@pytest.mark.parametrize("task", TRAINING)
def test_training_script_runs_both_stages_with_the_published_settings(run_script, task):
    calls, _ = run_script(TRAINING[task])
    expected = [published_command(task, stage) for stage in ("mapping", "augmentation")]
    assert [split_launcher(call)[:2] for call in calls] == [(["--log_level", "critical"], "run_training.py")] * 2
    assert [flags_of(call) for call in calls] == [
        vars(parser_named("run_training.py").parse_args([*command.split(), "--micro_batch_tokens", "4096"]))
        for command in expected
    ]
    assert flags_of(calls[0])["lr"] == 2e-5 and flags_of(calls[0])["dev_size"] == 3000


def test_layalign_script_runs_both_stages_with_its_published_settings(run_script):
    calls, _ = run_script("training_layalign.sh", TASK_TRAIN_NUM="5", INIT_CHECKPOINT="m.bin")
    common = "--deepspeed --llm_path meta-math/MetaMath-7B-V1.0 --mt_path google/mt5-xl --task math --bridge layalign"
    common += " --save_name LayAlign --train_batch_size 128 --micro_batch_tokens 4096 --epoch_num 3"
    common += " --lr_scheduler cosine --warmup_ratio 0.05 --deepspeed_config scripts/ds_zero2.json"
    own = {"translation": (8, 100000, "4e-5", 200, " --init_checkpoint m.bin"), "task": (2, 5, "3e-5", 512, "")}
    assert [flags_of(call) for call in calls] == [
        vars(
            parser_named("run_training.py").parse_args(
                f"{common} --stage_name {stage} --train_micro_batch_size_per_gpu {rows} --train_num {number} --lr {lr} "
                f"--max_seq_len {length} --max_gen_len {length}{more}".split()
            )
        )
        for stage, (rows, number, lr, length, more) in own.items()
    ]
    alone, _ = run_script("training_layalign.sh", STAGE_NAME="task", INIT_CHECKPOINT="m.bin")
    assert [(flags_of(call)["stage_name"], flags_of(call)["init_checkpoint"]) for call in alone] == [("task", "m.bin")]
    calls, error = run_script("training_layalign.sh", STAGE_NAME="mapping", expected_exit=2)
    assert not calls and error == "error: STAGE_NAME is 'mapping': it may be translation or task\n"
    calls, error = run_script("training_layalign.sh", TRANSLATION_TRAIN_NUMBER="5", expected_exit=2)
    assert not calls and error.startswith("error: TRANSLATION_TRAIN_NUMBER is in the environment, but no flag")
    assert len(run_script("training_layalign.sh", MAPPING_TRAIN_NUMBER="5")[0]) == 2  # no stage of this script


OTHER_BRIDGES = {
    "langbridge": (
        "LangBridge",
        "--train_batch_size 128 --lr 6e-4 --max_grad_norm 1.0 --epoch_num 1 --deepspeed_config scripts/ds_zero2.json",
        {"task": "--train_micro_batch_size_per_gpu 4 --train_num 200000"},
    ),
    "xbridge": (
        "XBridge",
        "--train_batch_size 128 --lr 2e-5 --epoch_num 3",
        {
            "translation": "--train_micro_batch_size_per_gpu 8 --train_num 100000 --max_seq_len 200 --max_gen_len 200",
            "task": "--train_micro_batch_size_per_gpu 2 --train_num 30000",
        },
    ),
    "layer_fusion": (
        "LayerFusion",
        "--train_batch_size 8 --lr 3e-5 --lr_scheduler cosine --warmup_ratio 0.05 --epoch_num 3",
        {"task": "--train_micro_batch_size_per_gpu 1 --train_num 30000"},
    ),
}


@pytest.mark.parametrize("bridge", OTHER_BRIDGES)
def test_the_script_of_a_bridge_runs_its_stages_in_order_with_its_published_settings(run_script, bridge):
    from mindmerger.bridges import BRIDGES

    name, shared, own = OTHER_BRIDGES[bridge]
    calls, _ = run_script(f"training_{bridge}.sh")
    common = "--deepspeed --llm_path meta-math/MetaMath-7B-V1.0 --mt_path google/mt5-xl --task math --bridge "
    common += f"{bridge} --save_name {name} --micro_batch_tokens 4096 {shared}"
    parse = parser_named("run_training.py").parse_args
    expected = [f"{common} --stage_name {stage} {more}" for stage, more in own.items()]
    assert [flags_of(call) for call in calls] == [vars(parse(command.split())) for command in expected]
    assert list(own) == list(BRIDGES[bridge].stages)


def test_the_merlin_style_script_runs_its_four_stages_in_order_with_their_settings(run_script, tmp_path):
    common = "--deepspeed --llm_path meta-math/MetaMath-7B-V1.0 --mt_path google/mt5-xl --task math --save_name MERLIN "
    common += "--micro_batch_tokens 4096 --train_batch_size 128 --lr 2e-5 --epoch_num 3 --dev_size 3000 --stage_name "
    rank_16 = (
        "--adapter lora --adapter_rank 16 --adapter_alpha 32 --adapter_dropout 0.05 --adapter_targets q_proj,v_proj"
    )
    expected = [
        "mapping --train_num 100000 --train_micro_batch_size_per_gpu 8 --max_seq_len 200 --max_gen_len 200",
        "question --train_num 30000 --train_micro_batch_size_per_gpu 8",
        "augmentation --train_num 30000 --train_micro_batch_size_per_gpu 2 --init_checkpoint "
        "outputs/MERLIN/math/question",
        f"adapter --train_num 30000 --train_micro_batch_size_per_gpu 2 {rank_16}",
    ]
    parse = parser_named("run_training.py").parse_args
    calls, _ = run_script("training_merlin_style.sh")
    assert [flags_of(call) for call in calls] == [vars(parse((common + more).split())) for more in expected]
    calls, _ = run_script(
        "training_merlin_style.sh", "--save_name", "other", OUTPUT_DIR="there", INIT_CHECKPOINT="m.bin"
    )
    starts = [flags_of(call)["init_checkpoint"] for call in calls]
    assert starts == ["m.bin", None, "there/other/math/question", None]
    # From another run's mapping it would start as readily.
    (tmp_path / "mine.yaml").write_text("save_name: Mine\n")
    calls, _ = run_script("training_merlin_style.sh", CONFIG=str(tmp_path / "mine.yaml"))
    assert flags_of(calls[2])["init_checkpoint"] == "outputs/Mine/math/question"
    assert {flags_of(call)["save_name"] for call in calls} == {"Mine"}
    calls, _ = run_script("training_merlin_style.sh", QUESTION_SAVE_NAME="asked", QUESTION_OUTPUT_DIR="there")
    assert flags_of(calls[2])["init_checkpoint"] == "there/asked/math/question"
    calls, _ = run_script("training_merlin_style.sh", STAGE_NAME="augmentation", INIT_CHECKPOINT="m.bin")
    assert [flags_of(call)["init_checkpoint"] for call in calls] == ["m.bin"]
    # The stage's name begins the names of the adapter's own flags: they are no misspelt ones of that stage.
    calls, _ = run_script("training_merlin_style.sh", ADAPTER_RANK="8", ADAPTER="dora", ADAPTER_LR="1e-4")
    last = flags_of(calls[-1])
    assert (last["adapter_rank"], last["adapter"], last["lr"], flags_of(calls[0])["lr"]) == (8, "dora", 1e-4, 2e-5)
    calls, error = run_script("training_merlin_style.sh", ADAPTER_RANKS="8", expected_exit=2)
    assert not calls and error.startswith("error: ADAPTER_RANKS is in the environment, but no flag")


@pytest.mark.parametrize(
    "script, task, trained, llm, length",
    [
        ("evaluation_mgsm.sh", "math_mgsm", "math", "meta-math/MetaMath-7B-V1.0", 512),
        ("evaluation_msvamp.sh", "math_msvamp", "math", "meta-math/MetaMath-7B-V1.0", 512),
        ("evaluation_x_csqa.sh", "x-csqa", "x-csqa", "LLaMAX/LLaMAX2-7B-X-CSQA", None),
        ("evaluation_xnli.sh", "xnli", "xnli", "LLaMAX/LLaMAX2-7B-XNLI", None),
    ],
)
def test_evaluation_script_evaluates_what_training_left(run_script, script, task, trained, llm, length):
    calls, _ = run_script(script)
    (flags,) = map(flags_of, calls)
    expected = {
        "task": task,
        "llm_path": llm,
        "mt_path": "google/mt5-xl",
        "init_checkpoint": f"outputs/MindMerger/{trained}",  # of whose stages the program takes the last one
        "augmentation": True,
        "eval_max_tokens": 16384,
        "eval_batch_size": None,
        "max_seq_len": 512,
        "max_gen_len": length,
        "save_name": "MindMerger",
    }
    assert {name: flags[name] for name in expected} == expected
    assert find_task(task).training_name == trained


def test_evaluation_under_another_name_reads_that_runs_mapping(run_script):
    """`--save_name other` must not score the default run's mapping under the other name."""
    for arguments in (["--save_name", "other"], ["--save_name=other"]):
        calls, _ = run_script("evaluation_xnli.sh", *arguments)
        assert flags_of(calls[0])["init_checkpoint"] == "outputs/other/xnli"
    calls, _ = run_script("evaluation_xnli.sh", SAVE_NAME="third", OUTPUT_DIR="elsewhere")
    assert flags_of(calls[0])["init_checkpoint"] == "elsewhere/third/xnli"
    calls, _ = run_script("evaluation_xnli.sh", INIT_CHECKPOINT="a.bin", AUGMENTATION="False")
    assert (flags_of(calls[0])["init_checkpoint"], flags_of(calls[0])["augmentation"]) == ("a.bin", False)


def test_evaluation_of_another_bridge_takes_the_form_that_it_trains(run_script):
    """MindMerger's published form put a prompt before LangBridge's LLM, which was trained without one."""
    for arguments, variables in ((["--bridge", "langbridge"], {}), ([], {"BRIDGE": "langbridge"})):
        (flags,) = map(flags_of, run_script("evaluation_mgsm.sh", *arguments, **variables)[0])
        assert (flags["bridge"], flags["augmentation"]) == ("langbridge", None)
    (flags,) = map(flags_of, run_script("evaluation_mgsm.sh", BRIDGE="layalign", AUGMENTATION="False")[0])
    assert (flags["bridge"], flags["augmentation"]) == ("layalign", False)


def test_evaluation_of_the_llm_alone_names_no_mapping(run_script):
    calls, _ = run_script("evaluation_mgsm.sh", "--llm_only", "--limit", "3")
    flags = flags_of(calls[0])
    assert (flags["llm_only"], flags["limit"], flags["init_checkpoint"]) == (True, 3, None)


def test_every_setting_of_a_script_can_be_replaced_from_the_environment(run_script):
    calls, _ = run_script("training_math.sh")
    fixed = {"--task", "--stage_name", "--deepspeed"}
    names = [word[2:] for word in split_launcher(calls[0])[2] if word.startswith("--") and word not in fixed]
    assert {"llm_path", "mt_path", "train_num", "lr", "max_gen_len"} < set(names)
    for spelling in (str.upper, str.lower):
        environment = {spelling(name): "False" if name == "augmentation" else "7" for name in names}
        for call in run_script("training_math.sh", **environment)[0]:
            flags = flags_of(call)
            assert {name: str(flags[name]).removesuffix(".0") for name in names} == {
                name: environment[spelling(name)] for name in names
            }


OWNED = {"deepspeed", "task", "stage_name", "local_rank", "gpu", "help"}  # by the scripts, and by the launcher


@pytest.mark.parametrize("script", ["training_math.sh", "evaluation_mgsm.sh"])
def test_a_variable_named_like_any_flag_of_the_program_passes(run_script, script):
    """A list of flags in the scripts would lack the next one: --bridge and --skip_faulty_rows never got through."""
    program = "run_training.py" if script.startswith("training") else "run_evaluation.py"
    accepted = {"train_batch_size", "train_micro_batch_size_per_gpu"} if program == "run_evaluation.py" else set()
    actions = {action.dest: action for action in parser_named(program)._actions}
    apart = OWNED | accepted | {"llm_only", "config"}
    names = {name for name, action in actions.items() if action.nargs in (None, 0)} - apart
    assert {"seed", "skip_faulty_rows", "precision"} < names and len(names) > 20
    environment = {name.upper(): f"of-{name}" if actions[name].nargs is None else "1" for name in names}
    call = run_script(script, **environment)[0][0]
    assert {name for name in names if call.count(f"--{name}") != 1} == set()
    values = {name: call[call.index(f"--{name}") + 1] for name in names if actions[name].nargs is None}
    assert values == {name: f"of-{name}" for name in values}
    assert not {f"--{name}" for name in accepted} & set(call)


def test_a_flag_s_second_name_is_open_to_variables_and_wins_as_an_argument(run_script):
    calls, _ = run_script("training_math.sh", LEARNING_RATE="1e-3", MAPPING_PER_DEVICE_TRAIN_BATCH_SIZE="4")
    assert [flags_of(call)["lr"] for call in calls] == [1e-3, 1e-3]
    assert [flags_of(call)["train_micro_batch_size_per_gpu"] for call in calls] == [4, 2]
    calls, _ = run_script("training_math.sh", "--learning_rate=2e-3", "--per_device_train_batch_size", "16", LR="1e-3")
    assert [flags_of(call)["lr"] for call in calls] == [2e-3, 2e-3]
    assert [flags_of(call)["train_micro_batch_size_per_gpu"] for call in calls] == [16, 16]
    calls, error = run_script("training_math.sh", LR="1", LEARNING_RATE="2", expected_exit=2)
    assert not calls
    assert error == "error: LR and LEARNING_RATE in the environment name one setting: unset one of them\n"


def test_a_file_of_settings_stands_between_the_variables_and_the_published_ones(run_script, tmp_path):
    """On the program's command line the published settings would have won over the file."""
    file = tmp_path / "settings.yaml"
    file.write_text("learning_rate: 1e-3\ntrain_num: 7\ncompile: true\nbridge_option: [a=b]\ndata_root: my data\n")
    calls, _ = run_script("training_math.sh", "--max_seq_len", "9", CONFIG=str(file), TRAIN_NUM="8")
    for call, max_gen_len in zip(calls, (200, 512), strict=True):
        flags = flags_of(call)
        assert (flags["lr"], flags["train_num"], flags["compile"], flags["max_gen_len"]) == (1e-3, 8, True, max_gen_len)
        assert (flags["bridge_option"], flags["data_root"], flags["max_seq_len"]) == (["a=b"], "my data", 9)
        assert flags["config"] is None
    calls, _ = run_script("training_math.sh", AUGMENTATION_CONFIG=str(file), COMPILE="0")
    assert [flags_of(call)["train_num"] for call in calls] == [100000, 7]
    assert [flags_of(call)["compile"] for call in calls] == [False, False]


def test_a_file_of_settings_reaches_the_evaluation_and_names_its_mapping(run_script, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("save_name: mine\nlimit: 3\n")
    flags = flags_of(run_script("evaluation_mgsm.sh", CONFIG=str(file))[0][0])
    assert (flags["save_name"], flags["limit"]) == ("mine", 3)
    assert flags["init_checkpoint"] == "outputs/mine/math"
    file.write_text("llm_only: true\n")
    flags = flags_of(run_script("evaluation_mgsm.sh", CONFIG=str(file))[0][0])
    assert flags["llm_only"] and flags["init_checkpoint"] is None


def test_a_file_of_settings_that_cannot_be_used_stops_a_script_before_it_starts_anything(run_script, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("train_nums: 7\n")
    calls, error = run_script("training_math.sh", CONFIG=str(file), expected_exit=2)
    assert not calls and error.startswith(f"error: {file}: train_nums: no such setting, did you mean train_num?")
    assert error.count("\n") == 1
    file.write_text("bridge_option: [a=1, b=2]\n")
    calls, error = run_script("training_math.sh", CONFIG=str(file), expected_exit=2)
    assert not calls and error.startswith(f"error: {file}: bridge_option: takes one value here")
    calls, error = run_script("training_math.sh", "--config", str(file), expected_exit=2)
    assert not calls
    assert (
        error == f"error: --config {file} would lose to the published settings: say CONFIG={file} before the script\n"
    )


def test_variables_that_a_shell_or_a_launcher_left_choose_no_task_stage_or_gpu(run_script):
    calls, _ = run_script("training_xnli.sh", TASK="math", GPU="3", LOCAL_RANK="5", DEEPSPEED="0", HELP="1")
    assert calls == run_script("training_xnli.sh")[0] and len(calls) == 2


def test_a_flag_without_a_value_takes_one_or_zero_for_all_stages_or_one(run_script):
    calls, _ = run_script("training_math.sh", DRY_RUN="1", AUGMENTATION_COMPILE="true", LIGER="0")
    assert [flags_of(call)["dry_run"] for call in calls] == [True, True]
    assert [flags_of(call)["compile"] for call in calls] == [False, True]
    assert "--liger" not in calls[0]
    calls, error = run_script("training_math.sh", DRY_RUN="now", expected_exit=2)
    assert not calls and error.startswith("error: dry_run is 'now'") and error.count("\n") == 1


def test_a_misspelt_variable_for_one_stage_is_refused_before_anything_starts(run_script):
    """It changed nothing, and the run took the published value for days."""
    calls, error = run_script("training_math.sh", AUGMENTATION_TRAIN_NUMBER="5", expected_exit=2)
    assert not calls and error.startswith("error: AUGMENTATION_TRAIN_NUMBER is in the environment, but no flag")
    assert error.count("\n") == 1
    calls, error = run_script("training_math.sh", MAPPING_TASK="xnli", expected_exit=2)
    assert not calls and "no flag --task of run_training.py is open to variables" in error


def test_the_llm_alone_may_be_asked_for_by_a_variable_and_still_names_no_mapping(run_script):
    calls, _ = run_script("evaluation_mgsm.sh", LLM_ONLY="1", INIT_CHECKPOINT="m.bin", AUGMENTATION="True")
    flags = flags_of(calls[0])
    assert (flags["llm_only"], flags["init_checkpoint"], flags["augmentation"]) == (True, None, None)


def test_settings_from_the_environment_may_hold_for_one_stage(run_script):
    calls, _ = run_script("training_xnli.sh", TRAIN_NUM="9", AUGMENTATION_TRAIN_NUM="4", LANGUAGES="Swahili,Thai")
    assert [flags_of(call)["train_num"] for call in calls] == [9, 4]
    assert [flags_of(call)["languages"] for call in calls] == ["Swahili,Thai"] * 2


def test_arguments_reach_both_stages_and_win_over_the_environment(run_script):
    calls, _ = run_script("training_x_csqa.sh", "--train_num", "5", "--data_root", "my data", TRAIN_NUM="9")
    assert [flags_of(call)["train_num"] for call in calls] == [5, 5]
    assert [flags_of(call)["data_root"] for call in calls] == ["my data"] * 2


@pytest.mark.slow
def test_the_math_scripts_train_and_evaluate_with_the_real_launcher(tmp_path, tiny_llm, tiny_encoder, datas):
    """Both stages and MGSM on one process, as a user calls them; only sizes are made small."""
    environment = clean_environment(tmp_path) | {"LLM_PATH": tiny_llm, "MT_PATH": tiny_encoder, "DATA_ROOT": str(datas)}
    environment |= {"TRAIN_NUM": "6", "DEV_SIZE": "4", "MAX_STEPS": "2", "TRAIN_BATCH_SIZE": "16", "NUM_GPUS": "1"}
    environment |= {"LANGUAGES": "sw,th", "LIMIT": "2", "MAX_NEW_TOKENS": "4", "MASTER_PORT": str(free_port())}
    environment |= {"OUTPUT_DIR": str(tmp_path / "outputs"), "RESULTS_DIR": str(tmp_path / "results")}
    environment["PATH"] += os.pathsep + os.environ["PATH"]
    for script in ("training_math.sh", "evaluation_mgsm.sh"):
        command = ["bash", str(ROOT / "scripts" / script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "95 % interval" in done.stdout
    results = json.loads((tmp_path / "results/MindMerger/math_mgsm/results.json").read_text())
    assert results["form"] == "soft" and results["counts"]["examples"] == 4
    trained = json.loads((tmp_path / "outputs/MindMerger/math/augmentation/config.json").read_text())
    assert trained["stage"] == "augmentation"


@pytest.mark.slow
def test_the_merlin_style_script_trains_its_four_stages_and_the_evaluation_finds_the_adapter(
    tmp_path, tiny_llm, tiny_encoder
):
    """In the small world's data, as a user calls both; only sizes are made small."""
    from scripts.tiny_world.__main__ import write_data

    write_data(tmp_path / "datas", seed=0, pairs=8, problems=8, test_problems=2)
    environment = clean_environment(tmp_path) | {"LLM_PATH": tiny_llm, "MT_PATH": tiny_encoder, "NUM_GPUS": "1"}
    environment |= {"TRAIN_NUM": "6", "DEV_SIZE": "4", "MAX_STEPS": "2", "TRAIN_BATCH_SIZE": "4", "LANGUAGES": "sw,de"}
    environment |= {"TRAIN_MICRO_BATCH_SIZE_PER_GPU": "2", "MAX_NEW_TOKENS": "4", "MASTER_PORT": str(free_port())}
    environment |= {"DATA_ROOT": str(tmp_path / "datas"), "ADAPTER_RANK": "2"}
    environment |= {name: str(tmp_path / folder) for name, folder in (("OUTPUT_DIR", "o"), ("RESULTS_DIR", "r"))}
    environment["PATH"] += os.pathsep + os.environ["PATH"]
    for script, more in (("training_merlin_style.sh", {}), ("evaluation_mgsm.sh", {"SAVE_NAME": "MERLIN"})):
        command, settings = ["bash", str(ROOT / "scripts" / script)], environment | more
        done = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=tmp_path, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    folder, before = tmp_path / "o/MERLIN/math", None
    for stage in ("mapping", "question", "augmentation", "adapter"):
        settings = json.loads((folder / stage / "args.json").read_text())
        start = None if before is None else str(folder / before / "mapping.safetensors")
        assert settings["init_file"] == start, stage
        assert sum("loss" in line for line in (folder / stage / "log.jsonl").read_text().splitlines()) >= 2
        before = stage
    assert (folder / "adapter/mapping.safetensors").read_bytes() == (
        folder / "augmentation/mapping.safetensors"
    ).read_bytes()
    results = json.loads((tmp_path / "r/MERLIN/math_mgsm-adapter/results.json").read_text())
    assert results["checkpoint"] == str(folder / "adapter/mapping.safetensors")
    assert (results["form"], results["counts"]["examples"], results["adapter"]["adapter_rank"]) == ("soft", 4, 2)


@pytest.mark.slow
def test_a_refusal_is_the_last_line_that_a_script_prints_and_keeps_its_exit_code(tmp_path, tiny_encoder):
    """The launcher printed the whole command line of each process before and after it."""
    environment = clean_environment(tmp_path) | {"LLM_PATH": str(tmp_path / "absent"), "MT_PATH": tiny_encoder}
    environment |= {"NUM_GPUS": "2", "MASTER_PORT": str(free_port())}
    environment["PATH"] += os.pathsep + os.environ["PATH"]
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/training_math.sh")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 2 and lines[-1].startswith("error: ") and str(tmp_path / "absent") in lines[-1], lines
    assert not [line for line in lines if "[INFO]" in line or "return code" in line]


def test_launcher_options_stand_before_the_program(run_script, tmp_path):
    hosts = tmp_path / "my hosts"
    hosts.write_text("one slots=2\n")
    environment = {"NUM_GPUS": "2", "HOSTFILE": str(hosts), "MASTER_PORT": "1234"}
    environment["DEEPSPEED_ARGS"] = "--num_nodes 3 -q"
    for script in ("training_math.sh", "evaluation_mgsm.sh"):
        calls, _ = run_script(script, **environment)
        for call in calls:
            launcher, program, _ = split_launcher(call)
            assert launcher[:2] == ["--hostfile", str(hosts)]
            assert launcher[2:] == shlex.split("--num_gpus 2 --master_port 1234 --num_nodes 3 -q")
            assert (ROOT / program).is_file()


def test_a_hostfile_that_is_not_there_is_refused(run_script):
    """The launcher would merely warn and train on this node alone."""
    calls, errors = run_script("training_math.sh", HOSTFILE="typo", expected_exit=2)
    assert calls == [] and errors == "error: HOSTFILE=typo: no such file\n"


def test_one_stage_alone_and_where_it_starts(run_script):
    calls, _ = run_script("training_math.sh", STAGE_NAME="augmentation", INIT_CHECKPOINT="m.bin")
    assert [(flags_of(call)["stage_name"], flags_of(call)["init_checkpoint"]) for call in calls] == [
        ("augmentation", "m.bin")
    ]
    # Of a whole run it is the start: the augmentation stage must take the mapping that was just trained.
    calls, _ = run_script("training_math.sh", INIT_CHECKPOINT="m.bin")
    assert [flags_of(call)["init_checkpoint"] for call in calls] == ["m.bin", None]
    calls, error = run_script("training_math.sh", STAGE_NAME="mapping,augmentation", expected_exit=2)
    assert not calls and error.startswith("error: STAGE_NAME is 'mapping,augmentation'") and error.count("\n") == 1


def test_a_failed_mapping_stage_stops_the_script_with_its_exit_code(run_script):
    calls, _ = run_script("training_math.sh", expected_exit=2, FAKE_EXIT="2")
    assert len(calls) == 1


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_script_is_well_formed(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.read_text().startswith(("#!/usr/bin/env bash\n", "# Sourced", "#"))


def test_ci_script_is_executable():
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize(
    "arguments, expression, rest",
    [
        ([], "not soak", []),
        (["-m", "not slow", "-x"], "(not slow) and not soak", ["-x"]),
        (["tests/a.py", "-mslow"], "(slow) and not soak", ["tests/a.py"]),
    ],
)
def test_test_script_never_runs_soak_tests(tmp_path, arguments, expression, rest):
    """pytest obeys only the last -m: a caller's own would bring the soak tests back."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "test.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "setup_venv.sh").write_text(f"PATH={tmp_path}:$PATH\n")
    fake = tmp_path / "python"
    fake.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\nexit 5\n")
    fake.chmod(0o755)
    environment = {**os.environ, "PYTEST_WORKERS": "5"}
    done = subprocess.run(
        ["bash", tmp_path / "scripts" / "test.sh", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines() == ["-m", "pytest", "-n", "5", "-m", expression, *rest]
    assert done.returncode == 5


@pytest.mark.parametrize("tests_exit, lint_exit, expected", [(0, 0, 0), (5, 0, 5), (0, 1, 1), (5, 1, 5)])
def test_ci_script_runs_every_check_and_ends_with_the_first_failure(tmp_path, tests_exit, lint_exit, expected):
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "scripts" / "test.sh").write_text(f"echo tests\nexit {tests_exit}\n")
    (tmp_path / "scripts" / "setup_venv.sh").write_text(f"PATH={tmp_path}:$PATH\n")
    for name, code in (("ruff", lint_exit), ("mypy", 0), ("bandit", 0)):
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\necho {name} "$@"\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.splitlines() == [
        "tests",
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "bandit --quiet --configfile pyproject.toml --recursive .",
    ]
    assert done.returncode == expected


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed presets


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_leaves_precision_optimizer_and_batch_to_the_program(preset):
    """A bf16 or fp16 section makes DeepSpeed cast the mapping too; DeepSpeed's own CPU Adam needs a compiler."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads(preset.read_text())
    assert set(config) <= {"zero_optimization", "zero_force_ds_cpu_optimizer"}
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])  # refuses misspelt keys
    assert zero.stage == int(re.match(r"ds_zero(\d)", preset.stem).group(1))
    offloads = "offload_optimizer" in config["zero_optimization"]
    assert offloads == preset.stem.endswith("_offload")
    assert config.get("zero_force_ds_cpu_optimizer", True) is not offloads


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_passes_the_programs_own_list_of_keys(preset):
    from mindmerger.training.deepspeed_config import effective_config, read_deepspeed_config

    effective = effective_config(read_deepspeed_config(str(preset)), 128, 8, 16, 1.0)
    assert effective["train_micro_batch_size_per_gpu"] == 8


def test_all_promised_presets_are_there():
    names = {preset.stem for preset in PRESETS}
    assert {"ds_zero0", "ds_zero1", "ds_zero2", "ds_zero3", "ds_zero3_offload"} <= names


# ---------------------------------------------------------------------------------------------------------------------
# Data preparation: the hub's rows


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (HUB / name).read_text(encoding="utf-8").splitlines()]


def examples(task: str, data_root, language: str) -> list:
    return list(find_task(task).read_evaluation(data_root, find_language(language)))


@pytest.mark.parametrize("code, language", [("en", "English"), ("sw", "Swahili")])
def test_mgsm_rows_become_lines_the_reader_takes(tmp_path, code, language):
    hub_rows = rows(f"mgsm_{code}_test.jsonl")
    hub_formats.write_mgsm(tmp_path / f"evaluation/mgsm/mgsm_{code}.tsv", hub_rows)
    read = examples("math_mgsm", tmp_path, language)
    assert [example.source for example in read] == [row["question"] for row in hub_rows]
    assert [float(example.target) for example in read] == [18, 3]


def test_mgsm_line_break_or_tab_in_a_question_cannot_shift_the_columns():
    row = {"question": "one\ttwo\nthree", "answer": None, "answer_number": 4.0, "equation_solution": None}
    assert hub_formats.mgsm_line(row) == "one two three\t4"


@pytest.mark.parametrize("code, config", [("en", "en"), ("ja", "jap")])
def test_x_csqa_rows_become_records_the_reader_takes(tmp_path, code, config):
    hub_rows = rows(f"x_csqa_{config}_validation.jsonl")
    hub_formats.write_x_csqa(tmp_path / f"evaluation/x-csqa/{code}/dev.jsonl", hub_rows)
    read = examples("x-csqa", tmp_path, code)
    assert [example.target for example in read] == [row["answerKey"] for row in hub_rows]
    for example, row in zip(read, hub_rows, strict=True):
        assert row["question"]["stem"] in example.source
        assert all(text in example.source for text in row["question"]["choices"]["text"])


def test_x_csqa_rows_with_choices_as_a_list_give_the_same_lines():
    for row in rows("x_csqa_en_validation.jsonl"):
        listed = json.loads(hub_formats.x_csqa_line(row))
        assert isinstance(listed["question"]["choices"], list) and list(listed["question"]["choices"][0]) == [
            "label",
            "text",
        ]
        assert hub_formats.x_csqa_line(listed) == hub_formats.x_csqa_line(row)


def test_xnli_rows_become_records_of_all_languages(tmp_path):
    hub_rows = rows("xnli_all_languages.jsonl")
    for path in ("evaluation/xnli/test.json", "query_translation/xnli_dev.json"):
        hub_formats.write_xnli(tmp_path / path, hub_rows)
    for name in find_task("xnli").evaluation_languages:
        read, code = examples("xnli", tmp_path, name), find_language(name).code
        assert [example.target for example in read] == ["entailment", "contradiction"]
        hypotheses = [dict(zip(*row["hypothesis"].values(), strict=True))[code] for row in hub_rows]
        for example, row, hypothesis in zip(read, hub_rows, hypotheses, strict=True):
            assert example.source == f"Premise: {row['premise'][code]}\nHypothesis: {hypothesis}\nLabel:"
    training = list(find_task("xnli").read_augmentation(tmp_path))
    assert len(training) == 2 * 15


@pytest.mark.parametrize(
    "change, message",
    [({"label": -1}, "label -1 is none of"), ({"premise": {"en": "Only English."}}, "no 'sw' among en")],
)
def test_xnli_row_of_another_form_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        hub_formats.write_xnli(tmp_path / "test.json", [rows("xnli_all_languages.jsonl")[0] | change])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Data preparation: the way through `datasets`, from clones of the hub's data sets


def run_prepare(*arguments, **environment):
    command = ["bash", ROOT / "scripts" / "prepare_data.sh", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def clone(folder: Path, splits: dict[tuple[str, str], list[dict]], features=None) -> None:
    """Writes a data set as the hub keeps it: parquet files, and a card that says which belong to which config."""
    import datasets

    configs: dict[str, list[str]] = {}
    for (config, split), content in splits.items():
        path = folder / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(content, features=features).to_parquet(path)
        configs.setdefault(config, []).append(f"  - split: {split}\n    path: {config}/{split}-*\n")
    card = "".join(f"- config_name: {name}\n  data_files:\n{''.join(files)}" for name, files in configs.items())
    (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")


def test_everything_the_hub_has_arrives_in_the_released_layout(tmp_path):
    import datasets

    mirror, data_root = tmp_path / "mirror", tmp_path / "datas"
    mgsm = {(find_language(name).code, "test"): rows("mgsm_en_test.jsonl") for name in task_languages("math_mgsm")}
    clone(mirror / "juletxara" / "mgsm", mgsm)
    codes = [find_language(name).code for name in task_languages("x-csqa")]
    configs = ["X-CSQA-" + ("jap" if code == "ja" else code) for code in codes]
    x_csqa = {(config, "validation"): rows("x_csqa_jap_validation.jsonl") for config in configs}
    clone(mirror / "INK-USC" / "xcsr", x_csqa | {("X-CSQA-en", "train"): rows("x_csqa_en_train.jsonl")})
    xnli = rows("xnli_all_languages.jsonl")
    languages = sorted(xnli[0]["premise"])
    features = datasets.Features(
        premise=datasets.Translation(languages),
        hypothesis=datasets.TranslationVariableLanguages(languages),
        label=datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
    )
    content = [row | {"hypothesis": dict(zip(*row["hypothesis"].values(), strict=True))} for row in xnli]
    content = [features.encode_example(row) for row in content]
    clone(
        mirror / "facebook" / "xnli", {("all_languages", split): content for split in ("test", "validation")}, features
    )

    done = run_prepare("--data_root", data_root, "--hub_mirror", mirror, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    expected = {f"evaluation/mgsm/mgsm_{code}.tsv" for code, _ in mgsm}
    expected |= {f"evaluation/x-csqa/{code}/dev.jsonl" for code in codes}
    expected |= {"query_translation/x-csqa/train_en.jsonl", "evaluation/xnli/test.json"}
    expected |= {"query_translation/xnli_dev.json"}
    assert files_in(data_root) == expected
    for task in ("math_mgsm", "x-csqa", "xnli"):
        for name in task_languages(task):
            assert len(examples(task, data_root, name)) == 2
    assert "math: MGSM             11 of 11 files" in done.stdout
    # What the hub lacks is said, with where to get it.
    assert "x-csqa: augmentation    1 of 16 files" in done.stdout
    assert "the translated ones are not there" in done.stdout and "math: augmentation      0 of  1 files" in done.stdout

    # A second run keeps every file, asks for nothing, and needs no source.
    test_file = data_root / "evaluation/xnli/test.json"
    test_file.write_text("mine")
    again = run_prepare("--data_root", data_root, "--hub_mirror", tmp_path / "absent")
    assert (again.returncode, test_file.read_text()) == (0, "mine")


def write_rows(path: Path, content: list[dict]) -> None:
    """Writes rows in the form that the file's name says."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(content)
    match path.suffix:
        case ".tsv":
            lines = [f"{row['question']}\t{row['answer_number']}\n" for row in content]
            path.write_text("".join(lines), encoding="utf-8")
        case ".csv":
            table.to_csv(path)
        case ".parquet":
            table.to_parquet(path)
        case _:
            table.to_json(path, force_ascii=False)


@pytest.fixture
def scripted_mirror(tmp_path, monkeypatch):
    """A clone of MGSM with a loading script, which would leave a trace, and no card."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mirror/juletxara/mgsm"
    folder.mkdir(parents=True)
    (folder / "mgsm.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    (folder / "README.md").write_text("---\nlanguage: [en]\n---\n# MGSM\n")
    yield folder
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "layout",
    [
        "mgsm_{}.tsv",
        "{}/test-00000-of-00001.parquet",
        "data/mgsm/{}_test.jsonl",
        "csv/{}/test.csv",
    ],
)
def test_a_clone_with_a_loading_script_is_read_by_its_files_and_the_script_never_run(tmp_path, scripted_mirror, layout):
    for name in task_languages("math_mgsm"):
        code = find_language(name).code
        write_rows(scripted_mirror / layout.format(code), rows("mgsm_en_test.jsonl"))
        if "test" in layout:  # few-shot examples, which are not a test set
            train = scripted_mirror / layout.format(code).replace("test", "train")
            write_rows(train, [{"question": "Train?", "answer_number": 1}])
    assert scripts_prepare_data.fetch(tmp_path / "datas", ["mgsm"], tmp_path / "mirror", False) == []
    for name in task_languages("math_mgsm"):
        read = examples("math_mgsm", tmp_path / "datas", name)
        assert [example.source for example in read] == [row["question"] for row in rows("mgsm_en_test.jsonl")]
        assert [example.target for example in read] == ["18", "3"]


def test_x_csqa_as_its_own_release_lays_it_out_is_read_from_a_clone(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mirror/INK-USC/xcsr"
    for name in task_languages("x-csqa"):
        code = find_language(name).code
        code = "jap" if code == "ja" else code
        for split in ("dev", "test", "train"):
            content = [row | {"id": f"{code}-{split}"} for row in rows("x_csqa_en_validation.jsonl")]
            write_rows(folder / f"X-CSR_datasets/X-CSQA/{code}/{split}.jsonl", content)
            write_rows(folder / f"X-CSR_datasets/X-CODAH/{code}/{split}.jsonl", content)
    (folder / "xcsr.py").write_text("raise SystemExit(1)\n")
    assert scripts_prepare_data.fetch(tmp_path / "datas", ["x-csqa"], tmp_path / "mirror", False) == []
    assert {example.question for example in examples("x-csqa", tmp_path / "datas", "Japanese")} == {"jap-dev"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file of .*mgsm is named for te and test"),
        ({"te/train.csv": "question,answer_number\n"}, "no file of .*mgsm is named for te and test"),
        ({"a/te.tsv": "q\t1\n", "b/te.tsv": "q\t2\n"}, "several files for te, test: a/te.tsv, b/te.tsv"),
        (
            {"te/test-00000-of-00001.parquet": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"},
            r"test-00000-of-00001\.parquet is a Git LFS pointer, not the data: run git lfs pull",
        ),
        ({"te/test.jsonl": '{"question": 7}\n'}, "no 'answer_number' among question"),
    ],
)
def test_a_clone_whose_files_do_not_tell_is_refused_in_one_line(scripted_mirror, tmp_path, files, message, capsys):
    for name, content in files.items():
        (scripted_mirror / name).parent.mkdir(parents=True, exist_ok=True)
        (scripted_mirror / name).write_text(content)
    assert scripts_prepare_data.fetch(tmp_path / "datas", ["mgsm"], tmp_path / "mirror", False) == ["mgsm"]
    line = capsys.readouterr().err.splitlines()[-1]  # behind bars of `datasets`
    assert re.search(f"failed   mgsm: .*{message}$", line), line


def test_a_hub_out_of_reach_is_one_line_per_data_set_and_no_file(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = run_prepare("--data_root", tmp_path / "datas", **offline)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    reported = [line for line in done.stderr.splitlines() if line.startswith(("failed", "error:"))]
    assert [line.split(":")[0].split()[-1] for line in reported] == ["mgsm", "x-csqa", "xnli", "error"]
    assert "--archive" in reported[-1] and not files_in(tmp_path / "datas")


def test_an_unknown_data_set_is_refused_with_the_list(tmp_path):
    done = run_prepare("--tasks", "mgsm,msvamp", "--data_root", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --tasks mgsm,msvamp: choose from mgsm, x-csqa, xnli, ")


# ---------------------------------------------------------------------------------------------------------------------
# Data preparation: the released archive


def task_languages(task: str) -> tuple[str, ...]:
    return find_task(task).evaluation_languages


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


RELEASED = {
    "datas/bilingual_pairs/en-sw/train_100k.sw": "Habari.\n",
    "datas/bilingual_pairs/en-sw/train_100k.en": "Hello.\n",
    "datas/query_translation/math.json": "[]",
    "datas/evaluation/msvamp/test_German.json": "{}\n",
    "datas/evaluation/x-csqa/jap/dev.jsonl": "{}\n",
    "datas/README.md": "not data",
    "__MACOSX/datas/evaluation/mgsm/._mgsm_en.tsv": "not data",
}
ARRANGED = {
    "bilingual_pairs/en-sw/train_100k.sw": "Habari.\n",
    "bilingual_pairs/en-sw/train_100k.en": "Hello.\n",
    "query_translation/math.json": "[]",
    "evaluation/msvamp/test_German.jsonl": "{}\n",
    "evaluation/x-csqa/ja/dev.jsonl": "{}\n",
}


def make_archive(folder: Path, kind: str, members: dict[str, str]) -> Path:
    path = folder / f"release.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in members.items():
                archive.writestr(name, text)
    elif kind == "tar.gz":
        with tarfile.open(path, "w:gz") as archive:
            for name, text in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))
    else:
        for name, text in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
    return path


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "folder"])
def test_the_released_archive_lands_in_the_data_root(tmp_path, kind):
    archive, data_root = make_archive(tmp_path, kind, RELEASED), tmp_path / "root"
    scripts_prepare_data.arrange(archive, data_root, overwrite=False)
    assert {name: (data_root / name).read_text() for name in files_in(data_root)} == ARRANGED


def test_files_that_exist_are_kept_unless_told_otherwise(tmp_path):
    archive, mine = make_archive(tmp_path, "zip", RELEASED), tmp_path / "root/query_translation/math.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    scripts_prepare_data.arrange(archive, tmp_path / "root", overwrite=False)
    assert mine.read_text() == "mine"
    scripts_prepare_data.arrange(archive, tmp_path / "root", overwrite=True)
    assert mine.read_text() == "[]"


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize(
    "name", ["datas/evaluation/../../../stolen", "/etc/evaluation/stolen", "..\\evaluation\\stolen", "C:/evaluation/x"]
)
def test_a_member_that_leads_out_is_refused_before_anything_is_written(tmp_path, kind, name):
    archive = make_archive(tmp_path, kind, RELEASED | {name: "bad"})
    before = files_in(tmp_path)
    with pytest.raises(UserError, match="leads out of the data folder"):
        scripts_prepare_data.arrange(archive, tmp_path / "root", overwrite=False)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_a_link_in_the_archive_is_refused(tmp_path, kind):
    name, path = "datas/evaluation/mgsm/mgsm_en.tsv", tmp_path / f"release.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    else:
        (path / name).parent.mkdir(parents=True)
        (path / name).symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="is a link or a device"):
        scripts_prepare_data.arrange(path, tmp_path / "root", overwrite=False)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("fault", ["cut", "flipped", "no archive", "no data", "absent", "pipe"])
def test_an_archive_that_cannot_be_used_is_one_line_and_leaves_no_partial_file(tmp_path, fault):
    path = make_archive(tmp_path, "zip", {"datas/query_translation/math.json": "x" * 100})
    content = path.read_bytes()
    if fault == "cut":
        path.write_bytes(content[:80])
    elif fault == "flipped":
        path.write_bytes(content.replace(b"x" * 100, b"x" * 99 + b"y"))
    elif fault == "no archive":
        path.write_text("<html>please log in</html>")
    elif fault == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif fault == "no data":
        path = make_archive(tmp_path, "folder", {"paper/main.tex": "x"})
    else:
        path = tmp_path / "absent.zip"
    done = run_prepare("--archive", path, "--data_root", tmp_path / "root")
    assert done.returncode == 2 and done.stderr.startswith("error: --archive") and done.stderr.count("\n") == 1
    assert not files_in(tmp_path / "root")


# ---------------------------------------------------------------------------------------------------------------------
# README


def page_text(page: Path) -> str:
    """Text of a page; of a notebook the same as a page, its cells as blocks, without lines for IPython alone."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        language = "bash" if source.startswith("%%bash\n") else "python"
        source = source.removeprefix("%%bash\n")
        if cell["cell_type"] == "code":
            source = "".join(line for line in source.splitlines(keepends=True) if not line.startswith(("%", "!")))
            source = f"```{language}\n{source}\n```"
        parts.append(source)
    return "\n\n".join(parts)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs").glob("*.ipynb"))
TEXTS = {page: page_text(page) for page in PAGES}
README = "\n".join(TEXTS.values())
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def readme_commands() -> list[str]:
    """Every command of the shell blocks, continuation lines joined, comments dropped."""
    shell = "\n".join(text for language, text in BLOCKS if language == "bash").replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in shell.splitlines() if line.strip() and not line.startswith("#")]


def test_readme_starts_with_quickstart_and_tests():
    assert readme_commands()[:2] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_bytes()) <= 11_000


def test_every_program_and_file_the_pages_name_exists():
    # Inside code, whatever looks like a file of this project.
    pattern = r"(?:mindmerger|scripts|tests|docs|\.ci)/[\w./-]*\w|requirements\.txt|(?<![\w/>])\w+\.py\b"
    named = set(re.findall(pattern, README))
    assert len(named) > 40
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    links = {
        page: re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text) for page, text in TEXTS.items()
    }
    assert "docs/architecture.svg" in links[ROOT / "README.md"]
    missing = [(page.name, link) for page, found in links.items() for link in found if "://" not in link]
    assert [
        (page, link) for page, link in missing if not any((p.parent / link).exists() for p in PAGES if p.name == page)
    ] == []


# Every program that a page may name, by what follows `python` or `deepspeed`, with the words that choose its parser.
PARSERS = {
    "run_training.py": ("mindmerger.training.flags", "build_parser"),
    "run_evaluation.py": ("mindmerger.evaluation.flags", "build_parser"),
    "mindmerger.baselines.layer_swap": ("mindmerger.baselines.layer_swap", "build_parser"),
    "scripts.start_mapping": ("scripts.start_mapping", "build_parser"),
    "mindmerger.baselines.layer_swap analyse": ("mindmerger.baselines.layer_swap", "build_analyse_parser"),
    "mindmerger.baselines.maet": ("mindmerger.baselines.maet", "build_parser"),
    "mindmerger.baselines.merge_adapter": ("mindmerger.baselines.merge_adapter", "build_parser"),
    "mindmerger.baselines.parallel_input": ("mindmerger.baselines.parallel_input", "build_parser"),
    "mindmerger.baselines.translate_test": ("mindmerger.baselines.translate_test", "build_parser"),
    "mindmerger.analysis.neurons count": ("mindmerger.analysis.neurons", "build_count_parser"),
    "mindmerger.analysis.neurons analyse": ("mindmerger.analysis.neurons", "build_analyse_parser"),
    "mindmerger.analysis.contamination": ("mindmerger.analysis.contamination", "build_parser"),
    "mindmerger.analysis.embeddings": ("mindmerger.analysis.embeddings", "build_parser"),
    "mindmerger.evaluation.comparison_table": ("mindmerger.evaluation.comparison_table", "build_parser"),
    "mindmerger.evaluation.bridge_table": ("mindmerger.evaluation.bridge_table", "build_parser"),
    "mindmerger.evaluation.upload": ("mindmerger.evaluation.upload", "build_parser"),
    "mindmerger.integrations.lm_eval": ("test_lm_eval", "build_parser"),
    "mindmerger.integrations.demo": ("mindmerger.integrations.demo", "build_parser"),
    "scripts.benchmarks.speed": ("scripts.benchmarks.speed", "build_parser"),
    "scripts.benchmarks.growth": ("scripts.benchmarks.growth", "build_parser"),
    "scripts.benchmarks.merge_memory": ("scripts.benchmarks.merge_memory", "build_parser"),
    "scripts.benchmarks.threads": ("scripts.benchmarks.threads", "build_parser"),
    "scripts.prepare_data": ("scripts.prepare_data", "build_parser"),
    "scripts.tune_llm": ("mindmerger.training.tuning_settings", "build_parser"),
    "scripts.tiny_world": ("scripts.tiny_world.__main__", "build_parser"),
}


def parser_named(program: str):
    """The parser of a program in `PARSERS`."""
    module, function = PARSERS[program]
    return getattr(importlib.import_module(module), function)()


def test_every_command_of_the_pages_parses(tmp_path, monkeypatch):
    """A flag that the program does not know would be the reader's first error message."""
    from deepspeed.launcher.runner import parse_args as parse_launcher

    monkeypatch.chdir(tmp_path)
    record = tmp_path / "outputs/MindMerger/math/mapping/args.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"arguments": {}}')
    for language, text in BLOCKS:  # files that the commands read are blocks whose first line is their name
        if language == "yaml":
            (tmp_path / text.split()[1]).write_text(text)
    checked = set()
    for command in readme_commands():
        words = shlex.split(command)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words[:1] == ["deepspeed"]:
            launcher = parse_launcher(words[1:])
            words = [launcher.user_script, *launcher.user_args]
        elif words[:2] == ["python", "-m"]:
            words = words[2:]
        elif words[:1] == ["python"]:
            words = words[1:]
        elif words[:1] == ["bash"]:
            assert (ROOT / words[1]).is_file(), command
            continue
        else:
            continue
        if words[0] == "pytest":
            continue
        program = " ".join(words[:2]) if " ".join(words[:2]) in PARSERS else words[0]
        assert program in PARSERS, command
        parser_named(program).parse_args(words[program.count(" ") + 1 :])
        checked.add(program)
    assert len(checked) >= 12, checked


def test_every_flag_the_pages_mention_exists():
    from deepspeed.launcher.runner import parse_args as parse_launcher

    known = {f"--{name}" for name in vars(parse_launcher(["x.py"]))}
    for program in PARSERS:
        known |= set(parser_named(program)._option_string_actions)
    own = re.sub(r"#SBATCH.*|`ruff[^`]*`", "", README)
    assert set(re.findall(r"(?<![\w-])--[a-z_]+(?![\w-])", own)) - known == set()


def test_settings_the_readme_puts_into_the_environment_are_flags_of_the_scripts():
    names = ("common.sh", "compare_all.sh", "compare_bridges.sh", "small_real_models.sh")
    common = "".join((ROOT / "scripts" / name).read_text() for name in names)
    flags = {name.upper() for name in vars(parser_named("run_training.py").parse_args([]))}
    flags |= {name.upper() for name in vars(parser_named("run_evaluation.py").parse_args([]))}
    for command in readme_commands():
        for name in re.findall(r"\b([A-Z][A-Z_]+)=", command.split(" bash ")[0] if " bash " in command else ""):
            bare = re.sub(r"^(MAPPING|AUGMENTATION)_(?=.)", "", name)
            assert bare in flags or bare in common, f"{name} in: {command}"


def test_readme_python_imports_only_what_exists():
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert blocks
    for text in blocks:
        for node in ast.walk(ast.parse(textwrap.dedent(text))):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_versions_of_the_package_agree():
    version = importlib.import_module("mindmerger").__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_links_to_data_and_outputs_elsewhere_are_ignored_by_git(tmp_path):
    """A pattern that ends in a slash matches folders alone: `git add .` took a link named datas along."""
    names = ("datas", "outputs", "results", "quickstart", ".venv")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for name in names:
        (tmp_path / name).symlink_to(tmp_path.parent)
    done = subprocess.run(["git", "status", "--short"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "?? .gitignore\n"


def test_the_package_asks_for_what_requirements_pin():
    """`pip install .` and the files of pins must not drift apart: each pin lies in the package's range."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = [Requirement(one) for one in project["dependencies"] + project["optional-dependencies"]["dev"]]
    ranges = {one.name.lower(): one.specifier for one in ranges}
    files = [ROOT / "requirements.txt", ROOT / "tests/requirements.txt"]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pins = [line.split("#")[0].split("==") for line in lines if "==" in line.split("#")[0]]
    assert ranges.keys() == {name.strip().lower() for name, _ in pins}
    assert [name for name, version in pins if not ranges[name.strip().lower()].contains(version.strip())] == []


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks


@pytest.mark.slow
def test_the_speed_benchmark_measures_every_part_with_the_programs_own_functions(run, tmp_path, datas):
    """Nothing ran it after the training loop had changed: it ended in a TypeError."""
    done = run(
        *(sys.executable, "-m", "scripts.benchmarks.speed", "--preset", "tiny", "--data_root", datas),
        *("--train_num", 20, "--global_batch", 8, "--micro_batch", 2, "--windows", 1, "--plain_micro_batches", 1),
        *("--questions", 3, "--max_new_tokens", 2, "--parts", "mapping,mapping_memory,hard"),
        *("--modes", "rows,states,plain", "--output", tmp_path / "report.json"),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    figures = report["mapping"]["ours, micro-batch 2"]
    assert figures["samples_per_s"] > 0 and 0 < figures["real_position_share"] <= 1 and figures["times_plain"] > 0
    assert report["mapping"]["ours, 2048 tokens, states kept"]["useful_tokens_per_s"] > 0
    assert (
        set(report["mapping_memory"]) == {"rows", "states", "plain"} and report["hard"]["ours"]["questions_per_s"] > 0
    )
    assert "| mapping | samples/s |" in done.stdout
    assert f"torch {report['versions']['torch']}" in done.stdout and report["machine"]["processor"] in done.stdout


@pytest.mark.slow
def test_the_speed_benchmark_runs_to_its_end_on_two_ranks(run, tmp_path, datas):
    """The processes that measure memory waited for ranks that nobody had started, by the launcher's variables."""
    done = run(
        *("--module", "scripts.benchmarks.speed", "--preset", "tiny", "--data_root", datas, "--train_num", 20),
        *("--global_batch", 8, "--micro_batch", 2, "--windows", 1, "--modes", "rows", "--parts"),
        *("mapping_memory,mapping", "--output", tmp_path / "report.json"),
        cwd=ROOT,
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["processes"] == 2 and report["mapping_memory"]["rows"] > 0
    assert report["mapping"]["ours, micro-batch 2"]["samples_per_s"] > 0


@pytest.mark.slow
def test_the_speed_benchmark_says_which_documented_figure_no_longer_holds(run, tmp_path, datas):
    done = run(
        *(sys.executable, "-m", "scripts.benchmarks.speed", "--check", "--preset", "tiny", "--data_root", datas),
        *("--train_num", 20, "--global_batch", 8, "--micro_batch", 2, "--windows", 1, "--parts", "mapping"),
        *("--output", tmp_path / "report.json"),
        cwd=ROOT,
    )
    times = json.loads((tmp_path / "report.json").read_text())["mapping"]["ours, 2048 tokens"]["times_plain"]
    holds = times >= 0.8 * 2.26
    assert f"| mapping, fp32 | 2.26 | {times:.2f} | {'holds' if holds else 'NO LONGER'} |" in done.stdout
    assert done.returncode == (0 if holds else 1), done.stderr


def test_the_figures_that_the_speed_benchmark_checks_are_those_of_the_documentation():
    from scripts.benchmarks.speed_check import CLAIMS, HOLDS_FROM, check

    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    for precision, claims in CLAIMS.items():
        for claim in claims:
            assert f"{claim.times:.2f} |" in page
            if claim.row is not None:
                assert re.search(rf"^\| {precision}, {claim.row} \| \d+ \| {claim.times} \|", page, re.MULTILINE)
        exact = {
            c.part: {"times_plain": HOLDS_FROM * c.times, c.row: {"times_plain": HOLDS_FROM * c.times}} for c in claims
        }
        assert check({"precision": precision, **exact}) == 0
        exact["hard"] = {"times_plain": HOLDS_FROM * claims[-1].times - 0.01}
        assert check({"precision": precision, **exact}) == 1


@pytest.mark.slow
def test_the_speed_benchmark_times_a_bridge_beside_mindmerger_in_one_run(run, tmp_path, datas):
    done = run(
        *(sys.executable, "-m", "scripts.benchmarks.speed", "--preset", "tiny", "--data_root", datas, "--bridge"),
        *("layalign,langbridge", "--train_num", 20, "--global_batch", 2, "--micro_batch", 2, "--windows", 1),
        *("--parts", "generation", "--questions", 3, "--max_new_tokens", 2),
        *("--output", tmp_path / "report.json"),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert "mapping" not in report and list(report["bridges"]) == ["mindmerger", "layalign", "langbridge"]
    base, other, _ = report["bridges"].values()
    assert base["target_tokens_per_s_relative"] == 1 and other["stage"] == "task"
    ratio = other["target_tokens_per_s"] / base["target_tokens_per_s"]
    assert other["target_tokens_per_s_relative"] == ratio > 0
    assert other["trained_parameters"] > base["trained_parameters"] > 0
    order = re.findall(r"^(?:.*\] )?(\w+) window (\d)", done.stderr + done.stdout, flags=re.MULTILINE)
    assert order == [(name, number) for number in "01" for name in report["bridges"]]
    assert f"| layalign | task | {other['trained_parameters']:,} |" in done.stdout
    # In fp32 both ways of generating give the same answers, also where the LLM attends to a memory.
    made = report["generation"]
    forms = dict(zip(report["bridges"], ("soft", "soft", "hard"), strict=True))
    assert {name: row["form"] for name, row in made.items()} == forms
    assert all(row["same_answers"] == 1 and row["ours"]["questions_per_s"] > 0 for row in made.values())
    assert f"| layalign | soft | {made['layalign']['ours']['questions_per_s']:.2f} |" in done.stdout


def test_the_speed_benchmark_refuses_an_unknown_bridge_and_times_no_other_part_beside_bridges():
    from scripts.benchmarks import speed

    with pytest.raises(UserError, match="unknown bridge 'layaling'.*did you mean layalign"):
        speed.parse(["--bridge", "mindmerger,layaling"])
    args = speed.parse(["--bridge", "xbridge, layalign", "--bridge", "xbridge"])
    assert (args.parts, args.bridge) == ([], ["mindmerger", "xbridge", "layalign"])
    assert speed.parse([]).parts == speed.PARTS.split(",") and speed.parse([]).bridge == []
    with pytest.raises(UserError, match="--parts generation times the bridges of --bridge, and none is given"):
        speed.parse(["--parts", "generation"])
