"""DeepSpeed: what it does to models while they are made, and which settings it is given."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, clean_environment, free_port

from mindmerger.runtime.errors import UserError
from mindmerger.training import deepspeed_engine
from mindmerger.training.deepspeed_config import effective_config, gradient_clipping, read_deepspeed_config

STARTED = """
import os, sys

sys.path.insert(0, sys.argv[1])
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
from mindmerger.runtime.errors import UserError
from mindmerger.training.deepspeed_engine import preserve_explicit_dtypes, make_engine, import_deepspeed_quietly

import_deepspeed_quietly()
import deepspeed
import torch

deepspeed.init_distributed("gloo", verbose=False)
config = {"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}


def dtypes():
    with deepspeed.zero.Init(config_dict_or_path=config):
        weight, frequencies = torch.zeros(2), torch.arange(0, 64, 2, dtype=torch.float32)
    return weight.dtype, frequencies.dtype


without = dtypes()
with preserve_explicit_dtypes():
    within = dtypes()
print("dtypes:", without, within, dtypes() == without)


class Model(torch.nn.Linear):
    def trained_parameters(self):
        return dict(self.named_parameters())


config = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2, "zero_allow_untested_optimizer": True}
for batch_size in (2, 3):
    try:
        make_engine(Model(4, 4), config | {"train_batch_size": batch_size, "train_micro_batch_size_per_gpu": 1}, 1e-3)
        print(f"batch of {batch_size}: taken")
    except UserError as error:
        print(f"batch of {batch_size}: {error}")


def refuse(error):
    def initialize(**_):
        raise error

    return initialize


from deepspeed.runtime.config import DeepSpeedConfigError

for error in (Exception("two settings\\nat odds"), DeepSpeedConfigError("a setting"), RuntimeError("no setting")):
    deepspeed.initialize = refuse(error)
    try:
        make_engine(Model(4, 4), config, 1e-3)
    except Exception as error_again:
        print(f"{type(error).__name__}: {type(error_again).__name__}: {error_again}")
