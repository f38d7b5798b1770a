"""The training command: what it computes, what it leaves, what it refuses. Real runs of tiny models on CPU."""

import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, byte_tokenizer, make_tiny_encoder, read_log, run_many, run_prepared
from safetensors.torch import load_file, save_file

from mindmerger.bridges import Mapping
from mindmerger.data.loader import BatchLoader, TrainingData
from mindmerger.model import towers
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from mindmerger.training import deepspeed_engine, dry_run, guards
from mindmerger.training import flags as training_flags
from mindmerger.training import settings as training_settings
from mindmerger.training import trainer as training_trainer
from mindmerger.training.initial_mapping import find_initial_mapping

OUTPUTS = {"pytorch_model.bin", "mapping.safetensors", "config.json", "README.md", "log.jsonl", "loss.png"}
OUTPUTS |= {"ds_config.json", "args.json", "last"}
LINE = {"step", "epoch", "loss", "lr", "grad_norm", "target_tokens", "samples_per_s", "tokens_per_s", "padding_share"}
LINE |= {"peak_memory_gb", "data_wait_share"}


def test_both_stages_leave_exactly_the_documented_files(flags, tmp_path):
    steps = ["--max_steps", "4", "--eval_steps", "2", "--save_total_limit", "1"]
    mapping, augmentation = run_many(tmp_path, [[*flags, *steps], [*flags, *steps, "--stage_name", "augmentation"]])
    for outcome in (mapping, augmentation):
        assert outcome["code"] == 0, outcome
    first, second = (tmp_path / "outputs/MindMerger/math" / stage for stage in ("mapping", "augmentation"))
    for folder in (first, second):
        assert {entry.name for entry in folder.iterdir()} == OUTPUTS | {"checkpoint-000004"}
        last = {entry.name for entry in (folder / "last").iterdir()}
        assert last == {"pytorch_model.bin", "mapping.safetensors", "config.json", "README.md"}
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
        assert all(set(line) == LINE for line in lines if "loss" in line)
        assert [line["step"] for line in lines if "dev_loss" in line] == [2, 4]
        assert all(line["dev_perplexity"] == math.exp(line["dev_loss"]) for line in lines if "dev_loss" in line)
        released = torch.load(folder / "pytorch_model.bin", weights_only=True)["model_state_dict"]
        safe = load_file(folder / "mapping.safetensors")
        assert all(torch.equal(released[name], safe[name]) for name in safe)
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"starts from {Path('outputs/MindMerger/math/mapping/mapping.safetensors')}" in augmentation["printed"]
    assert "trainable parameters: 1,632 (mapping only)" in mapping["printed"]
    config = json.loads((second / "config.json").read_text())
    assert (config["stage"], config["task"], config["augmentation"]) == ("augmentation", "math", True)
    settings = json.loads((second / "args.json").read_text())
    assert settings["versions"]["torch"] and settings["data"]["fingerprint"] and settings["world_size"] == 1
    ds_config = json.loads((second / "ds_config.json").read_text())
    assert (ds_config["train_batch_size"], ds_config["gradient_clipping"]) == (8, 1.0)
    # The mapping file holds what the run ended with, and stage 2 went on from stage 1's best.
    assert MindMerger.from_pretrained(str(second)).config.stage == "augmentation"


def test_training_lowers_the_loss_and_keeps_the_best_mapping(flags, tmp_path):
    more = ["--epoch_num", "6", "--eval_steps", "3", "--gradient_checkpointing", "--lr", "3e-2"]
    (outcome,) = run_many(tmp_path, [[*flags, *more]])
    assert outcome["code"] == 0, outcome
    folder = tmp_path / "outputs/MindMerger/math/mapping"
    losses, dev = read_log(folder), read_log(folder, "dev_loss")
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    steps = read_log(folder, "step")
    assert set(read_log(folder, "epoch")) == set(range(6))
    best, last = load_file(folder / "mapping.safetensors"), load_file(folder / "last/mapping.safetensors")
    same = all(torch.equal(best[name], last[name]) for name in best)
    assert same == (dev[-1] == min(dev)), (steps, dev)
    state = json.loads((sorted(folder.glob("checkpoint-*"))[-1] / "state.json").read_text())
    assert state["best_dev_loss"] == min(dev)


