"""Leaving a process group, and the lock on a folder."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, free_port

import interrupt_utils

PROGRAM = """
import sys, time
import runtime_utils

def main():
    runtime_utils.init_distributed()
    runtime_utils.together(lambda: None)
    if runtime_utils.rank() == int(sys.argv[1]):
        time.sleep(3)
    print(time.time(), flush=True)
    return 7

runtime_utils.run_main(main)
"""


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_no_rank_leaves_before_the_slowest_has_finished_its_last_collective(slow_rank):
    """A rank that closed its connections early could break the last collective on a slower one."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(slow_rank)],
            env={**os.environ, **place, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ends = [0.0, 0.0]
    while any(process.poll() is None for process in ranks):
        for number, process in enumerate(ranks):
            if process.poll() is None:
                ends[number] = time.time()
        time.sleep(0.01)
    printed = [float(process.communicate()[0]) for process in ranks]
    assert [process.returncode for process in ranks] == [7, 7]
    assert ends[1 - slow_rank] >= printed[slow_rank], "the quick rank was gone before the slow one was through"


def test_a_lock_file_removed_while_it_was_being_locked_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """The run that held the folder removes the file when it ends, maybe after the next run has opened it."""
    lockf, calls = interrupt_utils.fcntl.lockf, []

    def lock_late(file, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return lockf(file, how)

    monkeypatch.setattr(interrupt_utils.fcntl, "lockf", lock_late)
    lock = interrupt_utils.FolderLock(tmp_path)
    assert len(calls) == 2 and str(os.getpid()) in (tmp_path / ".lock").read_text()
    lock.release()
    assert not (tmp_path / ".lock").exists()
