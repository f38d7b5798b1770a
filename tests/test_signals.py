"""The launcher watch, the watchdog, ignored signals, the lock on a folder, the table of faults in the docs."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

from mindmerger.runtime import files, signals
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import FolderLock

# A stand-in for DeepSpeed's node launcher: the file's name makes its command line look like it.
LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(rank.pid, flush=True)
time.sleep(60)
"""
# A rank with the processes that tokenising starts: two workers, the manager of their queue, the resource tracker.
WATCHED = """
import time
import multiprocess
from mindmerger.runtime import signals

signals.watch_launcher()
multiprocess.set_start_method("spawn", force=True)
pool = multiprocess.Pool(2)
manager = pool._ctx.Manager()
pool.map(abs, [1, 2])
print("started", flush=True)
time.sleep(60)
"""


def is_running(pid):
    """Whether the process lives, zombies aside."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid):
    """Pids of a process's children, whichever of its threads started them."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def orphaned(tmp_path, environment):
    """Pids of a process that watches its launcher, and of its children, after that launcher was killed."""
    launcher = tmp_path / "deepspeed.launcher.launch.py"
    launcher.write_text(LAUNCHER)
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(launcher), WATCHED],
            env=clean_environment() | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    pids = [int(process.stdout.readline())]
    assert process.stdout.readline() == "started\n"
    pids += children(pids[0])
    assert len(pids) == 5, pids
    process.kill()
    process.wait()
    process.stdout.close()
    return pids


def test_a_rank_whose_launcher_is_killed_before_anything_is_loaded_ends_with_its_children_and_says_why(tmp_path):
    """Once the watch came with the training loop only, and ranks that were loading models stayed behind for ever."""
    pids = orphaned(tmp_path, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "CROSS_RANK": "0"})
    wait_for_end(pids)
    assert "rank 1: the launcher is gone" in (tmp_path / "errors").read_text()


def wait_for_end(pids, seconds=10):
    """Fails unless all processes end in time."""
    end = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < end, f"{[pid for pid in pids if is_running(pid)]} still run after {seconds} s"
        time.sleep(0.05)


# Training as from the command line, but with processes for a few rows already.
TOKENISING = """
import runpy, sys
from mindmerger.data import training_set
training_set.ROWS_PER_PROCESS = 10
training_set._cpus = lambda: 2
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_processes_that_tokenise_do_not_outlive_a_rank_that_is_killed(tmp_path, flags):
    """The manager of their queue and the resource tracker stayed for ever."""
    rank = subprocess.Popen(
        [sys.executable, "-c", TOKENISING, str(ROOT / "run_training.py"), *flags],
        cwd=tmp_path,
        env=clean_environment() | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    end = time.monotonic() + 60
    while len(pids := children(rank.pid)) < 4:  # two workers, the manager, the resource tracker
        assert time.monotonic() < end and rank.poll() is None
        time.sleep(0.02)
    rank.kill()
    rank.wait()
    wait_for_end(pids, 20)


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, {"LOCAL_RANK": "x"}]
)
def test_a_run_without_a_launcher_outlives_the_shell_that_started_it(tmp_path, environment):
    """nohup python run_training.py &, also where a cluster sets some variables in every shell."""
    pids = orphaned(tmp_path, environment)
    time.sleep(4 * signals.POLL_S)
    assert all(map(is_running, pids))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_a_launcher_that_was_gone_before_the_first_look_is_gone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    watch = signals.LauncherWatch()
    watch.hand_over()
    assert not watch.is_gone()  # in a container the launcher may be process 1
    monkeypatch.setenv("CROSS_RANK", "0")  # but DeepSpeed's is known by its command line
    watch = signals.LauncherWatch()
    watch.hand_over()
    assert watch.is_gone()


def with_signals(code, limit=20.0):
    """Runs code in a process that listens, with a watchdog of so many seconds."""
    head = f"import os, signal, time, mindmerger.runtime.signals as i; i.STALL_LIMIT_S = {limit}; s = i.Signals()\n"
    return subprocess.run(
        [sys.executable, "-c", head + code],
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_watchdog_lets_a_slow_write_end_and_then_ends_what_hangs():
    slow = "with s.saving(): time.sleep(2); print('written', flush=True)\ntime.sleep(30)"
    done = with_signals(f"os.kill(os.getpid(), signal.SIGTERM)\n{slow}", limit=0.5)
    assert done.stdout == "written\n" and done.returncode == 143, done.stderr
    assert "no progress for 0 s after signal SIGTERM" in done.stderr


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stop_says_its_reason_and_leaves_its_code(number, code):
    wait = "while not s.stop_code: time.sleep(0.01)"
    done = with_signals(f"os.kill(os.getpid(), signal.{number})\n{wait}\ns.close()\nraise SystemExit(s.stop_code)")
    assert done.returncode == code
    assert done.stderr == f"rank 0: signal {number}: ending after this step, with a checkpoint\n"


def test_sigusr1_after_the_end_of_a_run_does_not_kill_it():
    done = with_signals("s.close(); os.kill(os.getpid(), signal.SIGUSR1); print('alive')")
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    with pytest.raises(UserError, match=r"cannot lock .*/\.lock: No locks available: use a folder on a file system"):
        FolderLock(tmp_path)


def test_every_row_of_what_it_survives_names_tests_that_exist():
    section = (ROOT / "docs/fault_tolerance.md").read_text(encoding="utf-8").split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1])
        assert names, row
        for name in names:
            assert f"def {name}(" in tests, name