@pytest.mark.slow
def test_mapping_gradient_is_the_same_for_any_cut_and_number_of_ranks(flags, tmp_path):
    """Averaging per micro-batch, as published, weighs a short target's tokens more than a long one's."""
    folder = tmp_path / "gradients"
    folder.mkdir()
    one = {f"micro{m}": ["--train_micro_batch_size_per_gpu", str(m)] for m in (1, 2, 8)}
    one["uneven"] = ["--train_micro_batch_size_per_gpu", "8", "--micro_batch_tokens", "300"]
    two = {f"ranks{m}": ["--train_micro_batch_size_per_gpu", str(m)] for m in (1, 2, 4)}
    two["ranks_uneven"] = ["--train_micro_batch_size_per_gpu", "4", "--micro_batch_tokens", "300"]
    for ranks, cuts in ((1, one), (2, two)):
        (tmp_path / "cuts.json").write_text(json.dumps(cuts))
        driver = (ROOT / "tests/drivers/gradients.py", tmp_path / "cuts.json", folder, "--", *flags)
        codes, printed = run_prepared(*driver, cwd=tmp_path, ranks=ranks)
        assert codes == [0] * ranks, printed
    reference = load_file(folder / "micro8.safetensors")
    for name in (*one, *two):
        state = load_file(folder / f"{name}.safetensors")
        for key, expected in reference.items():
            assert (state[key] - expected).norm() <= 5e-6 * expected.norm(), (name, key)


def test_speed_options_leave_the_mapping_after_fifty_steps_as_it_is(flags, tmp_path):
    """Row by row, collated in the step, against a token budget, threads that prefetch, and recomputed layers."""
    steps = ["--max_steps", "50", "--epoch_num", "50", "--eval_steps", "50", "--precision", "fp32", "--lr", "1e-4"]
    off = ["--train_micro_batch_size_per_gpu", "1", "--num_workers", "0"]
    on = ["--micro_batch_tokens", "300", "--num_workers", "2", "--gradient_checkpointing"]
    runs = [[*flags, *steps, *options, "--save_name", name] for name, options in (("off", off), ("on", on))]
    assert [outcome["code"] for outcome in run_many(tmp_path, runs)] == [0, 0]
    slow, fast = (tmp_path / "outputs" / name / "math/mapping" for name in ("off", "on"))
    assert len(read_log(slow)) == 50 and read_log(slow, "target_tokens") == read_log(fast, "target_tokens")
    expected, found = (load_file(folder / "last/mapping.safetensors") for folder in (slow, fast))
    assert min(read_log(slow, "grad_norm")) > 1e-3  # steps of Adam's size, 5e-3 in all
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-5, name


@pytest.mark.slow
def test_every_zero_stage_and_offload_trains_the_same_mapping_on_two_ranks(flags, tmp_path):
    presets = ["ds_zero0", "ds_zero1", "ds_zero2", "ds_zero3", "ds_zero3_offload"]
    steps = ["--max_steps", "3", "--eval_steps", "2", "--precision"]
    runs = [
        [
            *flags,
            *steps,
            precision,
            "--deepspeed_config",
            f"{ROOT}/scripts/{name}.json",
            "--save_name",
            name + precision,
        ]
        for precision in ("fp32", "bf16")
        for name in presets
    ]
    for outcome in run_many(tmp_path, runs, ranks=2):
        assert outcome["code"] == 0, outcome
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 2e-2)):
        folders = {name: tmp_path / "outputs" / (name + precision) / "math/mapping" for name in presets}
        expected = load_file(folders["ds_zero0"] / "last/mapping.safetensors")
        assert {tensor.dtype for tensor in expected.values()} == {torch.float32}
        for name, folder in folders.items():
            found = load_file(folder / "last/mapping.safetensors")
            for key in expected:
                assert (found[key] - expected[key]).abs().max() <= tolerance, (name, precision, key)
            for a, b in zip(read_log(folder), read_log(folders["ds_zero0"]), strict=True):
                assert abs(a - b) <= tolerance


@pytest.mark.slow
def test_gradient_clipping_of_a_deepspeed_config_counts_at_every_zero_stage(flags, tmp_path):
    """At ZeRO 0, where the loop clips by itself, it went by the flag's default. Adam's first moment shows the norm that
    the gradient was clipped to: it is (1 - 0.8) of it after one step."""
    runs = []
    for stage in (0, 1, 2):
        config = {"zero_optimization": {"stage": stage}, "gradient_clipping": 0.125}
        (tmp_path / f"{stage}.json").write_text(json.dumps(config))
        more = ["--deepspeed_config", str(tmp_path / f"{stage}.json"), "--max_steps", "1", "--save_name", f"z{stage}"]
        runs.append([*flags, *more])
    assert [outcome["code"] for outcome in run_many(tmp_path, runs)] == [0, 0, 0]
    for stage in (0, 1, 2):
        folder = tmp_path / "outputs" / f"z{stage}/math/mapping"
        assert read_log(folder, "grad_norm")[0] > 0.2
        tensors = load_file(folder / "checkpoint-000001/training.safetensors")
        moments = [tensor.flatten() for name, tensor in tensors.items() if name.startswith("exp_avg.")]
        assert torch.cat(moments).norm().item() == pytest.approx(0.2 * 0.125, rel=1e-3), stage
        assert json.loads((folder / "args.json").read_text())["arguments"]["max_grad_norm"] == 0.125


