"""Runs `run_training.main` for every entry of a JSON file in one launch, and writes how each ended.

    many_runs.py RUNS.json OUTCOMES.json [--local_rank N]

An entry is a list of flags, or {"argv": flags, "fault": {...}} with a fault that strikes at the start of an optimizer
step (1-based "step", on "rank", default every rank): "signal" sends a real signal to this process; "nan" makes the
loss of that step not a number; "dev_nan" does that to the dev loss after that step; "infinite_gradient" leaves the
loss of that step as it is but not its gradient; "memory" makes memory run out: in the first "forward" pass, in the
first one without gradients ("dev"), in the first "update", or while the model is put on its device ("placing").
Importing torch and DeepSpeed costs seconds; this pays it once for many short runs.
"""

import contextlib
import gc
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch

import run_training
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime import command, errors, processes


@contextlib.contextmanager
def fault_injected(fault):
    """Context manager: runs meet the fault."""
    step_function, forward, clip = run_training.train_step, MindMerger.forward, torch.nn.utils.clip_grad_norm_
    state = {"step": 0}

    def here():
        return "rank" not in fault or fault["rank"] == processes.rank()

    def train_step(run, step, batch):
        state["step"] = step + 1
        if "signal" in fault and fault["step"] == state["step"] and here():
            os.kill(os.getpid(), getattr(signal, fault["signal"]))
            time.sleep(0.3)  # the listening thread hears it; the step then continues
        return step_function(run, step, batch)

    def damaged_forward(self, *arguments, **named):
        if fault.get("memory") == "forward" or fault.get("memory") == "dev" and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory, as a test has it")
        out = forward(self, *arguments, **named)
        if fault.get("nan") and fault["step"] == state["step"] and here():
            out.loss_sum = out.loss_sum * float("nan")
        if fault.get("dev_nan") and fault["step"] == state["step"] and here() and not torch.is_grad_enabled():
            out.loss_sum = out.loss_sum * float("nan")
        if fault.get("infinite_gradient") and fault["step"] == state["step"] and here() and out.loss_sum.requires_grad:
            out.loss_sum.register_hook(lambda gradient: gradient * math.inf)
        return out

    def damaged_clipping(*arguments, **named):
        if fault.get("memory") == "update":
            raise torch.OutOfMemoryError("out of memory, as a test has it")
        return clip(*arguments, **named)

    def damaged_placing(self, *arguments, **named):
        if fault.get("memory") == "placing" and isinstance(self, MindMerger):
            raise torch.OutOfMemoryError("out of memory, as a test has it")
        return to(self, *arguments, **named)

    to, torch.nn.Module.to = torch.nn.Module.to, damaged_placing
    run_training.train_step, MindMerger.forward = train_step, damaged_forward
    torch.nn.utils.clip_grad_norm_ = damaged_clipping
    try:
        yield
    finally:
        run_training.train_step, MindMerger.forward = step_function, forward
        torch.nn.utils.clip_grad_norm_ = clip
        torch.nn.Module.to = to


def outcome(argv, fault):
    """How one run ended, with what it printed."""
    printed, error, code = io.StringIO(), None, None
    with contextlib.redirect_stderr(printed), fault_injected(fault):
        try:
            code = run_training.main(argv)
        except errors.UserError as caught:
            error, code = str(caught), 2
            print(f"error: {error}", file=sys.stderr)  # as run_main does, while the run's frames are still there
        except SystemExit as caught:
            code = caught.code
    thresholds = gc.get_threshold()
    return {"argv": argv, "code": code, "error": error, "printed": printed.getvalue(), "thresholds": thresholds}


def main():
    """Runs all of them; an error of ours ends the process with its traceback."""
    runs_file, outcomes_file = [a for a in sys.argv[1:] if not a.startswith("--local_rank")][:2]
    entries = [e if isinstance(e, dict) else {"argv": e} for e in json.loads(Path(runs_file).read_text())]
    outcomes = [outcome(entry["argv"], entry.get("fault", {})) for entry in entries]
    if processes.is_main():
        Path(outcomes_file).write_text(json.dumps(outcomes))
    return 0


if __name__ == "__main__":
    command.run_main(main)
