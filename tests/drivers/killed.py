"""Runs `run_training.main` and kills itself with SIGKILL at a named point.

    killed.py POINT flags…

POINT is `load_data:R` (rank R, while the data loads), `train_step:N` (at the start of that optimizer step) or
`write_checkpoint:N:os.CALL:M` (at the M-th call of `os.CALL` inside the N-th checkpoint this process writes).
"""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import run_training
from mindmerger.runtime import command, processes
from mindmerger.training import checkpoints, outputs


def kill():
    """Ends this process at once, as a failing node would."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point):
    """Sets the trap."""
    name, number, *inside = point.split(":")
    if name == "train_step":
        original_step = run_training.train_step

        def train_step(run, step, batch):
            if step + 1 == int(number):
                kill()
            return original_step(run, step, batch)

        run_training.train_step = train_step
        return
    if name == "load_data":
        original_load = run_training.load_data

        def load_data(*arguments):
            if processes.rank() == int(number):
                kill()
            return original_load(*arguments)

        run_training.load_data = load_data
        return
    original_write, written = checkpoints.write_checkpoint, [0]
    call_name, limit = inside[0].removeprefix("os."), int(inside[1])
    original_call, calls = getattr(os, call_name), [0]

    def call(*arguments, **named):
        calls[0] += 1
        if written[0] == int(number) and calls[0] == limit:
            kill()
        return original_call(*arguments, **named)

    def write_checkpoint(*arguments):
        written[0] += 1
        calls[0] = 0
        setattr(os, call_name, call)
        try:
            return original_write(*arguments)
        finally:
            setattr(os, call_name, original_call)

    outputs.write_checkpoint = write_checkpoint


if __name__ == "__main__":
    flags = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    arm(flags[0])
    command.run_main(lambda: run_training.main(flags[1:]))