@pytest.mark.slow
def test_zero_3_trains_without_a_launcher(flags, tmp_path):
    config = ["--max_steps", "1", "--deepspeed_config", ROOT / "scripts/ds_zero3.json"]
    codes, (printed,) = run_prepared(ROOT / "run_training.py", *flags, *config, cwd=tmp_path)
    assert codes == [0], printed[-2000:]
    assert "finished at step 1 of 1" in printed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_published_commands_run(run, tiny_llm, tiny_encoder, datas, tmp_path, ranks):
    """The three training commands that users already have, flag by flag, only sizes made small: by the launcher with
    two ranks, and as the process that it starts for one (`test_scripts.py` starts that one by the launcher)."""
    (tmp_path / "datas").symlink_to(datas)
    small = ["--dev_size", "4", "--max_steps", "2"]
    models = ["--llm_path", tiny_llm, "--mt_path", tiny_encoder + "/"]
    math_flags = ["--deepspeed", *models, "--task", "math", "--train_num", "6", "--train_batch_size", "16"]
    lengths = ["--epoch_num", "3", "--max_seq_len", "200", "--max_gen_len", "200"]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

    def train(*given) -> str:
        if ranks == 2:
            done = run(ROOT / "run_training.py", *given, ranks=2)
            codes, printed = [done.returncode], [done.stderr]
        else:
            command = (ROOT / "run_training.py", "--local_rank=0", *given)
            codes, printed = run_prepared(*command, cwd=tmp_path, env=place)
        assert codes == [0], printed[0][-3000:]
        return printed[0]

    mapping = [
        *math_flags,
        "--stage_name",
        "mapping",
        "--train_micro_batch_size_per_gpu",
        "8",
        "--augmentation",
        "False",
    ]
    train(*mapping, *lengths, *small)
    hard = [*math_flags, "--stage_name", "augmentation", "--train_micro_batch_size_per_gpu", "2"]
    assert "MindMerger-Hard" in train(*hard, "--augmentation", "False", *lengths, *small)
    translation = [
        "--deepspeed",
        *models,
        "--stage_name",
        "mapping",
        "--train_num",
        "100000",
        "--train_batch_size",
        "128",
    ]
    translation += ["--train_micro_batch_size_per_gpu", "8", "--gradient_accumulation", "16", "--augmentation", "False"]
    printed = train(*translation, "--epoch_num", "3", *small)
    assert ("--gradient_accumulation 16 is overruled" in printed) == (ranks == 2)
    outputs = tmp_path / "outputs/MindMerger"
    assert {p.parent.relative_to(outputs).as_posix() for p in outputs.rglob("loss.png")} == {
        "math/mapping",
        "math/augmentation",
        "translation/mapping",
    }


