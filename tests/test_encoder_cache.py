"""States of the frozen encoder that are computed once: what training reads, what the disk holds, what is refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny_encoder, read_log, run_prepared
from safetensors.torch import load_file, save_file
from test_dev_accuracy import LANGUAGES, option_rows, stage_flags, write_rows
from test_faults_ranks import training
from test_faults_resume import assert_same_run

from mindmerger.bridges import BRIDGES
from mindmerger.data.encoder_states import EncoderStates, bits
from mindmerger.data.loader import BatchLoader, TrainingData
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.signals import half_written
from mindmerger.runtime.watch import clear_away
from mindmerger.training import encoder_cache
from mindmerger.training import settings as training_settings

FLAG = "--cache_encoder_states"
STEPS = ["--epoch_num", "2", "--max_steps", "18", "--eval_steps", "6", "--save_steps", "5", "--logging_steps", "1"]
# Rows beside a row change the last bits of its states in fp32, and so of a loss.
ROUNDING = 1e-5
OPTIONS = {"langbridge": ["train_lm_head=true"], "layer_fusion": ["mix=token", "feed_forward=24"]}


def launch(folder, entries, ranks=1):
    """Outcomes of runs in one launch of drivers/cached.py; their states lie in `folder/cache` unless they say where."""
    entries = [{"cache": str(folder / "cache"), **(one if isinstance(one, dict) else {"argv": one})} for one in entries]
    (folder / "runs.json").write_text(json.dumps(entries))
    command = (ROOT / "tests/drivers/cached.py", folder / "runs.json", folder / "outcomes.json")
    codes, printed = run_prepared(*command, cwd=folder, ranks=ranks)
    assert codes == [0] * ranks, "\n".join(printed)[-3000:]
    return json.loads((folder / "outcomes.json").read_text())


def output(folder, name, stage="mapping", task="math"):
    """Output folder of a named run."""
    return folder / "outputs" / name / task / stage


def states_in(folder):
    """The folders of states in a cache."""
    return sorted((folder / "mindmerger").glob("states-*"))


def left_over(folder):
    """What an interrupted computation would leave in a cache."""
    return [*(folder / "mindmerger").glob(".states-*.tmp"), *states_in(folder)]


@pytest.fixture
def named(flags):
    """Flags of a named run of 18 steps, of which 13 are the first epoch."""
    return lambda name, *more: [*flags, *STEPS, "--save_name", name, *more]


# -- what training reads


def test_states_from_disk_train_as_the_encoder_does_in_both_epochs(named, tmp_path):
    """To the bit where the encoder sees the same rows at once, here one; else their company shows in the last bits."""
    alone = ["--train_micro_batch_size_per_gpu", "1", "--eval_batch_size", "1"]
    off, on, packed, off_alone, on_alone = launch(
        tmp_path,
        [
            named("off"),
            named("on", FLAG),
            named("packed", FLAG, "--packing"),
            named("off_alone", *alone),
            {"argv": named("on_alone", *alone, FLAG), "tokens": 1, "cache": str(tmp_path / "alone")},
        ],
    )
    assert [one["code"] for one in (off, on, packed, off_alone, on_alone)] == [0] * 5, on
    assert_same_run(output(tmp_path, "off_alone"), output(tmp_path, "on_alone"))
    for key in ("loss", "dev_loss", "grad_norm"):
        expected, found, without_padding = (read_log(output(tmp_path, name), key) for name in ("off", "on", "packed"))
        assert found == pytest.approx(expected, rel=ROUNDING) and len(found) == (4 if key == "dev_loss" else 18)
        assert without_padding == pytest.approx(expected, rel=ROUNDING)
    # With and without, a run leaves the same files, and the same configuration beside its mapping.
    ends = [output(tmp_path, name) for name in ("off", "on")]
    assert [sorted(p.name for p in end.iterdir()) for end in ends][0] == sorted(p.name for p in ends[1].iterdir())
    assert (ends[0] / "config.json").read_text() == (ends[1] / "config.json").read_text()
    recorded = [json.loads((end / "args.json").read_text())["arguments"]["cache_encoder_states"] for end in ends]
    assert recorded == [False, True]


def test_a_stopped_run_that_resumes_with_states_from_disk_equals_an_uninterrupted_one(named, tmp_path):
    entries = [named("whole", FLAG)]
    for name, step in (("middle", 7), ("second_epoch", 15)):
        entries += [{"argv": named(name, FLAG), "fault": {"step": step, "signal": "SIGTERM"}}, named(name, FLAG)]
    # The flag changes the way and not the result: a resumed run may take it up or drop it.
    for name, first, then in (("added", [], [FLAG]), ("dropped", [FLAG], [])):
        entries += [
            {"argv": named(name, *first), "fault": {"step": 7, "signal": "SIGTERM"}},
            named(name, *then),
        ]
    outcomes = launch(tmp_path, entries)
    assert [one["code"] for one in outcomes] == [0] + [143, 0] * 4, outcomes
    for name in ("middle", "second_epoch"):
        assert_same_run(output(tmp_path, "whole"), output(tmp_path, name))
    for name in ("added", "dropped"):
        assert read_log(output(tmp_path, name)) == pytest.approx(read_log(output(tmp_path, "whole")), rel=ROUNDING)


def test_a_run_killed_in_a_step_continues_exactly(run, named, tmp_path):
    """SIGKILL leaves no time to close a file of states."""
    env = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    driver, argv = ROOT / "tests/drivers/killed.py", named("cut", FLAG, "--max_steps", "9")
    assert run(driver, "train_step:8", *argv, env=env).returncode == -signal.SIGKILL
    again, whole = launch(tmp_path, [argv, named("whole", FLAG, "--max_steps", "9")])
    assert (again["code"], whole["code"], again["encoders"]) == (0, 0, 0), again
    assert_same_run(output(tmp_path, "whole"), output(tmp_path, "cut"))


def test_every_bridge_trains_on_states_from_disk(tiny_llm, tiny_encoder, datas, tmp_path):
    """Bridges read one layer, some, or all of them; LayAlign's memory is masked as the encoder's tokens are."""
    common = [
        *("--llm_path", tiny_llm, "--mt_path", tiny_encoder, "--data_root", datas, "--task", "math"),
        *("--precision", "fp32", "--dev_size", "1", "--train_batch_size", "2", "--train_micro_batch_size_per_gpu", "2"),
        *("--max_seq_len", "40", "--max_gen_len", "60", "--lr", "1e-2", "--num_workers", "1", "--max_steps", "3"),
        *("--init_checkpoint", "none", "--languages", "en,sw", "--gradient_checkpointing", "--eval_steps", "3"),
    ]
    names, entries = [name for name in BRIDGES if name != "toy"], []
    for name in names:
        bridge = BRIDGES[name]
        stage = list(bridge.stages)[-1]
        argv = [*common, "--bridge", name, "--stage_name", stage]
        argv += [part for option in OPTIONS.get(name, []) for part in ("--bridge_option", option)]
        if bridge.stages[stage].data == "english_task":
            argv += ["--languages", "en"]
        entries += [[*argv, "--save_name", f"{name}-off"], [*argv, "--save_name", f"{name}-on", FLAG]]
    adapter = [*common, "--stage_name", "adapter", "--init_checkpoint", "outputs/mindmerger-off/math/augmentation"]
    entries += [[*adapter, "--save_name", "adapter-off"], [*adapter, "--save_name", "adapter-on", FLAG]]
    outcomes = launch(tmp_path, entries)
    assert [one["code"] for one in outcomes] == [0] * len(entries), [one["error"] for one in outcomes]
    for name in [*names, "adapter"]:
        off, on = (next((tmp_path / f"outputs/{name}-{way}/math").iterdir()) for way in ("off", "on"))
        for key in ("loss", "dev_loss", "grad_norm"):
            assert read_log(on, key) == pytest.approx(read_log(off, key), rel=10 * ROUNDING), (name, key)
    # MindMerger, XBridge and the adapter read one layer of the same rows, LangBridge that of other texts.
    files = states_in(tmp_path / "cache")
    read = [json.loads((one / "manifest.json").read_text())["layers"] for one in files]
    assert sorted(read) == [[-1], [-1], [-1, 0, 1], [1, -1]]


def test_the_dev_accuracy_is_the_same_with_states_from_disk(flags, tmp_path):
    for code in LANGUAGES:
        write_rows(tmp_path / f"data/query_translation/x-csqa/train_{code}.jsonl", option_rows(code))
    argv = stage_flags(flags, tmp_path / "data")
    off, on = launch(tmp_path, [[*argv, "--save_name", "off"], [*argv, "--save_name", "on", FLAG]])
    assert (off["code"], on["code"], on["encoders"]) == (0, 0, 1), on
    ends = [output(tmp_path, name, "augmentation", "x-csqa") for name in ("off", "on")]
    assert read_log(ends[0], "dev_accuracy") == read_log(ends[1], "dev_accuracy") != []


def test_a_model_without_its_encoder_reads_states_and_refuses_ids_alone(tiny_encoder, tiny_llm):
    whole = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    towers = whole.mapping.towers
    torch.manual_seed(0)
    without = MindMerger.from_towers(None, whole.llm, tiny_encoder, tiny_llm, towers=towers)
    without.mapping.load_state_dict(whole.mapping.state_dict())
    assert without.encoder is None and without.config == whole.config
    ids, mask = torch.full((2, 6), 7), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    batch = {"encoder_input_ids": ids, "encoder_attention_mask": mask, "prompt_ids": ids, "prompt_mask": mask}
    target = {"target_ids": ids, "target_mask": torch.ones_like(mask)}
    states, _ = whole.encode(ids, mask)
    expected, found = whole(**batch, **target).loss, without(**batch, **target, encoder_states=states).loss
    assert torch.equal(expected, found)
    labels = {name: tensor[:, None].expand(2, 3, 6) for name, tensor in target.items()}
    scores = [model(**batch, **labels, encoder_states=states).label_losses for model in (whole, without)]
    assert torch.equal(*scores)
    for call in (lambda: without(**batch, **target), lambda: without.generate(ids, mask)):
        with pytest.raises(UserError, match="this model was built without its encoder: give it encoder_states"):
            call()


# -- the way from the file to a batch


@pytest.fixture
def stored(tmp_path):
    """Random states of rows of different lengths in a file, one row without any token, and each row's."""
    lengths = np.array([3, 0, 5, 1, 4])
    rows = [torch.randn(n, 2, 6, generator=torch.Generator().manual_seed(7)).bfloat16() for n in lengths]
    (tmp_path / "states.bin").write_bytes(b"".join(bits(one).tobytes() for one in rows))
    return EncoderStates(tmp_path / "states.bin", lengths, 2, 6, torch.bfloat16), rows


