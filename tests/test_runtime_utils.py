"""Leaving a process group."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, free_port

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
