"""Runs that are cut short and resumed: what remains must equal an uninterrupted run's, bit for bit."""

import argparse
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_log, run_many, run_prepared
from safetensors.torch import load_file, save_file

from mindmerger.runtime import files as runtime_files
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import write_text_atomic
from mindmerger.training import checkpoints
from mindmerger.training import outputs as training_outputs
from mindmerger.training import settings as training_settings
from mindmerger.training.checkpoints import damage_in, list_checkpoints, newest_valid, write_checkpoint

STEPS = ["--epoch_num", "2", "--eval_steps", "4", "--save_steps", "3", "--logging_steps", "1"]
# Everything of a log line but how fast it went.
EXACT = ("step", "epoch", "loss", "lr", "grad_norm", "target_tokens", "padding_share", "dev_loss", "dev_perplexity")


def exact_log(folder):
    """The log's lines without timings and memory."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in EXACT if key in line} for line in lines]


def assert_same_run(one, two):
    """Equal logs, equal best and last mapping, equal final checkpoint."""
    assert exact_log(one) == exact_log(two)
    newest = sorted(Path(one).glob("checkpoint-*"))[-1].name
    for name in ("mapping.safetensors", "last/mapping.safetensors", f"{newest}/training.safetensors"):
        a, b = load_file(Path(one) / name), load_file(Path(two) / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)
    assert torch.load(Path(one) / "pytorch_model.bin", weights_only=True).keys() == {"model_state_dict"}


def named(flags, name, *more):
    """Flags of a run with an output folder of its own."""
    return [*flags, *STEPS, *more, "--save_name", name]


def stopped_at(argv, step, **fault):
    """An entry for the driver: SIGTERM strikes at the start of a step."""
    return {"argv": argv, "fault": {"step": step, "signal": "SIGTERM", **fault}}


def outputs(tmp_path, name, stage="mapping"):
    """Output folder of a named run."""
    return tmp_path / "outputs" / name / "math" / stage


@pytest.mark.slow
def test_losses_after_a_stop_equal_an_uninterrupted_run(flags, tmp_path):
    """Stopped in mid-epoch, exactly at an epoch's end (13 steps), before a due evaluation, with accumulation, and with
    a scheduler: data order, moments, rate and best mapping must all continue as if nothing had happened."""
    variants = {
        "plain": (5, []),
        "epoch_end": (13, []),
        "evaluation": (8, []),
        "scheduler": (7, ["--lr_scheduler", "cosine", "--warmup_ratio", "0.3"]),
        "cut_by_tokens": (6, ["--micro_batch_tokens", "400", "--train_micro_batch_size_per_gpu", "1"]),
    }
    runs = []
    for name, (step, more) in variants.items():
        whole, cut = named(flags, f"{name}_whole", *more), named(flags, f"{name}_cut", *more)
        runs += [whole, stopped_at(cut, step), cut]
    results = run_many(tmp_path, runs)
    for (name, (step, _)), i in zip(variants.items(), range(0, len(runs), 3), strict=True):
        assert [result["code"] for result in results[i : i + 3]] == [0, 143, 0], results[i : i + 3]
        assert f"resumes from outputs/{name}_cut/math/mapping/checkpoint-{step:06d}" in results[i + 2]["printed"]
        assert_same_run(outputs(tmp_path, f"{name}_whole"), outputs(tmp_path, f"{name}_cut"))


@pytest.mark.slow
def test_an_evaluation_made_up_for_stands_once_in_the_log_however_often_the_run_is_resumed(run, flags, tmp_path):
    """Its checkpoint says that the evaluation is due, also after it has been made: at step 4 before a kill, and at the
    last step."""
    driver, short = ROOT / "tests/drivers/killed.py", ["--max_steps", "7", "--save_steps", "100"]
    whole, cut, ended = (named(flags, name, *short) for name in ("whole", "cut", "ended"))
    # The signal strikes in the step whose evaluation is due: that evaluation is then cut short.
    first = run_many(tmp_path, [whole, stopped_at(cut, 4), stopped_at(ended, 7), ended])
    assert [result["code"] for result in first] == [0, 143, 143, 0], first
    assert run_prepared(driver, "train_step:5", *cut, cwd=tmp_path)[0] == [-signal.SIGKILL]
    assert [result["code"] for result in run_many(tmp_path, [cut, ended])] == [0, 0]
    for name in ("cut", "ended"):
        assert exact_log(outputs(tmp_path, name)) == exact_log(outputs(tmp_path, "whole"))


@pytest.mark.slow
def test_resume_is_exact_at_every_zero_stage_with_two_ranks_and_in_stage_2(flags, tmp_path):
    runs, names = [], []
    for preset in ("ds_zero0", "ds_zero1", "ds_zero2", "ds_zero3"):
        config = ["--deepspeed_config", f"{ROOT}/scripts/{preset}.json", "--max_steps", "7"]
        whole, cut = named(flags, f"{preset}_whole", *config), named(flags, f"{preset}_cut", *config)
        runs += [whole, stopped_at(cut, 5, rank=1), cut]
        names.append((preset, "mapping"))
    first = outputs(Path(), "ds_zero0_whole") / "mapping.safetensors"
    second = ["--stage_name", "augmentation", "--init_checkpoint", str(first), "--max_steps", "7"]
    whole, cut = named(flags, "stage2_whole", *second), named(flags, "stage2_cut", *second)
    runs += [whole, stopped_at(cut, 5, rank=0), cut]
    names.append(("stage2", "augmentation"))
    results = run_many(tmp_path, runs, ranks=2)
    for (name, stage), i in zip(names, range(0, len(runs), 3), strict=True):
        assert [result["code"] for result in results[i : i + 3]] == [0, 143, 0], results[i : i + 3]
        assert_same_run(outputs(tmp_path, f"{name}_whole", stage), outputs(tmp_path, f"{name}_cut", stage))


@pytest.mark.slow
def test_another_world_size_or_zero_stage_continues_with_the_same_global_batches(flags, tmp_path):
    zero2 = ["--deepspeed_config", f"{ROOT}/scripts/ds_zero2.json"]
    short = ["--max_steps", "8"]
    first = [named(flags, "whole", *short), stopped_at(named(flags, "grow", *short), 4)]
    assert [r["code"] for r in run_many(tmp_path, first, ranks=1)] == [0, 143]
    second = [named(flags, "grow", *zero2, *short), stopped_at(named(flags, "shrink", *zero2, *short), 5)]
    assert [r["code"] for r in run_many(tmp_path, second, ranks=2)] == [0, 143]
    assert [r["code"] for r in run_many(tmp_path, [named(flags, "shrink", *short)], ranks=1)] == [0]
    whole = outputs(tmp_path, "whole")
    for name in ("grow", "shrink"):
        for key in ("loss", "dev_loss"):
            found, expected = read_log(outputs(tmp_path, name), key), read_log(whole, key)
            assert len(found) == len(expected)
            assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-5
        assert read_log(outputs(tmp_path, name), "target_tokens") == read_log(whole, "target_tokens")


@pytest.mark.slow
def test_changed_runs_are_refused_by_name_and_schedule_changes_need_a_word(
    flags, tiny_llm, tiny_encoder, datas, tmp_path
):
    from conftest import make_tiny_encoder, make_tiny_llm

    other_data = Path(shutil.copytree(datas, tmp_path / "data"))
    pairs = other_data / "bilingual_pairs/en-sw/train_100k.sw"
    pairs.write_text(pairs.read_text().replace("a", "o", 1))
    other_llm = make_tiny_llm(tmp_path / "llm", seed=9)
    other_encoder = make_tiny_encoder(tmp_path / "mt5", seed=9)
    base = named(flags, "base", "--max_steps", "3")
    save = [base, stopped_at([*base, "--save_name", "signal"], 2)]
    # Another task or stage has another output folder: only an explicit path can bring its checkpoint there.
    explicit = ["--resume_from_checkpoint", str(outputs(Path(), "base") / "checkpoint-000003")]
    mapping = str(outputs(Path(), "base") / "mapping.safetensors")
    cases = [
        (["--seed", "1"], "another seed"),
        (["--data_root", str(other_data)], "another data"),
        (["--llm_path", other_llm], "another llm"),
        (["--mt_path", other_encoder], "another encoder"),
        (["--dev_size", "6"], "another dev_size"),
        (["--precision", "bf16"], "another precision ('fp32', this run has 'bf16' - pass --precision fp32)"),
        (["--augmentation", "True"], "another augmentation"),
        (["--languages", "Swahili,Thai"], "another languages (None, this run has ['sw', 'th'])"),
        (["--train_num", "11"], "another train_num (100000, this run has 11)"),
        (["--max_seq_len", "59"], "another max_seq_len"),
        (["--max_gen_len", "79"], "another max_gen_len"),
        (["--task", "x-csqa", *explicit], "another task ('math', this run has 'x-csqa')"),
        (["--stage_name", "augmentation", "--init_checkpoint", "none", *explicit], "another stage_name"),
        (["--save_name", "initial", "--init_checkpoint", mapping, *explicit], "--allow_changed init_checkpoint"),
        (["--train_batch_size", "4"], "--allow_changed train_batch_size"),
        (["--lr", "0.5"], "--allow_changed lr"),
    ]
    allowed = [*base, "--train_batch_size", "4", "--max_steps", "9", "--allow_changed", "max_steps"]
    allowed += ["--allow_changed", "train_batch_size"]
    results = run_many(tmp_path, [*save, *([*base, *extra] for extra, _ in cases), allowed])
    assert [r["code"] for r in results] == [0, 143, *[2] * len(cases), 0], results
    for (extra, expected), result in zip(cases, results[2:], strict=False):
        assert expected in result["error"], (extra, result)
        assert "\n" not in result["error"]
    assert read_log(outputs(tmp_path, "base"), "step")[-2:] == [9, 9]  # 3 steps of 8, then 6 of 4, then its evaluation
    assert "--train_batch_size was 8, from here on 4" in results[-1]["printed"]


def files_of(folder):
    """Every file below a folder with its content."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.slow