def test_rows_come_padded_as_they_were_written(stored):
    states, rows = stored
    found = states.padded(np.array([4, 1, 2, 4]))
    assert found.shape == (2, 4, 5, 6) and found.dtype == torch.bfloat16 and all(one.is_contiguous() for one in found)
    for i, row in enumerate((4, 1, 2, 4)):
        n = len(rows[row])
        assert torch.equal(found[:, i, :n], rows[row].transpose(0, 1)) and not found[:, i, n:].any()


def test_states_wait_in_pinned_memory_and_move_with_the_ids(stored, monkeypatch):
    """A copy out of other memory waits for the GPU."""
    states, _ = stored
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    columns = {"encoder_ids": [[3] * n for n in states.lengths]}
    columns |= {name: [[3, 3]] * len(states.lengths) for name in ("prompt_ids", "target_ids")}
    examples = SimpleNamespace(dataset=datasets.Dataset.from_dict(columns), merged_lengths=lambda _: states.lengths)
    data = TrainingData(examples, SimpleNamespace(encoder_pad_id=0, llm_pad_id=0), None, None, None, states)
    loader = BatchLoader(SimpleNamespace(), data, None, torch.device("cuda"))
    batch = loader._collated(np.array([0, 2]))
    assert {"encoder_states"} < batch.tensors.keys() == batch.arguments.keys() and len(batch) == 2
    assert any(batch.encoder_states is one for one in pinned) and len(pinned) == 7
    assert batch.encoder_states.shape[2] == batch.encoder_input_ids.shape[1] == 5
    moved = batch.to("meta")
    assert moved.encoder_states.is_meta and moved.encoder_input_ids.is_meta and not moved.encoder_attention_mask.is_meta
    assert loader._collated(np.array([1])).encoder_states is None


