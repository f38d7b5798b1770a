"""Reading and writing model folders: every form they come in, and every way in which they can be wrong."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from expert_folders import VOCABULARY, base_state, copy_folder, load_state, same_bits, save_expert, tiny_config, tuned
from safetensors.torch import load_file, save_file

from mindmerger.baselines import layer_swap as baselines_layer_swap
from mindmerger.baselines import merged_folder, model_folder
from mindmerger.baselines.merged_folder import deal_into_shards
from mindmerger.baselines.model_folder import MergeError, open_model, place_of, row_blocks
from mindmerger.runtime.errors import UserError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a math and a language expert, bf16 Llamas in one file each."""
    root = tmp_path_factory.mktemp("pair")
    return save_pair(root, tiny_config(layers=4))


def save_pair(root, config, **options):
    start = base_state(config)
    return {n: save_expert(root / n, config, tuned(start, s), **options) for n, s in (("math", 1), ("language", 2))}


def flags_of(pair, output):
    return ["--math_expert", pair["math"], "--language_expert", pair["language"], "--output", str(output)]


def swap(pair, output, *flags):
    assert baselines_layer_swap.main([*flags_of(pair, output), "--bottom", "1", "--top", "0", *map(str, flags)]) == 0
    return load_state(output)


def expected_swap(math_state, language_state):
    """Returns what `swap` asks for with four layers: language, mixed, math, mixed, and the language expert outside."""
    merged = {}
    for name, tensor in math_state.items():
        mixed = (0.5 * language_state[name].float() + 0.5 * tensor.float()).to(tensor.dtype)
        source_of_layer = {1: mixed, 2: tensor, 3: mixed}
        merged[name] = source_of_layer.get(place_of(name).layer, language_state[name])
    return merged


# -- every form


@pytest.mark.parametrize(
    ("family", "form", "shards", "dtype", "tied"),
    [
        ("llama", "safetensors", 1, torch.bfloat16, False),
        ("llama", "bin", 2, torch.float16, True),
        ("mistral", "safetensors", 3, torch.float16, False),
        ("mistral", "bin", 1, torch.bfloat16, True),
        ("qwen2", "safetensors", 2, torch.bfloat16, True),
        ("qwen2", "bin", 3, torch.float16, False),
    ],
)
def test_every_form_of_folder_merges_and_loads(family, form, shards, dtype, tied, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = tiny_config(family, layers=4, tie_word_embeddings=tied)
    folders = save_pair(tmp_path, config, form=form, shards=shards, dtype=dtype)
    merged = swap(folders, tmp_path / "merged", "--max_shard_gb", "0.00002")
    start = base_state(config)
    sources = [{name: t.to(dtype) for name, t in tuned(start, seed).items()} for seed in (1, 2)]
    assert same_bits(merged, expected_swap(*sources))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == dtype
    assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("ab").input_ids[0] == 1


def test_folder_holds_exactly_what_a_model_folder_holds(pair, tmp_path):
    swap(pair, tmp_path / "merged")
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == [
        "config.json",
        "generation_config.json",
        "merge.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == Path(pair["math"], name).read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


def test_merge_json_tells_how_to_make_the_folder_again(pair, tmp_path):
    import hashlib

    swap(pair, tmp_path / "merged", "--weight", "0.5")
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert record["arguments"]["math_expert"] == pair["math"] and record["plan"]["weight"] == 0.5
    assert record["dtype"] == {"arithmetic": "float32", "stored": "bfloat16"}
    assert record["versions"]["torch"] == metadata.version("torch")  # torch.__version__ may add a build, as in "+cu130"
    for role, name in (("math expert", "math"), ("language expert", "language")):
        files = record["inputs"][role]["files"]
        assert sorted(files) == ["config.json", "model.safetensors"]
        content = Path(pair[name], "model.safetensors").read_bytes()
        assert files["model.safetensors"] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for file, described in record["outputs"].items():
        content = (tmp_path / "merged" / file).read_bytes()
        assert described == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_shards_stay_below_the_limit_and_the_index_finds_every_tensor(pair, tmp_path):
    limit = 20_000
    merged = swap(pair, tmp_path / "merged", "--max_shard_gb", limit / 1e9)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == merged.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in merged.values())
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / "merged" / file)
        assert sum(t.numel() * t.element_size() for t in held.values()) <= limit
        assert {name for name, at in index["weight_map"].items() if at == file} == set(held)
    assert len(set(index["weight_map"].values())) > 2


