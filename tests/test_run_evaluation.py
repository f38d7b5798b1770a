"""The evaluation command on tiny models: files, forms, continuing, ranks, wrong inputs, and `answer()`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, clean_environment, free_port, make_tiny_encoder, make_tiny_llm, run_prepared
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import run_evaluation
from mindmerger.evaluation import settings as evaluation_settings
from mindmerger.evaluation import summary
from mindmerger.evaluation.comparison import read_row
from mindmerger.evaluation.flags import build_parser
from mindmerger.evaluation.probes import exchange_rows
from mindmerger.evaluation.settings import settle
from mindmerger.generation import answers, gold
from mindmerger.generation.answers import Generation, answer, generate_batch, split_batches
from mindmerger.model.mapping_files import save_released
from mindmerger.model.mindmerger import MindMerger
from mindmerger.model.towers import check_positions, model_fingerprint
from mindmerger.runtime.errors import UserError
from run_evaluation import main

FP32 = ("--precision", "fp32")  # on every CPU: some would take bf16
FEW = ("--languages", "Swahili,th,English", "--max_new_tokens", "4", "--eval_batch_size", "4", *FP32)  # 12 examples


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llm, tiny_encoder):
    """Paths of a mapping in all three forms, trained (as its config.json says) as Soft between the tiny models."""
    folder = tmp_path_factory.mktemp("mapping")
    torch.manual_seed(5)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)  # so that different sources give different answers
    model.config.task, model.config.stage, model.config.augmentation = "math", "augmentation", True
    model.save_pretrained(folder / "saved")
    save_file(model.mapping.state_dict(), folder / "mapping.safetensors")
    save_released(folder / "pytorch_model.bin", model.mapping.state_dict())
    return SimpleNamespace(
        model=model,
        folder=str(folder / "saved"),
        safetensors=str(folder / "mapping.safetensors"),
        released=str(folder / "pytorch_model.bin"),
        llm=tiny_llm,
        encoder=tiny_encoder,
    )


@pytest.fixture
def evaluate(world, datas, tmp_path, monkeypatch, capsys):
    """Runs the command in this process, in a fresh folder; returns (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, checkpoint=world.folder):
        given = ["--data_root", datas, *(["--init_checkpoint", checkpoint] if checkpoint else []), *FP32, *arguments]
        assert main([str(part) for part in given]) == 0
        return capsys.readouterr()

    return call


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def outcome(folder):
    """All bytes of a results folder but what depends on when, where and how often it was started."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    results = json.loads(files.pop("results.json"))
    for name in ("timing", "arguments", "command"):
        del results[name]
    return files, results


# -- what a run leaves


def test_a_finished_run_leaves_exactly_these_files_and_one_table(evaluate, tmp_path):
    out, err = evaluate(*FEW)
    folder = tmp_path / "results/MindMerger/math_mgsm"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"results.json", "scores.tsv", *(f"predictions/{n}.jsonl" for n in ("English", "Swahili", "Thai"))}
    rows = [line.split() for line in out.splitlines()]
    assert [row[:2] for row in rows if row and row[0] in ("Swahili", "Thai", "English", "mean")] == [
        ["Swahili", "4"],
        ["Thai", "4"],
        ["English", "4"],
        ["mean", "12"],
    ]
    assert "MindMerger-Soft" in out and out.count("95 % interval") == 1
    assert "task math means math_mgsm" in err


def test_predictions_are_in_the_data_files_order_with_all_fields(evaluate, tmp_path, datas):
    evaluate(*FEW)
    rows = read_lines(tmp_path / "results/MindMerger/math_mgsm/predictions/Thai.jsonl")
    with open(f"{datas}/evaluation/mgsm/mgsm_th.tsv", encoding="utf-8") as file:
        questions = [line.split("\t") for line in file.read().split("\n") if line]
    assert [(row["source"], row["answer"]) for row in rows] == [(q.strip(), a.strip()) for q, a in questions]
    fields = "id source prompt output prediction answer correct reference_prediction reference_correct"
    assert all(list(row) == fields.split() for row in rows)
    assert all(row["source"] in row["prompt"] for row in rows)


def test_scores_file_and_results_agree_with_the_predictions(evaluate, tmp_path, monkeypatch):
    """Both scorers count on their own: a lost minus sign and a missing number make them differ."""
    texts = {"sw": "the answer is {}", "th": "-{}", "en": "no number"}

    def fixed(model, tokenizers, columns, batch, max_new_tokens):
        chosen = [examples[i] for i in batch]
        return [Generation(texts[e.id[:2]].format(e.target), 3, e.language == "Thai") for e in chosen]

    examples = []
    real = answers.tokenise_inputs
    monkeypatch.setattr(answers, "generate_batch", fixed)
    monkeypatch.setattr(
        evaluation_settings, "tokenise_inputs", lambda *a, **k: (examples.extend(a[1]), real(*a, **k))[1]
    )
    out, _ = evaluate(*FEW)
    folder = tmp_path / "results/MindMerger/math_mgsm"
    results = json.loads((folder / "results.json").read_text())
    found = {n: (o["n"], o["correct"], o["reference_correct"], o["hit_limit"]) for n, o in results["languages"].items()}
    assert found == {"Swahili": (4, 4, 4, 0), "Thai": (4, 0, 4, 4), "English": (4, 0, 0, 0)}
    assert results["mean"]["accuracy"] == 33.3333 and results["mean"]["reference_accuracy"] == 66.6667
    assert results["languages"]["Swahili"]["interval"] == [100, 100]
    assert results["counts"]["hit_limit"] == 4 and "4 of 12 answers stopped at the limit of 4" in out
    assert (folder / "scores.tsv").read_text() == "Swahili\t100.0\nThai\t0.0\nEnglish\t0.0\n"
    thai = read_lines(folder / "predictions/Thai.jsonl")
    assert all(row["prediction"] == -row["reference_prediction"] for row in thai)


def test_published_numbers_stand_beside_their_own_models_and_no_others(evaluate, tmp_path, world):
    """Until now any LLM's results stood beside those published for MetaMath."""
    llm, encoder = tmp_path / "MetaMath-7B-V1.0", tmp_path / "mt5-xl"
    renamed, small = tmp_path / "math-7b", tmp_path / "mt5-small"
    for source, copies in ((world.llm, (llm, renamed)), (world.encoder, (encoder, small))):
        for copy in copies:
            shutil.copytree(source, copy)

    def run(llm, encoder):
        flags = ("--llm_path", llm, "--mt_path", encoder, "--init_checkpoint", world.released, "--overwrite")
        out, _ = evaluate(*FEW, *flags)
        return out, json.loads((tmp_path / "results/MindMerger/math_mgsm/results.json").read_text())["published"]

    out, published = run(llm, encoder)
    assert published["scores"]["Swahili"] == 56.8 and "56.8" in out
    note = "mean over the languages of this table; on other items: 250 rows of each language, here 4"
    assert f"published: MindMerger-Soft (MetaMath-7B); {note}" in out
    for models in ((renamed, encoder), (llm, small)):
        out, published = run(*models)
        assert "published" not in out and published is None


