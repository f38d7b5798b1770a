"""An evaluation takes bridge and options from config.json, or from its flags for released weights."""

import json

import pytest
import torch

import run_evaluation
from mindmerger.evaluation import models as evaluation_models
from mindmerger.generation.answers import answer
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from mindmerger.tasks import find_task

LATENT = ["--bridge", "langbridge", "--bridge_option", "mapper=latent", "--bridge_option", "latents=5"]


@pytest.fixture(scope="module")
def latent(tiny_llm, tiny_encoder, tmp_path_factory):
    """A LangBridge of five latents: its model, its saved folder, and the same weights as its authors release them."""
    folder = tmp_path_factory.mktemp("latent")
    torch.manual_seed(0)
    options = {"mapper": "latent", "latents": 5}
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, bridge="langbridge", bridge_options=options)
    model.config.stage, model.config.task, model.config.augmentation = "task", "math", False
    model.save_pretrained(folder / "saved")
    state = model.mapping.state_dict()
    released = {key: state[name] for key, name in model.released_names().items()}
    torch.save(released | {"lb.lm_head.weight": torch.zeros(2, 2)}, folder / "pytorch_model.bin")
    return model, folder


@pytest.fixture
def flags(tiny_llm, tiny_encoder, datas, tmp_path, monkeypatch):
    """Flags of a short evaluation of both models, in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    short = ["--languages", "sw,de", "--limit", "2", "--max_new_tokens", "4", "--precision", "fp32"]
    return ["--data_root", datas, "--task", "math_mgsm", *short, "--llm_path", tiny_llm, "--mt_path", tiny_encoder]


def predictions(folder) -> list[dict]:
    """The lines of all languages."""
    files = sorted((folder / "predictions").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_langbridges_encoder_reads_the_whole_prompt_and_its_llm_none(latent, flags, tmp_path):
    model, folder = latent
    assert run_evaluation.main([*flags, "--init_checkpoint", str(folder / "saved")]) == 0
    place = tmp_path / "results/MindMerger/math_mgsm-hard"  # the form that its last stage trains
    results = json.loads((place / "results.json").read_text())
    settled = {"mapper": "latent", "latents": "5", "train_lm_head": "false"}
    assert (results["bridge"], results["bridge_options"]) == ("langbridge", settled)
    assert results["identity"]["--bridge"] == "langbridge" and results["identity"]["--bridge_option"] == settled
    items = predictions(place)
    assert len(items) == 4 and not any(item["prompt"] for item in items)
    sources = [item["source"] for item in items]
    languages = [{"sw": "Swahili", "de": "German"}[item["id"][:2]] for item in items]
    assert answer(model, sources, languages=languages, max_new_tokens=4) == [item["output"] for item in items]
    # By hand: the template goes to the encoder.
    prompt, _ = find_task("math").format_query(sources[0])
    from transformers import AutoTokenizer

    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (model.config.mt_path, model.config.llm_path)]
    ids = torch.tensor([tokenizers[0](prompt)["input_ids"]])
    new = model.generate(encoder_input_ids=ids, encoder_attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert tokenizers[1].decode(new[0], skip_special_tokens=True) == items[0]["output"]


def test_released_weights_are_evaluated_by_the_flags_that_name_their_bridge(latent, flags, tmp_path):
    _, folder = latent
    file = str(folder / "pytorch_model.bin")
    assert run_evaluation.main([*flags, "--init_checkpoint", str(folder / "saved")]) == 0
    assert run_evaluation.main([*flags, *LATENT, "--init_checkpoint", file, "--save_name", "released"]) == 0
    found = [predictions(tmp_path / f"results/{name}/math_mgsm-hard") for name in ("MindMerger", "released")]
    assert found[0] == found[1]
    with pytest.raises(UserError, match=r"of the bridge langbridge \(mapper=linear, .*unknown \['lb\.alignment"):
        run_evaluation.main([*flags, "--bridge", "langbridge", "--init_checkpoint", file])


CONTRADICTIONS = {
    "--bridge xbridge": "holds the bridge langbridge, not --bridge xbridge",
    "--bridge_option latents=6": "was trained with --bridge_option latents=5, not latents=6",
    "--bridge_option latent=5": "latent: LangBridge has no such option (did you mean latents?)",
    "--bridge_option mapper=lattent": "must be linear or ffn or latent (did you mean latent?)",
    "--bridge_option latents=0": "latents=0 of LangBridge must be a whole number of at least 1",
    "--bridge_option latents": "--bridge_option 'latents' must be KEY=VALUE",
    "--bridge_option latents=5 --bridge_option latents=5": "--bridge_option latents is given twice",
}


@pytest.mark.parametrize("more", CONTRADICTIONS)
def test_flags_that_contradict_the_mapping_are_one_line(latent, flags, more):
    _, folder = latent
    with pytest.raises(UserError) as caught:
        run_evaluation.main([*flags, "--init_checkpoint", str(folder / "saved"), *more.split()])
    assert CONTRADICTIONS[more] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "trained, asked, message",
    [
        ({}, "1", "was trained with --bridge_option no encoder_layer, not encoder_layer=1"),
        ({"encoder_layer": "1"}, "last", "was trained with --bridge_option encoder_layer=1, not no encoder_layer"),
        ({"encoder_layer": "1"}, "3", "was trained with --bridge_option encoder_layer=1, not encoder_layer=3"),
    ],
)
def test_the_layer_that_a_mapping_reads_is_the_one_it_was_trained_on(
    flags, tiny_llm, tiny_encoder, tmp_path, trained, asked, message
):
    """No shape depends on it: the weights would load, and answer another question."""
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, bridge_options=trained)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match=message):
        run_evaluation.main(
            [*flags, "--init_checkpoint", str(tmp_path / "saved"), "--bridge_option", f"encoder_layer={asked}"]
        )


def test_vllm_is_refused_for_a_trained_output_head(tiny_llm, tiny_encoder, tmp_path):
    """vLLM loads the LLM from its folder: the trained head would be passed over silently."""
    options = {"train_lm_head": "true"}
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, bridge="langbridge", bridge_options=options)
    model.save_pretrained(tmp_path)
    models = evaluation_models.Models(str(tmp_path / "mapping.safetensors"), tiny_encoder, tiny_llm, model.config)
    with pytest.raises(UserError, match="--engine vllm loads the LLM with its own output head"):
        evaluation_models.check_models_fit(models, "vllm")
    assert evaluation_models.check_models_fit(models).lm_head.weight.shape == (259, 32)


def test_without_a_mapping_the_last_stage_of_the_bridge_that_is_there_is_evaluated(tmp_path, monkeypatch, capsys):
    """It was looked for in MindMerger's last stage alone, whatever bridge was trained."""
    monkeypatch.chdir(tmp_path)

    def leave(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")

    def found(bridge, name="MindMerger"):
        return evaluation_models.trained_mapping(name, find_task("math"), bridge)

    with pytest.raises(UserError, match="training left nothing in outputs/MindMerger/math: pass the mapping"):
        found("layalign")
    # As the released code leaves it, and ours; a stage that has just begun holds no mapping yet.
    leave("outputs/MindMerger/math/mapping/pytorch_model.bin", "outputs/MindMerger/math/augmentation/log.jsonl")
    assert found("mindmerger") == "outputs/MindMerger/math/mapping"
    leave("outputs/MindMerger/math/question/mapping.safetensors")  # no stage of MindMerger's own curriculum
    leave(*(f"outputs/MindMerger/math/augmentation/{part}mapping.safetensors" for part in ("", "last/")))
    assert found("mindmerger") == "outputs/MindMerger/math/augmentation"
    leave("outputs/MindMerger/math/adapter/mapping.safetensors")
    assert found("mindmerger") == "outputs/MindMerger/math/adapter"
    leave("outputs/other/math/translation/mapping.safetensors", "outputs/other/math/task/mapping.safetensors")
    assert found("layalign", "other") == found("langbridge", "other") == "outputs/other/math/task"
    assert "of the stages there (task, translation) taking outputs/other/math/task" in capsys.readouterr().err
    message = r"outputs/other/math holds no stage of --bridge mindmerger \(mapping, augmentation, adapter\) but task"
    with pytest.raises(UserError, match=message):
        found("mindmerger", "other")
    # A stage's own folder and a file are themselves.
    for one in ("outputs/MindMerger/math/augmentation", "outputs/MindMerger/math/mapping/pytorch_model.bin", "absent"):
        assert evaluation_models.last_stage(one, "mindmerger") is None


def test_a_run_s_folder_may_be_named_in_the_place_of_its_last_stage(latent, flags, tmp_path, capsys):
    model, _ = latent
    model.save_pretrained(tmp_path / "run/math/task")
    assert run_evaluation.main([*flags, "--bridge", "langbridge", "--init_checkpoint", "run/math"]) == 0
    results = json.loads((tmp_path / "results/MindMerger/math_mgsm-hard/results.json").read_text())
    assert results["checkpoint"] == "run/math/task/mapping.safetensors"