def test_larger_tensor_than_a_shard_gets_its_own_file():
    layout = {"a": ((2,), torch.float32), "b": ((100,), torch.float32), "c": ((2,), torch.float32)}
    assert list(deal_into_shards(layout, 16).values()) == [["a"], ["b"], ["c"]]
    assert list(deal_into_shards(layout, 10**6).values()) == [["a", "b", "c"]]


def test_merged_folder_is_evaluated_like_any_llm(tmp_path, datas, run):
    """Evaluation must not know that the model was merged."""
    config = tiny_config(layers=2, max_position_embeddings=4096)
    folders = save_pair(tmp_path / "experts", config)
    swap(folders, tmp_path / "merged")
    flags = ["--task", "math", "--languages", "en", "--limit", "2", "--max_new_tokens", "4", "--data_root", datas]
    done = run(ROOT / "run_evaluation.py", "--llm_only", "--llm_path", tmp_path / "merged", *flags)
    assert done.returncode == 0, done.stderr
    results = json.loads(next(tmp_path.glob("results/*/math_mgsm-llm_only/results.json")).read_text())
    assert results["languages"]["English"]["n"] == 2


def test_one_read_never_exceeds_a_block(pair, tmp_path, monkeypatch):
    """A whole tensor at once is what makes memory grow with the model."""
    sizes = []
    read = model_folder.ModelFolder.read

    def counted(self, name, start, stop):
        block = read(self, name, start, stop)
        sizes.append(block.numel())
        return block

    whole = swap(pair, tmp_path / "whole")
    monkeypatch.setattr(model_folder, "BLOCK_ELEMENTS", 96)
    monkeypatch.setattr(model_folder.ModelFolder, "read", counted)
    assert same_bits(swap(pair, tmp_path / "blocks"), whole)
    assert max(sizes) <= 96


