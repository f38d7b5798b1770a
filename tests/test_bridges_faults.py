"""What does not fit a bridge is one line that says what would: files, options, depths, heads, stages, languages."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, make_tiny_encoder, make_tiny_llm
from safetensors.torch import save_file

from mindmerger.analysis.embeddings import load_mappings
from mindmerger.model.mapping_files import check_mapping, config_of_models, read_config
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from mindmerger.training.settings import find_stage, settle_languages

MODELS = [str(DATA / "parity/mt5-llama" / name) for name in ("mt5-tiny", "llm-tiny")]
RELEASED = {
    "mindmerger": "parity/mt5-llama",
    "langbridge": "bridges/langbridge-mt5-llama",
    "xbridge": "bridges/xbridge-enc-mt5-llama",
    "layer_fusion": "bridges/fus-global-mt5-llama",
}


def refusal(call, *arguments, **named) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("there", RELEASED)
@pytest.mark.parametrize("asked", [*RELEASED, "layalign"])
def test_released_weights_of_another_bridge_are_refused_with_its_name(asked, there):
    file = str(DATA / RELEASED[there] / "pytorch_model.bin")
    config = config_of_models(*MODELS, asked)
    if asked == there:
        assert len(check_mapping(file, config)) == len(torch.load(file).get("model_state_dict", torch.load(file)))
        return
    message = refusal(check_mapping, file, config)
    assert message.startswith(f"{file} is not a mapping of the bridge {asked}")
    assert message.endswith(f"these are weights of the bridge {there}, pass --bridge {there}")


def test_a_bridge_of_another_encoder_depth_is_refused_with_both_depths(tmp_path):
    file = str(DATA / "bridges/fus-token-mt5-llama/pytorch_model.bin")
    options = {"mix": "token", "feed_forward": "64"}
    config = config_of_models(*MODELS, "layer_fusion", options)
    assert check_mapping(file, config)
    message = refusal(check_mapping, file, replace(config, encoder_depth=3))
    assert "mix.positions has shape (2, 32) but encoder" in message
    assert "(width 32, 3 layers)" in message and "need (3, 32)" in message
    deep = make_tiny_encoder(tmp_path / "deep", width=32, layers=3)
    model = MindMerger.from_models(deep, MODELS[1], torch.float32, bridge="layer_fusion", bridge_options=options)
    assert "need (3, 32)" in refusal(model.load_mapping, file)


def test_a_file_of_other_options_is_refused_with_those_that_were_asked_for():
    file = str(DATA / "bridges/langbridge-latent-mt5-llama/pytorch_model.bin")
    message = refusal(check_mapping, file, config_of_models(*MODELS, "langbridge", {"mapper": "latent"}))
    assert "latents has shape (8, 32) but" in message and "with (mapper=latent, latents=64, train_lm" in message
    assert message.endswith("need (64, 32): pass the models and options this mapping was trained with")


def test_options_that_a_bridge_does_not_have_are_refused_from_python_and_from_a_config(tmp_path):
    named = refusal(MindMerger.from_models, *MODELS, bridge="layer_fusion", bridge_options={"mixx": "token"})
    assert named == (
        "--bridge_option mixx: LayerFusion has no such option (did you mean mix?): its options are mix=global|token, "
        "feed_forward=NUMBER"
    )
    MindMerger.from_models(*MODELS, bridge="layer_fusion").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"bridge_options": {"mix": "tokens"}}))
    expected = "--bridge_option mix=tokens of LayerFusion must be global or token (did you mean token?)"
    assert refusal(read_config, str(tmp_path)) == f"{tmp_path / 'config.json'}: {expected}"
    del values["bridge_options"]  # as a version without options writes it
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(str(tmp_path)).bridge_options == {"mix": "global", "feed_forward": "2048"}


def test_a_head_that_is_the_input_embedding_too_is_not_trained(tmp_path):
    tied = make_tiny_llm(tmp_path / "tied", tie_word_embeddings=True)
    options = {"train_lm_head": "true"}
    messages = [
        refusal(config_of_models, MODELS[0], tied, "langbridge", options),
        refusal(MindMerger.from_models, MODELS[0], tied, bridge="langbridge", bridge_options=options),
    ]
    for message in messages:
        assert message.startswith(f"LLM {tied} ties its output head to its input embeddings")
        assert "leave --bridge_option train_lm_head=true out" in message


def test_a_released_file_without_an_output_head_leaves_the_llms_own():
    options = {"train_lm_head": "true"}
    model = MindMerger.from_models(*MODELS, torch.float32, bridge="langbridge", bridge_options=options)
    before = model.mapping.lm_head.weight.clone()
    model.load_mapping(str(DATA / "bridges/langbridge-mt5-llama/pytorch_model.bin"))
    assert torch.equal(model.mapping.lm_head.weight, before)


def test_an_unknown_stage_lists_those_of_the_bridge_and_the_nearest():
    assert refusal(find_stage, "xbridge", "translaton") == (
        "--stage_name 'translaton' is not a stage of --bridge xbridge: choose translation or task or adapter (did you "
        "mean translation?)"
    )
    assert find_stage("langbridge", "task", {"train_lm_head": "true"}).trains == ("bridge", "lm_head")


def test_a_stage_on_english_rows_takes_no_other_languages():
    stage = find_stage("langbridge", "task")
    for given in (None, "English", "en"):
        args = SimpleNamespace(languages=given, stage_name="task", bridge="langbridge")
        assert [language.name for language in settle_languages(args, stage)] == ["English"]
    args.languages = "English,German"
    assert "trains on English rows alone: leave --languages out" in refusal(settle_languages, args, stage)


def test_the_last_shard_of_released_weights_may_not_be_missing(tmp_path):
    state = torch.load(DATA / "bridges/langbridge-mt5-llama/pytorch_model.bin")
    torch.save(state, tmp_path / "pytorch_model-00001-of-00002.bin")
    message = refusal(check_mapping, str(tmp_path), config_of_models(*MODELS, "langbridge"))
    assert message == f"{tmp_path} lacks pytorch_model-00002-of-00002.bin, one of 2 shards: fetch it too"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_towers_in_released_weights_are_not_read_into_memory(tmp_path, name):
    def memory(what: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what))

    if not Path("/proc/self/clear_refs").is_file():
        pytest.skip("the peak of resident memory is set back where Linux allows it")
    state = dict(torch.load(DATA / "bridges/langbridge-mt5-llama/pytorch_model.bin"))
    state["lb.lm.model.embed_tokens.weight"] = torch.zeros(25_000_000)
    (torch.save if name.endswith("bin") else save_file)(state, tmp_path / name)
    del state
    config = config_of_models(*MODELS, "langbridge")
    check_mapping(str(DATA / "bridges/langbridge-mt5-llama/pytorch_model.bin"), config)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory("VmRSS")
    found = check_mapping(str(tmp_path), config)
    assert found.keys() == {"enc_eos", "linear.weight", "linear.bias"} and memory("VmHWM") - before < 30_000


def test_embeddings_are_compared_of_bridges_that_map_token_by_token_alone(tmp_path):
    args = SimpleNamespace(mt_path=None, llm_path=None, seed=0, before=None, names=["after"], init_checkpoint=[])
    for bridge in ("xbridge", "layer_fusion"):
        MindMerger.from_models(*MODELS, torch.float32, bridge=bridge).save_pretrained(tmp_path / bridge)
        args.init_checkpoint = [str(tmp_path / bridge)]
        if bridge == "xbridge":
            mappings, _ = load_mappings(args)
            assert {type(mapping).__name__ for mapping in mappings.values()} == {"XBridge"}
        else:
            assert "holds the bridge layer_fusion: only of bridges" in refusal(load_mappings, args)
