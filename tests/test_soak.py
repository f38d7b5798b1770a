"""Minutes of random kills: `python -m pytest -m soak tests/test_soak.py` (test.sh leaves it out)."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_environment
from safetensors.torch import load_file

from mindmerger.training.checkpoints import newest_valid

KILLS = 20


@pytest.mark.soak
def test_twenty_random_kills_leave_the_mapping_of_an_uninterrupted_run(run, flags, tmp_path):
    """Kills strike anywhere from the first import to the last write; a run that makes no progress between two kills
    gets a little more time, so that the test ends."""
    argv = [*flags, "--epoch_num", "100", "--eval_steps", "7", "--save_steps", "2", "--logging_steps", "1"]
    done = run(ROOT / "run_training.py", *argv, "--save_name", "whole", timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    chance, kills, patience = random.Random(0), 0, 12.0
    folder = tmp_path / "outputs/soaked/math/mapping"
    last_step = -1
    while True:
        command = [sys.executable, str(ROOT / "run_training.py"), *argv, "--save_name", "soaked"]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=clean_environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, errors = process.communicate(timeout=chance.uniform(3, patience) if kills < KILLS else 600)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            found, _ = newest_valid(folder)
            step = int(found.name[-6:]) if found else 0
            patience += 0 if step > last_step else 1.0
            last_step = step
            time.sleep(0.1)
            continue
        assert process.returncode == 0, errors.decode()[-3000:]
        break
    for name in ("mapping.safetensors", "last/mapping.safetensors"):
        a = load_file(tmp_path / "outputs/whole/math/mapping" / name)
        b = load_file(Path(folder) / name)
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)
    assert kills == KILLS, f"the run ended after {kills} kills: give it more epochs"