def test_the_mean_s_interval_takes_questions_together_and_says_so(evaluate, tmp_path, monkeypatch):
    """All three languages get the same two of four questions right: no more is known than from one of them."""

    def fixed(model, tokenizers, columns, batch, max_new_tokens):
        chosen = [examples[i] for i in batch]
        return [Generation(e.target if e.id[-1] in "12" else "x", 3, False) for e in chosen]

    examples = []
    real = answers.tokenise_inputs
    monkeypatch.setattr(answers, "generate_batch", fixed)
    monkeypatch.setattr(
        evaluation_settings, "tokenise_inputs", lambda *a, **k: (examples.extend(a[1]), real(*a, **k))[1]
    )
    out, _ = evaluate(*FEW)
    results = json.loads((tmp_path / "results/MindMerger/math_mgsm/results.json").read_text())
    assert results["mean"]["interval"] == results["languages"]["Thai"]["interval"] == [0, 100]
    assert results["resampling"] == {
        "unit": "question",
        "rows": 12,
        "questions": 4,
        "questions_in_every_language": 4,
        "numbers_with_different_answers": 0,
    }
    assert "interval of the mean: 4 questions are resampled, each with its rows in all languages" in out


def test_x_csqa_questions_are_known_by_their_own_id_in_whatever_order_they_stand(evaluate, tmp_path, monkeypatch):
    """The real files hold rows and options in another order in every language, so that numbers pair strangers."""
    for code, order in (("en", range(20)), ("de", reversed(range(20)))):
        folder = tmp_path / "csqa/evaluation/x-csqa" / code
        folder.mkdir(parents=True)
        letter = {"en": "A", "de": "B"}[code]
        choices = [{"label": label, "text": label} for label in "AB"]
        rows = [{"id": f"id{i}", "question": {"stem": f"{i}?", "choices": choices}, "answerKey": letter} for i in order]
        (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def fixed(model, tokenizers, columns, batch, max_new_tokens):
        texts = [tokenizers.llm.decode(columns["prompt_ids"][i]) for i in batch]
        return [Generation("AB"[i // 20] if int(text.split("?")[0]) < 10 else "", 1, False)
                for i, text in zip(batch, texts, strict=True)]  # fmt: skip

    monkeypatch.setattr(answers, "generate_batch", fixed)
    evaluate("--task", "x-csqa", "--languages", "en,de", "--data_root", tmp_path / "csqa")
    folder = tmp_path / "results/MindMerger/x-csqa"
    results = json.loads((folder / "results.json").read_text())
    assert results["resampling"]["questions"] == results["resampling"]["questions_in_every_language"] == 20
    assert [row["question"] for row in read_lines(folder / "predictions/German.jsonl")][:2] == ["id19", "id18"]
    # Right on the same ten questions: as wide as one language's. Paired by number it would be [50, 50].
    low, high = results["mean"]["interval"]
    one_low, one_high = results["languages"]["English"]["interval"]
    assert abs(low - one_low) <= 5 and abs(high - one_high) <= 5


def test_rows_with_other_answers_are_not_translations_of_each_other_and_that_is_said(evaluate, tmp_path, datas):
    shutil.copytree(f"{datas}/evaluation/mgsm", tmp_path / "shifted/evaluation/mgsm")
    file = tmp_path / "shifted/evaluation/mgsm/mgsm_th.tsv"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines[1:], lines[0]]) + "\n", encoding="utf-8")
    out, err = evaluate("--data_root", tmp_path / "shifted", *FEW)
    assert "the test sets are not parallel throughout" in err
    assert "4 row numbers have different gold answers in different languages" in out
    results = json.loads((tmp_path / "results/MindMerger/math_mgsm/results.json").read_text())
    assert results["resampling"]["questions"] == 8 and results["resampling"]["questions_in_every_language"] == 0


def test_a_finished_folder_of_an_earlier_version_is_said_to_have_a_too_narrow_interval(evaluate, tmp_path):
    evaluate(*FEW)
    file = tmp_path / "results/MindMerger/math_mgsm/results.json"
    _, err = evaluate(*FEW)
    assert "too narrow" not in err
    results = json.loads(file.read_text())
    del results["resampling"]
    file.write_text(json.dumps(results))
    _, err = evaluate(*FEW)
    assert "its interval of the mean is too narrow" in err


def test_the_same_answer_is_read_by_the_language_of_its_question(evaluate, tmp_path, monkeypatch):
    fixed = [Generation("= 12.345", 3, False)]
    monkeypatch.setattr(answers, "generate_batch", lambda m, t, c, batch, limit: fixed * len(batch))
    evaluate("--languages", "de,en,ru", "--limit", 1)
    folder = tmp_path / "results/MindMerger/math_mgsm/predictions"
    read = {name: read_lines(folder / f"{name}.jsonl")[0] for name in ("German", "English", "Russian")}
    assert {name: row["prediction"] for name, row in read.items()} == {
        "German": 12345.0,
        "English": 12.345,
        "Russian": 12.345,
    }
    assert {row["reference_prediction"] for row in read.values()} == {12.345}


def test_results_of_an_older_scorer_compare_with_a_warning_and_its_answers_are_as_good_as_new(
    evaluate, tmp_path, capsys
):
    evaluate(*FEW)
    new, old = tmp_path / "results/MindMerger/math_mgsm", tmp_path / "older/MindMerger/math_mgsm"
    shutil.copytree(new, old)
    results = json.loads((old / "results.json").read_text())
    assert results["identity"].pop("version of the scorer") == 3
    (old / "results.json").write_text(json.dumps(results))
    assert main(["--compare", str(old), str(new)]) == 0
    assert "were scored by different versions" in capsys.readouterr().err
    partial = old / ".partial"
    partial.mkdir()
    (old / "results.json").unlink()
    (partial / "run.json").write_text(json.dumps(results))
    evaluate(*FEW, "--results_dir", tmp_path / "older")
    assert outcome(old) == outcome(new)


def test_faulty_rows_of_a_test_set_are_refused_or_left_out_counted_and_listed(evaluate, tmp_path, datas):
    shutil.copytree(f"{datas}/evaluation/mgsm", tmp_path / "faulty/evaluation/mgsm")
    file = tmp_path / "faulty/evaluation/mgsm/mgsm_th.tsv"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([lines[0], f"{lines[1]} or 4", *lines[2:]]) + "\n", encoding="utf-8")
    flags = ("--data_root", tmp_path / "faulty", *FEW)
    with pytest.raises(UserError, match=r"mgsm_th\.tsv:2: .*several numbers.* \(--skip_faulty_rows leaves such rows"):
        evaluate(*flags)
    out, err = evaluate(*flags, "--skip_faulty_rows")
    assert f"--skip_faulty_rows leaves out 1 faulty rows, all of them listed in results.json:\n{file}:2: " in err
    assert "1 faulty rows were left out (--skip_faulty_rows)" in out
    folder = tmp_path / "results/MindMerger/math_mgsm"
    (fault,) = json.loads((folder / "results.json").read_text())["faulty_rows"]
    assert fault.startswith(f"{file}:2: ")
    assert [row["id"] for row in read_lines(folder / "predictions/Thai.jsonl")] == ["th-1", "th-3", "th-4"]


def test_results_hold_everything_needed_to_run_again(evaluate, tmp_path, world):
    evaluate(*FEW, "--limit", 2, "--seed", 3)
    results = json.loads((tmp_path / "results/MindMerger/math_mgsm/results.json").read_text())
    assert results["arguments"]["limit"] == 2 and results["arguments"]["seed"] == 3
    assert results["identity"]["--languages"] == ["Swahili", "Thai", "English"]
    assert len(results["identity"]["--init_checkpoint (sha256)"]) == len(results["identity"]["data (sha256)"]) == 64
    assert (results["llm_path"], results["mt_path"]) == (world.llm, world.encoder)
    assert {"torch", "transformers", "python", "mindmerger"} <= results["versions"].keys()
    assert results["timing"]["examples"] == results["counts"]["examples"] == 6
    assert results["timing"]["generated_tokens"] <= 6 * 4 and results["timing"]["examples_per_s"] > 0


