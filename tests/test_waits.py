"""No micro-batch of training waits for a GPU, an optimizer step as often as it must: seen by what would wait."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, clean_environment

STEPS, EVALUATIONS = 3, 1
AGREE = "cpu in run_training.py apply_gradient > signals.py agree"
NORM = "aten::_local_scalar_dense in run_training.py train_step > run_training.py apply_gradient"
PACKED = ["--packing", "--train_micro_batch_size_per_gpu", "4", "--eval_batch_size", "4"]
# DeepSpeed's own, in its `step`: by where it looks at the norm, how often.
OF_ZERO = {0: 0, 1: 2, 2: 2, 3: 1}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, tiny_encoder, tiny_llm, datas):
    """What the driver counted, by ZeRO stage and number of micro-batches of a step, or "packed"; of one also with the
    encoder's states from disk."""
    folder = tmp_path_factory.mktemp("waits")
    shared = ["--llm_path", tiny_llm, "--mt_path", tiny_encoder, "--data_root", datas, "--task", "math"]
    shared += ["--stage_name", "mapping", "--train_num", "100", "--max_steps", str(STEPS), "--train_batch_size", "8"]
    shared += ["--dev_size", "40", "--eval_batch_size", "1", "--num_workers", "1", "--eval_steps", str(STEPS)]
    runs = {
        (stage, 8 // rows): ["--deepspeed_config", str(ROOT / f"scripts/ds_zero{stage}.json"),
            "--train_micro_batch_size_per_gpu", str(rows), "--output_dir", str(folder / f"{stage}-{rows}")]
        for stage in OF_ZERO
        for rows in (8, 1)
    }  # fmt: skip
    for stage in OF_ZERO:
        config = str(ROOT / f"scripts/ds_zero{stage}.json")
        runs[stage, "packed"] = [*PACKED, "--deepspeed_config", config, "--output_dir", str(folder / f"{stage}-packed")]
    runs["states"] = [*runs[2, 8], "--cache_encoder_states", "--output_dir", str(folder / "states")]
    (folder / "runs.json").write_text(json.dumps([shared + more for more in runs.values()]))
    command = [sys.executable, ROOT / "tests/drivers/waits.py", folder / "runs.json", folder / "outcomes.json"]
    env = clean_environment(folder) | {"HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(runs, json.loads((folder / "outcomes.json").read_text()), strict=True))


@pytest.mark.parametrize("stage", OF_ZERO)
def test_a_micro_batch_waits_for_nothing(outcomes, stage):
    for parts in (1, 8, "packed"):
        assert outcomes[stage, parts]["passes"] == {"times": STEPS}


@pytest.mark.parametrize("stage", OF_ZERO)
def test_an_optimizer_step_waits_once_for_loss_norm_and_signals_and_where_deepspeed_does(outcomes, stage):
    for parts in (1, 8, "packed"):
        found = outcomes[stage, parts]["update"]
        own = {AGREE: STEPS} | ({NORM: STEPS} if stage else {})
        assert {place: found[place] for place in own} == own
        others = {place: n for place, n in found.items() if place not in own and place != "times"}
        assert sum(others.values()) == STEPS * OF_ZERO[stage], others
        assert all("is_invalid_grad_norm" in place for place in others)


@pytest.mark.parametrize("stage", OF_ZERO)
def test_an_evaluation_waits_once_a_group_of_micro_batches_and_for_its_result(outcomes, stage):
    """40 micro-batches are three groups: between them the ranks look whether they are to stop."""
    found = outcomes[stage, 1]["dev loss"]
    assert found == {
        "times": EVALUATIONS,
        "cpu in run_training.py dev_loss > signals.py agree": 3 + 1,
        "aten::_local_scalar_dense in run_training.py evaluate_and_save > run_training.py dev_loss": 1,
    }
    packed = outcomes[stage, "packed"]["dev loss"]  # of four rows each the same 40 are one group
    assert packed == found | {"cpu in run_training.py dev_loss > signals.py agree": 1 + 1}


def test_states_of_the_encoder_from_disk_add_no_wait(outcomes):
    assert outcomes["states"] == outcomes[2, 8] and outcomes["states"]["code"] == 0
