"""Runs `run_training.main` for every entry of a JSON file in one launch, as many_runs.py does, and notes how often each
loaded an encoder.

    cached.py RUNS.json OUTCOMES.json

An entry is {"argv": flags, "cache": the folder of tokenised data and states}, and when wanted "tokens", the positions
of a pass of the encoder, "fault" as many_runs.py has it, and "at": what happens in the pass, at "batch" (from 1) of the
rank's share, on "rank" (default every rank): "signal" sends that signal to this process, "memory" runs out, "full" lets
another program fill the disk.
"""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets
import many_runs
import torch

from mindmerger.model import encoding, towers
from mindmerger.runtime import command, processes
from mindmerger.training import encoder_cache


def struck(at, cache):
    """The encoder's pass that meets what is to happen."""
    run_encoder, passes = encoding.run_encoder, [0]

    def call(*arguments):
        passes[0] += 1
        if passes[0] == at["batch"] and at.get("rank") in (None, processes.rank()):
            if "signal" in at:
                os.kill(os.getpid(), getattr(signal, at["signal"]))
            elif "memory" in at:
                raise torch.OutOfMemoryError("out of memory, as a test has it")
            elif "full" in at:
                fill(cache)
        return run_encoder(*arguments)

    return call


def fill(cache):
    """Takes all the room that a disk has left."""
    with open(cache / "another program's", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


def outcome(entry):
    """How one run ended."""
    cache, at, calls = Path(entry["cache"]), entry.get("at", {"batch": 0}), []
    load = towers.load_encoder

    def load_encoder(*arguments):
        calls.append(arguments)
        return load(*arguments)

    # Read from the environment when datasets is imported, which has happened long before.
    datasets.config.HF_DATASETS_CACHE = cache
    patches = [mock.patch.object(encoder_cache, "TOKENS_PER_PASS", entry.get("tokens", encoder_cache.TOKENS_PER_PASS))]
    patches += [mock.patch.object(towers, "load_encoder", load_encoder)]
    patches += [mock.patch.object(encoding, "run_encoder", struck(at, cache))]
    if "full" in at:  # as on a disk that reserves nothing
        patches.append(mock.patch.object(encoder_cache, "_reserve", lambda *_: None))
    for patch in patches:
        patch.start()
    try:
        return many_runs.outcome(entry["argv"], entry.get("fault", {})) | {"encoders": len(calls)}
    finally:
        mock.patch.stopall()


def main():
    """Runs all of them."""
    outcomes = [outcome(entry) for entry in json.loads(Path(sys.argv[1]).read_text())]
    if processes.is_main():
        Path(sys.argv[2]).write_text(json.dumps(outcomes))
    return 0


if __name__ == "__main__":
    command.run_main(main)
