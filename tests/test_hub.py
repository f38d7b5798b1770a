"""Mappings on the Hugging Face hub: huggingface_hub's own client against a hub on this machine."""

import argparse
import json
import os
import re
import shlex

import pytest
import torch
from conftest import ROOT
from hub_server import running_hub
from huggingface_hub import ModelCard, constants

import run_evaluation
import run_training
from mindmerger.evaluation import upload
from mindmerger.evaluation.settings import ADAPTER_HASH, MAPPING_HASH
from mindmerger.hub.chat_template import ChatTemplate
from mindmerger.hub.repositories import split_id
from mindmerger.model.adapters import adapter_values, add_adapter, check_adapter
from mindmerger.model.mapping_files import MindMergerConfig, mapping_sha256, read_config
from mindmerger.model.mindmerger import MindMerger
from mindmerger.model.model_card import hub_name, model_card
from mindmerger.model.sharing import fetch_mapping, push_folder
from mindmerger.runtime.errors import UserError
from mindmerger.tasks import TASKS
from mindmerger.training import settings as training_settings
from mindmerger.training.sharing import share_mapping

FILES = {"config.json", "mapping.safetensors", "README.md"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the client in this process asks, with anna's token and an empty cache."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        yield hub


@pytest.fixture
def model(tiny_encoder, tiny_llm):
    """A model whose mapping is of its own."""
    torch.manual_seed(7)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)
    model.config.stage, model.config.task, model.config.augmentation = "augmentation", "math", True
    return model


def refusal(call, *arguments, **named) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: MindMerger, other: MindMerger) -> bool:
    """Whether two models have the same mapping."""
    state, found = one.mapping.state_dict(), other.mapping.state_dict()
    return state.keys() == found.keys() and all(torch.equal(state[name], found[name]) for name in state)


# -- by one id


def test_a_model_that_was_pushed_is_itself_again_by_its_id(hub, model):
    address = model.push_to_hub("anna/swahili", license="mit")
    repository = hub.repositories["anna/swahili"]
    assert address == f"{hub.url}/anna/swahili/commit/{repository.branches['main']}"
    assert repository.files().keys() == FILES and not repository.private
    again = MindMerger.from_pretrained("anna/swahili", dtype=torch.float32)
    assert same(again, model) and again.config == model.config
    other = MindMerger.from_models(model.config.mt_path, model.config.llm_path, torch.float32)
    other.load_mapping("anna/swahili")
    assert same(other, model)


def test_what_training_recorded_is_there_when_a_loaded_model_is_pushed_again(hub, model):
    chat = ChatTemplate("<user>", "<assistant>", "</s>").record()
    recorded = {"precision": "bf16", "quantization": "nf4", "chat_template": chat, "languages": ["sw"]}
    for name, value in recorded.items():
        setattr(model.config, name, value)
    model.push_to_hub("anna/first")
    MindMerger.from_pretrained("anna/first", dtype=torch.float32).push_to_hub("anna/second")
    first, second = (hub.repositories[name].files() for name in ("anna/first", "anna/second"))
    assert (
        first["config.json"] == second["config.json"] and recorded.items() <= json.loads(second["config.json"]).items()
    )
    card = second["README.md"].decode()
    assert 'MindMerger.from_pretrained("anna/second", quantization="nf4")' in card
    assert "the prompt in the LLM's chat template" in card


def test_an_adapter_travels_with_its_mapping(hub, model):
    add_adapter(model, adapter_values("lora", 4, 8.0, 0.1, ["q_proj"], model.config.llm_path))
    for parameter in model.trained_parameters().values():
        torch.nn.init.normal_(parameter)
    model.push_to_hub("anna/adapted")
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert hub.repositories["anna/adapted"].files().keys() == FILES | adapter
    again = MindMerger.from_pretrained("anna/adapted", dtype=torch.float32)
    found = again.trained_parameters()
    assert all(torch.equal(found[name], one) for name, one in model.trained_parameters().items())


def test_a_revision_is_a_branch_or_a_commit_of_the_id(hub, model):
    model.push_to_hub("anna/swahili")
    first = hub.repositories["anna/swahili"].branches["main"]
    other = MindMerger.from_models(model.config.mt_path, model.config.llm_path, torch.float32)
    other.push_to_hub("anna/swahili", revision="seed/2")
    assert hub.repositories["anna/swahili"].branches["main"] == first
    for arguments in ({"revision": "seed/2"}, {"folder": "anna/swahili@seed/2"}):
        assert same(MindMerger.from_pretrained(**{"folder": "anna/swahili", **arguments}), other)
    other.push_to_hub("anna/swahili")
    assert same(MindMerger.from_pretrained("anna/swahili"), other)
    assert same(MindMerger.from_pretrained("anna/swahili", revision=first), model)
    line = refusal(MindMerger.from_pretrained, "anna/swahili", revision="v3")
    assert line.endswith("does not give it: it has no branch, tag or commit v3")