def test_starting_over_never_removes_what_the_run_was_told_to_start_from(flags, tmp_path):
    """The folder used to be emptied first, and only then was the checkpoint or the mapping found missing."""
    argv = named(flags, "kept", "--max_steps", "3")
    assert run_many(tmp_path, [argv])[0]["code"] == 0
    folder = outputs(tmp_path, "kept")
    (tmp_path / "link").symlink_to(folder / "last")
    before = files_of(folder)
    cases = [
        ["--resume_from_checkpoint", str(folder / "checkpoint-000003")],
        ["--init_checkpoint", str(folder)],
        ["--init_checkpoint", "outputs/kept/../kept/math/mapping/pytorch_model.bin"],
        ["--init_checkpoint", str(tmp_path / "link")],
    ]
    results = run_many(tmp_path, [[*argv, "--overwrite_output_dir", *case] for case in cases])
    for case, result in zip(cases, results, strict=True):
        assert result["code"] == 2 and case[0].replace("init_checkpoint", "save_name") in result["error"], result
    assert files_of(folder) == before


# -- checkpoints on disk


def small_checkpoint(folder, step, keep=None):
    """Writes a checkpoint whose tensors say which step it is."""
    tensors = {"mapping.w": torch.full((50,), float(step)), "exp_avg.w": torch.arange(50.0)}
    return write_checkpoint(folder, step, tensors, {"step": step}, keep)


