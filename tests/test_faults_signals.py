"""Signals, vanished launchers, dead ranks and second runs, with real processes under the real launcher."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment, free_port
from safetensors.torch import load_file

from mindmerger.training.checkpoints import list_checkpoints, newest_valid

pytestmark = pytest.mark.slow


def processes(mark):
    """Pids of all living processes whose command line holds `mark`, launcher first."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if mark in command and state != "Z":
                found.append((int(entry.name), command))
    return sorted(found)


class Launched:
    """A command of two ranks that would run for very long, under the real launcher."""

    def __init__(self, tmp_path, program, flags, name):
        self.name, self.folder = name, tmp_path / "outputs" / name / "math/mapping"
        launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
        command = [sys.executable, launcher, "--num_gpus", "2", "--master_port", str(free_port()), str(ROOT / program)]
        self.errors = tmp_path / f"{name}.err"
        with open(self.errors, "a") as errors:
            self.process = subprocess.Popen(
                [*command, *flags, "--save_name", name],
                cwd=tmp_path,
                env=clean_environment(tmp_path),
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def wait_for_steps(self, number=3):
        """Waits until the log shows so many steps of this run."""
        self.wait(lambda: (self.folder / "log.jsonl").is_file() and self.lines() >= number, "steps in the log", 120)

    def lines(self):
        """How many lines the log has."""
        return (self.folder / "log.jsonl").read_text().count("\n")

    def last_step(self):
        """The last step in the log; its lines are more than its steps, since evaluations have lines too."""
        return json.loads((self.folder / "log.jsonl").read_text().rsplit("\n", 2)[-2])["step"]

    def wait(self, condition, what, seconds):
        """Waits for a condition; fails with the run's errors otherwise."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} after {seconds} s: {self.errors.read_text()[-3000:]}"
            time.sleep(0.1)

    def ranks(self):
        """Pids of the training processes, in rank order."""
        commands = {pid: command for pid, command in processes(self.name) if "--local_rank=" in command}
        return sorted(commands, key=lambda pid: commands[pid].split("--local_rank=")[1][:1])

    def node_launcher(self):
        """Pid of DeepSpeed's per-node launcher."""
        return next(pid for pid, command in processes(self.name) if "deepspeed.launcher.launch" in command)

    def end(self, seconds=60):
        """Waits until no process of the run is left."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.wait(lambda: not processes(self.name), "end of all processes", seconds)
        return self.process.returncode

    def kill(self):
        """Ends whatever is left, so that a failed test disturbs no other."""
        for pid, _ in processes(self.name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    """Starts commands and ends them whatever happens."""
    started = []

    def call(*command):
        started.append(Launched(tmp_path, *command))
        return started[-1]

    yield call
    for one in started:
        one.kill()


@pytest.fixture
def launch(start, flags):
    """Starts long trainings."""
    long = [*flags, "--epoch_num", "100000", "--eval_steps", "100000", "--logging_steps", "1"]
    return lambda name: start("run_training.py", long, name)


def assert_checkpoint_of_the_last_step(training):
    """The newest checkpoint is valid and no logged step lies after it."""
    folder, skipped = newest_valid(training.folder)
    assert skipped == []
    last = int((training.folder / "log.jsonl").read_text().splitlines()[-1].split('"step": ')[1].split(",")[0])
    assert folder is not None and folder.name == f"checkpoint-{last:06d}"
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigusr1_writes_a_checkpoint_and_continues_then_a_stop_on_one_rank_ends_all_with_one(launch, number, code):
    training = launch(f"usr1-{number.name}")
    training.wait_for_steps()
    os.kill(training.ranks()[1], signal.SIGUSR1)
    training.wait(lambda: list_checkpoints(training.folder), "checkpoint after SIGUSR1", 30)
    lines = training.lines()
    training.wait(lambda: training.lines() > lines + 2, "further steps", 30)
    first = list_checkpoints(training.folder)[0]
    started = time.monotonic()
    os.kill(training.ranks()[1], number)
    assert training.end() == code, training.errors.read_text()[-4000:]
    assert time.monotonic() - started < 40
    assert assert_checkpoint_of_the_last_step(training).name > first.name
    errors = training.errors.read_text()
    assert f"rank 1: signal {number.name}" in errors and "ended by a signal" in errors


SLOW_DISK = """
import os, signal, sys, time
from mindmerger.runtime import files
from mindmerger.training import checkpoints
from mindmerger.runtime import signals
import run_training
from mindmerger.runtime import command

signals.STALL_LIMIT_S = 2.0
sync, train_step = files.sync_folder, run_training.train_step

def slow(path):
    time.sleep(3)
    sync(path)

def stopped(run, step, batch):
    if step == 2:
        checkpoints.sync_folder = slow
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    return train_step(run, step, batch)

run_training.train_step = stopped
command.run_main(lambda: run_training.main(sys.argv[1:]))
"""


def test_a_checkpoint_on_a_slow_disk_is_written_to_its_end_after_a_stop(run, flags, tmp_path):
    """The watchdog that ends a rank whose peers are gone once struck in the middle of the write."""
    done = run(
        sys.executable, "-c", SLOW_DISK, *flags, "--save_name", "slow", env={"PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert done.returncode == 143, done.stderr[-2000:]
    assert "ended by a signal at step 3" in done.stderr and "no progress" not in done.stderr
    folder, skipped = newest_valid(tmp_path / "outputs/slow/math/mapping")
    assert folder.name == "checkpoint-000003" and skipped == []
    assert not list(folder.parent.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_of_the_process_group_ends_all_with_a_checkpoint(launch, number):
    training = launch(f"group-{number.name}")
    training.wait_for_steps()
    os.killpg(training.process.pid, number)
    training.end()
    assert_checkpoint_of_the_last_step(training)


@pytest.mark.parametrize(
    ("who", "number"), [("runner", signal.SIGKILL), ("runner", signal.SIGTERM), ("node", signal.SIGKILL)]
)
def test_ranks_whose_launcher_is_gone_write_a_checkpoint_and_end(launch, who, number):
    """The runner passes no signal on; the per-node launcher, killed, leaves its ranks behind."""
    training = launch(f"gone-{who}-{number.name}")
    training.wait_for_steps()
    os.kill(training.process.pid if who == "runner" else training.node_launcher(), number)
    training.end()
    assert_checkpoint_of_the_last_step(training)


def test_ranks_whose_launcher_is_killed_while_they_load_end(launch):
    """Once they trained on with nobody to end them: the watch began with the first step."""
    training = launch("gone-loading")
    training.wait(lambda: len(training.ranks()) == 2, "ranks", 60)
    maps = [Path(f"/proc/{pid}/maps") for pid in training.ranks()]
    training.wait(lambda: all("libtorch" in one.read_text() for one in maps), "import of torch", 60)
    for pid in (training.process.pid, training.node_launcher()):
        os.kill(pid, signal.SIGKILL)
    training.end(15)
    assert "the launcher is gone" in training.errors.read_text()
    assert not (training.folder / "log.jsonl").exists()


@pytest.mark.parametrize("who", ["runner", "both"])
def test_an_evaluation_whose_launcher_is_killed_ends_and_resumes_when_started_again(
    start, run, tmp_path, tiny_llm, datas, who
):
    """Its ranks once generated on, kept the folder locked, and could write into the next run's."""
    flags = ["--task", "math_msvamp", "--llm_only", "--llm_path", tiny_llm, "--data_root", datas]
    flags += ["--eval_batch_size", "1", "--max_new_tokens", "100", "--precision", "fp32"]
    name = f"evaluation-{who}"
    evaluation = start("run_evaluation.py", flags, name)
    folder = tmp_path / "results" / name / "math_msvamp-llm_only"
    shard = folder / ".partial/rank1.jsonl"
    evaluation.wait(lambda: shard.is_file() and shard.stat().st_size, "answers", 120)
    for pid in [evaluation.process.pid] + [evaluation.node_launcher()] * (who == "both"):
        os.kill(pid, signal.SIGKILL)
    evaluation.end(15)
    assert not (folder / "results.json").exists(), "the evaluation was over before its launcher was killed"
    assert "the launcher is gone" in evaluation.errors.read_text()
    again = run(ROOT / "run_evaluation.py", *flags, "--save_name", name)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "continuing: " in again.stderr and sorted(entry.name for entry in folder.iterdir()) == [
        *("predictions", "results.json", "scores.tsv")
    ]


def test_a_second_run_into_the_same_folder_is_refused_naming_host_and_process(launch, run, flags):
    training = launch("locked")
    training.wait_for_steps()
    second = run(ROOT / "run_training.py", *flags, "--save_name", "locked")
    assert second.returncode == 2, second.stderr[-2000:]
    message = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and f'"pid": {training.ranks()[0]}' in message[0] and "host" in message[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_other_and_the_same_command_takes_the_lock_over_and_resumes(launch, rank):
    training = launch(f"dead-{rank}")
    training.wait_for_steps()
    os.kill(training.ranks()[0], signal.SIGUSR1)
    training.wait(lambda: list_checkpoints(training.folder), "checkpoint", 30)
    os.kill(training.ranks()[rank], signal.SIGKILL)
    started = time.monotonic()
    assert training.end() != 0
    assert time.monotonic() - started < 60
    errors = training.errors.read_text()
    assert "lost contact with another rank" in errors or "another rank must be gone" in errors, errors[-3000:]
    log = training.folder / "log.jsonl"
    before = log.stat().st_ino
    again = launch(f"dead-{rank}")
    # The resumed run replaces the log by its part up to the checkpoint before it continues.
    again.wait(lambda: log.stat().st_ino != before, "log cut back", 90)
    assert "resumes from" in again.errors.read_text()
    step = int(list_checkpoints(again.folder)[0].name[-6:])
    again.wait(lambda: again.last_step() > step + 2, "steps after the resume", 60)
    os.kill(again.ranks()[0], signal.SIGTERM)
    assert again.end() == 143, again.errors.read_text()[-4000:]
    load_file(assert_checkpoint_of_the_last_step(again) / "training.safetensors")


def test_a_rank_that_dies_while_the_data_loads_ends_the_others_with_a_message(run, flags):
    """Before the training itself the others left a traceback or nothing."""
    started = time.monotonic()
    done = run(ROOT / "tests/drivers/killed.py", "load_data:1", *flags, ranks=2)
    assert done.returncode != 0 and time.monotonic() - started < 60
    assert "error: rank 0: lost contact with another rank" in done.stderr, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
