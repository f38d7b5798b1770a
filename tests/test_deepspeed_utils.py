"""What DeepSpeed does to models while they are made."""

import sys

from conftest import ROOT, free_port

DTYPES_UNDER_ZERO_3 = """
import os, sys

sys.path.insert(0, sys.argv[1])
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
from deepspeed_utils import keeping_explicit_dtypes, quiet_start

quiet_start()
import deepspeed
import torch

deepspeed.init_distributed("gloo", verbose=False)
config = {"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}


def dtypes():
    with deepspeed.zero.Init(config_dict_or_path=config):
        weight, frequencies = torch.zeros(2), torch.arange(0, 64, 2, dtype=torch.float32)
    return weight.dtype, frequencies.dtype


without = dtypes()
with keeping_explicit_dtypes():
    within = dtypes()
print(without, within, dtypes() == without)
"""


def test_rotary_frequencies_stay_in_fp32_while_zero_3_makes_a_bf16_model(run):
    """Rounded to bf16 they turn the later positions of a long text by more than a radian."""
    done = run(sys.executable, "-c", DTYPES_UNDER_ZERO_3, ROOT, free_port())
    assert done.returncode == 0, done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last == "(torch.bfloat16, torch.bfloat16) (torch.bfloat16, torch.float32) True"