def test_row_blocks_cover_every_row_once():
    assert list(row_blocks((10, model_folder.BLOCK_ELEMENTS // 4))) == [(0, 4), (4, 8), (8, 10)]
    assert list(row_blocks((3, 2 * model_folder.BLOCK_ELEMENTS))) == [(0, 1), (1, 2), (2, 3)]
    assert list(row_blocks((10, 2), 8)) == [(8, 10)] and list(row_blocks((10, 2), 10)) == []


# -- dtypes


def test_asked_dtype_is_written_and_recorded_in_the_config(pair, tmp_path):
    merged = swap(pair, tmp_path / "merged", "--dtype", "float32")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "float32" and "torch_dtype" not in config


def test_value_that_the_dtype_cannot_hold_is_refused(tmp_path):
    """bf16 reaches 3e38, fp16 65504: an infinite weight would make a model that only says NaN."""
    config = tiny_config(layers=4)
    start = base_state(config)
    large = {name: tensor.clone() for name, tensor in start.items()}
    large["model.embed_tokens.weight"][5, 5] = 1e6
    folders = {
        "math": save_expert(tmp_path / "math", config, start, dtype=torch.float16),
        "language": save_expert(tmp_path / "language", config, large),
    }
    with pytest.raises(MergeError, match=r"embed_tokens.weight has a value of .*, which float16 cannot hold"):
        swap(folders, tmp_path / "merged")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["language", "math"]
    assert swap(folders, tmp_path / "merged", "--dtype", "bfloat16")["model.embed_tokens.weight"][5, 5] > 9e5


# -- vocabularies


@pytest.mark.parametrize(("math_rows", "language_rows"), [(VOCABULARY + 5, VOCABULARY), (VOCABULARY, VOCABULARY + 3)])
def test_surplus_vocabulary_rows_are_the_task_experts(math_rows, language_rows, tmp_path):
    folders = {}
    for name, rows, seed in (("math", math_rows, 1), ("language", language_rows, 2)):
        config = tiny_config(layers=4, vocab_size=rows)
        folders[name] = save_expert(tmp_path / name, config, base_state(config, seed))
    merged = swap(folders, tmp_path / "merged", "--head", "average")
    math_state, language_state = load_state(folders["math"]), load_state(folders["language"])
    common = min(math_rows, language_rows)
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    assert merged[embeddings].shape[0] == merged[head].shape[0] == math_rows
    assert torch.equal(merged[embeddings][:common], language_state[embeddings][:common])
    assert torch.equal(merged[embeddings][common:], math_state[embeddings][common:])
    mixed = 0.5 * language_state[head][:common].float() + 0.5 * math_state[head][:common].float()
    assert torch.equal(merged[head][:common], mixed.bfloat16())
    assert torch.equal(merged[head][common:], math_state[head][common:])


def rename_token(folder, old, new):
    file = Path(folder, "tokenizer.json")
    text = file.read_text(encoding="utf-8")
    assert json.dumps(old) in text
    file.write_text(text.replace(json.dumps(old), json.dumps(new)), encoding="utf-8")


def test_other_base_vocabulary_is_refused_with_both_tokens(pair, tmp_path):
    """Rows of two vocabularies mean different words: their mixture means nothing."""
    other = copy_folder(pair["language"], tmp_path / "language")
    rename_token(other, "a", "qq")
    with pytest.raises(MergeError, match="1 token ids mean different tokens: .* is 'a' in .* 'qq' in"):
        swap({**pair, "language": other}, tmp_path / "merged")


def test_other_name_of_an_added_token_only_warns(pair, tmp_path, capsys):
    other = copy_folder(pair["language"], tmp_path / "language")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / "language" / file
        path.write_text(path.read_text().replace("<unk>", "<none>"))
    swap({**pair, "language": other}, tmp_path / "merged")
    assert "warning: 1 token ids mean different tokens: 0 is '<unk>'" in capsys.readouterr().err


# -- wrong input: one line, nothing left behind


def refuse(pair, tmp_path, match):
    """Runs a merge that must be refused with one line, leaving the folder as it was."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=match) as caught:
        swap(pair, tmp_path / "new" / "merged")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"layers": 2}, "different number of layers: math expert .* has 4, language expert .* has 2"),
        ("llama", {"hidden_size": 48}, "different hidden width: .* has 32, .* has 48"),
        ("llama", {"intermediate_size": 64}, "different MLP width: .* has 48, .* has 64"),
        ("llama", {"num_attention_heads": 8}, "different number of attention heads: .* has 4, .* has 8"),
        ("llama", {"num_key_value_heads": 4}, "different number of key-value heads: .* has 2, .* has 4"),
        ("llama", {"rope_theta": 5e5}, "different rope settings: .*10000.0.*500000.0"),
        ("llama", {"tie_word_embeddings": True}, "different tie_word_embeddings: .* has False, .* has True"),
        ("mistral", {}, "different architecture: .* has llama, .* has mistral"),
    ],
)
def test_incompatible_experts_are_refused_with_both_values(pair, tmp_path, family, changes, message):
    config = tiny_config(family, **{"layers": 4, **changes})
    other = save_expert(tmp_path / "other", config, base_state(config))
    told = refuse({**pair, "language": other}, tmp_path, message)
    assert pair["math"] in told and other in told


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_missing_shard_is_named(tmp_path, form):
    folders = save_pair(tmp_path, tiny_config(layers=4), shards=3, form=form)
    shard = sorted((tmp_path / "language").glob(f"*00002*.{form}"))[0]
    shard.unlink()
    refuse(folders, tmp_path, rf"lacks 1 of its 3 weight files \(first: {shard.name}\)")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shard_cut_short_is_named(tmp_path, form):
    folders = save_pair(tmp_path, tiny_config(layers=4), shards=2, form=form)
    shard = sorted((tmp_path / "language").glob(f"*00001*.{form}"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    refuse(folders, tmp_path, f"{shard.name} cannot be read")


def test_missing_tensor_is_named(pair, tmp_path):
    other = copy_folder(pair["language"], tmp_path / "language")
    state = load_file(f"{other}/model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, f"{other}/model.safetensors")
    refuse({**pair, "language": other}, tmp_path, r"lacks 1 of the .* tensors .*first: model.layers.1.mlp.up_proj")


def test_index_that_points_to_the_wrong_shard_is_refused(tmp_path):
    folders = save_pair(tmp_path, tiny_config(layers=4), shards=2)
    index = tmp_path / "language" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.norm.weight"
    wrong = (set(content["weight_map"].values()) - {content["weight_map"][name]}).pop()
    content["weight_map"][name] = wrong
    index.write_text(json.dumps(content))
    refuse(folders, tmp_path, f"{wrong} lacks {name}, which model.safetensors.index.json says it holds")


def test_pickle_that_holds_code_is_never_run(pair, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    other = copy_folder(pair["language"], tmp_path / "language")
    os.remove(f"{other}/model.safetensors")
    with open(f"{other}/pytorch_model.bin", "wb") as file:
        pickle.dump(Trap(), file)
    refuse({**pair, "language": other}, tmp_path, "pytorch_model.bin cannot be read without running code")
    assert not (tmp_path / "trapped").exists()


def test_tied_model_with_another_head_is_refused(tmp_path):
    config = tiny_config(layers=4, tie_word_embeddings=True)
    folders = save_pair(tmp_path, config)
    state = load_file(f"{folders['language']}/model.safetensors")
    save_file(
        state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, f"{folders['language']}/model.safetensors"
    )
    refuse(folders, tmp_path, "says tie_word_embeddings but stores a lm_head.weight that differs")


def test_adapter_and_empty_folders_are_told_apart(pair, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    refuse({**pair, "language": str(tmp_path / "adapter")}, tmp_path, "is an adapter, not a whole model")
    refuse({**pair, "language": str(tmp_path / "empty")}, tmp_path, r"holds no config.json \(it holds: nothing\)")
    refuse({**pair, "language": str(tmp_path / "absent")}, tmp_path, "no language expert .*absent: pass an existing")
    refuse({**pair, "language": "some-user/some-model"}, tmp_path, "fetch it with: hf download some-user/some-model")


def test_quantised_weights_are_refused(pair, tmp_path):
    other = copy_folder(pair["language"], tmp_path / "language")
    state = load_file(f"{other}/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(state | {name: state[name].to(torch.int8)}, f"{other}/model.safetensors")
    refuse({**pair, "language": other}, tmp_path, f"{name} is neither fp32, fp16 nor bf16")


def test_other_parameter_names_are_refused(tmp_path):
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    folders = {name: save_expert(tmp_path / name, config, base_state(config)) for name in ("math", "language")}
    refuse(
        folders, tmp_path, "cannot tell which layer tensor transformer.wte.weight belongs to: .*Llama, Mistral, Qwen2"
    )


def test_old_rotary_buffers_are_ignored_and_unknown_tensors_warned_of(pair, tmp_path, capsys):
    other = copy_folder(pair["language"], tmp_path / "language")
    state = load_file(f"{other}/model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, f"{other}/model.safetensors")
    whole = swap(pair, tmp_path / "plain")
    assert same_bits(swap({**pair, "language": other}, tmp_path / "buffers"), whole)
    assert "warning" not in capsys.readouterr().err
    save_file(state | {"v_head.weight": torch.ones(1, 32)}, f"{other}/model.safetensors")
    assert same_bits(swap({**pair, "language": other}, tmp_path / "value_head"), whole)
    assert "stores 1 tensors its architecture does not have, left out (first: v_head.weight)" in capsys.readouterr().err


# -- the disk and the output folder


def test_too_little_free_disk_is_refused_before_anything_is_written(pair, tmp_path, monkeypatch):
    usage = merged_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merged_folder.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    refuse(pair, tmp_path, r"needs 0\.02 GB, but .* has 0\.00 GB free")


def test_disk_that_fills_up_meanwhile_leaves_nothing(pair, tmp_path):
    """The free space found at the start may be gone before the end: here no file may grow beyond 20 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        refuse(pair, tmp_path, r"cannot write .*/new/merged: File too large; nothing is left behind")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_wrong_input_is_one_line_and_exit_code_2(pair, tmp_path):
    command = [
        sys.executable,
        "-m",
        "mindmerger.baselines.layer_swap",
        *flags_of(pair, tmp_path / "merged"),
        "--middle",
        "2:99",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: --middle 2:99 is not a range of layers: expected A:B with 0 <= A < B <= 4, the number of layers"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_killed_merge_leaves_nothing(pair, tmp_path, monkeypatch, sent):
    put = merged_folder._write_shard

    def write_then_die(*args):
        put(*args)
        os.kill(os.getpid(), sent)

    monkeypatch.setattr(merged_folder, "_write_shard", write_then_die)
    # A shell's background job starts with SIGINT ignored, and a test run may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            swap(pair, tmp_path / "new" / "merged")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_existing_output_stays_unless_overwritten(pair, tmp_path):
    first = swap(pair, tmp_path / "merged")
    with pytest.raises(MergeError, match="exists: choose another folder, or --overwrite"):
        swap(pair, tmp_path / "merged")
    assert same_bits(load_state(tmp_path / "merged"), first)
    second = swap(pair, tmp_path / "merged", "--embeddings", "math", "--overwrite")
    assert not same_bits(second, first)
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


def test_overwriting_that_fails_keeps_the_older_folder(pair, tmp_path, monkeypatch):
    first = swap(pair, tmp_path / "merged")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merged_folder, "_write_shard", full)
    with pytest.raises(MergeError, match="cannot write .*merged: No space left on device"):
        swap(pair, tmp_path / "merged", "--overwrite")
    assert same_bits(load_state(tmp_path / "merged"), first)
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


def test_overwrite_touches_no_folder_that_is_not_a_merge(pair, tmp_path):
    """--overwrite with a mistyped path must not delete someone's work."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("words")
    with pytest.raises(MergeError, match="holds no merge.json, so it is not ours to replace"):
        swap(pair, tmp_path / "thesis", "--overwrite")
    for output in (pair["math"], os.path.dirname(pair["math"])):
        with pytest.raises(MergeError, match="would replace the input"):
            swap(pair, output, "--overwrite")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "words"


def test_leftover_of_a_killed_merge_is_named_and_not_touched(pair, tmp_path, capsys):
    """SIGKILL leaves a temporary folder of the model's size; another merge may still be writing to one."""
    (tmp_path / ".merged.123.tmp").mkdir()
    swap(pair, tmp_path / "merged")
    assert ".merged.123.tmp is what a killed merge left behind" in capsys.readouterr().err
    assert (tmp_path / ".merged.123.tmp").is_dir()


def test_hub_name_in_the_local_cache_is_a_model_folder(pair, tmp_path, monkeypatch):
    import huggingface_hub

    def from_cache(name, local_files_only):
        assert name == "some-user/some-model" and local_files_only
        return pair["math"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_cache)
    assert str(open_model("math expert", "some-user/some-model").path) == pair["math"]


@pytest.mark.parametrize("module", ["layer_swap", "maet"])
def test_help_states_the_formula_and_what_is_ours_without_loading_torch(module):
    import importlib

    code = f"import sys, mindmerger.baselines.{module} as m; print(m.build_parser().format_help()); "
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "*(ours)*" in done.stdout and "arXiv" in done.stdout
    formula = {
        "layer_swap": "w * language + (1-w) * math",
        "maet": "merged  = t0 + eta * R_L + gamma * R_A * 1[t in T]",
    }
    assert formula[module] in done.stdout
    assert importlib.util.find_spec(f"mindmerger.baselines.{module}") is not None