def test_pages_of_the_states_are_given_back(tmp_path):
    """A process that reads rows at random soon counted the whole file as its own memory."""
    lengths = np.full(64, 256)
    with open(tmp_path / "states.bin", "wb") as file:
        file.write(np.random.RandomState(0).bytes(64 * 256 * 2 * 256 * 4))
    os.symlink(tmp_path / "states.bin", tmp_path / "link")
    states = EncoderStates(tmp_path / "link", lengths, 2, 256, torch.float32)

    def resident():
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith(str(tmp_path / "states.bin")))
        return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))

    before = [states.padded(np.array([row])) for row in range(64)]
    assert resident() > 20_000  # of 33,554 kB
    examples = SimpleNamespace(release_pages=lambda: None, merged_lengths=lambda _: lengths)
    data = TrainingData(examples, None, None, None, None, states)
    BatchLoader(None, data, None, torch.device("cpu")).release_pages()
    assert resident() < 2_000
    assert all(torch.equal(bits_of(states.padded(np.array([row]))), bits_of(before[row])) for row in range(64))


def bits_of(tensor):
    """The bits of random numbers, some of which are not numbers."""
    return tensor.view(torch.int32)


# -- what the disk holds


def test_a_second_run_finds_the_states_and_loads_no_encoder(named, tmp_path):
    short = ["--max_steps", "2"]
    # Another learning rate, other batches: none of it changes what an encoder computes.
    other = ["--lr", "1e-3", "--train_batch_size", "4", "--micro_batch_tokens", "300"]
    first, second = launch(tmp_path, [named("first", *short, FLAG), named("second", *short, *other, FLAG)])
    assert (first["code"], first["encoders"]) == (0, 1), first
    assert (second["code"], second["encoders"]) == (0, 0), second
    (folder,) = states_in(tmp_path / "cache")
    assert {entry.name for entry in folder.iterdir()} == {"states.bin", "manifest.json"}
    size = (folder / "states.bin").stat().st_size
    tokens = size // (16 * 4)
    said = f"encoder states of 108 rows, {tokens:,} tokens: {size / 1e6:.1f} MB"
    assert f"{said} in {folder}\n" in first["printed"]
    assert f"{said} found in {folder}: the encoder is not loaded\n" in second["printed"]