def test_kill_at_every_point_of_a_checkpoint_write_leaves_the_old_or_the_new_one(tmp_path):
    """Each child is killed with SIGKILL at its n-th call that changes the disk, n = 1, 2, … until none is left."""
    calls = ("fsync", "replace", "open", "mkdir", "unlink", "rmdir")
    survived, points = False, 0
    while not survived:
        folder = tmp_path / str(points)
        folder.mkdir()
        small_checkpoint(folder, 1)
        small_checkpoint(folder, 7)
        child = os.fork()
        if child == 0:
            count = [0]

            def counted(original, count=count, limit=points):
                def call(*arguments, **named):
                    if count[0] == limit:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count[0] += 1
                    return original(*arguments, **named)

                return call

            for name in calls:
                setattr(os, name, counted(getattr(os, name)))
            small_checkpoint(folder, 2, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        survived = os.WIFEXITED(status)
        found, skipped = newest_valid(folder)
        assert skipped == []
        step = int(found.name[-6:])
        assert checkpoints.read_checkpoint(found)[0]["mapping.w"].tolist() == [float(step)] * 50
        # Step 7 is of a course that was abandoned for step 1: it never outlives the first checkpoint of the new one.
        assert step != 7 or not (folder / "checkpoint-000002").exists()
        checkpoints.remove_leftovers(folder)
        assert all(damage_in(entry) is None for entry in folder.iterdir())
        # A restart writes the same step again over whatever is there.
        small_checkpoint(folder, 2, keep=1)
        assert [entry.name for entry in folder.iterdir()] == ["checkpoint-000002"]
        points += 1
    assert points > 10


@pytest.mark.slow
def test_kill_9_in_mid_run_and_in_a_checkpoint_write_continues_exactly(run, flags, tmp_path):
    argv = named(flags, "cut", "--max_steps", "8")
    (whole,) = run_many(tmp_path, [named(flags, "whole", "--max_steps", "8")])
    assert whole["code"] == 0
    driver = ROOT / "tests/drivers/killed.py"
    for point in ("train_step:5", "write_checkpoint:2:os.replace:3", "write_checkpoint:1:os.fsync:4"):
        codes, printed = run_prepared(driver, point, *argv, cwd=tmp_path)
        assert codes == [-signal.SIGKILL], (point, printed)
    done = run(ROOT / "run_training.py", *argv)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumes from" in done.stderr
    assert_same_run(outputs(tmp_path, "whole"), outputs(tmp_path, "cut"))
    assert not list(outputs(tmp_path, "cut").rglob("*.tmp"))


@pytest.mark.slow
def test_a_resume_from_an_older_checkpoint_keeps_the_new_work_and_drops_the_abandoned(flags, tmp_path):
    """The abandoned checkpoint had the higher number: it was kept, resumed from, and the new one pruned at once."""
    argv = named(flags, "turned", "--max_steps", "7")
    older = outputs(Path(), "turned") / "checkpoint-000003"
    turned = [*argv, "--resume_from_checkpoint", str(older), "--lr", "2e-2", "--allow_changed", "lr"]
    turned += ["--save_total_limit", "1"]
    after = [*argv, "--lr", "2e-2"]
    first, second, third = run_many(tmp_path, [stopped_at(argv, 6), stopped_at(turned, 5), after])
    assert [first["code"], second["code"], third["code"]] == [143, 143, 0], (second, third)
    assert "the first new checkpoint replaces checkpoint-000006" in second["printed"]
    assert "resumes from outputs/turned/math/mapping/checkpoint-000005 at step 5" in third["printed"]
    assert read_log(outputs(tmp_path, "turned"), "lr") == [1e-2] * 3 + [2e-2] * 4


def cut_short(file):
    os.truncate(file, file.stat().st_size - 1)


def nest_too_deep(file):
    file.write_text("[" * 100_000 + "]" * 100_000 + "}\n")


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_short, flip_a_byte, nest_too_deep, Path.unlink])
@pytest.mark.parametrize("name", [checkpoints.TENSORS, checkpoints.STATE, checkpoints.MANIFEST])
def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(tmp_path, name, damage):
    """safetensors loads a flipped data byte silently; only the manifest's sha256 sees it."""
    older, newer = small_checkpoint(tmp_path, 1), small_checkpoint(tmp_path, 2)
    damage(newer / name)
    found, skipped = newest_valid(tmp_path)
    assert found == older
    assert len(skipped) == 1 and "checkpoint-000002" in skipped[0] and name in skipped[0]
    with pytest.raises(UserError, match=rf"checkpoint-000002 is damaged.*{name}"):
        checkpoints.read_checkpoint(newer)
    small_checkpoint(tmp_path, 3, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [
        "checkpoint-000003",
        "checkpoint-000002",
        older.name,
    ]


def test_linked_checkpoint_folders_are_unlinked_where_folders_would_be_removed(tmp_path):
    """rmtree refuses links: pruning left them behind, the next removal of that number met one and failed, and starting
    over resumed from one."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    for step in (1, 2, 3):
        small_checkpoint(elsewhere, step)
    before = files_of(elsewhere)
    folder.mkdir()

    def link(name, step=1):
        (folder / name).symlink_to(elsewhere / f"checkpoint-{step:06d}")

    link("checkpoint-000001")
    link("checkpoint-000002", 2)
    link("checkpoint-000001.old.tmp")
    link("checkpoint-000003.tmp")
    small_checkpoint(folder, 2, keep=1)
    link("checkpoint-000003", 9)  # dangling
    small_checkpoint(folder, 3, keep=1)
    checkpoints.remove_leftovers(folder)
    assert [entry.name for entry in folder.iterdir()] == ["checkpoint-000003"]
    link("checkpoint-000004")
    (folder / "last").symlink_to(elsewhere)
    training_outputs.clear_outputs(folder)
    assert list(folder.iterdir()) == [] and files_of(elsewhere) == before


def test_a_damaged_later_checkpoint_outlives_a_new_one(tmp_path):
    """What is damaged is never resumed from; after a file system failed for a while it may be the only work left."""
    small_checkpoint(tmp_path, 7)
    cut_short(tmp_path / "checkpoint-000007" / checkpoints.TENSORS)
    small_checkpoint(tmp_path, 2, keep=1)
    assert [entry.name for entry in list_checkpoints(tmp_path)] == ["checkpoint-000007", "checkpoint-000002"]


def test_an_old_checkpoint_that_cannot_be_removed_is_warned_of_and_the_new_one_stands(tmp_path, monkeypatch, capsys):
    small_checkpoint(tmp_path, 1)

    def refuse(folder):
        raise OSError(30, "Read-only file system", str(folder))

    monkeypatch.setattr(checkpoints, "remove_atomically", refuse)
    new = small_checkpoint(tmp_path, 2, keep=1)
    assert damage_in(new) is None and newest_valid(tmp_path)[0] == new
    assert "cannot remove an old checkpoint" in capsys.readouterr().err


def test_starting_over_ends_when_a_checkpoint_cannot_be_removed(tmp_path, monkeypatch):
    folder = small_checkpoint(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(UserError, match=f"cannot remove {folder}"):
        training_outputs.clear_outputs(tmp_path)


@pytest.mark.slow
def test_training_skips_a_damaged_checkpoint_by_name_and_refuses_it_when_named(flags, tmp_path):
    argv = named(flags, "cut", "--max_steps", "7")
    results = run_many(tmp_path, [named(flags, "whole", "--max_steps", "7"), stopped_at(argv, 5)])
    assert [r["code"] for r in results] == [0, 143]
    newest = outputs(tmp_path, "cut") / "checkpoint-000005"
    flip_a_byte(newest / checkpoints.TENSORS)
    named_one = [*argv, "--resume_from_checkpoint", str(newest)]
    refused, resumed = run_many(tmp_path, [named_one, argv])
    assert refused["code"] == 2 and "sha256" in refused["error"]
    assert resumed["code"] == 0
    assert "skipped checkpoint-000005: training.safetensors differs from its sha256" in resumed["printed"]
    assert "resumes from outputs/cut/math/mapping/checkpoint-000003" in resumed["printed"]
    assert_same_run(outputs(tmp_path, "whole"), outputs(tmp_path, "cut"))


def remade(original, folder, change=None, tensors=None, text=None):
    """A copy of a checkpoint with another content and a manifest that vouches for it.

    `change` gets the state and may change it in place; `text` replaces the state file, `tensors` the tensors.
    """
    shutil.copytree(original, folder)
    state = json.loads((folder / checkpoints.STATE).read_text())
    if change is not None:
        change(state)
    write_text_atomic(folder / checkpoints.STATE, json.dumps(state) if text is None else text)
    if tensors is not None:
        save_file(tensors, folder / checkpoints.TENSORS)
    return vouched_for(folder)


def vouched_for(folder):
    """The folder, with a new manifest for what its two files now hold."""
    files = {name: runtime_files.describe_file(folder / name) for name in ("training.safetensors", "state.json")}
    write_text_atomic(folder / checkpoints.MANIFEST, json.dumps({"files": files}) + "\n")
    return folder


@pytest.mark.slow
def test_checkpoints_of_foreign_content_are_refused_in_one_line_and_those_of_older_versions_resume(flags, tmp_path):
    """The manifest vouches for bytes, not for what they mean."""
    argv = named(flags, "real", "--max_steps", "4")
    assert run_many(tmp_path, [stopped_at(argv, 3)])[0]["code"] == 143
    original = outputs(tmp_path, "real") / "checkpoint-000003"
    tensors = load_file(original / checkpoints.TENSORS)
    moment = "exp_avg_sq.end_boundary"
    states = {
        "empty": ("{}", "step in state.json is missing"),
        "list": ("[]", "must hold an object"),
        "deep": ('{"step": ' + "[" * 100_000 + "]" * 100_000 + "}", "state.json"),
    }
    changes = {
        "no_due": (lambda state: state.pop("evaluation_due"), "evaluation_due in state.json is missing"),
        "text_step": (lambda state: state.update(step="3"), "step in state.json is '3'"),
        "nan_loss": (lambda state: state.update(best_dev_loss=float("nan")), "best_dev_loss in state.json is nan"),
        "identity": (lambda state: state.update(identity=[]), "identity in state.json is []"),
        "no_seed": (lambda state: state["identity"].pop("seed"), "another seed (None, this run has 0)"),
    }
    contents = {
        "no_moment": ({k: v for k, v in tensors.items() if k != moment}, f"missing ['{moment}']"),
        "foreign": ({"weight": torch.zeros(2)}, "unknown ['weight']"),
        "shape": (tensors | {moment: torch.zeros(3, 5)}, f"{moment} is (3, 5)"),
        "dtype": (tensors | {moment: tensors[moment].bfloat16()}, f"{moment} is (1, 1, 32) in torch.bfloat16"),
    }
    cases = [(remade(original, tmp_path / name, text=text), part) for name, (text, part) in states.items()]
    cases += [(remade(original, tmp_path / name, change=change), part) for name, (change, part) in changes.items()]
    cases += [(remade(original, tmp_path / name, tensors=other), part) for name, (other, part) in contents.items()]

    def as_before(state):
        for name in training_outputs.ABSENT_IN_OLD_CHECKPOINTS:
            del state["identity"][name]

    older = remade(original, tmp_path / "older", change=as_before)
    paths = [folder for folder, _ in cases] + [older]
    results = run_many(tmp_path, [[*argv, "--resume_from_checkpoint", str(path)] for path in paths])
    for (folder, expected), result in zip(cases, results, strict=False):
        assert result["code"] == 2 and "\n" not in result["error"], result
        assert str(folder) in result["error"] and expected in result["error"], (expected, result["error"])
    assert results[-1]["code"] == 0 and f"resumes from {older} at step 3" in results[-1]["printed"], results[-1]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.slow
def test_pickles_in_checkpoints_and_model_folders_are_not_executed(flags, tiny_llm, tmp_path):
    witness = tmp_path / "executed"
    folder = small_checkpoint(tmp_path / "checkpoints", 1)
    (folder / checkpoints.TENSORS).write_bytes(pickle.dumps(Payload(witness)))
    (folder / "optimizer.bin").write_bytes(pickle.dumps(Payload(witness)))
    vouched_for(folder)
    deepspeed = tmp_path / "deepspeed/global_step5/mp_rank_00_model_states.pt"
    deepspeed.parent.mkdir(parents=True)
    torch.save({"module": Payload(witness)}, deepspeed)
    as_zip = Path(shutil.copytree(folder, tmp_path / "zip"))
    shutil.copy(deepspeed, as_zip / checkpoints.TENSORS)
    for path, refused in (
        (folder, folder / "training.safetensors"),
        (vouched_for(as_zip), as_zip / "training.safetensors"),
        (tmp_path / "deepspeed", deepspeed),
        (deepspeed.parent, deepspeed),
    ):
        with pytest.raises(UserError, match=rf"{refused} is a pickle.*safetensors.torch.save_file.*--init_checkpoint"):
            checkpoints.read_checkpoint(path)
    with pytest.raises(UserError, match=rf"{deepspeed} is a file, .* --init_checkpoint"):
        checkpoints.read_checkpoint(deepspeed)
    llm = Path(shutil.copytree(tiny_llm, tmp_path / "llm"))
    (llm / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(witness)}, llm / "pytorch_model.bin")
    (result,) = run_many(tmp_path, [[*flags, "--llm_path", str(llm)]])
    assert result["code"] == 2 and str(llm) in result["error"] and "safetensors" in result["error"], result
    assert not witness.exists()


# -- the disk, the numbers, the memory


@pytest.mark.slow
def test_a_full_disk_names_path_and_bytes_and_leaves_earlier_work_valid(run, flags, tmp_path):
    """A limit on file sizes stops a write in its middle, as a full disk does."""
    argv = named(flags, "full", "--max_steps", "3")
    (first,) = run_many(tmp_path, [argv])
    assert first["code"] == 0
    folder = outputs(tmp_path, "full")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "checkpoint" in str(p)}
    more = [*argv, "--max_steps", "6", "--allow_changed", "max_steps"]
    limit = 12_000  # the checkpoint's tensors take about 20 kB, the mapping alone 7 kB

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run(ROOT / "run_training.py", *more, preexec_fn=limited)
    assert done.returncode == 2, done.stderr[-2000:]
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "training.safetensors" in error[0] and "bytes" in error[0], error
    assert "Traceback" not in done.stderr
    assert {p: p.read_bytes() for p in before} == before
    assert damage_in(folder / "checkpoint-000003") is None
    assert not list(folder.rglob("*.tmp"))
    load_file(folder / "mapping.safetensors")
    resumed, whole = run_many(tmp_path, [more, named(flags, "whole", "--max_steps", "6")])
    assert resumed["code"] == whole["code"] == 0, (resumed, whole)
    assert exact_log(folder)[-4:] == exact_log(outputs(tmp_path, "whole"))[-4:]


def test_a_full_tmpfs_leaves_the_earlier_checkpoint_valid(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("this machine does not let the test mount a small tmpfs")
    try:
        small_checkpoint(disk, 1)
        with pytest.raises(UserError, match=r"cannot write .*training.safetensors \(\d+ bytes\): No space left"):
            write_checkpoint(disk, 2, {"mapping.w": torch.zeros(30_000)}, {"step": 2}, 1)
        assert [entry.name for entry in disk.iterdir()] == ["checkpoint-000001"]
        assert damage_in(disk / "checkpoint-000001") is None
    finally:
        subprocess.run([shutil.which("umount"), str(disk)], check=True)


@pytest.mark.slow
def test_a_nan_on_one_rank_stops_all_before_the_update_and_names_the_examples(flags, tmp_path):
    """At ZeRO 0 nothing in DeepSpeed looks, and the weights would be lost."""
    entries = [named(flags, "whole", "--max_steps", "6")]  # first: ZeRO-3 replaces torch's linear function for good
    for preset in ("ds_zero0", "ds_zero1", "ds_zero3"):
        argv = named(flags, preset, "--deepspeed_config", f"{ROOT}/scripts/{preset}.json", "--max_steps", "6")
        entries += [{"argv": argv, "fault": {"step": 5, "rank": 1, "nan": True}}, argv]
    results = run_many(tmp_path, entries, ranks=2)
    for broken, resumed in zip(results[1::2], results[2::2], strict=True):
        assert broken["code"] == 2, broken
        assert "at step 5 is not finite" in broken["error"] and "examples: " in broken["error"]
        assert "-" in broken["error"].split("examples: ")[1].split(";")[0]
        assert resumed["code"] == 0 and "checkpoint-000003 at step 3" in resumed["printed"]
    assert_same_run(outputs(tmp_path, "whole"), outputs(tmp_path, "ds_zero0"))


@pytest.mark.slow
def test_an_infinite_gradient_of_a_finite_loss_stops_all_before_the_update(flags, tmp_path):
    """The loss alone shows nothing, and one more step would be too late."""
    entries = []
    for preset in ("ds_zero0", "ds_zero1", "ds_zero3"):
        argv = named(flags, preset, "--deepspeed_config", f"{ROOT}/scripts/{preset}.json", "--max_steps", "6")
        entries.append({"argv": argv, "fault": {"step": 5, "rank": 1, "infinite_gradient": True}})
    for entry, broken in zip(entries, run_many(tmp_path, entries, ranks=2), strict=True):
        assert broken["code"] == 2, broken
        loss, norm = re.match(r"loss (\S+) with gradient norm (\S+) at step 5 is not finite", broken["error"]).groups()
        assert math.isfinite(float(loss)) and not math.isfinite(float(norm)), broken["error"]
        folder = outputs(tmp_path, entry["argv"][entry["argv"].index("--save_name") + 1])
        assert newest_valid(folder)[0].name == "checkpoint-000003"


@pytest.mark.slow
def test_a_dev_loss_that_is_not_finite_stops_all_and_keeps_the_best_mapping(flags, tmp_path):
    """It continued silently: the log got a NaN, which is not JSON, and no mapping was ever the best again."""
    argv = named(flags, "dev", "--max_steps", "8", "--eval_steps", "2")
    (broken,) = run_many(tmp_path, [{"argv": argv, "fault": {"step": 4, "rank": 1, "dev_nan": True}}], ranks=2)
    assert broken["code"] == 2 and "dev loss nan at step 4 is not finite" in broken["error"], broken
    folder = outputs(tmp_path, "dev")
    assert "NaN" not in (folder / "log.jsonl").read_text()
    assert newest_valid(folder)[0].name == "checkpoint-000003"
    best, last = (load_file(folder / name) for name in ("mapping.safetensors", "last/mapping.safetensors"))
    assert all(torch.equal(best[name], last[name]) for name in best)  # both are those of step 2


@pytest.mark.slow
def test_an_error_stands_on_a_line_of_its_own_below_the_progress_bar(flags, tmp_path):
    argv = named(flags, "bar", "--max_steps", "6")
    (broken,) = run_many(tmp_path, [{"argv": argv, "fault": {"step": 5, "nan": True}}])
    assert broken["printed"].splitlines()[-1].startswith("error: loss nan"), broken["printed"][-300:]


@pytest.mark.slow
def test_running_out_of_memory_is_known_before_training_and_names_the_flags(flags, tmp_path):
    """The dev split has micro-batches of its own. In the update Adam's moments come on top, at the first step."""
    places = {
        "forward": ("2 rows", "--train_micro_batch_size_per_gpu", "--gradient_checkpointing"),
        "dev": ("3 rows", "lower --eval_batch_size"),
        "update": ("2 rows", "in the update of step 1", "--deepspeed_config"),
    }
    more = ["--eval_batch_size", "3"]
    entries = [{"argv": named(flags, place, *more), "fault": {"memory": place}} for place in places]
    for (place, expected), result in zip(places.items(), run_many(tmp_path, entries), strict=True):
        assert result["code"] == 2
        for part in (*expected, "encoder ", "target "):
            assert part in result["error"], (part, result["error"])
        assert (outputs(tmp_path, place) / "log.jsonl").read_text() == ""


@pytest.mark.slow
def test_folders_whose_names_are_not_utf_8_hold_a_run_and_its_continuation_in_ascii(run, flags, datas, tmp_path):
    """Settings with such a path could not be written, and safetensors opens no file below one."""
    data, out = (os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/datas\xff", b"/out\xff"))
    shutil.copytree(datas, data)
    argv = [*flags, "--data_root", data, "--output_dir", out]
    first = [[*argv, "--max_steps", "2"]]
    second = [[*argv, "--max_steps", "3", "--allow_changed", "max_steps"]]
    second += [[*argv, "--max_steps", "1", "--stage_name", "augmentation"]]
    (tmp_path / "runs.json").write_text(json.dumps([*first, *second]))
    done = run(
        *(ROOT / "tests/drivers/many_runs.py", tmp_path / "runs.json", tmp_path / "outcomes.json"),
        env={"PYTHONIOENCODING": "ascii"},  # read when Python starts: no fork of a prepared process has it
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for outcome in json.loads((tmp_path / "outcomes.json").read_text()):
        assert outcome["code"] == 0, outcome
    stage = Path(out, "MindMerger/math/mapping")
    assert len(read_log(stage)) == 3
    assert json.loads((stage / "args.json").read_text(encoding="utf-8"))["arguments"]["output_dir"] == out


@pytest.mark.slow
def test_running_out_of_memory_while_models_are_placed_is_one_line(flags, tmp_path):
    """And so is a bucket that no memory holds, which torch reports as another error on the host."""
    config = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 4e12}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    entries = [{"argv": named(flags, "placing"), "fault": {"memory": "placing"}}]
    entries += [{"argv": named(flags, "bucket", "--deepspeed_config", str(tmp_path / "ds.json"))}]
    placing, bucket = run_many(tmp_path, entries)
    assert placing["code"] == bucket["code"] == 2
    assert "while the models are placed on cpu" in placing["error"] and "ds_zero3.json" in placing["error"]
    assert bucket["error"].startswith("out of memory on rank 0") and "\n" not in bucket["error"] + placing["error"]


def test_a_resume_from_an_output_folder_takes_its_newest_valid_checkpoint(flags, tmp_path, capsys):
    folder = tmp_path / "stage"
    args = training_settings.parse([*flags, "--resume_from_checkpoint", str(folder)])
    settings, data = training_settings.settle(args), argparse.Namespace(fingerprint="data")
    shapes = dict(settings.bridge.named_parameters())
    kinds = ("mapping", "exp_avg", "exp_avg_sq")
    tensors = {f"{kind}.{name}": torch.zeros(p.shape) for name, p in shapes.items() for kind in kinds}
    state = {"epoch": 0, "examples_in_epoch": 8, "best_dev_loss": None, "evaluation_due": False}
    state["identity"] = training_outputs.identity(settings, data)
    for step in (1, 2, 3):
        write_checkpoint(folder, step, tensors, state | {"step": step}, None)
    (folder / "checkpoint-000003" / "state.json").write_text("{}")
    found, _, state = training_outputs.find_checkpoint_to_resume(settings, data)
    assert (found.name, state["step"]) == ("checkpoint-000002", 2)
    assert "skipped checkpoint-000003" in capsys.readouterr().err
    for step in (1, 2):
        (folder / f"checkpoint-00000{step}" / "state.json").unlink()
    with pytest.raises(UserError, match="no checkpoint in .*stage is whole"):
        training_outputs.find_checkpoint_to_resume(settings, data)


def test_dry_run_reports_and_writes_nothing(run, flags, tmp_path):
    done = run(
        ROOT / "run_training.py",
        *named(flags, "dry"),
        "--dry_run",
        "--deepspeed_config",
        f"{ROOT}/scripts/ds_zero3.json",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for part in (
        "steps per epoch: 13; in all: 26",
        "1,632 trained in fp32",
        "at ZeRO 3",
        "nothing was written",
        "% of the 19.5 TFLOP/s",
    ):
        assert part in done.stdout, (part, done.stdout)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_the_memory_estimate_of_a_dry_run_leaves_out_what_is_offloaded(flags, tmp_path):
    lines = {}
    for preset in ("ds_zero2", "ds_zero2_offload", "ds_zero3_offload"):
        config = ["--deepspeed_config", f"{ROOT}/scripts/{preset}.json", "--dry_run"]
        codes, (printed,) = run_prepared(ROOT / "run_training.py", *flags, *config, cwd=tmp_path)
        assert codes == [0], printed[-2000:]
        start = ("memory on", "offloaded")
        lines[preset] = " ".join(line for line in printed.splitlines() if line.startswith(start))
    assert "GB mapping, gradient and Adam;" in lines["ds_zero2"] and "offloaded" not in lines["ds_zero2"]
    assert "GB mapping, gradient;" in lines["ds_zero2_offload"] and "0.000 GB Adam;" in lines["ds_zero2_offload"]
    assert " 0.000 GB frozen weights, 0.000 GB gradient;" in lines["ds_zero3_offload"]
    assert "GB Adam, frozen weights, mapping;" in lines["ds_zero3_offload"]


def test_no_code_loads_pickles_without_weights_only():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.py"), *ROOT.glob("mindmerger/**/*.py")]
    assert len(sources) > 50
    for path in sources:
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text(encoding="utf-8")):
            assert "weights_only=True" in call, (path, call)
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bpickle\.loads?\(|allow_pickle=True|trust_remote_code=True", text), path