def test_offline_the_cache_is_read_and_nothing_is_asked(hub, model, monkeypatch):
    model.push_to_hub("anna/swahili")
    MindMerger.from_pretrained("anna/swahili")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert same(MindMerger.from_pretrained("anna/swahili", dtype=torch.float32), model)
    line = refusal(MindMerger.from_pretrained, "anna/other")
    assert "no folder or file anna/other here" in line and "HF_HUB_OFFLINE is set and the cache" in line
    assert len(hub.asked) == asked


def test_what_lies_here_comes_before_the_hub(hub, model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("anna/swahili")
    assert fetch_mapping("anna/swahili") == "anna/swahili" and not hub.asked
    assert "is no id of the Hugging Face hub: leave revision='v2' out" in refusal(fetch_mapping, "anna/swahili", "v2")
    for path in ("absent.bin", "a/absent.safetensors", "./a/b", "~/a", "outputs/MindMerger/math", "a", "/a", "a/b@"):
        assert fetch_mapping(path) == path and not hub.asked
    assert split_id("a-b/c.d_e@refs/pr/1") == ("a-b/c.d_e", "refs/pr/1")


def test_a_repository_of_something_else_is_refused_before_its_weights_are_fetched(hub):
    from hub_server import Repository

    hub.repositories["anna/llm"] = Repository(private=False)
    hub.repositories["anna/llm"].commit("main", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"0"})
    assert "has no config.json of a mapping" in refusal(MindMerger.from_pretrained, "anna/llm")
    assert not any("model.safetensors" in one for one in hub.asked)


def test_a_private_mapping_is_seen_by_its_owner_alone(hub, model, monkeypatch):
    model.push_to_hub("lab/secret", private=True)
    assert hub.repositories["lab/secret"].private
    assert same(MindMerger.from_pretrained("lab/secret", dtype=torch.float32), model)
    monkeypatch.delenv("HF_TOKEN")
    line = refusal(MindMerger.from_pretrained, "lab/secret", cache_dir=constants.HF_HUB_CACHE + "2")
    assert "the hub shows no such model: check the name, and for a private model log in with" in line
    other = MindMerger.from_pretrained("lab/secret", token="hf_writes", cache_dir=constants.HF_HUB_CACHE + "2")
    assert other.config.task == "math"


