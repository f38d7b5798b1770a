"""Folders that version 0.1.0 wrote before the package `mindmerger` existed are resumed, loaded and continued."""

import json
import shutil

import pytest
import torch
from conftest import DATA, ROOT, read_log
from safetensors.torch import load_file

import run_evaluation
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.command import versions
from mindmerger.runtime.errors import UserError

OLD = DATA / "version_0_1_0"
MODELS = ["--llm_path", "llm", "--mt_path", "mt5", "--data_root", "datas", "--languages", "sw,de"]
TRAINING = [
    *(*MODELS, "--task", "math", "--stage_name", "mapping", "--precision", "fp32", "--dev_size", "5"),
    *("--train_batch_size", "8", "--train_micro_batch_size_per_gpu", "2", "--max_seq_len", "60", "--max_gen_len", "80"),
    *("--lr", "1e-2", "--num_workers", "0"),
]
EVALUATION = [
    *("--init_checkpoint", "outputs/whole/math/mapping", *MODELS, "--task", "math_mgsm", "--limit", "3"),
    *("--max_new_tokens", "6", "--precision", "fp32", "--eval_batch_size", "2", "--augmentation", "False"),
]


@pytest.fixture
def old(tmp_path, datas, monkeypatch):
    """A copy of everything that the earlier version left, in the current folder."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    (folder / "datas").symlink_to(datas)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_is_resumed_to_the_end_that_it_would_have_had(run, old):
    more = ["--max_steps", "4", "--save_name", "stopped", "--allow_changed", "max_steps"]
    done = run(ROOT / "run_training.py", *TRAINING, *more, cwd=old)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumes from outputs/stopped/math/mapping/checkpoint-000002 at step 2" in done.stderr
    whole, stopped = (old / f"outputs/{name}/math/mapping" for name in ("whole", "stopped"))
    # Recorded on another machine perhaps, whose sums may round otherwise.
    for key in ("loss", "grad_norm"):
        assert read_log(stopped, key) == pytest.approx(read_log(whole, key), rel=1e-5), key
    evaluated = read_log(stopped, "dev_loss")[1:]  # the first was made where the earlier version stopped
    assert evaluated == pytest.approx(read_log(whole, "dev_loss"), rel=1e-5)
    expected, found = (load_file(folder / "mapping.safetensors") for folder in (whole, stopped))
    assert all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in expected.items())


def test_a_mapping_of_an_earlier_version_loads_in_both_of_its_formats(old):
    folder = old / "outputs/whole/math/mapping"
    assert "bridge" not in json.loads((folder / "config.json").read_text())
    model = MindMerger.from_pretrained(str(folder), dtype=torch.float32)
    expected = load_file(folder / "mapping.safetensors")
    for path in (folder, folder / "pytorch_model.bin", folder / "mapping.safetensors"):
        model.load_mapping(str(path))
        found = model.mapping.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_evaluation_that_an_earlier_version_left_unfinished_continues_to_the_results_of_a_finished_one(old, capsys):
    assert run_evaluation.main([*EVALUATION, "--save_name", "unfinished"]) == 0
    assert "continuing: 2 of 6 examples are finished" in capsys.readouterr().err
    folders = [old / f"results/{name}/math_mgsm-hard" for name in ("finished", "unfinished")]
    for name in ("predictions/German.jsonl", "predictions/Swahili.jsonl", "scores.tsv"):
        assert (folders[0] / name).read_text() == (folders[1] / name).read_text(), name


def test_results_of_an_earlier_version_are_compared_shown_and_scored_again_without_generating(old, capsys, monkeypatch):
    again = [*EVALUATION, "--save_name", "again"]
    assert run_evaluation.main(again) == 0
    folders = [f"results/{name}/math_mgsm-hard" for name in ("finished", "again")]
    assert run_evaluation.main(["--compare", *folders]) == 0
    printed = capsys.readouterr()
    assert "6 items in common" in printed.out and "were scored by different versions" in printed.err
    monkeypatch.setattr(run_evaluation, "load_model", None)
    earlier = json.loads((old / folders[0] / "results.json").read_text())
    assert run_evaluation.main([*EVALUATION, "--save_name", "finished"]) == 0
    assert "scored by version 2 of the scorer, now 3: 6 kept answers are scored again" in capsys.readouterr().err
    results = json.loads((old / folders[0] / "results.json").read_text())
    assert results["timing"] == earlier["timing"] and results["versions"] == earlier["versions"]
    assert results["identity"]["version of the scorer"] == 3
    for name in ("predictions/German.jsonl", "predictions/Swahili.jsonl", "scores.tsv"):
        assert (old / folders[0] / name).read_text() == (old / folders[1] / name).read_text(), name
    assert run_evaluation.main([*EVALUATION, "--save_name", "finished"]) == 0
    assert "holds this evaluation already" in capsys.readouterr().err


def test_results_of_an_earlier_version_are_extended_where_the_same_libraries_are_installed(old, capsys):
    file = old / "results/finished/math_mgsm-hard/results.json"
    results = json.loads(file.read_text())
    more = [*EVALUATION, "--limit", "4", "--languages", "sw,de,en"]
    results["versions"]["torch"] = "2.0.0"
    file.write_text(json.dumps(results))
    with pytest.raises(UserError, match="was generated with torch 2.0.0.*now installed: torch .*; one table"):
        run_evaluation.main([*more, "--save_name", "finished"])
    results["versions"] = versions()
    file.write_text(json.dumps(results))
    assert run_evaluation.main([*more, "--save_name", "finished"]) == 0
    assert "6 answers are kept, 6 rows (Swahili 1, German 1, English 4) are to come" in capsys.readouterr().err
    assert run_evaluation.main([*more, "--save_name", "again"]) == 0
    for name in ("predictions/German.jsonl", "predictions/Swahili.jsonl", "predictions/English.jsonl", "scores.tsv"):
        assert (file.parent / name).read_text() == (old / "results/again/math_mgsm-hard" / name).read_text(), name
