"""Runs `run_training.main` for every list of flags in a JSON file, and writes where a GPU would have been waited for.

    waits.py RUNS.json OUTCOMES.json

Without a GPU nothing waits, but what would wait can be seen: a number read off a tensor, an operation whose result is
as long as its values say, a copy to the host, DeepSpeed's accelerator asked to finish. They are counted in the thread
that trains, apart for the passes of a step, its update and the dev loss, each by the place that asked for it. What the
collating threads do waits for no GPU and is not seen. Neither is torch's optimizer, which on a GPU is a fused one.
"""

import collections
import contextlib
import json
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import run_training
from mindmerger.runtime import command

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}
READS |= {"aten::is_nonzero", "aten::unique_consecutive", "aten::allclose", "aten::bincount", "aten::repeat_interleave"}
PHASES = {"train_step": "passes", "apply_gradient": "update", "dev_loss": "dev loss"}
phase, found = [None], collections.Counter()


def note(what):
    """Counts one wait of the phase that the run is in."""
    frames = traceback.extract_stack()[:-2]
    if phase[0] is not None and not any("torch/optim/" in frame.filename for frame in frames):
        frames = [frame for frame in frames if "/torch/" not in frame.filename and frame.filename != __file__]
        places = [f"{Path(frame.filename).name} {frame.name}" for frame in frames[-2:]]
        found[phase[0], f"{what} in {' > '.join(places)}"] += 1


class Reads(TorchDispatchMode):
    """Notes operations that read values on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        indices = args[1] if name in ("aten::index", "aten::index_put", "aten::index_put_") else ()
        # An index that is a mask is turned into numbers, as many as it has ones.
        if name in READS or any(one is not None and one.dtype == torch.bool for one in indices):
            note(name)
        return func(*args, **kwargs or {})


def noted(owner, name, unless=lambda *_: False):
    """Lets a method note each call, unless its arguments make it one that waits for nothing."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        if not unless(*args):
            note(name)
        return method(*args, **kwargs)

    setattr(owner, name, call)


def copied():
    """Lets copies to the host note themselves, and be known as such: to read those waits for nothing more."""
    copy = torch.Tensor.cpu

    def call(tensor):
        note("cpu")
        result = copy(tensor)
        result.on_host = True
        return result

    torch.Tensor.cpu = call


def in_phase(name):
    """Makes a function of run_training a phase of its own."""
    function = getattr(run_training, name)

    def call(*args, **kwargs):
        before, phase[0] = phase[0], PHASES[name]
        found[phase[0], "times"] += 1
        try:
            # A phase within another one has the other one's mode already.
            with Reads() if before is None else contextlib.nullcontext():
                return function(*args, **kwargs)
        finally:
            phase[0] = before

    setattr(run_training, name, call)


def main():
    """Runs all of them."""
    copied()
    for method in ("tolist", "numpy"):
        noted(torch.Tensor, method, unless=lambda tensor, *_: hasattr(tensor, "on_host"))
    noted(get_accelerator(), "synchronize")
    for name in PHASES:
        in_phase(name)
    outcomes = []
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        found.clear()
        code = run_training.main(argv)
        counts = {name: {place: n for (where, place), n in found.items() if where == name} for name in PHASES.values()}
        outcomes.append({"code": code, **counts})
    Path(sys.argv[2]).write_text(json.dumps(outcomes))
    return 0


if __name__ == "__main__":
    command.run_main(main)