def test_large_files_go_through_git_lfs_where_the_hub_asks_for_it(hub, model, monkeypatch):
    """Without hf_xet, whose storage this hub does not have."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.large_files = (".safetensors",)
    model.push_to_hub("anna/large")
    assert len(hub.large) == 1 and hub.repositories["anna/large"].files().keys() == FILES
    assert same(MindMerger.from_pretrained("anna/large", dtype=torch.float32), model)


# -- the model card


def test_the_card_names_licence_both_base_models_languages_and_data():
    config = MindMergerConfig("google/mt5-xl", "meta-math/MetaMath-7B-V1.0", 2048, 4096, task="xnli")
    config.languages = ["sw", "zho_Hant", "en"]
    card = ModelCard(model_card(config, {}, "anna/swahili", "mit", ["facebook/xnli"]))
    assert card.data.to_dict() == {
        "library_name": "mindmerger",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "base_model": ["meta-math/MetaMath-7B-V1.0", "google/mt5-xl"],
        "base_model_relation": "adapter",
        "datasets": ["facebook/xnli"],
        "language": ["sw", "zho", "en"],
        "tags": ["mindmerger", "multilingual", "xnli"],
    }
    assert 'MindMerger.from_pretrained("anna/swahili")' in card.text


def test_a_model_in_a_folder_has_the_hubs_name_only_where_it_lies_in_the_cache(tmp_path, tiny_llm):
    snapshot = tmp_path / "hub/models--google--mt5-xl/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    assert hub_name(str(snapshot)) == hub_name(str(tmp_path / "link")) == hub_name("google/mt5-xl") == "google/mt5-xl"
    assert hub_name(tiny_llm) is hub_name("../LLMs/mt5-xl") is hub_name("/models/mt5/xl") is None
    assert "base_model" not in model_card(MindMergerConfig(str(tmp_path), tiny_llm, 1, 1), {}).split("---")[1]


def test_a_licence_that_the_hub_does_not_know_is_refused_and_nothing_is_uploaded(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    line = refusal(push_folder, str(tmp_path / "saved"), "anna/swahili", license="mine")
    assert line.startswith(f"cannot upload {tmp_path / 'saved'} to anna/swahili: Invalid metadata in README.md. - ")
    assert not hub.repositories["anna/swahili"].files()


def test_an_evaluation_by_the_id_puts_its_scores_on_the_card(hub, model, tmp_path, datas, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("trained")
    model.push_to_hub("anna/swahili")
    few = ["--data_root", datas, "--languages", "sw,en", "--limit", "2", "--max_new_tokens", "3"]
    assert run_evaluation.main([*few, "--precision", "fp32", "--init_checkpoint", "anna/swahili@main"]) == 0
    results = json.loads((tmp_path / "results/MindMerger/math_mgsm/results.json").read_text())
    assert results["checkpoint"].startswith(constants.HF_HUB_CACHE)
    capsys.readouterr()
    to = ["--push_to_hub", "anna/swahili", "--hub_license", "mit", "--hub_dataset", "anna/questions"]
    assert upload.main(["--init_checkpoint", "trained", *to, "--results", "results/MindMerger"]) == 0
    files = hub.repositories["anna/swahili"].files()
    assert capsys.readouterr().out.startswith(f"{hub.url}/anna/swahili/commit/")
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.datasets) == ("mit", ["anna/questions"])
    found = {one.dataset_config: one for one in card.data.eval_results}
    expected = {"sw": "Swahili", "en": "English"}
    assert found.keys() == expected.keys() | {"mean"}
    for code, name in expected.items():
        assert found[code].metric_value == results["languages"][name]["accuracy"]
        assert (found[code].dataset_type, found[code].metric_type) == ("juletxara/mgsm", "accuracy")
    assert found["mean"].metric_value == results["mean"]["accuracy"]
    assert found["sw"].metric_name == "accuracy, MindMerger-Soft (mapped source and prompt)"
    assert "| math_mgsm, Swahili | accuracy, MindMerger-Soft" in card.text
    # Scores of one mapping on the card of another would be believed.
    MindMerger.from_models(model.config.mt_path, model.config.llm_path).save_pretrained("other")
    line = refusal(upload.main, ["--init_checkpoint", "other", *to, "--results", "results/MindMerger/math_mgsm"])
    assert line.startswith("results/MindMerger/math_mgsm holds scores of another mapping than other (its --init_ch")
    assert hub.repositories["anna/swahili"].files() == files


def test_scores_with_an_adapter_are_not_those_without_it(model, tmp_path):
    add_adapter(model, adapter_values("lora", 4, 8.0, 0.1, ["q_proj"], model.config.llm_path))
    model.save_pretrained(tmp_path)
    identity = {MAPPING_HASH: mapping_sha256(str(tmp_path / "mapping.safetensors"))}
    line = refusal(upload.refuse_other_mapping, "results/math", identity, str(tmp_path))
    assert line.startswith(f"results/math holds scores of another adapter than {tmp_path} (its --adapter_path (sha256)")
    identity[ADAPTER_HASH] = check_adapter(str(tmp_path / "adapter"), model.config.llm_path).sha256
    upload.refuse_other_mapping("results/math", identity, str(tmp_path))


def test_tasks_name_data_sets_of_the_hub_that_the_pages_name_too():
    page = (ROOT / "docs/data.md").read_text()
    further = [task for name, task in TASKS.items() if task.hub_dataset and f"`{name}`" in page]
    assert len(further) == 7 and all(f"({task.hub_dataset})" in page for task in further)


def test_a_folder_without_a_whole_mapping_is_not_uploaded(hub, model, tmp_path):
    assert "has no config.json of a mapping" in refusal(push_folder, str(tmp_path), "anna/swahili")
    model.save_pretrained(tmp_path)
    (tmp_path / "mapping.safetensors").write_bytes((tmp_path / "mapping.safetensors").read_bytes()[:-8])
    assert "mapping.safetensors cannot be read" in refusal(push_folder, str(tmp_path), "anna/swahili")
    (tmp_path / "mapping.safetensors").unlink()
    assert "no mapping at" in refusal(push_folder, str(tmp_path), "anna/swahili")
    assert not hub.asked


def test_the_harness_evaluates_a_mapping_by_its_id(hub, model):
    pytest.importorskip("lm_eval", reason='pip install "lm_eval>=0.4.13,<0.5"')
    from mindmerger.integrations.lm_eval_model import HarnessModel

    model.push_to_hub("anna/swahili", revision="v1")
    found = HarnessModel(init_checkpoint="anna/swahili@v1", device="cpu", precision="fp32")
    assert found.models.mapping_file.startswith(constants.HF_HUB_CACHE) and same(found.model, model)


# -- training


def test_what_an_upload_to_a_branch_says_loads_it(hub, model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    args = argparse.Namespace(push_to_hub="anna/swahili@v2", hub_private=False, hub_license=None, hub_dataset=[])
    stage = argparse.Namespace(data="pairs")
    share_mapping(argparse.Namespace(args=args, output_dir=tmp_path, task=TASKS["xnli"], stage=stage))
    [name] = re.findall(r"MindMerger\.from_pretrained\('(.*)'\) loads it", capsys.readouterr().err)
    assert same(MindMerger.from_pretrained(name), model)


def test_an_upload_that_cannot_be_is_refused_before_anything_is_trained(hub, flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def said(name, **token):
        for key, value in token.items():
            monkeypatch.setenv(key, value)
        return refusal(run_training.prepare, training_settings.parse([*flags, "--push_to_hub", name]))

    for name in ("swahili", "anna/a/b", "anna/sw@", "anna/--", "../x", "anna/schön"):
        assert said(name).startswith(f"--push_to_hub {name!r} is no id of the hub: pass USER/NAME")
    flags += ["--hub_license", "mine"]
    assert 'the hub refuses such a card: "license" must be one of [apache-2.0, mit' in said("anna/swahili")
    flags[-1:] = ["mit"]
    line = said("bert/swahili")
    assert "the token is one of anna and may write to anna, lab: pass anna/swahili, or a token of bert" in line
    assert "the token may only read: log in with 'hf auth login'" in said("anna/swahili", HF_TOKEN="hf_reads")
    assert "does not accept the token (HTTP 401)" in said("anna/swahili", HF_TOKEN="hf_unknown")
    monkeypatch.delenv("HF_TOKEN")
    assert said("anna/swahili").startswith("--push_to_hub anna/swahili needs a token that may write: log in with")
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "needs the network, and HF_HUB_OFFLINE is set" in said("anna/swahili")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "no answer of the hub (ConnectError: " in said("anna/swahili")
    assert not hub.repositories and not os.path.exists("outputs")


def test_training_starts_from_a_mapping_by_its_id(hub, model, flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model.push_to_hub("anna/swahili", revision="first")
    argv = [*flags, "--stage_name", "augmentation", "--languages", "Swahili", "--dev_size", "0"]
    settings, _ = run_training.prepare(
        training_settings.parse([*argv, "--init_checkpoint", "anna/swahili@first", "--dry_run", "--push_to_hub", "a/b"])
    )
    assert settings.init_file.startswith(constants.HF_HUB_CACHE) and settings.init_file.endswith("mapping.safetensors")
    with pytest.raises(UserError, match=r"no folder or file anna/swahilli here, and the .* the hub shows no such"):
        run_training.prepare(training_settings.parse([*argv, "--init_checkpoint", "anna/swahilli"]))


@pytest.mark.slow
def test_a_run_uploads_its_mapping_and_a_failed_upload_loses_nothing(hub, flags, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_writes"}
    share = ["--push_to_hub", "lab/swahili", "--hub_private", "--hub_license", "cc-by-nc-4.0"]
    command = [ROOT / "run_training.py", *flags, "--task", "xnli", "--max_steps", "2", "--dev_size", "0", *share]
    command += ["--stage_name", "augmentation", "--init_checkpoint", "none"]
    hub.refuse["POST /api/models/lab/swahili/commit"] = 403
    done = run(*command, env=place)
    folder, line = "outputs/MindMerger/xnli/augmentation", done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr[-3000:]
    assert line.startswith(f"error: cannot upload {folder} to lab/swahili: the token may not write there (HTTP 403)")
    assert f"the run is finished and {folder} is whole: upload it with python -m mindmerger.evaluation.upload" in line
    assert {"sw", "th"} < set(read_config(folder).languages) and not hub.repositories["lab/swahili"].files()
    # The same command again trains nothing further, and uploads.
    hub.refuse.clear()
    done = run(*command, env=place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"uploaded ({hub.url}/lab/swahili/commit/" in done.stderr
    files = hub.repositories["lab/swahili"].files()
    assert files.keys() == FILES and hub.repositories["lab/swahili"].private
    data = ModelCard(files["README.md"].decode()).data
    assert (data.license, data.datasets, len(data.language)) == ("cc-by-nc-4.0", ["facebook/xnli"], 15)
    # And so does the command that the line names.
    hub.repositories.clear()
    words = shlex.split(re.search(r"python -m (mindmerger\.evaluation\.upload .*)", line)[1])
    assert upload.main(words[1:]) == 0
    assert hub.repositories["lab/swahili"].files() == files and hub.repositories["lab/swahili"].private
    assert MindMerger.from_pretrained("lab/swahili").config.task == "xnli"