def test_results_as_a_file_of_settings_evaluate_again_to_the_same_bytes(evaluate, tmp_path, datas):
    evaluate(*FEW, "--limit", 2, "--seed", 3)
    one, other = (tmp_path / "results" / name / "math_mgsm" for name in ("MindMerger", "again"))
    assert main(["--config", str(one / "results.json"), "--save_name", "again"]) == 0
    assert outcome(one) == outcome(other)


def test_the_three_forms_differ_and_never_collide(evaluate, tmp_path, world):
    evaluate(*FEW)
    evaluate(*FEW, "--augmentation", "False")
    evaluate(*FEW, "--llm_only", "--llm_path", world.llm, checkpoint=None)
    root = tmp_path / "results/MindMerger"
    assert {path.name for path in root.iterdir()} == {"math_mgsm", "math_mgsm-hard", "math_mgsm-llm_only"}
    outputs = {
        path.name: [row["output"] for row in read_lines(path / "predictions/Swahili.jsonl")] for path in root.iterdir()
    }
    assert len({tuple(texts) for texts in outputs.values()}) == 3
    assert read_lines(root / "math_mgsm-hard/predictions/Thai.jsonl")[0]["prompt"] == ""
    main(["--compare", str(root / "math_mgsm"), str(root / "math_mgsm-llm_only")])
    # A folder that holds a single finished evaluation stands for it.
    (tmp_path / "alone").mkdir()
    (root / "math_mgsm-hard").rename(tmp_path / "alone/math_mgsm-hard")
    main(["--compare", str(tmp_path / "alone"), str(root / "math_mgsm")])


@pytest.mark.parametrize(
    ("task", "folder", "new_tokens"),
    [("x_csqa", "x-csqa", 16), ("xnli", "xnli", 16), ("math_msvamp", "math_msvamp", 512)],
)
def test_every_task_runs_into_the_folder_of_its_canonical_name(
    evaluate, tmp_path, task, folder, new_tokens, monkeypatch
):
    limits = []
    monkeypatch.setattr(
        answers,
        "generate_batch",
        lambda m, t, c, b, limit: limits.append(limit) or [Generation("A", 1, False)] * len(b),
    )
    out, _ = evaluate("--task", task)
    assert (tmp_path / "results/MindMerger" / folder / "results.json").is_file()
    assert set(limits) == {new_tokens}
    assert out.count("\n") >= 14  # ten languages at least


def test_released_file_safetensors_and_folder_are_the_same_mapping(evaluate, tmp_path, world):
    found = []
    for i, checkpoint in enumerate((world.folder + "/", world.released, world.safetensors)):
        evaluate(
            *FEW,
            "--results_dir",
            f"r{i}",
            "--llm_path",
            world.llm + "/",
            "--mt_path",
            world.encoder + "/",
            checkpoint=checkpoint,
        )
        found.append(outcome(tmp_path / f"r{i}/MindMerger/math_mgsm")[0])
    assert found[0] == found[1] == found[2]


# -- flags


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), 512),
        (("--max_gen_len", "6"), 6),
        (("--max_gen_len", "60", "--max_new_tokens", "7"), 7),
        (("--max_new_tokens", "70", "--max_gen_len", "60"), 70),
        (("--task", "xnli"), 16),
    ],
)
def test_new_tokens_are_limited_by_the_flag_that_wins(world, datas, flags, expected):
    given = ["--init_checkpoint", world.folder, "--data_root", datas, "--limit", "1", "--languages", "en", *flags]
    assert settle(build_parser().parse_args(given), on_gpu=False).max_new_tokens == expected


def test_older_flags_are_accepted_and_change_nothing(evaluate, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "untouched")
    evaluate(*FEW, "--results_dir", "plain")
    old = [
        "--deepspeed",
        "--local_rank=0",
        "--gpu",
        "1",
        "--train_batch_size",
        128,
        "--train_micro_batch_size_per_gpu",
        1,
    ]
    _, err = evaluate(*FEW, "--results_dir", "old", *old, "--augmentation", "True")
    assert err.count("warning: ") == 1 and "--gpu changes nothing" in err
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "untouched"
    assert outcome(tmp_path / "plain/MindMerger/math_mgsm") == outcome(tmp_path / "old/MindMerger/math_mgsm")


def test_help_needs_no_heavy_import():
    code = (
        "import sys, mindmerger.evaluation.flags as r, run_evaluation; r.build_parser().format_help(); "
        "assert not {'torch', 'transformers', 'datasets', 'deepspeed', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_mapping_evaluated_otherwise_than_trained_warns(evaluate, tmp_path, world):
    _, err = evaluate(*FEW, "--augmentation", "False")
    assert "warning: this mapping was trained as Soft" in err
    other = make_tiny_llm(tmp_path / "other_llm", seed=9)
    _, err = evaluate(*FEW, "--llm_path", other, "--overwrite")
    assert f"warning: this mapping was trained with --llm_path {world.llm}, not {other}" in err
    assert f"--mt_path not given: taking {world.encoder}" in err


def test_other_spellings_of_a_path_do_not_warn(evaluate, tmp_path, world):
    (tmp_path / "link").symlink_to(world.llm)
    _, err = evaluate(*FEW, "--llm_path", "./link/")
    assert "warning" not in err


def test_llm_alone_takes_the_llm_that_the_mapping_names(evaluate, tmp_path, world):
    _, err = evaluate(*FEW, "--llm_only")
    assert f"--llm_path not given: taking {world.llm}" in err and "--mt_path" not in err
    results = json.loads((tmp_path / "results/MindMerger/math_mgsm-llm_only/results.json").read_text())
    assert (results["llm_path"], results["mt_path"], results["checkpoint"]) == (world.llm, None, None)


def test_the_mapping_that_training_left_is_found_and_named(evaluate, tmp_path, world):
    trained = tmp_path / "outputs/mine/math/augmentation"
    with pytest.raises(UserError, match="no --init_checkpoint given.*outputs/mine/math: .*--llm_only"):
        evaluate(*FEW, "--save_name", "mine", checkpoint=None)
    shutil.copytree(world.folder, trained)
    _, err = evaluate(*FEW, "--save_name", "mine", checkpoint=None)
    assert "taking outputs/mine/math/augmentation" in err
    assert (tmp_path / "results/mine/math_mgsm/scores.tsv").is_file()


# -- batches and continuing


def test_batches_are_longest_first_and_survive_the_removal_of_others():
    lengths = [3, 9, 9, 1, 7, 5, 2]
    batches = split_batches(list(range(7)), lengths, 2)
    assert batches == [[1, 2], [4, 5], [0, 6], [3]]
    assert split_batches([4, 5, 3, 1, 2], lengths, 2) == [[1, 2], [4, 5], [3]]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    batch_size=st.none() | st.integers(1, 9),
    token_budget=st.integers(1, 300),
    new_tokens=st.integers(0, 20),
    data=st.data(),
)
def test_batches_by_token_budget_keep_both_limits_and_survive_the_removal_of_others(
    lengths, batch_size, token_budget, new_tokens, data
):
    batches = split_batches(list(range(len(lengths))), lengths, batch_size, token_budget, new_tokens)
    assert sorted(sum(batches, [])) == list(range(len(lengths)))
    for i, batch in enumerate(batches):
        positions = len(batch) * (max(lengths[i] for i in batch) + new_tokens)
        assert len(batch) == 1 or positions <= token_budget
        assert batch_size is None or len(batch) <= batch_size
        if i + 1 < len(batches) and len(batch) != batch_size:
            one_more = (len(batch) + 1) * (max(lengths[i] for i in batch) + new_tokens)
            assert one_more > token_budget, "the batch could have been larger"
    kept = [batch for batch in batches if data.draw(st.booleans())]
    assert split_batches(sum(kept, []), lengths, batch_size, token_budget, new_tokens) == kept