@pytest.mark.slow
def test_two_nodes_give_the_losses_of_one_node_with_two_ranks(flags, tmp_path):
    import subprocess
    import sys

    from conftest import clean_environment, free_port

    steps = ["--max_steps", "3", "--eval_steps", "2"]
    (one,) = run_many(tmp_path, [[*flags, *steps, "--save_name", "one"]], ranks=2)
    assert one["code"] == 0, one
    (tmp_path / "hostfile").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    common = [
        "--hostfile",
        tmp_path / "hostfile",
        "--no_ssh",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        free_port(),
    ]
    nodes = [
        subprocess.Popen(
            [sys.executable, launcher, *map(str, common), "--node_rank", str(node), str(ROOT / "run_training.py")]
            + [*flags, *steps, "--save_name", "two"],
            cwd=tmp_path,
            env=clean_environment(tmp_path),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for node in (0, 1)
    ]
    errors = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    one, two = (tmp_path / "outputs" / name / "math/mapping" for name in ("one", "two"))
    assert read_log(one) == read_log(two)
    assert read_log(one, "dev_loss") == read_log(two, "dev_loss")


def copy_data(datas, folder):
    """A private copy of the excerpt that a test may damage."""
    return Path(shutil.copytree(datas, folder))


def test_wrong_inputs_end_with_one_line_and_write_nothing(flags, tiny_llm, tiny_encoder, datas, tmp_path):
    bad_json, unequal, empty, absent = (copy_data(datas, tmp_path / name) for name in ("j", "u", "e", "a"))
    xcsqa = bad_json / "query_translation/x-csqa/train_sw.jsonl"
    xcsqa.write_text(xcsqa.read_text().splitlines()[0] + "\n{broken\n")
    with open(unequal / "bilingual_pairs/en-sw/train_100k.sw", "a") as file:
        file.write("moja zaidi\n")
    for side in ("sw", "en"):
        (empty / f"bilingual_pairs/en-sw/train_100k.{side}").write_text("")
    (absent / "bilingual_pairs/en-sw/train_100k.sw").unlink()
    wide = make_tiny_encoder(tmp_path / "wide", width=24)
    MindMerger.from_models(wide, tiny_llm).save_pretrained(str(tmp_path / "wide_mapping"))
    torch.save({"model_state_dict": Path("x")}, tmp_path / "code.bin")
    no_eos = Path(shutil.copytree(tiny_llm, tmp_path / "no_eos"))
    byte_tokenizer(no_eos, {"unk_token": "<unk>", "bos_token": "<s>"})
    endless = Path(shutil.copytree(no_eos, tmp_path / "endless"))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((endless / name).read_text())
        (endless / name).write_text(json.dumps(settings | {"eos_token_id": None}))
    damaged = Path(shutil.copytree(tiny_llm, tmp_path / "damaged"))
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_cliping": 1.0}))
    (tmp_path / "ds_bf16.json").write_text(json.dumps({"bf16": {"enabled": True}}))
    (tmp_path / "ds_batch.json").write_text(json.dumps({"train_batch_size": 99}))
    (tmp_path / "ds_clip.json").write_text(json.dumps({"gradient_clipping": 0.5}))
    (tmp_path / "ds_no_clip.json").write_text(json.dumps({"gradient_clipping": 0}))
    fresh_augmentation = ["--stage_name", "augmentation", "--init_checkpoint", "none"]
    cases = [
        (["--data_root", str(absent)], ["train_100k.sw", "train_100k.en"]),
        (["--data_root", str(tmp_path / "nowhere")], ["nowhere"]),
        (["--data_root", str(unequal)], ["13", "12", "train_100k.sw"]),
        (["--data_root", str(bad_json), "--task", "x-csqa", *fresh_augmentation], ["train_sw.jsonl:2"]),
        (["--data_root", str(empty)], ["train_100k.sw", "hold no pairs"]),
        (["--task", "maths"], ["maths", "math"]),
        (["--languages", "Swahilli"], ["Swahilli", "Swahili"]),
        (["--dev_size", "5000"], ["--dev_size", "5000"]),
        (["--train_batch_size", "7"], ["--train_batch_size 7", "--train_micro_batch_size_per_gpu 2"]),
        (["--init_checkpoint", str(tmp_path / "wide_mapping")], ["(48, 24)", "(32, 16)", tiny_encoder, tiny_llm]),
        (["--init_checkpoint", str(tmp_path / "code.bin")], ["code.bin", "could run code"]),
        (["--init_checkpoint", str(tmp_path / "absent.bin")], ["absent.bin"]),
        (["--llm_path", str(no_eos)], ["no_eos", "EOS"]),
        (["--llm_path", "/nowhere/llm"], ["/nowhere/llm"]),
        (["--mt_path", "/nowhere/mt5/"], ["/nowhere/mt5"]),
        (["--stage_name", "augmentation"], ["outputs/MindMerger/math/mapping", "--init_checkpoint"]),
        (
            ["--task", "translation", "--stage_name", "augmentation"],
            ["translation has no rows of its own to train on", "--task math"],
        ),
        (["--deepspeed_config", str(tmp_path / "ds.json")], ["gradient_cliping", "gradient_clipping"]),
        (["--deepspeed_config", str(tmp_path / "ds_bf16.json")], ["bf16", "--precision"]),
        (["--deepspeed_config", str(tmp_path / "ds_batch.json")], ["train_batch_size", "99", "8"]),
        (
            ["--deepspeed_config", str(tmp_path / "ds_clip.json"), "--max_grad_norm", "2"],
            ["gradient_clipping 0.5", "2.0", "--max_grad_norm"],
        ),
        (["--deepspeed_config", str(tmp_path / "ds_no_clip.json")], ["gradient_clipping", "above 0"]),
        (["--deepspeed_config", str(tmp_path / "none.json")], ["none.json"]),
        (["--epoch_num", "0"], ["--epoch_num", "0"]),
        (["--num_workers", "-1"], ["--num_workers", "at least 0"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--llm_path", str(endless)], ["endless", "eos_token_id"]),
        (["--output_dir", str(tmp_path / "ds.json")], ["ds.json", "cannot write"]),
        (["--report_to", "wandb"], ["wandb", "pip install"]),
        (
            ["--llm_path", str(damaged), "--output_dir", str(tmp_path / "elsewhere")],
            ["not finite", f"llm.model.norm.weight of the LLM {damaged}"],
        ),
        (["--train_batch_size", "many"], []),
    ]
    outcomes = run_many(tmp_path, [[*flags, *extra] for extra, _ in cases])
    for (extra, expected), outcome in zip(cases, outcomes, strict=True):
        assert outcome["code"] == 2, (extra, outcome)
        message = outcome["error"] if outcome["error"] is not None else outcome["printed"]
        assert "\n" not in message.strip(), message
        for part in expected:
            assert part in message, (part, message)
    assert not (tmp_path / "outputs").exists()


def test_dev_size_auto_and_skipped_rows_are_recorded_and_resume_exactly(flags, datas, tmp_path):
    data = copy_data(datas, tmp_path / "faulty")
    for line, text in ((2, b"\xff\n"), (5, b"a\0b\n")):
        file = data / "bilingual_pairs/en-sw/train_100k.sw"
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join([*lines[: line - 1], text, *lines[line:]]))
    steps = [*flags, "--data_root", str(data), "--eval_steps", "2"]
    auto = [*steps, "--dev_size", "auto", "--skip_faulty_rows"]
    stopped, resumed, whole, named, other, unskipped = run_many(
        tmp_path,
        [
            [*auto, "--max_steps", "2"],
            [*auto, "--max_steps", "4", "--allow_changed", "max_steps"],
            [*auto, "--max_steps", "4", "--save_name", "whole"],
            [*steps, "--dev_size", "10", "--skip_faulty_rows", "--max_steps", "4"],
            [*steps, "--dev_size", "11", "--skip_faulty_rows", "--max_steps", "4"],
            [*steps, "--dev_size", "10", "--max_steps", "4"],
        ],
    )
    assert [one["code"] for one in (stopped, resumed, whole, named)] == [0] * 4, (stopped, resumed, whole, named)
    assert "--dev_size auto: 10 of 106 examples" in stopped["printed"]
    for outcome in (stopped, resumed):  # from the cache as well
        assert "--skip_faulty_rows leaves out 2 faulty rows" in outcome["printed"]
        assert f"{file}:2: not UTF-8" in outcome["printed"] and f"{file}:5: NUL byte" in outcome["printed"]
    assert "dev_size (10, this run has 11" in other["error"]
    assert f"{file}:2: not UTF-8" in unskipped["error"] and "--skip_faulty_rows" in unskipped["error"]
    first, second = (tmp_path / "outputs" / name / "math/mapping" for name in ("MindMerger", "whole"))
    assert json.loads((first / "args.json").read_text())["arguments"]["dev_size"] == 10
    assert [line.split(": ")[0] for line in (first / "faulty_rows.txt").read_text().splitlines()] == [
        f"{file}:2",
        f"{file}:5",
    ]
    assert read_log(first) == read_log(second) and len(read_log(first)) == 4
    assert (first / "last/mapping.safetensors").read_bytes() == (second / "last/mapping.safetensors").read_bytes()


@pytest.mark.slow
def test_an_error_that_concerns_all_ranks_is_printed_once_and_all_exit_2(run, flags, tmp_path):
    done = run(ROOT / "run_training.py", *flags, "--languages", "Swahilli", ranks=2)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    done = run(ROOT / "run_training.py", *flags, "--no_such_flag", ranks=2)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1


def test_tokenizers_without_bos_or_pad_are_fine(flags, tiny_llm, tmp_path):
    plain = Path(shutil.copytree(tiny_llm, tmp_path / "plain"))
    byte_tokenizer(plain, {"unk_token": "<unk>", "other": "<other>", "eos_token": "</s>"})
    (outcome,) = run_many(tmp_path, [[*flags, "--llm_path", str(plain), "--max_steps", "1"]])
    assert outcome["code"] == 0, outcome


def test_a_dry_run_of_the_second_stage_needs_no_first_one(flags, tmp_path):
    """The scripts pass --dry_run to both stages; the first writes nothing that the second could start from."""
    stage = ["--stage_name", "augmentation", "--dry_run"]
    (outcome,) = run_many(tmp_path, [[*flags, *stage]])
    assert outcome["code"] == 0, outcome
    assert not (tmp_path / "outputs").exists()


def test_a_mapping_of_other_models_is_warned_of(flags, tiny_encoder, tiny_llm, tmp_path, capsys):
    MindMerger.from_models(tiny_encoder, tiny_llm).save_pretrained(str(tmp_path / "mapping"))
    other = shutil.copytree(tiny_llm, tmp_path / "other")
    given = [*flags, "--init_checkpoint", str(tmp_path / "mapping"), "--llm_path", str(other)]
    args = training_settings.parse([str(flag) for flag in given])
    stage = training_settings.settle_stage(args, {})
    assert find_initial_mapping(args, stage, {}, tmp_path).endswith("mapping.safetensors")
    errors = capsys.readouterr().err
    assert errors.count("was trained with --") == 1 and f"--llm_path {tiny_llm}, not {other}" in errors


def settled(flags, *more):
    """Returns what training settles from the flags, in this process."""
    return training_settings.settle(training_settings.parse([*flags, *map(str, more)]))


def test_a_mapping_of_another_task_is_warned_of(flags, tiny_encoder, tiny_llm, tmp_path, capsys):
    model = MindMerger.from_models(tiny_encoder, tiny_llm)
    for task in ("xnli", "math"):
        model.config.task = task
        model.save_pretrained(str(tmp_path / task))
        settled(flags, "--init_checkpoint", tmp_path / task)
    errors = capsys.readouterr().err
    assert errors.count("was trained for task") == 1 and "was trained for task xnli, this run trains math" in errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        # A comparison of a method with None let this through to the search for the mapping stage's outputs.
        (
            ["--task", "translation", "--stage_name", "augmentation"],
            "no rows of its own to train on: choose --task math, x-csqa, xnli, or --stage_name mapping$",
        ),
        (
            ["--task", "translation", "--bridge", "layalign", "--stage_name", "task"],
            "translation has no rows of its own to train on: .*, or --stage_name translation$",
        ),
        # Of LangBridge's stages none reads pairs.
        (["--task", "translation", "--bridge", "langbridge"], "no rows of its own to train on: choose --task .* xnli$"),
        (["--languages", ""], "no language in ''"),
        (["--save_name", ""], "--save_name '' names no folder"),
        (["--save_name", "."], "--save_name '.' names no folder"),
        (["--save_name", "../x"], "--save_name '../x' leaves the outputs"),
        (["--save_name", "a/../../x"], "--save_name 'a/../../x' leaves the outputs"),
        (["--save_name", "/elsewhere"], "--save_name '/elsewhere' leaves the outputs"),
        (["--save_name", "a\nb"], r"--save_name 'a\\nb' has control characters"),
        (["--seed", "-1"], "--seed must be at least 0 and below 2.64, not -1"),
        (["--seed", str(2**64)], "--seed must be at least 0 and below 2.64"),
        (["--max_seq_len", str(10**30)], "--max_seq_len: expected a whole number of at least 1, got '1000"),
        (["--train_num", "0"], "--train_num: expected a whole number of at least 1, got '0'"),
        (["--warmup_ratio", "1"], "--warmup_ratio: expected a number of at least 0 and below 1, got '1'"),
        # Written to ds_config.json as Infinity, which is not JSON.
        (["--max_grad_norm", "inf"], "--max_grad_norm: expected a finite number above 0, got 'inf'"),
        (["--max_grad_norm", "nan"], "--max_grad_norm: expected a finite number above 0, got 'nan'"),
        (["--lr", "inf"], "--lr/--learning_rate: expected a finite number above 0, got 'inf'"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_anything_loads(flags, more, message):
    with pytest.raises(UserError, match=message):
        settled(flags, *more)


def test_names_and_seeds_up_to_the_limits_are_taken(flags):
    settings = settled(flags, "--save_name", "über/läuft 2", "--seed", 2**64 - 1)
    assert settings.output_dir == Path("outputs/über/läuft 2/math/mapping")


def test_an_encoder_as_the_llm_is_refused_and_an_llm_as_the_encoder_is_said(flags, tiny_llm, tmp_path, capsys):
    from transformers import BertConfig

    BertConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="bert is a bert model, an encoder and not a causal language model.*--mt_path"):
        settled(flags, "--llm_path", tmp_path / "bert")
    other = shutil.copytree(tiny_llm, tmp_path / "other")
    settled(flags, "--mt_path", other)
    assert f"--mt_path {other} is a decoder-only model (llama)" in capsys.readouterr().err
    settled(flags, "--mt_path", tiny_llm)
    assert f"--mt_path and --llm_path are the same model, {tiny_llm}" in capsys.readouterr().err


def test_a_model_folder_whose_name_is_not_utf_8_is_refused_before_anything_loads(flags, tiny_llm, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/llm\xff")
    shutil.copytree(tiny_llm, folder)
    with pytest.raises(UserError, match="the name is not UTF-8.*pass a link to it"):
        settled(flags, "--llm_path", folder)
    (tmp_path / "link").symlink_to(folder)
    settled(flags, "--llm_path", tmp_path / "link")


def test_positions_are_checked_as_in_evaluation(flags, tiny_llm, tmp_path, capsys):
    """Training refused rows that rotary positions merely answer worse, which evaluation warned of."""
    from transformers import GPT2Config

    short = Path(shutil.copytree(tiny_llm, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    GPT2Config(n_positions=20, n_embd=8, n_head=2, n_layer=1).save_pretrained(tmp_path / "gpt2")
    data = SimpleNamespace(merged_lengths=lambda prefix_length: np.array([9, 21]), encoder_lengths=np.array([4, 5]))
    args = training_settings.parse([*flags, "--llm_path", str(short)])
    settings = SimpleNamespace(args=args, bridge=Mapping(4, 4))
    training_settings.check_lengths(settings, data)
    assert f"the longest row needs 21 positions but {short} has 20: lower" in capsys.readouterr().err
    args.llm_path = str(tmp_path / "gpt2")
    with pytest.raises(UserError, match="the longest row needs 21 positions but .*gpt2 has 20: lower --max_gen_len"):
        training_settings.check_lengths(settings, data)


# Checkpointing recomputes a layer only as far as its backward pass needs.
@pytest.mark.parametrize(("checkpointing", "tolerance"), [(False, 0.02), (True, 0.1)])
def test_the_estimated_arithmetic_is_what_torch_counts_in_the_matrix_products(
    tiny_encoder, tiny_llm, checkpointing, tolerance
):
    from torch.utils.flop_counter import FlopCounterMode

    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable()
    shapes = {"encoder_input_ids": (2, 30), "prompt_ids": (2, 20), "target_ids": (2, 10)}
    batch = {name: torch.full(shape, 7) for name, shape in shapes.items()}
    batch |= {"encoder_attention_mask": torch.ones(2, 30, dtype=torch.long)}
    batch |= {f"{part}_mask": torch.ones(shapes[f"{part}_ids"], dtype=torch.long) for part in ("prompt", "target")}
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    products = {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items() if "mm" in str(op)}
    counted = sum(flop for op, flop in products.items() if "bmm" not in op)  # those are of attention
    first, second = (layer.weight.numel() for layer in (model.mapping.mlp.linear1, model.mapping.mlp.linear2))
    mapping = 60 * (4 * first + 6 * second)  # no gradient reaches the encoder
    lengths = {"merged": 62, "encoder": 30, "target": 10}
    data = SimpleNamespace(**{f"{name}_lengths": np.array([n, n]) for name, n in lengths.items()})
    args = training_settings.parse(["--gradient_checkpointing"] * checkpointing)
    estimate = dry_run.training_flop(args, data, data.merged_lengths, np.arange(2), model.llm, model.encoder)
    assert counted - mapping == pytest.approx(estimate, rel=tolerance)


def test_flags_without_effect_are_said(flags, capsys):
    settled(flags, "--dev_size", 0, "--eval_steps", 2)
    assert "--eval_steps is ignored: with --dev_size 0 nothing is evaluated" in capsys.readouterr().err
    for given in (["--overwrite_output_dir"], ["--allow_changed", "lr"], ["--resume_from_checkpoint", "x"]):
        settled(flags, "--dry_run", *given)
        assert f"{given[0]} is ignored: --dry_run neither resumes nor removes anything" in capsys.readouterr().err
    settled(flags, "--gpu", "0,1")
    assert "--gpu is ignored: choose GPUs with the launcher" in capsys.readouterr().err
    assert settled(flags, "--head_lr", "1e-5").args.head_lr is None
    assert "--head_lr is ignored: the mapping stage of --bridge mindmerger trains no" in capsys.readouterr().err


def test_a_stage_with_another_form_than_its_own_is_obeyed_and_said(flags, capsys):
    """The published README has False for the augmentation stage, which silently trained Hard."""
    fresh = ["--stage_name", "augmentation", "--init_checkpoint", "none"]
    assert not settled(flags, *fresh, "--augmentation", "False").with_prompt
    assert "--augmentation False in the augmentation stage: trains MindMerger-Hard" in capsys.readouterr().err
    assert settled(flags, "--stage_name", "mapping", "--augmentation", "True").with_prompt
    assert "trains with the translation prompt after the mapped source" in capsys.readouterr().err


def test_an_adapter_on_the_llm_alone_takes_neither_a_form_without_prompt_nor_a_mapping(flags, capsys):
    alone = ["--llm_only", "--stage_name", "adapter"]
    with pytest.raises(UserError, match="--llm_only reads nothing but the prompt: leave --augmentation False out"):
        settled(flags, *alone, "--augmentation", "False")
    settings = settled(flags, *alone, "--init_checkpoint", "outputs/some/mapping")
    assert "--init_checkpoint is ignored: --llm_only trains without a bridge" in capsys.readouterr().err
    assert settings.init_file is None and settings.with_prompt


def test_an_automatic_dev_split_of_nothing_is_said(flags, tmp_path, monkeypatch, capsys):
    import run_training

    monkeypatch.chdir(tmp_path)
    for number, said in ((9, True), (10, False)):
        given = [*flags, "--languages", "Swahili", "--train_num", str(number), "--dev_size", "auto"]
        _, data = run_training.prepare(training_flags.build_parser().parse_args(given))
        assert (len(data.dev), len(data.train)) == ((0, 9) if said else (1, 9))
        assert ("--dev_size auto takes a tenth, none of 9 examples" in capsys.readouterr().err) == said


class Engine:
    """Runs out of memory above a number of tokens of one kind, as logits or encoder states would."""

    def __init__(self, kind, limit):
        self.kind, self.limit, self.backward = kind, limit, lambda *_, **__: None
        self.set_gradient_accumulation_boundary = lambda _: None

    def __call__(self, **batch):
        if int(batch[self.kind].sum()) > self.limit:
            raise torch.OutOfMemoryError("out of memory, as a test has it")
        return SimpleNamespace(loss_sum=torch.zeros(()))


@pytest.mark.parametrize(
    ("kind", "limit", "part", "rows"),
    [
        ("target_mask", 15, "train", "2 rows, longest encoder 2, prompt 1, target 9"),
        ("encoder_attention_mask", 45, "train", "2 rows, longest encoder 24, prompt 2, target 1"),
        ("target_mask", 5, "dev", "1 rows, longest encoder 1, prompt 1, target 6"),
    ],
)
def test_the_memory_probe_takes_the_most_targets_and_sources_as_well_as_the_longest_rows(kind, limit, part, rows):
    """Only the longest merged rows were probed, whose targets may be short: logits then outgrew memory in mid-run."""
    # Encoder, prompt and target tokens of training rows 0 to 4, longest merged first, and of dev rows 5 and 6.
    table = [(20, 20, 3), (20, 20, 3), (24, 2, 1), (23, 2, 1), (2, 1, 9), (2, 1, 8), (9, 9, 2), (1, 1, 6)]
    columns = ("encoder_ids", "prompt_ids", "target_ids")
    stored = {name: [[1] * row[i] for row in table] for i, name in enumerate(columns)}
    lengths = np.array(table)
    data = SimpleNamespace(
        dataset=datasets.Dataset.from_dict(stored),
        **{f"{name}_lengths": lengths[:, i] for i, name in enumerate(("encoder", "prompt", "target"))},
        merged_lengths=lambda prefix_length: 2 + lengths.sum(1),
    )
    args = training_settings.parse(
        ["--train_micro_batch_size_per_gpu", "2", "--eval_batch_size", "1", "--num_workers", "0"]
    )
    ids = SimpleNamespace(encoder_pad_id=0, llm_pad_id=0)
    # On the dev split's turn, training rows with more targets must not come before it.
    train = np.arange(2, 4) if part == "dev" else np.arange(6)
    loader = BatchLoader(args, TrainingData(data, ids, np.arange(6, 8), train), None, torch.device("cpu"))
    run = training_trainer.Run(
        SimpleNamespace(args=args), Engine(kind, limit), loader, total_steps=1, eval_steps=1, save_steps=1
    )
    with pytest.raises(
        UserError, match=f"out of memory on rank 0 with a micro-batch of {rows}".replace(", target", ".*target")
    ):
        guards.probe_memory(run)
    run.engine.limit = 10**6
    guards.probe_memory(run)


@pytest.fixture
def without_tf32():
    """The GPU's setting as torch has it by default, and afterwards as it was."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    yield matmul
    matmul.allow_tf32 = before


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 3])
def test_towers_go_straight_onto_the_gpu_and_the_mapping_takes_tf32_beside_bf16(
    monkeypatch, without_tf32, precision, stage
):
    """ZeRO 3 places the weights itself; fp32 towers keep fp32 products."""
    asked = []
    monkeypatch.setattr(towers, "load_llm", lambda *given: asked.append(given[-1]))
    monkeypatch.setattr(towers, "load_encoder", lambda *given: asked.append(given[-1]))
    monkeypatch.setattr(deepspeed_engine, "sharded_loading", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(MindMerger, "from_towers", lambda *_: 1 / 0)  # far enough
    args = training_settings.parse(["--precision", precision, "--mt_path", "m", "--llm_path", "l"])
    settings = SimpleNamespace(args=args, config={"zero_optimization": {"stage": stage}}, bridge=Mapping(2, 2))
    gpu = torch.device("cuda")
    with pytest.raises(ZeroDivisionError):
        training_trainer.load_model(settings, gpu)
    assert asked == [gpu if stage == 0 else None] * 2
    assert without_tf32.allow_tf32 is (precision == "bf16")


def test_without_a_dev_split_the_last_mapping_is_also_the_best(flags, tmp_path):
    (outcome,) = run_many(tmp_path, [[*flags, "--dev_size", "0", "--max_steps", "1"]])
    assert outcome["code"] == 0, outcome
    folder = next((tmp_path / "outputs").rglob("mapping.safetensors")).parent
    folder = folder.parent if folder.name == "last" else folder
    assert (folder / "mapping.safetensors").read_bytes() == (folder / "last/mapping.safetensors").read_bytes()


def test_help_names_a_default_once():
    text = " ".join(training_flags.build_parser().format_help().split())
    assert "(default: None)" not in text and ") (default" not in text and "(default: 2e-05)" in text


def test_stage_form_and_defaults_follow_the_published_flags():
    parser = training_flags.build_parser()
    published = {
        **{"llm_path": "../LLMs/Llama-2-7b-hf/", "mt_path": "../LLMs/mt5-xl/", "save_name": "MindMerger"},
        **{"lr": 2e-5, "epoch_num": 3, "train_num": 100000, "train_batch_size": 24},
        **{"train_micro_batch_size_per_gpu": 1, "eval_batch_size": 2, "max_seq_len": 512, "max_gen_len": 512},
        **{"dev_size": 3000, "augmentation": None, "task": "translation", "seed": 0, "logging_steps": 10},
    }
    assert {name: parser.get_default(name) for name in published} == published
    args = training_settings.parse([])
    training_settings.settle_stage(args, {})
    assert args.stage_name == "mapping"
    described = [a for a in training_flags.build_parser()._actions if a.help]
    assert len(described) == len(training_flags.build_parser()._actions)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9]),
        ("cosine", [0.5, *[(1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]]),
    ],
)
def test_learning_rate_warms_up_and_decays(scheduler, expected):
    args = training_flags.build_parser().parse_args(["--lr_scheduler", scheduler, "--warmup_ratio", "0.1", "--lr", "2"])
    assert [training_trainer.learning_rate(args, step, total_steps=10) / 2 for step in range(10)] == pytest.approx(
        expected
    )
