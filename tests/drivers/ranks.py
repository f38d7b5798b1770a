"""Runs scenarios of two ranks each and writes how every rank ended.

    ranks.py SCENARIOS.json OUTCOMES.json

A scenario is {"name", "runs": [{"program": "training" or "evaluation", "argv": flags}, …]} and, when wanted,
"fault": {"at", "rank", "step"}: what fails on that rank (see `arm`);
"waits": [{"at", "rank", "seconds"}, …]: that rank is slow there;
"folders": [a working folder for each rank]; "settings": {constant of the runtime: value}; "timeout_s": the libraries';
"alone": the environment of a single process in place of two ranks'.
Importing torch and DeepSpeed costs seconds; this pays it once: each rank is a fork of this process, which has no
threads.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import torch
from conftest import free_port
from torch.distributed import distributed_c10d

import run_evaluation
import run_training
from mindmerger.data import training_set
from mindmerger.model import mindmerger, towers
from mindmerger.runtime import command, processes, watch
from mindmerger.runtime import errors as runtime_errors
from mindmerger.training import outputs

PROGRAMS = {"training": run_training.main, "evaluation": run_evaluation.main}
LIMIT_S = 60


def fail_at(owner, name, rank, error, when=lambda *_: True):
    """Makes a function raise on one rank."""
    original = getattr(owner, name)

    def failing(*arguments, **named):
        if processes.rank() == rank and when(*arguments):
            raise error
        return original(*arguments, **named)

    setattr(owner, name, failing)


def arm(fault):
    """Sets the trap."""
    at, rank, step = fault["at"], fault["rank"], fault.get("step", 0)
    no_memory = torch.OutOfMemoryError("out of memory, as a test has it")
    message = runtime_errors.UserError("a mistake of one rank, as a test has it")
    forward = (mindmerger.MindMerger, "forward", rank)
    reached = [0]

    def count_steps(run, step, batch):
        reached[0] = step + 1
        return train_step(run, step, batch)

    train_step, run_training.train_step = run_training.train_step, count_steps
    if at == "probe":
        fail_at(*forward, no_memory)
    elif at == "step":
        fail_at(*forward, no_memory, lambda *_: reached[0] == step)
    elif at == "fault in a step":
        fail_at(*forward, ValueError("a fault of ours, as a test has it"), lambda *_: reached[0] == step)
    elif at == "load":
        fail_at(towers, "load_encoder", rank, message)
    elif at == "checkpoint":
        fail_at(outputs, "write_checkpoint", rank, message)
    elif at == "arguments":
        fail_at(run_training, "settle", rank, message)
    elif at == "generate":
        fail_at(mindmerger.MindMerger, "generate", rank, no_memory)
    elif at == "fault in generate":
        fail_at(mindmerger.MindMerger, "generate", rank, ValueError("a fault of ours, as a test has it"))
    else:
        raise AssertionError(at)


def be_slow(wait):
    """Makes one rank wait."""
    places = {"tokenising": (training_set, "open_or_build"), "reading": (run_evaluation, "settle")}
    places["generating"] = (mindmerger.MindMerger, "generate")
    owner, name = places[wait["at"]]
    original = getattr(owner, name)

    def slow(*arguments, **named):
        if processes.rank() == wait["rank"]:
            time.sleep(wait["seconds"])
        return original(*arguments, **named)

    setattr(owner, name, slow)


def be_rank(number, port, scenario, folder):
    """Becomes one rank of a scenario; never returns."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(scenario.get("alone") or {name: str(value) for name, value in place.items()})
    if "folders" in scenario:
        os.environ["LOCAL_RANK"] = "0"  # as on nodes of one process each
        os.chdir(scenario["folders"][number])
    for name, value in scenario.get("settings", {}).items():
        for module in (processes, watch):
            if hasattr(module, name):
                setattr(module, name, value)
    if "timeout_s" in scenario:
        short = timedelta(seconds=scenario["timeout_s"])
        distributed_c10d._get_default_timeout = lambda backend: short
    if "fault" in scenario:
        arm(scenario["fault"])
    for wait in scenario.get("waits", []):
        be_slow(wait)
    command.run_main(lambda: max(PROGRAMS[run["program"]](run["argv"]) for run in scenario["runs"]))


def outcome(scenario, folder):
    """How the ranks of one scenario ended: exit codes by rank (None: it had to be killed), output, and seconds."""
    folder.mkdir(parents=True)
    numbers = range(1 if "alone" in scenario else 2)
    port, pids, codes, started = free_port(), [], [None for _ in numbers], time.monotonic()
    for number in numbers:
        if (pid := os.fork()) == 0:
            try:
                be_rank(number, port, scenario, folder)
            finally:
                sys.stderr.flush()
                os._exit(sys.exc_info()[1].code if isinstance(sys.exc_info()[1], SystemExit) else 99)
        pids.append(pid)
    while None in codes and time.monotonic() - started < LIMIT_S:
        time.sleep(0.05)
        for number in numbers:
            if codes[number] is None and (ended := os.waitpid(pids[number], os.WNOHANG))[0]:
                codes[number] = os.waitstatus_to_exitcode(ended[1])
    for number in numbers:
        if codes[number] is None:
            os.kill(pids[number], signal.SIGKILL)
            os.waitpid(pids[number], 0)
    errors = [(folder / f"{number}.err").read_bytes().decode(errors="replace") for number in numbers]
    return {"codes": codes, "seconds": time.monotonic() - started, "err": errors}


def run_all(scenarios, file):
    """Runs scenarios and writes their outcomes to a file."""
    file.write_text(json.dumps({one["name"]: outcome(one, file.parent / one["name"]) for one in scenarios}))


def main():
    """Runs all scenarios; those that mostly wait, beside the others."""
    scenarios, outcomes = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    outcomes.parent.mkdir(parents=True, exist_ok=True)
    waiting = [one for one in scenarios if "timeout_s" in one]
    if (pid := os.fork()) == 0:
        run_all(waiting, outcomes.with_name("waiting.json"))
        os._exit(0)
    run_all([one for one in scenarios if one not in waiting], outcomes)
    assert os.waitpid(pid, 0)[1] == 0
    both = [json.loads(file.read_text()) for file in (outcomes, outcomes.with_name("waiting.json"))]
    outcomes.write_text(json.dumps(both[0] | both[1]))


if __name__ == "__main__":
    main()