def test_another_encoder_dtype_layers_or_rows_get_a_file_of_their_own(named, tiny_encoder, tmp_path):
    other = make_tiny_encoder(tmp_path / "other", seed=5)
    copy = shutil.copytree(tiny_encoder, tmp_path / "copy")
    short = ["--max_steps", "1", FLAG]
    changes = {
        "base": [],
        "encoder": ["--mt_path", other],
        "dtype": ["--precision", "bf16"],
        "layers": ["--bridge", "layalign", "--stage_name", "translation"],
        "rows": ["--languages", "sw,de", "--dev_size", "2"],
        "attention": ["--attn_implementation", "eager"],
    }
    entries = [named(name, *short, *more) for name, more in changes.items()]
    *outcomes, same = launch(tmp_path, [*entries, named("same", *short, "--mt_path", str(copy))])
    assert [(one["code"], one["encoders"]) for one in outcomes] == [(0, 1)] * len(changes), outcomes
    assert len(states_in(tmp_path / "cache")) == len(changes)
    # The same weights in another folder are the same encoder.
    assert (same["code"], same["encoders"]) == (0, 0), same
    sizes = sorted((one / "states.bin").stat().st_size for one in states_in(tmp_path / "cache"))
    assert sizes[-1] == 3 * sizes[-2] and sizes[-2] in sizes[:-2]  # LayAlign reads three layers of this encoder
    dtypes = [json.loads((one / "manifest.json").read_text())["dtype"] for one in states_in(tmp_path / "cache")]
    assert sorted(dtypes) == ["bfloat16"] + ["float32"] * 5


