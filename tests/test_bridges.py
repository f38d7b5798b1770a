"""The seam for connectors: a bridge in a file of its own trains, resumes, evaluates and counts like any other."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, read_log, run_prepared
from safetensors.torch import load_file
from toy_bridge import ToyBridge

import run_evaluation
from mindmerger.bridges import BRIDGES, Mapping
from mindmerger.generation.answers import answer, input_positions
from mindmerger.model.mapping_files import MindMergerConfig, empty_bridge, read_config
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from mindmerger.training.settings import find_stage

READ = ["--bridge", "toy", "--stage_name", "read"]
SOLVE = ["--bridge", "toy", "--stage_name", "solve", "--max_gen_len", "300", "--max_steps", "1"]


@pytest.fixture(scope="module")
def runs(tiny_llm, tiny_encoder, datas, tmp_path_factory):
    """The folder in which several runs with the toy bridge took place, and their outcomes by name."""
    folder = tmp_path_factory.mktemp("toy")
    flags = [
        *("--deepspeed", "--llm_path", tiny_llm, "--mt_path", tiny_encoder, "--data_root", datas, "--task", "math"),
        *("--precision", "fp32", "--dev_size", "5", "--train_batch_size", "8", "--train_micro_batch_size_per_gpu", "2"),
        *("--max_seq_len", "60", "--max_gen_len", "80", "--lr", "1e-2", "--num_workers", "1"),
    ]
    ways = {
        "whole": [*READ, "--max_steps", "4", "--micro_batch_tokens", "150"],
        "half": [*READ, "--max_steps", "2", "--micro_batch_tokens", "150", "--save_name", "half"],
        "resumed": [*READ, "--max_steps", "4", "--micro_batch_tokens", "150", "--save_name", "half"],
        "solve": SOLVE,
        "dry toy": [*READ, "--dry_run"],
        "dry mindmerger": ["--dry_run"],
        "another bridge": [*READ, "--bridge", "mindmerger"],
        "another start": ["--init_checkpoint", "outputs/MindMerger/math/read", "--save_name", "other"],
        "no such bridge": ["--bridge", "toyy"],
    }
    ways["resumed"] += ["--allow_changed", "max_steps"]
    (folder / "runs.json").write_text(json.dumps([[*flags, *more] for more in ways.values()]))
    driver = (ROOT / "tests/drivers/toy_runs.py", folder / "runs.json", folder / "outcomes.json")
    codes, (printed,) = run_prepared(*driver, cwd=folder)
    assert codes == [0], printed[-6000:]
    return folder, dict(zip(ways, json.loads((folder / "outcomes.json").read_text()), strict=True)), printed


@pytest.mark.slow
def test_a_bridge_in_a_file_of_its_own_trains_both_of_its_stages(runs):
    folder, outcomes, _ = runs
    assert [outcomes[name]["code"] for name in ("whole", "half", "resumed", "solve")] == [0, 0, 0, 0], outcomes
    losses = read_log(folder / "outputs/MindMerger/math/read")
    assert len(losses) == 4 and losses[-1] < losses[0]
    best = load_file(folder / "outputs/MindMerger/math/read/mapping.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in best.items()} == {
        "queries": (8, 16),
        "out.weight": (32, 32),
        "out.bias": (32,),
        "markers": (2, 32),
    }
    assert "mapping: starts from outputs/MindMerger/math/read/mapping.safetensors" in outcomes["solve"]["printed"]
    config = read_config(str(folder / "outputs/MindMerger/math/solve"))
    assert (config.bridge, config.stage, config.augmentation) == ("toy", "solve", True)


@pytest.mark.slow
def test_a_bridge_resumes_exactly_and_its_checkpoint_holds_its_own_tensors(runs):
    folder, _, _ = runs
    whole, half = (folder / f"outputs/{name}/math/read" for name in ("MindMerger", "half"))
    assert read_log(whole) == read_log(half) and len(read_log(half)) == 4
    tensors = load_file(half / "checkpoint-000004/training.safetensors")
    assert "mapping.queries" in tensors and "exp_avg_sq.markers" in tensors
    expected, found = (load_file(place / "last/mapping.safetensors") for place in (whole, half))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_lengths_are_counted_as_the_bridge_says(runs):
    _, _, printed = runs
    longest = [int(line.split()[2]) for line in printed.splitlines() if line.startswith("longest row:")]
    # Ten positions whatever the source; MindMerger's, of up to 60 encoder tokens, one more than the source.
    assert len(longest) == 2 and longest[0] < longest[1]
    assert empty_bridge(MindMergerConfig("e", "l", 16, 32, bridge="toy")).prefix_length(60) == 10
    columns = {"encoder_ids": [[5] * 7, [5]], "prompt_ids": [[1, 2], [1]]}
    assert input_positions(columns, ToyBridge(4, 4)) == [13, 12]
    assert input_positions(columns, Mapping(4, 4)) == [11, 4]
    assert input_positions({"prompt_ids": [[1, 2]]}, None) == [3]


@pytest.mark.slow
def test_names_of_bridges_and_stages_that_do_not_fit_are_one_line(runs):
    _, outcomes, _ = runs
    errors = {name: outcomes[name]["error"] for name in ("another bridge", "another start", "no such bridge")}
    assert errors["another bridge"].startswith("--stage_name 'read' is not a stage of --bridge mindmerger: choose mapp")
    assert "holds the bridge toy, this run trains --bridge mindmerger" in errors["another start"]
    assert errors["no such bridge"].startswith("unknown bridge 'toyy': choose one of mindmerger, ")


@pytest.mark.slow
def test_a_bridge_evaluates_from_what_its_config_names(runs, datas, tmp_path, monkeypatch, capsys):
    folder, _, _ = runs
    monkeypatch.chdir(tmp_path)
    mapping = str(folder / "outputs/MindMerger/math/solve")
    flags = ["--init_checkpoint", mapping, "--data_root", datas, "--task", "math_mgsm", "--languages", "sw,de"]
    flags += ["--limit", "3", "--max_new_tokens", "4", "--eval_max_tokens", "700", "--precision", "fp32"]
    assert run_evaluation.main(flags) == 0
    results = json.loads((tmp_path / "results/MindMerger/math_mgsm/results.json").read_text())
    assert results["counts"]["examples"] == 6
    model = MindMerger.from_pretrained(mapping, dtype=torch.float32)
    assert isinstance(model.mapping, ToyBridge)
    # One question alone, without packing or a cache, is what the evaluation generated among others.
    item = json.loads((tmp_path / "results/MindMerger/math_mgsm/predictions/Swahili.jsonl").read_text().split("\n")[0])
    again = answer(model, [item["source"]], languages="Swahili", max_new_tokens=4)
    assert again == [item["output"]]


def test_encoder_layers_that_a_bridge_reads_are_those_of_its_hidden_states(tiny_llm, tiny_encoder):
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, bridge="toy")
    ids_BS, mask_BS = torch.tensor([[5, 6, 7, 1], [8, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    states, _ = model.encode(ids_BS, mask_BS)
    output = model.encoder(input_ids=ids_BS, attention_mask=mask_BS, output_hidden_states=True)
    assert len(states) == 2
    assert torch.equal(states[0], output.hidden_states[0]) and torch.equal(states[1], output.last_hidden_state)


def test_a_folder_of_an_earlier_version_names_no_bridge_and_holds_mindmergers(tiny_llm, tiny_encoder, tmp_path):
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    model.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new/config.json").read_text())["bridge"] == "mindmerger"
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    values = json.loads((tmp_path / "old/config.json").read_text())
    del values["bridge"]
    (tmp_path / "old/config.json").write_text(json.dumps(values))
    assert isinstance(MindMerger.from_pretrained(str(tmp_path / "old")).mapping, Mapping)
    values["bridge"] = "someone's"
    (tmp_path / "old/config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match='unknown bridge "someone\'s": choose one of mindmerger'):
        MindMerger.from_pretrained(str(tmp_path / "old"))


@pytest.mark.parametrize("name", sorted(BRIDGES))
def test_every_bridge_counts_the_positions_that_it_makes(name):
    bridge = BRIDGES[name](16, 32, 2, 2, 50)
    mask_BS = torch.tensor([[1, 1, 1], [1, 0, 0]])
    layers = [torch.randn(2, 3, 16) for _ in bridge.encoder_layers]
    prefix = bridge(layers, mask_BS)
    assert prefix.prefix_BKD.shape == (2, prefix.prefix_mask_BK.shape[1], 32)
    assert prefix.prefix_mask_BK.sum(1).tolist() == [bridge.prefix_length(3), bridge.prefix_length(1)]
    assert torch.equal(bridge.prefix_mask(mask_BS), prefix.prefix_mask_BK)
    assert list(bridge.stages) and all(
        stage.starts_from is None or stage.starts_from in bridge.stages for stage in bridge.stages.values()
    )


@pytest.mark.parametrize("more", [{"trains": ("bridge", "encoder")}, {"encoder_text": "answer"}, {"data": "songs"}])
def test_a_stage_that_asks_for_more_than_the_loop_does_is_refused(monkeypatch, more):
    """Its wish would else be passed over silently."""
    stage = ToyBridge.stages["read"]._replace(**more)
    monkeypatch.setattr(ToyBridge, "stages", {"read": stage, "solve": ToyBridge.stages["solve"]})
    with pytest.raises(UserError, match=f"--stage_name read of --bridge toy has {next(iter(more))} .* so far"):
        find_stage("toy", "read")
    assert find_stage("toy", "solve").data == "task"
