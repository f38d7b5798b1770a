"""LLM tuning: the loss, the ids, held-back groups, resuming, the folder that comes out."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_environment
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_evaluation
from mindmerger.runtime.errors import UserError
from mindmerger.tasks.xnli import XNLI_LABELS
from mindmerger.training import tuning, tuning_settings
from scripts import tune_llm

ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl", "ant", "bee")


def xnli_rows(number: int, seed: int = 0) -> list[dict]:
    """Rows in XNLI's form, three to a premise, whose labels the hypotheses give away."""
    draw = random.Random(seed)
    rows = []
    for i in range(number // 3):
        premise = f"The {draw.choice(ANIMALS)} no. {seed}-{i} {'sleeps' * draw.randint(1, 4)}."
        rows += [
            {"sentence1": premise, "sentence2": word, "label": label, "language": "English"}
            for word, label in zip(("Yes", "Maybe", "Never"), XNLI_LABELS, strict=True)
        ]
    return rows


def write_root(root: Path, train: list[dict], test: list[dict] | None = None) -> Path:
    """Writes a data folder with XNLI's two files."""
    for name, rows in (("query_translation/xnli_dev.json", train), ("evaluation/xnli/test.json", test)):
        if rows is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(json.dumps(rows))
    return root


@pytest.fixture
def flags(tiny_llm, tmp_path):
    """A function of the output's name: flags of a short run on 36 rows of its own data folder."""
    root = write_root(tmp_path / "datas", xnli_rows(36), xnli_rows(6, seed=9))

    def of(name: str, *more: str) -> list[str]:
        common = ["--task", "xnli", "--llm_path", tiny_llm, "--data_root", str(root), "--output_dir"]
        short = ["--max_steps", "4", "--train_batch_size", "8", "--micro_batch_tokens", "400", "--precision", "fp32"]
        return [*common, str(tmp_path / name), *short, "--dev_size", "6", *more]

    return of


def settle(flags: list[str]):
    return tuning_settings.settle(tuning_settings.build_parser().parse_args(flags))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def log_of(folder, key: str) -> list:
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


def test_the_loss_of_a_step_is_the_cross_entropy_of_its_target_tokens_alone(flags, tiny_llm, tmp_path):
    arguments = flags("tuned", "--max_steps", "1")
    assert tune_llm.main(arguments) == 0
    settings = settle([*arguments, "--overwrite_output_dir"])
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llm), AutoTokenizer.from_pretrained(tiny_llm)
    rows = json.loads((tmp_path / "datas/query_translation/xnli_dev.json").read_text())
    losses = []
    for i in tuning.Steps(settings).batches[0]:
        text = f"Premise: {rows[i]['sentence1']}\nHypothesis: {rows[i]['sentence2']}\nLabel:"
        prompt = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        target = [*tokenizer(rows[i]["label"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = llm(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        losses += [-logits[len(prompt) + at - 1, token].item() for at, token in enumerate(target)]
    assert log_of(tmp_path / "tuned", "loss") == [pytest.approx(sum(losses) / len(losses), rel=1e-5)]


def test_the_tuned_llm_reads_what_the_evaluation_feeds_it(flags, tiny_llm, tmp_path):
    """The same rows as training rows and as a test set: every position before the target is equal."""
    settings = settle(flags("tuned"))
    model = tuning.load_model(settings)
    read = {}

    def note(module, given, kwargs):
        for row_LD in kwargs["inputs_embeds"]:
            read[len(read)] = row_LD

    handle = model.llm.register_forward_pre_hook(note, with_kwargs=True)
    for i in range(6):
        [micro] = tuning.micro_batches(settings, settings.train[i : i + 1])
        model(**micro)
    handle.remove()
    from mindmerger.evaluation.flags import parse
    from mindmerger.evaluation.settings import settle as settle_evaluation
    from mindmerger.generation.answers import batch_inputs

    write_root(tmp_path / "other", [], xnli_rows(36))
    given = ["--task", "xnli", "--llm_only", "--llm_path", tiny_llm, "--languages", "English"]
    asked = settle_evaluation(parse([*given, "--data_root", str(tmp_path / "other")]), on_gpu=False)
    assert [settings.columns["prompt_ids"][i] for i in range(36)] == asked.columns["prompt_ids"]
    for i in range(6):
        number = int(settings.train[i])
        [embeds_LD], _ = model.merged_embeddings(**batch_inputs(model, asked.tokenizers, asked.columns, [number]))
        assert len(embeds_LD) == 1 + len(asked.columns["prompt_ids"][number])
        assert torch.equal(read[i][: len(embeds_LD)], embeds_LD)


@pytest.mark.slow
def test_the_tuned_folder_is_an_ordinary_model_whose_evaluation_scores_what_the_dev_rows_say(
    flags, tiny_llm, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    more = ("--max_steps", "90", "--epoch_num", "50", "--lr", "1e-2", "--dev_size", "12")
    assert tune_llm.main(flags("tuned", *more)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["datas", "tuned"]
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    source = AutoModelForCausalLM.from_pretrained(tiny_llm)
    assert llm.dtype == source.dtype
    changed = [name for name, one in source.state_dict().items() if not torch.equal(one, llm.state_dict()[name])]
    assert len(changed) == len(source.state_dict())
    assert len({path.stat().st_mode for path in (tmp_path / "tuned").iterdir()}) == 1
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "tuned" / name).read_bytes() == (Path(tiny_llm) / name).read_bytes()
    losses, shares = log_of("tuned", "dev_loss"), log_of("tuned", "dev_accuracy")
    assert losses[-1] < losses[0] / 4
    record = json.loads(Path("tuned/tune.json").read_text())
    assert record["data"]["rows"] == {"read": 36, "in_a_test_set": 0, "train": 24, "dev": 12}
    assert [entry["step"] for entry in record["dev"]] == [0, 50, 90]
    # The dev rows as a test set of their own: greedy answers of the folder score as the dev rows did.
    dev = settle(flags("again", *more)).dev
    rows = xnli_rows(36)
    write_root(tmp_path / "dev", [], [rows[i] for i in dev])
    given = ["--task", "xnli", "--llm_only", "--llm_path", "tuned", "--languages", "English", "--data_root", "dev"]
    assert run_evaluation.main(given) == 0
    results = json.loads(Path("results/MindMerger/xnli-llm_only/results.json").read_text())
    assert results["languages"]["English"]["correct"] == round(shares[-1] * len(dev))
    assert shares[0] < shares[-1]


def test_micro_batches_change_no_gradient_and_pad_little(flags, tmp_path):
    for budget in ("150", "4000"):
        assert tune_llm.main(flags(budget, "--micro_batch_tokens", budget)) == 0
    for name, one in weights(tmp_path / "150").items():
        assert torch.allclose(one, weights(tmp_path / "4000")[name], atol=1e-4), name
    assert log_of(tmp_path / "150", "padding")[0] < log_of(tmp_path / "4000", "padding")[0]


KILLED = """
import os, signal, sys
from mindmerger.training import tuning
from scripts import tune_llm
step = int(sys.argv.pop(1))
move = tuning.ShowProgress.on_step_end
def on_step_end(self, args, state, control, **others):
    if state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    move(self, args, state, control, **others)
tuning.ShowProgress.on_step_end = on_step_end
tune_llm.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("--lora",)], ids=["all weights", "LoRA"])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(flags, tmp_path, capfd, lora):
    more = ("--max_steps", "9", "--epoch_num", "3", "--save_steps", "2", "--lr", "1e-3", *lora)
    assert tune_llm.main(flags("whole", *more)) == 0
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "6", *flags("killed", *more)], cwd=ROOT, env=clean_environment(), timeout=240
    )
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    # Another one, killed while it wrote a checkpoint.
    torn = tmp_path / "killed.unfinished/checkpoint-6"
    torn.mkdir()
    (torn / "trained.safetensors").write_bytes(b"half")
    capfd.readouterr()
    assert tune_llm.main(flags("killed", *more)) == 0
    said = capfd.readouterr().err
    assert "checkpoint-6 was cut short" in said and f"resumes from {torn.with_name('checkpoint-4')}" in said
    for name, one in weights(tmp_path / "whole").items():
        assert torch.equal(one, weights(tmp_path / "killed")[name]), name
    assert log_of(tmp_path / "whole", "dev_loss") == log_of(tmp_path / "killed", "dev_loss")
    assert not (tmp_path / "killed.unfinished").exists()


def test_a_lora_is_merged_into_the_layers_that_it_changes(flags, tiny_llm, tmp_path):
    more = ("--lora", "--adapter_rank", "2", "--adapter_dropout", "0", "--lr", "1e-2")
    assert tune_llm.main(flags("tuned", *more)) == 0
    before, after = weights(tiny_llm), weights(tmp_path / "tuned")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) == 2
    # The dev loss was measured with the LoRA beside the weights.
    settings = settle(flags("again", *more))
    settings.args.llm_path, settings.adapter = str(tmp_path / "tuned"), None
    model = tuning.load_model(settings)
    micros = tuning.micro_batches(settings, settings.dev)
    scores = [row for micro in micros for row in tuning.score_targets(model, micro)]
    loss = sum(row[0] for row in scores) / sum(row[1] for row in scores)
    assert loss == pytest.approx(log_of(tmp_path / "tuned", "dev_loss")[-1], rel=1e-5)


def test_bf16_is_the_arithmetic_and_not_the_dtype_of_the_weights(flags, tmp_path):
    assert tune_llm.main(flags("fp32")) == 0 and tune_llm.main(flags("bf16", "--precision", "bf16")) == 0
    fp32, bf16 = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    for name, one in bf16.items():
        assert one.dtype == torch.float32 and not torch.equal(one, one.bfloat16().float())
        assert torch.allclose(one, fp32[name], atol=2e-3)
    losses = log_of(tmp_path / "fp32", "loss")[0], log_of(tmp_path / "bf16", "loss")[0]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert tune_llm.main(flags("half", "--save_dtype", "bf16")) == 0
    assert torch.equal(weights(tmp_path / "half")[name], fp32[name].bfloat16())


def test_rows_of_one_premise_are_never_on_both_sides(flags, tmp_path):
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps(xnli_rows(12)[::-1] + xnli_rows(9, seed=3)))  # premises of the data folder too
    settings = settle(flags("tuned", "--rows", str(extra), "--dev_size", "10"))
    rows = xnli_rows(36) + xnli_rows(12)[::-1] + xnli_rows(9, seed=3)
    sides = [{rows[i]["sentence1"] for i in side} for side in (settings.dev, settings.train)]
    assert not sides[0] & sides[1]
    assert 9 <= len(settings.dev) <= 15 and len(settings.dev) + len(settings.train) == len(rows)
    assert list(settings.dev) != list(settle(flags("tuned", "--rows", str(extra), "--seed", "1")).dev)
    assert len(settle(flags("tuned", "--dev_size", "0")).dev) == 0


def test_translations_of_a_row_are_never_on_both_sides(flags, tmp_path):
    rows = xnli_rows(36)
    swahili = [{**row, "sentence1": row["sentence1"][::-1], "language": "Swahili"} for row in rows]
    write_root(tmp_path / "datas", rows + swahili)
    settings = settle(flags("tuned", "--languages", "English,sw", "--dev_size", "12"))
    sides = [{int(i) % 36 for i in side} for side in (settings.dev, settings.train)]
    assert not sides[0] & sides[1] and len(settings.dev) == 12


def test_rows_of_a_test_set_are_left_out_and_counted(flags, tmp_path, capfd):
    copies = [{**row, "sentence1": row["sentence1"].upper() + " "} for row in xnli_rows(6, seed=9)]
    extra = tmp_path / "extra.jsonl"
    extra.write_text("\n".join(json.dumps(row) for row in xnli_rows(9, seed=3) + copies))
    settings = settle(flags("tuned", "--rows", str(extra), "--rows_only"))
    assert settings.data["rows"] == {"read": 15, "in_a_test_set": 6, "train": 3, "dev": 6}
    assert list(settings.data["files"]) == [str(extra)]
    assert "6 of 15 rows are left out: a test set of xnli holds them too" in capfd.readouterr().err
    (tmp_path / "datas/evaluation/xnli/test.json").unlink()
    assert settle(flags("tuned")).data["rows"]["in_a_test_set"] is None
    assert "holds no test set of xnli" in capfd.readouterr().err


def test_train_num_limits_each_source(flags, tmp_path):
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps(xnli_rows(9, seed=3)))
    settings = settle(flags("tuned", "--rows", str(extra), "--train_num", "6"))
    assert settings.data["rows"]["read"] == 12


def test_a_finished_tuning_is_kept_and_another_one_is_refused(flags, tmp_path, capfd):
    assert tune_llm.main(flags("tuned")) == 0
    before = (tmp_path / "tuned/model.safetensors").stat()
    capfd.readouterr()
    assert tune_llm.main(flags("tuned")) == 0
    assert "is tuned already by this command, nothing is done" in capfd.readouterr().err
    assert (tmp_path / "tuned/model.safetensors").stat() == before
    assert not (tmp_path / "tuned.unfinished").exists()
    with pytest.raises(UserError, match=r"tuned is of a tuning with another --lr \(0.00015, this one has 0.01\)"):
        tune_llm.main(flags("tuned", "--lr", "1e-2"))
    assert (tmp_path / "tuned/model.safetensors").stat() == before
    assert tune_llm.main(flags("tuned", "--lr", "1e-2", "--overwrite_output_dir")) == 0
    assert json.loads((tmp_path / "tuned/tune.json").read_text())["identity"]["--lr"] == 1e-2


def test_an_unfinished_run_of_other_settings_is_refused_and_started_over_on_demand(flags, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tuning, "copy_settings", full)
        with pytest.raises(UserError, match="cannot write .*tuned: No space left on device; the same command tries"):
            tune_llm.main(flags("tuned"))
    assert not (tmp_path / "tuned").exists() and (tmp_path / "tuned.unfinished/checkpoint-4/whole.json").is_file()
    with pytest.raises(UserError, match="unfinished is of a tuning with another --seed"):
        tune_llm.main(flags("tuned", "--seed", "1"))
    assert tune_llm.main(flags("tuned", "--seed", "1", "--overwrite_output_dir")) == 0


def test_a_loss_that_is_not_a_number_ends_the_run(flags, tiny_llm, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(tiny_llm)
    llm.model.norm.weight.data[0] = torch.nan
    for path in Path(tiny_llm).iterdir():
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes())
    llm.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="the loss of step 1 is not a number: lower --lr"):
        tune_llm.main(flags("tuned", "--llm_path", str(tmp_path / "broken"), "--dev_size", "0"))
    assert not (tmp_path / "tuned").exists()


def test_wrong_inputs_say_what_to_do(flags, tmp_path, tiny_llm, tiny_encoder):
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps([{"sentence1": "A.", "sentence2": "B.", "language": "English"}]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    cases = [
        (["--rows", "absent.json"], "--rows absent.json is missing: pass a file with rows in the form of"),
        (["--rows", str(bare)], "bare.json:1: field 'label' is missing"),
        (["--languages", "Englisch"], "unknown language 'Englisch': did you mean English"),
        (["--languages", "Thai"], "no rows in Thai; the file holds English"),
        (["--task", "xnly"], "unknown task 'xnly'; did you mean xnli"),
        (["--task", "translation"], "translation has no rows of its own to train on"),
        (["--llm_path", str(tmp_path / "empty")], "empty"),
        (["--llm_path", tiny_encoder], "an encoder-decoder and not a causal language model"),
        (["--rows_only"], "no --rows gives others"),
        (["--adapter_rank", "4"], "--adapter_rank describes a LoRA: pass --lora too"),
        (["--lora", "--adapter_targets", "qproj"], "has no linear layer of this name .did you mean q_proj"),
        (["--output_dir", str(tmp_path / "foreign")], "holds no tune.json, so it is not ours to replace"),
        (["--output_dir", tiny_llm], "is the LLM that is tuned"),
        (["--dev_size", "36"], "would take all of the 36 examples"),
        (["--train_num", "3"], "all 3 rows are of one question, premise or stem"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--data_root", str(tmp_path / "empty")], "no file .*xnli_dev.json"),
    ]
    for more, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            tune_llm.main(flags("tuned", *more))
        assert "\n" not in str(caught.value)
    assert (tmp_path / "foreign/notes.txt").read_text() == "mine" and not (tmp_path / "tuned").exists()


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_code_2(flags):
    command = [sys.executable, "-m", "scripts.tune_llm", *flags("tuned", "--rows", "absent.json")]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: --rows absent")


def test_several_processes_are_refused(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="the tuning runs in one process: .* unset .*WORLD_SIZE"):
        tune_llm.main(flags("tuned"))
    assert os.environ["WORLD_SIZE"] == "2"