def test_the_weights_content_is_the_identity_of_an_encoder_in_every_shard(tiny_encoder, tmp_path):
    """The fingerprint of a checkpoint samples large files: another value between its samples would go unseen."""
    one = Path(shutil.copytree(tiny_encoder, tmp_path / "one"))
    before = encoder_cache.identity_of_weights(str(one))
    assert before == encoder_cache.identity_of_weights(tiny_encoder)
    tensors = load_file(one / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, one / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (one / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (one / "model.safetensors").unlink()
    sharded = encoder_cache.identity_of_weights(str(one))
    tensors[names[-1]].view(-1)[-1] += 1
    save_file({name: tensors[name] for name in names[5:]}, one / file, metadata={"format": "pt"})
    assert len({before, sharded, encoder_cache.identity_of_weights(str(one))}) == 3
    (one / file).unlink()
    with pytest.raises(UserError, match="lacks 1 of the 2 weight files"):
        encoder_cache.identity_of_weights(str(one))


@pytest.mark.parametrize("damage", ["short", "long", "no manifest", "manifest cut short", "no file"])
def test_a_file_that_is_not_whole_is_computed_again(named, tmp_path, damage):
    argv = named("run", "--max_steps", "1", "--overwrite_output_dir", FLAG)
    (first,) = launch(tmp_path, [argv])
    (folder,) = states_in(tmp_path / "cache")
    file, manifest = folder / "states.bin", folder / "manifest.json"
    content = file.read_bytes()
    if damage == "short":
        file.write_bytes(content[:-1])
    elif damage == "long":
        file.write_bytes(content + b"\0")
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "manifest cut short":
        manifest.write_text(manifest.read_text()[:10])
    else:
        file.unlink()
    stale = folder.parent / f".{folder.name[:23]}-x.tmp"  # of a run that was killed
    stale.mkdir()
    (stale / "states.bin").write_bytes(content)
    again, found = launch(tmp_path, [argv, argv])
    assert [one["code"] for one in (first, again, found)] == [0] * 3, again
    assert [one["encoders"] for one in (first, again, found)] == [1, 1, 0]
    assert file.read_bytes() == content and left_over(tmp_path / "cache") == [folder]


def test_a_disk_without_room_is_refused_in_one_line_before_anything_is_computed(run, named, tmp_path):
    """A limit on file sizes stands for the disk: the states are larger than any other file of the run."""
    plain, cached = named("off", "--max_steps", "1"), named("on", "--max_steps", "1", FLAG)
    assert launch(tmp_path, [plain])[0]["code"] == 0
    done = run(
        ROOT / "run_training.py",
        *cached,
        env={"HF_DATASETS_CACHE": str(tmp_path / "cache")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 2, done.stderr[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"to {tmp_path}/cache/mindmerger: File too large; make room, set HF_" in errors[0]
    assert (
        errors[0].startswith("error: cannot write the encoder states of 108 rows,") and "Traceback" not in done.stderr
    )
    assert left_over(tmp_path / "cache") == []


def test_a_disk_with_less_free_than_the_states_take_is_refused(tmp_path, monkeypatch, capsys):
    plan = encoder_cache.Plan(tmp_path / "states-x", 10, 10**6, (-1,), 2048, torch.bfloat16)
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"rows, 1,000,000 tokens: 4.1 GB, to .*: only 3.0 GB are free; make room"):
        encoder_cache._make_room(plan)
    assert "encoder states of 10 rows, 1,000,000 tokens: 4.1 GB in " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_in_mid_pass_is_one_line_and_nothing_stays(named, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    assert launch(tmp_path, [named("off", "--max_steps", "1")])[0]["code"] == 0
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("this machine does not let the test mount a small tmpfs")
    try:
        shutil.copytree(tmp_path / "cache/mindmerger", disk / "mindmerger")
        entry = {"argv": named("on", FLAG), "cache": str(disk), "tokens": 400, "at": {"batch": 3, "full": True}}
        (outcome,) = launch(tmp_path, [entry])
        assert outcome["code"] == 2 and "No space left on device; make room, set HF_" in outcome["error"], outcome
        assert "\n" not in outcome["error"] and left_over(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- errors and signals in the pass


def test_out_of_memory_in_the_pass_is_one_line_and_nothing_stays(named, tmp_path):
    entry = {"argv": named("on", FLAG), "tokens": 400, "at": {"batch": 2, "memory": True}}
    (outcome,) = launch(tmp_path, [entry])
    assert outcome["code"] == 2 and left_over(tmp_path / "cache") == [], outcome
    expected = (
        "out of memory on rank 0 while the encoder computes the states of 6 rows, longest encoder 60 tokens: lower"
    )
    assert outcome["error"].startswith(expected) and outcome["error"].count("--cache_encoder_states") == 1


def test_states_that_are_no_numbers_are_refused_and_not_kept(named, tiny_encoder, tmp_path):
    """Every later run would have read them, and the encoder that could be blamed was not loaded any more."""
    broken = Path(shutil.copytree(tiny_encoder, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["encoder.block.0.layer.1.DenseReluDense.wo.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (outcome,) = launch(tmp_path, [named("on", FLAG, "--mt_path", str(broken))])
    assert outcome["code"] == 2 and f"{broken} computes states that are NaN or infinite" in outcome["error"], outcome
    assert left_over(tmp_path / "cache") == []


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_in_the_pass_ends_the_run_and_nothing_stays(named, tmp_path, name, code):
    entry = {"argv": named("on", FLAG), "cache": str(tmp_path / "cache"), "tokens": 400}
    (tmp_path / "runs.json").write_text(json.dumps([entry | {"at": {"batch": 3, "signal": name}}]))
    driver = (ROOT / "tests/drivers/cached.py", tmp_path / "runs.json", tmp_path / "outcomes.json")
    codes, printed = run_prepared(*driver, cwd=tmp_path)
    if name == "SIGTERM":  # a program that leaves by itself, after which the driver continues
        (outcome,) = json.loads((tmp_path / "outcomes.json").read_text())
        codes, printed = [outcome["code"]], [outcome["printed"]]
        assert "stopped while the encoder's states were computed: none are kept" in printed[0]
    assert codes == [code] and "Traceback" not in printed[0] and left_over(tmp_path / "cache") == [], printed
    (again,) = launch(tmp_path, [entry])
    assert (again["code"], again["encoders"]) == (0, 1), again


def test_what_is_half_written_goes_with_a_rank_that_is_ended_at_once(tmp_path):
    """One whose launcher is gone left gigabytes behind: it is ended without any clean-up of Python's."""
    kept, lost = tmp_path / "kept", tmp_path / "lost"
    for folder in (kept, lost):
        folder.mkdir()
    with half_written(kept):
        pass
    before = signal.getsignal(signal.SIGTERM)
    with half_written(lost):
        assert signal.getsignal(signal.SIGTERM) is not before
        clear_away()
    assert list(tmp_path.iterdir()) == [kept] and signal.getsignal(signal.SIGTERM) is before


# -- several ranks


@pytest.mark.slow
def test_one_rank_and_two_compute_the_same_states_and_every_zero_stage_trains_on_them(named, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    short = ["--max_steps", "4", "--eval_steps", "4", "--save_steps", "2"]
    zero = [["--deepspeed_config", str(ROOT / f"scripts/ds_zero{stage}.json")] for stage in range(4)]
    entries = [{"argv": named(f"zero{i}", *short, *more, FLAG), "tokens": 400} for i, more in enumerate(zero)]
    first = launch(one, entries[:1])
    outcomes = launch(two, [*entries, {"argv": named("off", *short)}], ranks=2)
    assert [(run["code"], run["encoders"]) for run in first + outcomes] == [(0, 1)] * 2 + [(0, 0)] * 3 + [(0, 1)]
    (ours,), (theirs,) = states_in(one / "cache"), states_in(two / "cache")
    assert ours.name == theirs.name
    assert (ours / "states.bin").read_bytes() == (theirs / "states.bin").read_bytes()
    expected = read_log(output(two, "off"))
    for folder, name in ((one, "zero0"), *((two, f"zero{i}") for i in range(4))):
        assert read_log(output(folder, name)) == pytest.approx(expected, rel=ROUNDING), name
    # At each stage a resumed run begins where the checkpoint left off, to the bit.
    begun = [f"outputs/zero{i}/math/mapping/checkpoint-000002" for i in range(4)]
    again = [
        named(f"again{i}", *short, *more, FLAG, "--resume_from_checkpoint", begun[i]) for i, more in enumerate(zero)
    ]
    assert [run["code"] for run in launch(two, again, ranks=2)] == [0] * 4
    for i in range(4):
        assert read_log(output(two, f"again{i}")) == read_log(output(two, f"zero{i}"))[2:]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_out_of_memory_of_one_rank_in_the_pass_ends_all_and_nothing_stays(named, tmp_path, rank):
    entry = {"argv": named("on", FLAG), "tokens": 400, "at": {"batch": 2, "memory": True, "rank": rank}}
    (outcome,) = launch(tmp_path, [entry], ranks=2)
    assert outcome["code"] == 2 and f"out of memory on rank {rank} while the encoder" in outcome["error"], outcome
    assert left_over(tmp_path / "cache") == []


@pytest.mark.slow
def test_nodes_that_share_a_disk_compute_the_states_once(tiny_llm, tiny_encoder, tmp_path, monkeypatch):
    """The second node waited for the lock inside a collective call, for which the first one, which held it, waited."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        folder.mkdir()
    runs = [training(name, tiny_llm, tiny_encoder, FLAG) for name in ("first", "second")]
    scenario = {"name": "shared", "runs": runs, "folders": [str(folder) for folder in folders]}
    ends = in_a_process_of_its_own(tmp_path, [scenario])["shared"]
    assert ends["codes"] == [0, 0], ends
    assert len(states_in(tmp_path / "cache")) == 1 == len(left_over(tmp_path / "cache"))
    assert "another process that computes the same encoder states" in "".join(ends["err"]) or "found" in ends["err"][0]


def in_a_process_of_its_own(folder, scenarios):
    """Outcomes of scenarios whose `datasets` reads the environment of this test."""
    import sys

    from conftest import clean_environment

    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    driver = (ROOT / "tests/drivers/ranks.py", folder / "scenarios.json", folder / "ends/outcomes.json")
    done = subprocess.run([sys.executable, *driver], cwd=folder, env=clean_environment(folder), timeout=240)
    assert done.returncode == 0
    return json.loads((folder / "ends/outcomes.json").read_text())


# -- flags


def test_states_of_an_encoder_that_there_is_none_of_are_refused(flags):
    args = training_settings.parse([*flags, FLAG, "--stage_name", "adapter", "--llm_only"])
    with pytest.raises(UserError, match="keeps what an encoder computes, and --llm_only has none"):
        training_settings.settle(args)


def test_a_dry_run_tells_the_size_of_the_states_and_counts_no_encoder_in_training(flags, tmp_path):
    printed = {}
    for name, more in (("off", []), ("on", [FLAG])):
        codes, (printed[name],) = run_prepared(
            ROOT / "run_training.py", *flags, "--dry_run", "--epoch_num", "3", *more, cwd=tmp_path
        )
        assert codes == [0], printed[name][-2000:]
    (line,) = [line for line in printed["on"].splitlines() if line.startswith("encoder states of ")]
    tokens = int(line.split()[5].replace(",", ""))
    assert f"108 rows, {tokens:,} tokens: {tokens * 16 * 4 / 1e6:.1f} MB in " in line
    assert "encoder states of" not in printed["off"]
    frozen, arithmetic = {}, {}
    for name, text in printed.items():
        words = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if ": " in line}
        frozen[name], arithmetic[name] = int(words["parameters"].replace(",", "")), float(words["arithmetic"])
    encoder = sum(tensor.numel() for tensor in load_encoder_weights(flags).values())
    assert frozen["off"] - frozen["on"] == encoder
    assert 0.5 * arithmetic["off"] < arithmetic["on"] < arithmetic["off"]
    assert not (tmp_path / "outputs").exists()


def load_encoder_weights(flags):
    """The tensors of the tiny encoder's half, its embeddings once."""
    state = load_file(f"{flags[flags.index('--mt_path') + 1]}/model.safetensors")
    return {name: tensor for name, tensor in state.items() if name.startswith(("encoder.", "shared."))}


def test_batches_of_the_pass_hold_each_row_once_by_falling_length_within_the_budget():
    lengths = np.random.RandomState(0).randint(0, 50, 200)
    batches = encoder_cache.batches_by_length(lengths, 100)
    assert sorted(row for rows in batches for row in rows) == np.flatnonzero(lengths).tolist()
    assert all(len(rows) * lengths[rows].max() <= 100 for rows in batches)
    longest = [lengths[rows].max() for rows in batches]
    assert longest == sorted(longest, reverse=True)
    assert [rows.tolist() for rows in encoder_cache.batches_by_length(np.array([7, 900]), 100)] == [[1], [0]]