"""


@pytest.fixture(scope="module")
def started():
    """Returns what a process in which DeepSpeed has started prints, by the names of its lines."""
    command = [sys.executable, "-c", STARTED, str(ROOT), str(free_port())]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


def test_rotary_frequencies_stay_in_fp32_while_zero_3_makes_a_bf16_model(started):
    """Rounded to bf16 they turn the later positions of a long text by more than a radian."""
    assert started["dtypes"] == "(torch.bfloat16, torch.bfloat16) (torch.bfloat16, torch.float32) True"


def test_settings_that_deepspeed_asserts_only_at_its_start_are_refused_in_one_line(started):
    assert started["batch of 2"] == "taken"
    assert started["batch of 3"].startswith("DeepSpeed refuses this configuration: Check batch related parameters")
    assert started["batch of 3"].endswith("3 != 1 * 2 * 1; see --deepspeed_config")


def test_what_deepspeed_raises_of_its_settings_is_one_line_and_nothing_else_is(started):
    """Some of it is an `Exception` of no type of its own, which ended in a traceback."""
    refused = "UserError: DeepSpeed refuses this configuration: {}; see --deepspeed_config"
    assert started["Exception"] == refused.format("two settings at odds")
    assert started["DeepSpeedConfigError"] == refused.format("a setting")
    assert started["RuntimeError"] == "RuntimeError: no setting"


@pytest.fixture
def read(tmp_path):
    """Reads a DeepSpeed JSON given as a value or as text."""

    def call(content):
        (tmp_path / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return read_deepspeed_config(str(tmp_path / "ds.json"))

    return call


def zero(stage=2, **more):
    return {"zero_optimization": {"stage": stage, **more}}


WRONG_VALUES = [
    (zero(reduce_bucket_size=15099494.4), "zero_optimization.reduce_bucket_size is 15099494.4"),
    (zero(reduce_bucket_size=0), "zero_optimization.reduce_bucket_size is 0"),
    (zero(reduce_bucket_size=-5), "zero_optimization.reduce_bucket_size is -5"),
    (zero(reduce_bucket_size="500"), 'zero_optimization.reduce_bucket_size is "500"'),
    (zero(reduce_bucket_size=None), "zero_optimization.reduce_bucket_size is null"),
    (zero(reduce_bucket_size=10**30), "zero_optimization.reduce_bucket_size is 1000000000000000000000000000000"),
    (zero(overlap_comm="yes please", offload_optimizer="cpu"), 'zero_optimization.overlap_comm is "yes please"'),
    (zero(overlap_comm="true"), 'zero_optimization.overlap_comm is "true"'),
    (zero(overlap_comm=1), "zero_optimization.overlap_comm is 1"),
    (zero(compute_grad_norm=False), "zero_optimization.compute_grad_norm must be true"),
    (zero(stage="2"), "zero_optimization.stage must be 0, 1, 2 or 3, not '2'"),
    (zero(stage=True), "zero_optimization.stage must be 0, 1, 2 or 3, not True"),
    (zero(offload_optimizer="cpu"), 'zero_optimization.offload_optimizer is "cpu"'),
    (zero(offload_optimizer={"device": "gpu"}), 'zero_optimization.offload_optimizer.device is "gpu"'),
    (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "zero_optimization: Partial offloading"),
    (zero(offload_optimizer={"device": "cpu"}, cpu_offload=True), "zero_optimization: cpu_offload and offload"),
    (zero(3, offload_optimizer={"ratio": 1.5}), "zero_optimization.offload_optimizer.ratio is 1.5"),
    (zero(3, offload_param={"device": "cpu", "pin_memry": True}), "zero_optimization.offload_param.pin_memry: unknown"),
    (zero(3, offload_param={"device": "nvme"}), "zero_optimization.offload_param.nvme_path is None"),
    (zero(3, offload_param={"device": "nvme", "nvme_path": "/nowhere"}), "offload_param.nvme_path is '/nowhere'"),
    (zero(3, stage3_prefetch_bucket_size=-1), "zero_optimization.stage3_prefetch_bucket_size is -1"),
    (zero(3, module_granularity_threshold=-1), "zero_optimization.module_granularity_threshold is -1"),
    ({"zero_optimization": True}, "zero_optimization must be an object, not true"),
    ({"gradient_clipping": -1}, "gradient_clipping must be 'auto' or a number above 0"),
    ('{"gradient_clipping": 1e999}', "gradient_clipping must be 'auto' or a number above 0"),
    ({"train_batch_size": "8"}, 'train_batch_size is "8"'),
    ({"steps_per_print": 0}, "steps_per_print is 0"),
    ({"wall_clock_breakdown": "false"}, 'wall_clock_breakdown is "false"'),
    ({"communication_data_type": "fp64"}, 'communication_data_type is "fp64"'),
    ({"bf16": True}, "bf16 is true"),
    ({"aio": {"block_size": "1M"}}, 'aio.block_size is "1M"'),
    ({"aio": {"blocksize": 1}}, "aio.blocksize: unknown key, did you mean 'block_size'?"),
    ({"flops_profiler": {"enabled": "yes"}}, 'flops_profiler.enabled is "yes"'),
    ({"flops_profiler": True}, "flops_profiler must be an object, not true"),
    ({"activation_checkpointing": {"number_checkpoints": -2}}, "activation_checkpointing.number_checkpoints is -2"),
    ({"comms_logger": {"prof_ops": "all_reduce"}}, 'comms_logger.prof_ops is "all_reduce"'),
    (zero(3, zenflow={}), "zero_optimization.zenflow is {}: this training loop has not been made to work with it"),
    (zero(1, legacy_stage1=True), "zero_optimization.legacy_stage1 is true: this training loop"),
    (zero(3, zero_hpz_partition_size=2), "zero_optimization.zero_hpz_partition_size is 2: this training loop"),
    (zero(3, zero_quantized_weights=True), "zero_optimization.zero_quantized_weights is true: this training loop"),
    (zero(3, zero_quantized_nontrainable_weights=True), "zero_quantized_nontrainable_weights is true: this training"),
    (zero(3, zero_quantized_gradients=True), "zero_optimization.zero_quantized_gradients is true: this training loop"),
    (
        zero(3, offload_optimizer={"device": "cpu", "super_offload": True}),
        "zero_optimization.offload_optimizer.super_offload is true: this training loop",
    ),
    (
        zero(3, prefetch_bucket_size=5, stage3_prefetch_bucket_size=5),
        "zero_optimization: prefetch_bucket_size and stage3_prefetch_bucket_size are names of the same setting: leave",
    ),
    (
        zero(3, stage3_gather_fp16_weights_on_model_save=True, stage3_gather_16bit_weights_on_model_save=True),
        "stage3_gather_16bit_weights_on_model_save and stage3_gather_fp16_weights_on_model_save are names of the same",
    ),
    (zero(3, cpu_offload_param=True, offload_param={"device": "cpu"}), "cpu_offload_param and offload_param are names"),
    ('{"zero_optimization": {"stage": 2, "stage": 3}}', "is not readable JSON: Duplicate keys"),
]


@pytest.mark.parametrize(("content", "named"), WRONG_VALUES)
def test_a_wrong_value_in_a_deepspeed_json_is_refused_by_file_and_key_path(read, tmp_path, content, named):
    """DeepSpeed took half of these without a word and died of the others once the models were loaded."""
    with pytest.raises(UserError) as caught:
        read(content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'ds.json'}") and named in message and "\n" not in message


@pytest.mark.parametrize(("section", "flag"), [("optimizer", "--lr"), ("scheduler", "--lr_scheduler")])
def test_a_section_that_flags_settle_is_refused_with_the_flag(read, section, flag):
    with pytest.raises(UserError, match=f"remove the section '{section}', its settings come from {flag}"):
        read({section: {"type": "x"}})


def test_a_deepspeed_json_that_is_not_there_is_answered_with_the_presets(tmp_path):
    with pytest.raises(UserError, match=r"no DeepSpeed config .*absent\.json: presets are scripts/ds_zero0\.json"):
        read_deepspeed_config(str(tmp_path / "absent.json"))


def test_deepspeed_values_as_its_documentation_writes_them_are_taken(read, capsys):
    written = '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "overlap_comm": null,'
    written += (
        ' "stage3_param_persistence_threshold": "auto", "offload_param": {"device": "cpu", "pin_memory": false}},'
    )
    written += ' "train_batch_size": "auto", "gradient_clipping": 1.0, "aio": {"block_size": 1e6}}'
    config = read(written)
    assert config["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert type(config["aio"]["block_size"]) is int
    read(zero(3, zenflow=None, legacy_stage1=False, zero_hpz_partition_size=1, zero_quantized_weights=False))
    for preset in sorted((ROOT / "scripts").glob("ds_*.json")):
        read_deepspeed_config(str(preset))
    assert capsys.readouterr().err == ""


def test_an_offload_without_effect_at_its_stage_is_said(read, capsys):
    read(zero(2, offload_param={"device": "cpu"}))
    assert "zero_optimization.offload_param has no effect at ZeRO 2: it needs stage 3" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [0, 2])
def test_gradient_clipping_is_shown_as_it_is_applied(read, stage):
    """At ZeRO 0, where the loop clips, the record of the run said 0.0."""
    for flag, expected in ((None, 1.0), (0.25, 0.25)):
        config = read(zero(stage))
        shown = effective_config(config, 8, 2, 4, gradient_clipping(config, flag))
        assert shown["gradient_clipping"] == expected


@pytest.mark.parametrize(("elements", "ranks"), [(1, 2), (5, 2), (6, 2), (3, 4)])
def test_every_rank_gets_its_share_of_what_cannot_be_dealt_out_evenly(monkeypatch, elements, ranks):
    """DeepSpeed's own setter ends a resume at ZeRO 3 with an error there."""
    share = -(-elements // ranks)
    parameter = SimpleNamespace(ds_tensor=torch.empty(share))  # as large as its partition
    monkeypatch.setattr(deepspeed_engine, "world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(deepspeed_engine, "rank", lambda rank=rank: rank)
        shares.append(deepspeed_engine._share_of_rank(parameter, torch.arange(1.0, elements + 1).view(1, -1)))
    assert {len(one) for one in shares} == {share}
    assert torch.cat(shares).tolist() == [*range(1, elements + 1), *[0] * (ranks * share - elements)]