def test_batch_size_changes_no_answer(evaluate, tmp_path):
    sizes = {"one": ["--eval_batch_size", 1], "five": ["--eval_batch_size", 5], "budget": ["--eval_max_tokens", 700]}
    found = []
    for name, size in sizes.items():
        evaluate(*FEW[:4], *size, "--results_dir", name)
        found.append(outcome(tmp_path / name / "MindMerger/math_mgsm"))
    assert found[0] == found[1] == found[2]


def interrupt_after(monkeypatch, batches):
    """Ends the next run as Ctrl-C does after that many batches; returns the list of batches that were begun."""
    begun, real = [], generate_batch

    def counted(model, tokenizers, columns, batch, max_new_tokens):
        begun.append(batch)
        if len(begun) > batches:
            raise KeyboardInterrupt
        return real(model, tokenizers, columns, batch, max_new_tokens)

    monkeypatch.setattr(answers, "generate_batch", counted)
    return begun


def test_an_interrupted_run_continues_to_the_same_bytes(evaluate, tmp_path, monkeypatch, capsys):
    evaluate(*FEW, "--results_dir", "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 2)
        evaluate(*FEW, "--results_dir", "parts")
    assert "8 examples of this run are kept: the same command continues" in capsys.readouterr().err
    folder = tmp_path / "parts/MindMerger/math_mgsm"
    assert not (folder / "results.json").exists()
    shard = folder / ".partial/rank0.jsonl"
    shard.write_bytes(shard.read_bytes()[:-20])  # a crash while the second batch was being written
    with monkeypatch.context() as patch:
        begun = interrupt_after(patch, 99)
        _, err = evaluate(*FEW, "--results_dir", "parts")
    assert "continuing: 4 of 12 examples are finished" in err
    assert [len(batch) for batch in begun] == [4, 4]
    assert outcome(folder) == outcome(tmp_path / "whole/MindMerger/math_mgsm")


def test_rows_that_change_places_continue_after_a_stop_to_the_same_bytes_in_bf16(evaluate, tmp_path, monkeypatch):
    """Beside other rows bf16 rounds otherwise: what is written at once is generated again at once."""
    monkeypatch.setattr(answers, "BATCHES_AT_ONCE", 1)
    flags = [*FEW[:4], "--eval_max_tokens", 400, "--precision", "bf16", "--score_gold"]
    evaluate(*flags, "--results_dir", "whole")
    begun, real = [], answers.generate_in_places

    def stopped(*args):
        begun.append(args[3])
        if len(begun) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(answers, "generate_in_places", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*flags, "--results_dir", "parts")
    _, err = evaluate(*flags, "--results_dir", "parts")
    assert f"continuing: {len(begun[0]) + len(begun[1])} of" in err and begun[3] == begun[2]
    folders = [tmp_path / name / "MindMerger/math_mgsm" for name in ("whole", "parts")]
    assert outcome(folders[0]) == outcome(folders[1])


def test_a_run_out_of_memory_continues_with_a_smaller_batch(evaluate, tmp_path, monkeypatch):
    """Finished examples stay finished when --eval_batch_size, which is not part of the result, is lowered."""
    evaluate(*FEW, "--results_dir", "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1)
        evaluate(*FEW, "--results_dir", "parts")
    with monkeypatch.context() as patch:
        begun = interrupt_after(patch, 99)
        evaluate(*FEW, "--results_dir", "parts", "--eval_batch_size", 3)
    assert [len(batch) for batch in begun] == [3, 3, 2]
    folders = [tmp_path / name / "MindMerger/math_mgsm" for name in ("whole", "parts")]
    assert outcome(folders[0]) == outcome(folders[1])


def test_a_finished_run_only_prints_its_table_again(evaluate, tmp_path, monkeypatch):
    first, _ = evaluate(*FEW)
    folder = tmp_path / "results/MindMerger/math_mgsm"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(run_evaluation, "load_model", None)
    again, err = evaluate(*FEW)
    assert again == first and "nothing is generated" in err
    assert before == {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    }


def test_a_second_run_into_the_same_results_is_refused_and_a_dead_ones_lock_is_taken_over(evaluate, tmp_path):
    folder = tmp_path / "results/MindMerger/math_mgsm"
    code = "from mindmerger.runtime.files import FolderLock\n"
    code += f"lock = FolderLock({str(folder)!r}); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        owner.stdout.readline()
        with pytest.raises(UserError, match=f'another run is writing to .*"pid": {owner.pid}'):
            evaluate(*FEW)
        assert [path.name for path in folder.iterdir()] == [".lock"]
        owner.kill()
    evaluate(*FEW)
    assert "results.json" in {path.name for path in folder.iterdir()} and not (folder / ".lock").exists()


def test_a_crash_while_merging_loses_no_answer(evaluate, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(summary, "write_json_atomic", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate(*FEW)
    monkeypatch.setattr(run_evaluation, "load_model", None)
    out, _ = evaluate(*FEW)
    assert "mean" in out


KILLED_MERGE = """
import os, signal, sys
from mindmerger.evaluation import summary
import run_evaluation
from mindmerger.runtime import command

name, number, summarise = sys.argv[1], int(sys.argv[2]), summary.summarise
call, calls = getattr(os, name), []

def counted(*arguments, **named):
    calls.append(arguments)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments, **named)

def armed(*arguments):
    setattr(os, name, counted)
    return summarise(*arguments)

run_evaluation.summarise = armed
command.run_main(lambda: run_evaluation.main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_kill_9_at_any_point_of_the_merge_loses_no_answer_and_leaves_no_litter(
    evaluate, world, datas, tmp_path, monkeypatch
):
    """Three files of predictions, scores.tsv, results.json, and then .partial goes."""
    evaluate(*FEW, "--results_dir", "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_evaluation, "summarise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate(*FEW, "--results_dir", "generated")
    monkeypatch.setattr(run_evaluation, "load_model", None)
    (tmp_path / "killed_merge.py").write_text(KILLED_MERGE)
    # Each of the five written files removes what may stand in its temporary one's place: the sixth is .partial's.
    for point in (("replace", 2), ("replace", 5), ("unlink", 6), ("rmdir", 1)):
        parts = f"parts-{point[0]}-{point[1]}"
        shutil.copytree(tmp_path / "generated", tmp_path / parts)
        flags = [*FEW, "--init_checkpoint", world.folder, "--data_root", datas, "--results_dir", parts]
        codes, printed = run_prepared(tmp_path / "killed_merge.py", *point, *flags, cwd=tmp_path)
        assert codes == [-signal.SIGKILL], (point, printed)
        folder = tmp_path / parts / "MindMerger/math_mgsm"
        assert (folder / ".partial").is_dir()
        assert (folder / "results.json").is_file() == (point[0] != "replace")
        evaluate(*FEW, "--results_dir", parts)
        assert outcome(folder) == outcome(tmp_path / "whole/MindMerger/math_mgsm"), point


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_changed_arguments_are_refused_by_name(evaluate, tmp_path, monkeypatch, state, world, datas):
    if state == "finished":
        evaluate(*FEW)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(patch, 1)
            evaluate(*FEW)
    other_data = tmp_path / "data"
    shutil.copytree(datas, other_data)
    file = other_data / "evaluation/mgsm/mgsm_th.tsv"
    file.write_text(f"หนึ่งบวกหนึ่ง\t2\n{file.read_text(encoding='utf-8')}", encoding="utf-8")
    altered = {name: value + 1 for name, value in world.model.mapping.state_dict().items()}
    save_file(altered, tmp_path / "altered.safetensors")
    llm = make_tiny_llm(tmp_path / "retrained", seed=8)
    models = ("--llm_path", world.llm, "--mt_path", world.encoder)
    # What decides an answer is the same in both; which rows are asked may differ from a finished evaluation's.
    rows = [
        (("--limit", 2), world.folder, "with another --limit"),
        (("--languages", "Thai"), world.folder, "with another --languages"),
    ]
    for flags, checkpoint, name in (
        *(rows if state == "unfinished" else []),
        (("--max_new_tokens", 5), world.folder, "with another --max_new_tokens"),
        (("--precision", "bf16"), world.folder, "with another --precision"),
        (("--data_root", other_data), world.folder, "(with another|of other rows, the) data "),
        (models, tmp_path / "altered.safetensors", "with another --init_checkpoint"),
        (("--llm_path", llm), world.folder, "with another --llm_path"),
    ):
        with pytest.raises(UserError, match=f"{state} evaluation {name}.*(then|was).*now.*--overwrite") as caught:
            evaluate(*FEW, *flags, checkpoint=checkpoint)
        assert "\n" not in str(caught.value)
    evaluate(*FEW, "--limit", 2, "--overwrite")
    assert len(read_lines(tmp_path / "results/MindMerger/math_mgsm/predictions/Thai.jsonl")) == 2


def test_a_model_trained_again_in_its_folder_has_another_fingerprint(tmp_path):
    """Equal names and sizes: without a look at the weights a stale table would be printed for the new model."""
    folder = tmp_path / "llm"
    make_tiny_llm(folder, width=192, seed=1)
    assert (folder / "model.safetensors").stat().st_size > 2 * 64 * 16 * 1024, "small files are read whole"
    first = model_fingerprint(str(folder))
    shutil.copytree(folder, tmp_path / "copy")
    assert model_fingerprint(str(tmp_path / "copy")) == first
    make_tiny_llm(folder, width=192, seed=2)
    assert model_fingerprint(str(folder)) != first


# -- one batch


class EchoModel:
    """Answers with given ids, as `MindMerger.generate` returns them."""

    device, eos_token_ids = torch.device("cpu"), [2, 7]

    def __init__(self, ids=None, error=None):
        self.ids, self.error = ids, error

    def generate(self, **inputs):
        if self.error:
            raise self.error
        return torch.tensor(self.ids)


class Letters:
    """A tokenizer whose id is the letter's number and which calls nothing special."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(96 + i) for i in ids)


def test_answers_end_before_the_first_end_token_whatever_pads_them():
    """An LLM padded with an ordinary token (or EOS) must not have its padding decoded or counted."""
    tokenizers = SimpleNamespace(llm=Letters(), encoder_pad_id=0, llm_pad_id=0)
    columns = {"prompt_ids": [[1]] * 4}
    model = EchoModel([[8, 9, 2, 3], [7, 1, 1, 1], [8, 8, 8, 8], [8, 8, 8, 2]])
    assert generate_batch(model, tokenizers, columns, [0, 1, 2, 3], 4) == [
        Generation("hi", 3, False),
        Generation("", 1, False),
        Generation("hhhh", 4, True),
        Generation("hhh", 4, False),
    ]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    ],
)
def test_out_of_memory_names_sizes_and_flags(error):
    tokenizers = SimpleNamespace(llm=None, encoder_pad_id=0, llm_pad_id=0)
    columns = {"prompt_ids": [[1, 2]] * 3, "encoder_ids": [[1, 2, 3]] * 3}
    with pytest.raises(
        UserError, match="3 examples, longest encoder 3, prompt 2, answer 9 tokens: .*--eval_batch_size"
    ) as e:
        generate_batch(EchoModel(error=error), tokenizers, columns, [0, 1, 2], 9)
    assert str(e.value).startswith("out of memory on a batch") and "\n" not in str(e.value)


def test_an_error_that_is_not_of_memory_stays_what_it_is():
    tokenizers = SimpleNamespace(llm=None, encoder_pad_id=0, llm_pad_id=0)
    error = RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="^shapes cannot be multiplied$") as e:
        generate_batch(EchoModel(error=error), tokenizers, {"prompt_ids": [[1]]}, [0], 9)
    assert e.value is error


# -- answer()


def test_answer_gives_what_the_command_gives_in_the_order_asked(evaluate, tmp_path, world):
    evaluate(*FEW)
    rows = []
    for language in ("Thai", "English"):
        found = read_lines(tmp_path / f"results/MindMerger/math_mgsm/predictions/{language}.jsonl")
        rows += [(row["source"], language, row["output"]) for row in found]
    rows = rows[::2] + rows[1::2]
    texts, languages, outputs = map(list, zip(*rows, strict=True))
    assert answer(world.model, texts, languages=languages, max_new_tokens=4, batch_size=3) == outputs
    assert answer(world.model, texts, languages="th", max_new_tokens=4) == outputs
    assert answer(world.model, texts, max_new_tokens=4, augmentation=False) != outputs
    assert answer(world.model, []) == []


def test_answer_of_a_model_without_encoder_is_the_llm_alone(evaluate, tmp_path, world):
    evaluate("--task", "xnli", "--languages", "Thai", "--llm_only", "--llm_path", world.llm, checkpoint=None)
    rows = read_lines(tmp_path / "results/MindMerger/xnli-llm_only/predictions/Thai.jsonl")
    model = MindMerger.from_models(None, world.llm, torch.float32)
    assert answer(model, [row["prompt"] for row in rows], task="xnli") == [row["output"] for row in rows]


def test_answer_refuses_wrong_lists_in_one_line(world):
    for arguments, message in (
        ((["a", "b"], "math", ["Thai"]), "2 texts, 1 languages"),
        ((["a"], "math", ["Tahi"]), "Thai"),
        ((["a"], "maht", ["Thai"]), "math"),
        (("a", "math", ["Thai"]), "list"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            answer(world.model, *arguments)
        assert "\n" not in str(caught.value)


def test_answer_asks_for_languages_where_the_encoder_reads_a_tag(world, monkeypatch):
    """An NLLB-like encoder silently told that Swahili is English answers worse, and nobody sees why."""
    tagged = SimpleNamespace(encoder=SimpleNamespace(src_lang="eng_Latn"))
    monkeypatch.setattr(answers, "_cached_tokenizers", lambda mt_path, llm_path: tagged)
    with pytest.raises(UserError, match="needs the texts' languages"):
        answer(world.model, ["a"])


# -- probes of the prefix, and losses of gold answers

PROBED = ("--languages", "Swahili,th", "--max_new_tokens", "4", "--eval_batch_size", "3")  # 8 examples


def outputs_of(folder):
    return {
        row["id"]: row["output"]
        for name in ("Swahili", "Thai")
        for row in read_lines(folder / f"predictions/{name}.jsonl")
    }


def test_a_shuffled_prefix_is_that_of_another_question_of_the_language_and_nothing_else_changes(
    evaluate, tmp_path, world
):
    whole = (*PROBED, "--max_seq_len", 3000, "--max_gen_len", 3000)  # nothing is truncated
    evaluate(*whole)
    out, _ = evaluate(*whole, "--probe_prefix", "shuffled")
    root = tmp_path / "results/MindMerger"
    folder = root / "math_mgsm-prefix_shuffled"
    own, probed = outputs_of(root / "math_mgsm"), outputs_of(folder)
    assert own != probed and own.keys() == probed.keys()
    rows = {row["id"]: row for name in ("Swahili", "Thai") for row in read_lines(folder / f"predictions/{name}.jsonl")}
    partners = {id: row["prefix_of"] for id, row in rows.items()}
    assert sorted(partners.values()) == sorted(rows), "each prefix is used once"
    assert all(id != other and id[:2] == other[:2] for id, other in partners.items())
    # By hand: the other row's source to the encoder, the own prompt to the LLM.
    tokenizers = answers._cached_tokenizers(world.encoder, world.llm)
    encoder, llm = tokenizers.encoder, tokenizers.llm
    for id, row in rows.items():
        source = torch.tensor([encoder(rows[partners[id]]["source"])["input_ids"]])
        prompt = torch.tensor([llm(row["prompt"], add_special_tokens=False)["input_ids"]])
        ids = world.model.generate(source, torch.ones_like(source), prompt, torch.ones_like(prompt), max_new_tokens=4)
        assert row["output"] == answers.to_generation(world.model, tokenizers, ids[0].tolist()).output
    results = json.loads((folder / "results.json").read_text())
    assert results["probe_prefix"] == {"kind": "shuffled", "seed": 0, "rows_with_an_equal_source": 0}
    assert results["published"] is None and "prefix of another question" in out


def test_without_a_prompt_a_shuffled_prefix_brings_the_answer_to_the_other_question(evaluate, tmp_path):
    evaluate(*PROBED, "--augmentation", "False")
    evaluate(*PROBED, "--augmentation", "False", "--probe_prefix", "shuffled")
    own, folder = (tmp_path / f"results/MindMerger/math_mgsm-hard{suffix}" for suffix in ("", "-prefix_shuffled"))
    answered = outputs_of(own)
    for name in ("Swahili", "Thai"):
        for row in read_lines(folder / f"predictions/{name}.jsonl"):
            assert row["output"] == answered[row["prefix_of"]]


def test_a_prefix_of_zeros_is_what_a_mapping_of_zeros_gives(evaluate, tmp_path, world):
    zeros = {name: torch.zeros_like(value) for name, value in world.model.mapping.state_dict().items()}
    save_file(zeros, tmp_path / "zeros.safetensors")
    models = ("--llm_path", world.llm, "--mt_path", world.encoder)
    evaluate(*PROBED, *models, "--results_dir", "mapping", checkpoint=tmp_path / "zeros.safetensors")
    evaluate(*PROBED, "--results_dir", "probe", "--probe_prefix", "zero")
    evaluate(*PROBED, "--results_dir", "own")
    expected = outputs_of(tmp_path / "mapping/MindMerger/math_mgsm")
    assert outputs_of(tmp_path / "probe/MindMerger/math_mgsm-prefix_zero") == expected
    assert outputs_of(tmp_path / "own/MindMerger/math_mgsm") != expected


@pytest.mark.parametrize("probe", ["shuffled", "zero"])
def test_a_probe_continues_after_a_stop_to_the_same_bytes_and_mixes_with_nothing(
    evaluate, tmp_path, monkeypatch, probe
):
    flags = (*PROBED, "--probe_prefix", probe, "--score_gold")
    evaluate(*flags, "--results_dir", "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 2)
        evaluate(*flags, "--results_dir", "parts")
    folder = tmp_path / f"parts/MindMerger/math_mgsm-prefix_{probe}"
    plain = tmp_path / "mixed/MindMerger/math_mgsm"
    shutil.copytree(folder, plain)
    with pytest.raises(UserError, match=f"unfinished evaluation with another --probe_prefix: {probe} then, None now"):
        evaluate(*PROBED, "--results_dir", "mixed")
    with pytest.raises(UserError, match="unfinished evaluation with another --score_gold: True then, None now"):
        evaluate(*flags[:-1], "--results_dir", "parts")
    _, err = evaluate(*flags, "--results_dir", "parts")
    assert "continuing: 6 of 8 examples are finished" in err
    assert outcome(folder) == outcome(tmp_path / f"whole/MindMerger/math_mgsm-prefix_{probe}")
    with pytest.raises(UserError, match=f"finished evaluation with another --probe_prefix: {probe} then, None now"):
        shutil.rmtree(plain)
        shutil.copytree(folder, plain)
        evaluate(*PROBED, "--results_dir", "mixed")


@given(counts=st.lists(st.integers(2, 9), min_size=1, max_size=4), seed=st.integers(0, 2**40))
def test_nobody_keeps_the_own_prefix_and_none_is_used_twice(counts, seed):
    examples = [SimpleNamespace(language=str(i)) for i, count in enumerate(counts) for _ in range(count)]
    partner = exchange_rows(examples, seed)
    assert sorted(partner) == list(range(len(examples))) and all(i != other for i, other in enumerate(partner))
    assert all(examples[i].language == examples[other].language for i, other in enumerate(partner))
    assert partner == exchange_rows(examples, seed)
    # A language has the same partners with others beside it as alone.
    assert exchange_rows(examples[: counts[0]], seed) == partner[: counts[0]]


def test_another_seed_is_another_exchange():
    examples = [SimpleNamespace(language="Thai")] * 50
    assert exchange_rows(examples, 0) != exchange_rows(examples, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--llm_only", "--probe_prefix", "zero"), "--probe_prefix changes the prefix, which --llm_only has none of"),
        (("--limit", "1", "--probe_prefix", "shuffled"), "within a language, but Telugu has one row"),
        (("--engine", "vllm", "--score_gold"), "--score_gold needs the LLM's logits, which --engine vllm keeps"),
    ],
)
def test_probes_that_say_nothing_are_refused_in_one_line(world, datas, flags, message):
    given = ["--init_checkpoint", world.folder, "--llm_path", world.llm, "--data_root", datas, *flags]
    with pytest.raises(UserError, match=message) as caught:
        settle(build_parser().parse_args(given), on_gpu=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", [(), ("--augmentation", "False"), ("--llm_only",), ("--probe_prefix", "shuffled")])
def test_losses_of_gold_answers_are_the_model_s_own_on_the_same_rows(evaluate, tmp_path, world, datas, form):
    out, _ = evaluate(*PROBED, "--score_gold", *form)
    [folder] = (tmp_path / "results/MindMerger").iterdir()
    results = json.loads((folder / "results.json").read_text())
    given = ["--init_checkpoint", world.folder, "--data_root", datas, *PROBED, "--score_gold", *form]
    settings = settle(build_parser().parse_args(given), on_gpu=False)
    for name, one in results["languages"].items():
        total, tokens = 0.0, 0
        batch = [i for i, example in enumerate(settings.examples) if example.language == name]
        for i in batch:  # one row at a time: neither batches nor padding may matter
            inputs = answers.batch_inputs(world.model, settings.tokenizers, settings.columns, [i], with_target=True)
            with torch.no_grad():
                output = world.model(**{"encoder_input_ids": None, "encoder_attention_mask": None} | inputs)
            total, tokens = total + output.loss_sum.item(), tokens + int(output.target_tokens)
            assert settings.columns["target_ids"][i][-1] == settings.tokenizers.eos_id
        assert one["gold_tokens"] == tokens and one["gold_loss"] == pytest.approx(total / tokens, rel=1e-5)
    languages = results["languages"].values()
    weighted = sum(one["gold_loss"] * one["gold_tokens"] for one in languages) / results["gold"]["gold_tokens"]
    assert results["gold"]["gold_loss"] == pytest.approx(weighted, abs=1e-5)
    assert "gold loss" in out and f"{results['gold']['gold_loss']:.4f}" in out
    rows = read_lines(folder / "predictions/Thai.jsonl")
    assert sum(row["gold_tokens"] for row in rows) == results["languages"]["Thai"]["gold_tokens"]


def test_gold_answers_change_no_answer_and_nothing_else_in_the_results(evaluate, tmp_path):
    evaluate(*PROBED, "--results_dir", "without")
    evaluate(*PROBED, "--results_dir", "with", "--score_gold")
    without, scored = (outcome(tmp_path / name / "MindMerger/math_mgsm")[1] for name in ("without", "with"))
    assert outputs_of(tmp_path / "with/MindMerger/math_mgsm") == outputs_of(tmp_path / "without/MindMerger/math_mgsm")
    assert scored.keys() - without.keys() == {"gold"} and without["identity"]["--score_gold"] is None
    for one in (*scored["languages"].values(), scored["mean"]):
        one.pop("gold_loss"), one.pop("gold_tokens", None)
    assert scored["languages"] == without["languages"] and scored["mean"] == without["mean"]


def test_a_gold_loss_that_is_not_a_number_names_the_weight_that_makes_it_so(world):
    tokenizers = answers._cached_tokenizers(world.encoder, world.llm)
    columns = {"encoder_ids": [[5, 6]], "prompt_ids": [[7]], "target_ids": [[8, 2]]}
    limits = {"batch_size": 8, "token_budget": None, "max_new_tokens": 1}
    settings = SimpleNamespace(tokenizers=tokenizers, columns=columns, bridge=None, **limits)
    assert gold.score_gold(world.model, settings, [0])[0]["gold_tokens"] == 2
    broken = deepcopy(world.model)
    with torch.no_grad():
        broken.llm.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match=r"llm\.model\.norm\.weight of the LLM .* has values that are NaN"):
        gold.score_gold(broken, settings, [0])


def test_comparisons_name_the_probe_and_both_gold_losses(evaluate, tmp_path, capsys):
    evaluate(*PROBED, "--score_gold")
    evaluate(*PROBED, "--score_gold", "--probe_prefix", "shuffled")
    folders = [str(tmp_path / "results/MindMerger" / name) for name in ("math_mgsm", "math_mgsm-prefix_shuffled")]
    main(["--compare", *folders])
    table = capsys.readouterr().out
    assert "(MindMerger-Soft (mapped source and prompt), prefix of another question)" in table
    losses = [json.loads(Path(folder, "results.json").read_text())["gold"]["gold_loss"] for folder in folders]
    assert f"gold loss in nats per token: A {losses[0]:.4f}, B {losses[1]:.4f}" in table
    rows = [read_row("MindMerger-Soft", folder) for folder in folders]
    assert [row.label for row in rows] == ["MindMerger-Soft", "MindMerger-Soft (shuffled prefix)"]
    assert read_row("Soft, shuffled prefix", folders[1]).label == "Soft, shuffled prefix"


@pytest.mark.parametrize(
    ("bridge", "options", "suffix", "title"),
    [
        ("langbridge", {"mapper": "latent"}, "-hard", "langbridge (prefix only)"),
        ("xbridge", {}, "", "xbridge (prefix and prompt)"),
    ],
)
def test_another_bridge_is_named_and_gets_its_options_its_form_and_no_published_numbers(
    evaluate, tmp_path, world, bridge, options, suffix, title
):
    """Its table was titled MindMerger-Soft, with MindMerger's published numbers beside it."""
    llm, encoder = tmp_path / "MetaMath-7B-V1.0", tmp_path / "mt5-xl"
    shutil.copytree(world.llm, llm)
    shutil.copytree(world.encoder, encoder)
    model = MindMerger.from_models(str(encoder), str(llm), torch.float32, None, bridge, options)
    model.save_pretrained(tmp_path / "saved")
    out, _ = evaluate(*FEW[:2], "--limit", 1, "--max_new_tokens", 2, checkpoint=tmp_path / "saved")
    folder = tmp_path / f"results/MindMerger/math_mgsm{suffix}"
    results = json.loads((folder / "results.json").read_text())
    assert results["bridge"] == bridge and results["published"] is None
    assert f"math_mgsm, {title}: accuracy" in out and "MindMerger-" not in out
    row = read_lines(folder / "predictions/Thai.jsonl")[0]
    loaded = MindMerger.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32)
    assert answer(loaded, [row["source"]], languages="Thai", max_new_tokens=2) == [row["output"]]


# -- wrong inputs


@pytest.fixture(scope="module")
def broken(tmp_path_factory, world):
    """Things a user may pass by mistake, by name."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty").mkdir()
    (folder / "cut.bin").write_bytes(Path(world.released).read_bytes()[:200])
    torch.save({"model_state_dict": os.system}, folder / "code.bin")
    save_file({"mlp.linear1.weight": torch.zeros(2, 2)}, folder / "part.safetensors")
    make_tiny_encoder(folder / "wide_encoder", width=24)
    make_tiny_llm(folder / "short_llm", max_position_embeddings=100)
    return folder


WRONG = {
    "unknown task": (["--task", "mgms"], "unknown task 'mgms'"),
    "task without evaluation": (["--task", "translation"], "no evaluation set: choose --task math_mgsm"),
    "unknown language": (["--languages", "Swahilli"], "Swahili"),
    "no language": (["--languages", ","], "no language"),
    "missing data root": (["--data_root", "absent"], "absent"),
    "missing file": (["--data_root", "{broken}/empty"], "mgsm"),
    "missing checkpoint": (["--init_checkpoint", "absent.bin"], "no mapping at absent.bin"),
    "empty checkpoint folder": (["--init_checkpoint", "{broken}/empty"], "neither mapping.safetensors nor"),
    "cut checkpoint": (
        ["--init_checkpoint", "{broken}/cut.bin", "--llm_path", "{llm}", "--mt_path", "{encoder}"],
        "cut.bin",
    ),
    "checkpoint with code": (
        ["--init_checkpoint", "{broken}/code.bin", "--llm_path", "{llm}", "--mt_path", "{encoder}"],
        "could run code",
    ),
    "checkpoint of other widths": (
        ["--mt_path", "{broken}/wide_encoder"],
        r"has shape \(32, 16\).*width 24.*\(48, 24\)",
    ),
    "part of a checkpoint": (
        ["--init_checkpoint", "{broken}/part.safetensors", "--llm_path", "{llm}", "--mt_path", "{encoder}"],
        "part.safetensors is not a mapping of the bridge mindmerger: missing .'end_boundary",
    ),
    "missing llm": (["--llm_path", "./absent"], "./?absent"),
    "missing encoder": (["--mt_path", "./absent"], "./?absent"),
    "batch of none": (["--eval_batch_size", "0"], "batch_size: expected a whole number of at least 1, got '0'"),
    "limit of none": (["--limit", "-1"], "--limit"),
    "not a bool": (["--augmentation", "Soft"], "expected True or False, got 'Soft'"),
    "unknown flag": (["--max_new_token", "4"], "unrecognized arguments: --max_new_token"),
    "compare one": (["--compare", "results"], "at least two"),
    "empty languages": (["--languages", ""], "no language in ''"),
    "name above the folder": (["--save_name", "../x"], "--save_name '../x' leaves the outputs"),
    "name elsewhere": (["--save_name", "/elsewhere"], "--save_name '/elsewhere' leaves the outputs"),
    "no name": (["--save_name", " "], "--save_name ' ' names no folder"),
    "name with control characters": (["--save_name", "a\x1b[2J"], r"--save_name 'a\\x1b\[2J' has control characters"),
    "seed of 65 bits": (["--seed", str(2**64)], "--seed"),
    "negative seed": (["--seed", "-1"], "--seed: expected a whole number of at least 0, got '-1'"),
    "an encoder as the LLM": (["--llm_path", "{encoder}"], "is a mt5 model, an encoder-decoder and not a causal"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_before_any_model_loads(case, world, broken, datas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_evaluation, "load_model", None)
    flags, message = WRONG[case]
    flags = [part.format(broken=broken, llm=world.llm, encoder=world.encoder) for part in flags]
    with pytest.raises(UserError, match=message) as caught:
        main(["--data_root", datas, "--init_checkpoint", world.folder, *flags])
    assert "\n" not in str(caught.value).strip()
    assert not (tmp_path / "results").exists()


def test_an_input_longer_than_learned_positions_is_refused_and_rotary_ones_warn(world, broken, datas, capsys):
    given = ["--init_checkpoint", world.folder, "--data_root", datas, "--languages", "en", "--limit", "1"]
    settings = settle(build_parser().parse_args([*given, "--llm_path", str(broken / "short_llm")]), on_gpu=False)
    assert settings.max_new_tokens == 512 and "has 100: lower --max_new_tokens" in capsys.readouterr().err
    from transformers import GPT2Config

    GPT2Config(n_positions=64, n_embd=8, n_head=2, n_layer=1).save_pretrained(broken / "gpt2")
    with pytest.raises(UserError, match="the longest row needs 65 positions but .*gpt2 has 64: lower --max_gen_len$"):
        check_positions(str(broken / "gpt2"), 65, "the longest row", "--max_gen_len")
    check_positions(str(broken / "gpt2"), 64, "the longest row", "--max_gen_len")


def test_a_question_longer_than_the_encoders_positions_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig(max_position_embeddings=64, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="the question needs 65 positions but .*bert has 64: lower --max_seq_len"):
        check_positions(str(tmp_path / "bert"), 65, "the question", "--max_seq_len")
    check_positions(str(tmp_path / "bert"), 64, "the question", "--max_seq_len")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--augmentation", "True"), "no use of --augmentation"),
        (("--mt_path", "{encoder}"), "no use of --mt_path"),
        ((), "no use of --init_checkpoint, of which only the name of its LLM is taken"),
    ],
)
def test_what_the_llm_alone_makes_no_use_of_is_said(world, datas, capsys, flags, said):
    given = ["--llm_only", "--data_root", datas, "--languages", "en", "--limit", "1"]
    given += [part.format(encoder=world.encoder) for part in flags] + ["--llm_path", world.llm] * bool(flags)
    given += [] if flags else ["--init_checkpoint", world.folder]
    settle(build_parser().parse_args(given), on_gpu=False)
    assert f"warning: --llm_only evaluates without encoder and mapping: {said}" in capsys.readouterr().err


def test_flags_beside_compare_are_said_to_be_unused(tmp_path, capsys):
    with pytest.raises(UserError):
        main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--task", "xnli", "--limit", "3"])
    assert "--compare evaluates nothing: no use of --task, --limit" in capsys.readouterr().err


def test_a_mapping_trained_for_another_task_is_warned_of(world, datas, capsys):
    given = ["--init_checkpoint", world.folder, "--data_root", datas, "--languages", "en", "--limit", "1"]
    settle(build_parser().parse_args([*given, "--task", "xnli"]), on_gpu=False)
    assert "this mapping was trained for task math, now evaluated on xnli" in capsys.readouterr().err
    settle(build_parser().parse_args([*given, "--task", "math_msvamp"]), on_gpu=False)
    assert "was trained for task" not in capsys.readouterr().err


# -- whole commands


@pytest.mark.slow
def test_wrong_input_on_two_ranks_is_printed_once_and_exits_2(run, world, datas):
    done = run(
        ROOT / "run_evaluation.py", "--init_checkpoint", world.folder, "--data_root", datas, "--task", "xnil", ranks=2
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: unknown task 'xnil'") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_wrong_input_of_a_plain_run_is_one_line_and_exit_2(run, world, datas):
    done = run(ROOT / "run_evaluation.py", "--data_root", datas, "--init_checkpoint", "absent.bin")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "task math means" not in line] == [
        "error: no mapping at absent.bin: pass a saved folder, a .safetensors file or a pytorch_model.bin"
    ]


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(run, evaluate, world, datas, tmp_path):
    """The published command, as the launcher starts it: every example once, merged by rank 0, one table."""
    evaluate(*FEW, "--results_dir", "one")
    models = ("--llm_path", world.llm + "/", "--mt_path", world.encoder + "/")
    program = ROOT / "run_evaluation.py"
    published = (
        "--deepspeed",
        *models,
        "--init_checkpoint",
        world.released,
        "--augmentation",
        "True",
        "--data_root",
        datas,
    )
    done = run(program, *published, *FEW, "--results_dir", "two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("95 % interval") == 1
    two = tmp_path / "two/MindMerger/math_mgsm"
    assert outcome(two)[0] == outcome(tmp_path / "one/MindMerger/math_mgsm")[0]
    timing = json.loads((two / "results.json").read_text())["timing"]
    assert timing["world_size"] == 2 and timing["examples"] == 12


@pytest.mark.slow
def test_two_ranks_killed_midway_are_continued_by_one_process(evaluate, world, datas, tmp_path):
    """SIGKILL leaves what each rank had finished; another world size takes it up and ends with the same bytes."""
    flags = ["--task", "math_msvamp", "--eval_batch_size", "1", "--max_new_tokens", "40"]
    evaluate(*flags, "--results_dir", "whole")
    command = [sys.executable, str(ROOT / "run_evaluation.py"), "--init_checkpoint", world.folder, "--data_root", datas]
    command += FP32
    environment = clean_environment(tmp_path) | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(
            [*command, *flags, "--results_dir", "parts"],
            cwd=tmp_path,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    folder = tmp_path / "parts/MindMerger/math_msvamp"
    shards = [folder / f".partial/rank{rank}.jsonl" for rank in range(2)]
    deadline = time.monotonic() + 120
    try:
        while not all(shard.is_file() and shard.stat().st_size for shard in shards):
            assert time.monotonic() < deadline and all(process.poll() is None for process in ranks)
            time.sleep(0.01)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert not (folder / "results.json").exists(), "the run was over before it could be killed"
    _, err = evaluate(*flags, "--results_dir", "parts")
    assert "continuing: " in err
    assert outcome(folder) == outcome(tmp_path / "whole/MindMerger/math_msvamp")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["math_mgsm", "math_msvamp", "x-csqa", "xnli"])
def test_published_commands_run_in_every_task(evaluate, world, tmp_path, task):
    models = ("--llm_path", world.llm + "/", "--mt_path", world.encoder + "/")
    older = ("--save_name", "MergeMinds", "--max_seq_len", 512, "--max_gen_len", 512, "--gpu", 0, "--max_new_tokens", 8)
    out, _ = evaluate("--task", task, *models, *older, "--augmentation", "True", checkpoint=world.released)
    results = json.loads((tmp_path / "results/MergeMinds" / task / "results.json").read_text())
    assert results["counts"]["examples"] >= 40
    assert all(name in out for name in results["languages"])
