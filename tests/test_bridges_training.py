"""Every bridge in the training loop: two ranks, each ZeRO stage, an exact resume, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_log, run_many
from safetensors.torch import load_file

from mindmerger.bridges import BRIDGES
from mindmerger.data.tokenising import load_tokenizers
from mindmerger.data.training_set import open_or_build
from mindmerger.model.mindmerger import MindMerger
from mindmerger.tasks import find_task
from mindmerger.tasks.examples import StageData
from mindmerger.training.settings import find_stage, settle_languages

# MindMerger's has tests of its own; of the others the form with most to go wrong.
OPTIONS = {"langbridge": ["train_lm_head=true"], "layer_fusion": ["mix=token", "feed_forward=24"]}
TRAINED = [name for name in BRIDGES if name not in ("mindmerger", "toy")]
LAST_STAGE = {name: list(BRIDGES[name].stages)[-1] for name in TRAINED}


@pytest.fixture(scope="module")
def launch(tiny_llm, tiny_encoder, datas, tmp_path_factory):
    """The folder of one launch of two ranks in which every bridge trained several times, and outcomes by run."""
    folder = tmp_path_factory.mktemp("bridges")
    common = [
        *("--llm_path", tiny_llm, "--mt_path", tiny_encoder, "--data_root", datas, "--task", "math"),
        *("--precision", "fp32", "--dev_size", "0", "--train_batch_size", "2", "--train_micro_batch_size_per_gpu", "1"),
        *("--max_seq_len", "40", "--max_gen_len", "60", "--lr", "1e-2", "--num_workers", "0"),
        *("--init_checkpoint", "none", "--max_steps", "2"),
    ]
    runs = {}
    for bridge in TRAINED:
        options = [part for option in OPTIONS.get(bridge, []) for part in ("--bridge_option", option)]
        which = ["--bridge", bridge, "--stage_name", LAST_STAGE[bridge]]
        begun = ["--resume_from_checkpoint", f"outputs/{bridge}-0/math/{LAST_STAGE[bridge]}/checkpoint-000001"]
        ways = {"0": ["--save_steps", "1"], "again": begun, "1": [], "2": begun, "3": []}
        for way, more in ways.items():
            preset = ROOT / f"scripts/ds_zero{way if way.isdigit() else 0}.json"
            more = [*more, "--deepspeed_config", str(preset), "--save_name", f"{bridge}-{way}"]
            runs[bridge, way] = [*common, *which, *options, *more]
        other = {"langbridge": "mapper=ffn", "layer_fusion": "mix=global"}.get(bridge)
        if other is not None:
            changed = [*which, "--bridge_option", other, "--save_name", f"{bridge}-0"]
            runs[bridge, "other options"] = [*common, *changed]
    for way in ("0", "2", "3"):  # an output head with a learning rate of its own
        runs["langbridge", f"head {way}"] = [
            *(*runs["langbridge", way], "--head_lr", "1e-5", "--save_name", f"langbridge-head {way}"),
            *("--resume_from_checkpoint", "auto", "--save_steps", "1"),
        ]
    begun = ["--resume_from_checkpoint", "outputs/langbridge-head 0/math/task/checkpoint-000001"]
    runs["langbridge", "head again"] = [*runs["langbridge", "head 2"], *begun, "--save_name", "langbridge-head again"]
    runs["langbridge", "other rate"] = [*runs["langbridge", "head 0"], "--head_lr", "1e-4"]
    outcomes = run_many(folder, list(runs.values()), ranks=2)
    return folder, dict(zip(runs, outcomes, strict=True))


def trained(launch, bridge: str, way: str):
    """The folder that a run left, which must have succeeded."""
    folder, outcomes = launch
    assert outcomes[bridge, way]["code"] == 0, outcomes[bridge, way]
    return folder / f"outputs/{bridge}-{way}/math/{LAST_STAGE[bridge]}"


@pytest.mark.slow
@pytest.mark.parametrize("bridge", TRAINED)
def test_every_zero_stage_trains_the_same_bridge_on_two_ranks(launch, bridge):
    folder = trained(launch, bridge, "0")
    expected = load_file(folder / "mapping.safetensors")
    for way in ("1", "2", "3"):  # at ZeRO 2 from the checkpoint that ZeRO 0 wrote after the first step
        place = trained(launch, bridge, way)
        found = load_file(place / "mapping.safetensors")
        assert found.keys() == expected.keys()
        assert all((found[key] - expected[key]).abs().max() <= 1e-5 for key in expected), way
        assert read_log(place) == pytest.approx(read_log(folder)[-len(read_log(place)) :], abs=1e-5), way


@pytest.mark.slow
@pytest.mark.parametrize("bridge", TRAINED)
def test_a_resumed_bridge_equals_an_uninterrupted_one_to_the_bit(launch, bridge):
    whole, again = (trained(launch, bridge, way) for way in ("0", "again"))
    assert "resumes from" in launch[1][bridge, "again"]["printed"]
    assert read_log(whole)[1:] == read_log(again) and len(read_log(again)) == 1
    names = ("mapping.safetensors", "checkpoint-000002/training.safetensors")
    for expected, found in ((load_file(whole / name), load_file(again / name)) for name in names):
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("bridge", TRAINED)
def test_a_run_also_writes_the_bridge_by_its_released_names(launch, bridge):
    folder = trained(launch, bridge, "3")
    model = MindMerger.from_pretrained(str(folder), dtype=torch.float32)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)["model_state_dict"]
    assert state.keys() == model.released_names().keys()
    expected = load_file(folder / "mapping.safetensors")
    assert all(torch.equal(tensor, expected[model.released_names()[key]]) for key, tensor in state.items())
    model.load_mapping(str(folder / "pytorch_model.bin"))


@pytest.mark.slow
def test_a_trained_output_head_moves_and_is_in_mapping_and_checkpoint(launch, tiny_llm):
    folder = trained(launch, "langbridge", "0")
    start = load_file(f"{tiny_llm}/model.safetensors")["lm_head.weight"]
    moved = load_file(folder / "mapping.safetensors")["lm_head.weight"]
    assert moved.dtype == torch.float32 and (moved - start).abs().mean() > 1e-3
    tensors = load_file(folder / "checkpoint-000002/training.safetensors")
    assert torch.equal(tensors["mapping.lm_head.weight"], moved) and "exp_avg_sq.lm_head.weight" in tensors


@pytest.mark.slow
def test_a_trained_output_head_may_have_a_learning_rate_of_its_own(launch, tiny_llm):
    """Published: 2e-5, a thirtieth of the bridge's. Adam's first steps move each weight by about the rate."""
    start = load_file(f"{tiny_llm}/model.safetensors")["lm_head.weight"]
    same = load_file(trained(launch, "langbridge", "0") / "mapping.safetensors")
    for way in ("0", "2", "3"):
        found = load_file(trained(launch, "langbridge", f"head {way}") / "mapping.safetensors")
        moved, usual = ((one["lm_head.weight"] - start).abs().max() for one in (found, same))
        assert 0.5e-5 < moved < 3e-5 < usual, way
        assert (found["linear.weight"] - same["linear.weight"]).abs().mean() < 2e-3, way  # it moves as before
    whole, again = (trained(launch, "langbridge", f"head {way}") for way in ("0", "again"))
    expected, found = (load_file(one / "checkpoint-000002/training.safetensors") for one in (whole, again))
    assert all((found[key] - expected[key]).abs().max() <= 1e-6 for key in expected)
    outcome = launch[1]["langbridge", "other rate"]
    assert outcome["code"] == 2 and "--head_lr 1e-05, this run has 0.0001: use the same, or say" in outcome["error"]


@pytest.mark.slow
def test_a_resume_with_other_options_is_refused_by_name(launch):
    for bridge, option in (("langbridge", "'train_lm_head': 'true'"), ("layer_fusion", "'feed_forward': '24'")):
        outcome = launch[1][bridge, "other options"]
        assert outcome["code"] == 2 and "was trained with another bridge_options" in outcome["error"]
        assert option in outcome["error"] and "\n" not in outcome["error"]


def test_langbridge_is_trained_on_english_rows_whose_prompt_its_encoder_reads(tiny_llm, tiny_encoder, datas, tmp_path):
    stage = find_stage("langbridge", "task")
    english = settle_languages(SimpleNamespace(languages=None), stage)
    tokenizers = load_tokenizers(tiny_encoder, tiny_llm)
    plain = StageData(find_task("math"), "augmentation", datas, english)
    limits = {"max_seq_len": 500, "max_gen_len": 500, "with_prompt": stage.with_prompt, "cache_dir": tmp_path}
    asked = replace(plain, encoder_text=stage.encoder_text)
    data, plain_data = (open_or_build(one, tokenizers, **limits) for one in (asked, plain))
    examples = list(plain.examples())
    assert data.dataset["language"][:] == ["English"] * len(examples) and len(examples) == 4
    assert data.dataset["encoder_ids"][:] == [tokenizers.encoder(one.prompt)["input_ids"] for one in examples]
    assert not any(data.dataset["prompt_ids"][:])
    assert plain_data.dataset["encoder_ids"][:] == [tokenizers.encoder(one.source)["input_ids"] for one in examples]
    assert data.fingerprint != plain_data.fingerprint
    # A prompt that is too long loses of its question: the encoder always reads that an answer follows.
    short = open_or_build(asked, tokenizers, **limits | {"max_seq_len": 200})
    texts = [tokenizers.encoder.decode(ids, skip_special_tokens=True) for ids in short.dataset["encoder_ids"][:]]
    assert all(text.endswith("### Response: Let's think step by step.") for text in texts)
    assert short.counts["source_cut"] > 0 and max(short.encoder_lengths) <= 200


@pytest.mark.slow
def test_a_parameter_without_a_dimension_trains_at_each_zero_stage_and_resumes(tmp_path, tiny_llm, tiny_encoder, datas):
    """Layer fusion's default form ended in a traceback before its first step: DeepSpeed sends parameters as bytes."""
    common = [
        *("--llm_path", tiny_llm, "--mt_path", tiny_encoder, "--data_root", datas, "--task", "math"),
        *("--precision", "fp32", "--dev_size", "0", "--train_batch_size", "2", "--train_micro_batch_size_per_gpu", "1"),
        *("--max_seq_len", "40", "--max_gen_len", "60", "--lr", "1e-4", "--num_workers", "0", "--max_steps", "2"),
        *("--bridge", "layer_fusion", "--save_steps", "1"),
    ]
    runs = []
    for zero in range(4):
        preset = ["--deepspeed_config", str(ROOT / f"scripts/ds_zero{zero}.json")]
        begun = ["--resume_from_checkpoint", f"outputs/{zero}/math/task/checkpoint-000001"]
        runs += [
            [*common, *preset, "--save_name", f"{zero}"],
            [*common, *preset, *begun, "--save_name", f"{zero}again"],
        ]
    outcomes = run_many(tmp_path, runs, ranks=2)
    assert [one["code"] for one in outcomes] == [0] * 8, outcomes
    first = [read_log(tmp_path / f"outputs/{zero}/math/task")[0] for zero in range(4)]
    assert first == pytest.approx([first[0]] * 4, rel=1e-6)
    for zero in range(4):
        made = [
            load_file(tmp_path / f"outputs/{name}/math/task/mapping.safetensors") for name in (zero, f"{zero}again")
        ]
        assert made[0]["mix.temperature"].shape == () and made[0]["mix.temperature"] != torch.tensor(1e-5)
        assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
