"""Model folders before their weights load: classes, quantisation, token ids, files, and code that is never run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, byte_tokenizer, make_tiny_encoder, make_tiny_llm
from safetensors.torch import load_file, save_file
from test_modeling_mindmerger import DECODER, batch, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_evaluation
import run_training
from mindmerger.analysis.embeddings import main as embeddings_main
from mindmerger.baselines.model_folder import open_model
from mindmerger.data.tokenising import load_tokenizers
from mindmerger.evaluation import flags as evaluation_flags
from mindmerger.evaluation import settings as evaluation_settings
from mindmerger.generation import answers as generation_answers
from mindmerger.generation import loading
from mindmerger.generation.answers import answer
from mindmerger.hub.model_configs import check_quantisation, load_config, takes_embeddings
from mindmerger.hub.tokenizer_files import load_tokenizer
from mindmerger.model.mapping_files import save_released
from mindmerger.model.mindmerger import MindMerger
from mindmerger.model.towers import check_models, check_roles, load_encoder, load_llm
from mindmerger.runtime.errors import UserError
from mindmerger.training import settings as training_settings
from mindmerger.training import trainer

FEW = ["--languages", "Swahili,English", "--limit", "2", "--max_new_tokens", "3", "--precision", "fp32"]


def edit_json(file, **changes):
    """Changes values of a JSON object in a file."""
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | changes))


@pytest.fixture
def llm(tmp_path, tiny_llm):
    """A copy of the tiny LLM to damage."""
    return Path(shutil.copytree(tiny_llm, tmp_path / "llm"))


@pytest.fixture
def encoder(tmp_path, tiny_encoder):
    """A copy of the tiny encoder to damage."""
    return Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))


@pytest.fixture(scope="module")
def mapping(tmp_path_factory, tiny_llm, tiny_encoder):
    """A mapping between the tiny models."""
    torch.manual_seed(5)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)
    folder = tmp_path_factory.mktemp("mapping") / "saved"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def evaluate(datas, tmp_path, monkeypatch, mapping, tiny_encoder):
    """Runs the evaluation command in a fresh folder; returns its predictions by language."""
    monkeypatch.chdir(tmp_path)

    def call(llm, *flags, mt_path=tiny_encoder, checkpoint=mapping):
        flags = [str(part) for part in flags]
        models = ["--llm_path", str(llm), "--mt_path", str(mt_path), "--init_checkpoint", str(checkpoint)]
        assert run_evaluation.main(["--data_root", datas, "--overwrite", *models, *FEW, *flags]) == 0
        files = sorted((tmp_path / "results/MindMerger/math_mgsm").glob("predictions/*.jsonl"))
        return [json.loads(line)["output"] for file in files for line in file.read_text().splitlines()]

    return call


@pytest.fixture
def check_training(flags, tmp_path, monkeypatch):
    """Runs all of the training command up to loading models; returns its settings and data."""
    monkeypatch.chdir(tmp_path)

    def call(*extra):
        argv = [*flags, "--languages", "Swahili", *(str(part) for part in extra)]
        if "--dry_run" in extra:
            return run_training.main(argv)
        return run_training.prepare(training_settings.parse(argv))

    return call


def refusal(call, *arguments, **named) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- end of text


def always_first_token(folder):
    """Makes an LLM whose logits are all equal, so that it says token 0 for ever."""
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"].zero_()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("configured", [2, None], ids=["another end", "no end"])
def test_generation_stops_at_an_end_token_that_only_the_tokenizer_names(evaluate, llm, tmp_path, configured):
    always_first_token(llm)
    assert "<unk>" not in evaluate(llm)[0] and not any(evaluate(llm))  # special tokens have no text
    hit = json.loads((tmp_path / "results/MindMerger/math_mgsm/results.json").read_text())["counts"]["hit_limit"]
    assert hit == 4
    byte_tokenizer(llm, {"eos_token": "<|im_end|>", "bos_token": "<s>", "unk_token": "</s>"})
    for name in ("config.json", "generation_config.json"):
        edit_json(llm / name, eos_token_id=configured)
    evaluate(llm)
    hit = json.loads((tmp_path / "results/MindMerger/math_mgsm/results.json").read_text())["counts"]["hit_limit"]
    assert hit == 0


def test_training_and_evaluation_end_texts_with_the_same_token(check_training, llm):
    byte_tokenizer(llm, {"eos_token": "<|im_end|>", "bos_token": "<s>", "unk_token": "</s>"})
    for name in ("config.json", "generation_config.json"):
        edit_json(llm / name, eos_token_id=None)
    _, data = check_training("--llm_path", llm)
    ends = {ids[-1] for ids in data.examples.dataset["target_ids"]}
    assert ends == {0} and ends <= set(MindMerger.from_models(None, str(llm)).eos_token_ids)


def test_an_llm_without_any_end_token_is_refused(llm):
    byte_tokenizer(llm, {"unk_token": "<unk>", "bos_token": "<s>"})
    for name in ("config.json", "generation_config.json"):
        edit_json(llm / name, eos_token_id=None)
    assert "names no end token" in refusal(check_models, None, str(llm), backward=False)
    edit_json(llm / "config.json", eos_token_id=[2, "</s>"])
    assert str(llm) in refusal(check_models, None, str(llm), backward=False)


# -- classes


def accepted_by_the_library(model_class) -> bool:
    """Whether `generate` of the class takes embeddings, asked where it decides that, without building a model."""
    model = model_class.__new__(model_class)
    torch.nn.Module.__init__(model)
    model.anchor = torch.nn.Parameter(torch.zeros(1))
    model.config = SimpleNamespace(is_encoder_decoder=False)
    inputs = {"inputs_embeds": torch.zeros(1, 2, 4)}
    try:
        _, name, _ = model._prepare_model_inputs(None, None, inputs)
    except ValueError as error:
        assert "inputs_embeds" in str(error)
        return False
    return name == "inputs_embeds"


def test_every_causal_lm_of_the_library_is_judged_as_its_own_generate_judges_it():
    mapping = AutoModelForCausalLM._model_mapping
    judged = {mapping[config].__name__: (takes_embeddings(mapping[config]), accepted_by_the_library(mapping[config]))
              for config in mapping}  # fmt: skip
    assert {name for name, (ours, theirs) in judged.items() if ours != theirs} == set()
    refused = {name for name, (ours, _) in judged.items() if not ours}
    assert {"BambaForCausalLM", "FalconH1ForCausalLM", "NemotronHForCausalLM", "ZambaForCausalLM"} < refused
    assert {"Gemma3ForConditionalGeneration", "XLNetLMHeadModel"} < refused and len(refused) < len(judged) / 4


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_multimodal(folder, family, **text):
    """Saves a tiny multimodal Gemma and returns the model."""
    vision = dict(VISION, image_size=28, patch_size=14) if family == "Gemma3" else dict(VISION, head_dim=8)
    if family != "Gemma3":
        text = {"global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0} | text
    settings = {"text_config": {**DECODER, "sliding_window": 8, **text}, "vision_config": vision}
    tokens = {"image_token_id": 119, "boi_token_id": 118, "eoi_token_id": 117}
    if family == "Gemma3":
        tokens = {name.replace("_id", "_index"): value for name, value in tokens.items()} | {"mm_tokens_per_image": 4}
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**settings, **tokens)
    model = getattr(transformers, family + "ForConditionalGeneration")(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("family", "names"), [("Gemma3", "hub"), ("Gemma3", "new"), ("Gemma4", "hub"), ("Gemma4Unified", "hub")]
)
def test_of_a_multimodal_gemma_the_text_model_is_loaded_whole(tmp_path, tiny_encoder, family, names):
    """Gemma 3 4B and larger: AutoModelForCausalLM gives a class that cannot generate from embeddings."""
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this version of transformers has no {family}")
    whole, folder = make_multimodal(tmp_path / "gemma", family), str(tmp_path / "gemma")
    if names == "new":
        state = load_file(tmp_path / "gemma/model.safetensors")
        state = {f"model.{name}".replace("language_model.model", "language_model"): state[name] for name in state}
        save_file(state, tmp_path / "gemma/model.safetensors", metadata={"format": "pt"})
    model = MindMerger.from_models(tiny_encoder, folder, torch.float32)
    assert type(model.llm).__name__ == f"{family}ForCausalLM"
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
    with torch.no_grad():
        assert torch.equal(model.llm(input_ids=ids).logits, whole(input_ids=ids).logits)
    out = model(**batch(rows(), "right"))
    out.loss.backward()
    assert out.loss.isfinite() and model.mapping.mlp.linear1.weight.grad.abs().sum() > 0
    prompt = ids[:, 1:]
    ours = model.generate(prompt_ids=prompt, prompt_mask=torch.ones_like(prompt), max_new_tokens=4)
    assert torch.equal(ours, whole.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :])


def test_a_dry_run_counts_the_text_model_of_a_multimodal_one(check_training, tmp_path, tiny_encoder, capsys):
    byte_tokenizer(tmp_path / "gemma", {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"})
    make_multimodal(tmp_path / "gemma", "Gemma3", vocab_size=259)
    check_training("--dry_run", "--llm_path", tmp_path / "gemma")
    counted = int(capsys.readouterr().out.split("parameters: ")[1].split()[0].replace(",", ""))
    towers = (load_llm(str(tmp_path / "gemma")), load_encoder(tiny_encoder))
    assert counted == sum(p.numel() for tower in towers for p in tower.parameters())


REFUSED = {
    "Bamba": {"attn_layer_indices": [1]},
    "XLNet": {},
    "Gemma3nText": {},
    "Gemma4Text": {"hidden_size_per_layer_input": 8},
    "DeepseekV4": {},
}


@pytest.mark.parametrize("family", REFUSED)
def test_an_llm_that_cannot_take_mapped_vectors_is_refused_by_name_before_data_loads(
    family, check_training, evaluate, tmp_path
):
    config = getattr(transformers, family + "Config")(**REFUSED[family])
    config.save_pretrained(tmp_path / "llm")
    path, absent = str(tmp_path / "llm"), ("--data_root", tmp_path / "absent")
    for call in (
        lambda: check_training("--llm_path", path, *absent),
        lambda: check_training("--llm_path", path, *absent, "--dry_run"),
        lambda: evaluate(path, *absent),
        lambda: evaluate(path, "--llm_only", *absent),
        lambda: MindMerger.from_models(None, path),
    ):
        message = refusal(call)
        assert f"{path} is a {config.model_type} model" in message and "--llm_path" in message


# -- quantised weights


def quantise_to_fp8(folder, block=16):
    """Turns the projections of a tiny Llama into fp8 with a scale for each block, as hub folders have them."""
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("proj.weight")]:
        out, into = state[name].shape
        blocks = state[name].view(out // block, block, into // block, block)
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        state[name] = (blocks / scales[:, None, :, None]).view(out, into).to(torch.float8_e4m3fn)
        state[name + "_scale_inv"] = scales
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    edit_json(folder / "config.json", quantization_config=settings)


def test_a_quantised_llm_without_a_backward_pass_is_refused_in_training_by_its_method(check_training, llm, tmp_path):
    quantise_to_fp8(llm)
    message = refusal(check_training, "--llm_path", llm, "--data_root", tmp_path / "absent")
    assert str(llm) in message and "(fp8)" in message and "bf16" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there fp8 needs kernels of its own")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp8_is_evaluated_on_a_cpu_with_the_answers_of_its_plain_weights(evaluate, llm, tmp_path, precision):
    quantise_to_fp8(llm)
    state, plain = load_file(llm / "model.safetensors"), Path(shutil.copytree(llm, tmp_path / "plain"))
    for name in [name for name in state if name.endswith("_scale_inv")]:
        weight = state[name.removesuffix("_scale_inv")].float()
        scales = state.pop(name).repeat_interleave(16, 0).repeat_interleave(16, 1)
        state[name.removesuffix("_scale_inv")] = weight * scales
    save_file(state, plain / "model.safetensors", metadata={"format": "pt"})
    edit_json(plain / "config.json", quantization_config=None)
    assert evaluate(llm, "--precision", precision) == evaluate(plain, "--precision", precision)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "config_groups": {}, "format": "float-quantized"},
        {"quant_method": "hqq"},
        {"quant_method": "torchao"},
        {"quant_method": "modelopt"},
        {"bits": 4},
    ],
    ids=lambda settings: settings.get("quant_method", "none"),
)
def test_a_quantised_folder_without_its_package_is_refused_by_its_method(
    check_training, evaluate, llm, encoder, tmp_path, settings, monkeypatch
):
    """A method that transformers does not know would load its integers as if they were weights."""
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    for folder in (llm, encoder):
        edit_json(folder / "config.json", quantization_config=settings)
    absent = ("--data_root", tmp_path / "absent")
    for folder, call in (
        (llm, lambda: check_training("--llm_path", llm, *absent)),
        (encoder, lambda: check_training("--mt_path", encoder, *absent)),
        (llm, lambda: evaluate(llm, *absent)),
    ):
        message = refusal(call)
        assert f"{folder} is quantised ({settings.get('quant_method')})" in message


@pytest.mark.parametrize("trainable", [True, False])
def test_transformers_says_which_quantised_llm_can_be_trained(llm, monkeypatch, trainable):
    """A method of our own, registered as users may: whatever transformers calls trainable is."""
    from transformers.quantizers import HfQuantizer, auto
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Settings(QuantizationConfigMixin):
        def __init__(self, quant_method="halves", **kwargs):
            self.quant_method = quant_method

    class Quantiser(HfQuantizer):
        requires_calibration = False
        is_trainable = trainable

        def is_serializable(self):
            return True

    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "halves", Settings)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "halves", Quantiser)
    edit_json(llm / "config.json", quantization_config={"quant_method": "halves"})
    config = load_config(str(llm))
    check_quantisation(str(llm), config, backward=False)
    if trainable:
        check_quantisation(str(llm), config, backward=True)
    else:
        assert "(halves)" in refusal(check_quantisation, str(llm), config, backward=True)


# -- token ids without an embedding row


def add_token(folder, token, **role):
    """Adds a token to a tokenizer without giving it an embedding row; returns its id."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(role) if role else tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(token)


def loss_of(llm, encoder):
    """Loss of one batch of examples of different lengths, by the tokenizers' own padding."""
    from mindmerger.data.batches import collate

    tokenizers = load_tokenizers(str(encoder), str(llm))
    lengths = {"encoder_ids": ([5, 6, 2], [7, 2]), "prompt_ids": ([8, 9], [10]), "target_ids": ([11, 12, 2], [2])}
    examples = [{name: ids[i] for name, ids in lengths.items()} for i in range(2)]
    torch.manual_seed(0)
    model = MindMerger.from_models(str(encoder), str(llm), torch.float32)
    return model(**collate(examples, tokenizers.encoder_pad_id, tokenizers.llm_pad_id).tensors).loss


@pytest.mark.parametrize("where", ["tokenizer", "config beyond", "config negative", "generation config"])
def test_a_pad_token_without_a_row_changes_neither_loss_nor_answers(
    evaluate, llm, encoder, tiny_encoder, tmp_path, where
):
    for name in ("config.json", "generation_config.json"):  # some rows end early, and are padded
        edit_json(llm / name, eos_token_id=[2, *range(3, 250, 3)])
    plain = shutil.copytree(llm, tmp_path / "plain")
    expected, answers = loss_of(plain, tiny_encoder), evaluate(plain, mt_path=tiny_encoder)
    for folder in (llm, encoder):
        rows = json.loads((folder / "config.json").read_text())["vocab_size"]
        if where == "tokenizer":
            assert add_token(folder, "[PAD]", pad_token="[PAD]") >= rows
        elif where == "generation config":
            edit_json(folder / "generation_config.json", pad_token_id=rows)
        else:
            edit_json(folder / "config.json", pad_token_id=rows + 5 if "beyond" in where else -1)
    assert torch.equal(loss_of(llm, encoder), expected)
    assert evaluate(llm, mt_path=encoder) == answers


@pytest.mark.parametrize("side", ["llm", "encoder"])
def test_a_used_token_without_a_row_is_refused_by_name_before_weights_load(
    check_training, evaluate, llm, encoder, datas, mapping, tmp_path, monkeypatch, side
):
    folder = {"llm": llm, "encoder": encoder}[side]
    add_token(folder, "<unused>")
    check_training("--llm_path", llm, "--mt_path", encoder)  # no text has it
    evaluate(llm, mt_path=encoder)
    model = MindMerger.from_models(str(encoder), str(llm))
    folder = Path(shutil.copytree(folder, tmp_path / "added"))
    added = add_token(folder, "an")
    paths = {"llm": str(llm), "encoder": str(encoder)} | {side: str(folder)}
    for module in (trainer, run_evaluation):
        monkeypatch.setattr(module, "load_model", None)
    for call in (
        lambda: check_training("--llm_path", paths["llm"], "--mt_path", paths["encoder"]),
        lambda: evaluate(paths["llm"], mt_path=paths["encoder"]),
    ):
        message = refusal(call)
        assert str(folder) in message and f"'an' (id {added})" in message and f"ends at id {added - 2}" in message
    model.config.llm_path, model.config.mt_path = paths["llm"], paths["encoder"]
    assert f"'an' (id {added})" in refusal(answer, model, ["an egg"])


# -- numbers that are none


def spoil(folder, name="model.norm.weight", value=float("nan")):
    """Puts one value that is not finite into a weight of a model folder."""
    state = load_file(Path(folder) / "model.safetensors")
    state[name].view(-1)[0] = value
    save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_mapping_that_is_not_finite_is_refused_wherever_it_is_read(
    check_training, evaluate, mapping, datas, tiny_llm, tiny_encoder, tmp_path, form, value
):
    state = load_file(Path(mapping) / "mapping.safetensors")
    state["mlp.linear1.bias"][3] = value
    path = tmp_path / f"bad.{form}"
    save_file(state, path) if form == "safetensors" else save_released(path, state)
    models = ["--llm_path", tiny_llm, "--mt_path", tiny_encoder]
    for call in (
        lambda: evaluate(tiny_llm, checkpoint=path),
        lambda: check_training("--init_checkpoint", path),
        lambda: embeddings_main(["--init_checkpoint", str(path), "--data_root", datas, *models]),
        lambda: MindMerger.from_models(tiny_encoder, tiny_llm).load_mapping(str(path)),
    ):
        message = refusal(call)
        assert str(path) in message and "mlp.linear1.bias" in message and "NaN or infinite" in message


@pytest.mark.parametrize("side", ["llm", "encoder"])
def test_models_whose_logits_are_not_numbers_are_named_at_the_first_token_and_get_no_score(
    evaluate, llm, encoder, mapping, tmp_path, monkeypatch, side
):
    """Of NaN logits argmax makes token 0, which would be scored as an answer."""
    name = {"llm": "model.norm.weight", "encoder": "encoder.final_layer_norm.weight"}[side]
    spoil({"llm": llm, "encoder": encoder}[side], name)
    message = refusal(evaluate, llm, "--max_new_tokens", "50", mt_path=encoder)
    assert str({"llm": llm, "encoder": encoder}[side]) in message and f"{side}." in message and "NaN" in message
    assert not (tmp_path / "results/MindMerger/math_mgsm/results.json").exists()
    model, calls = MindMerger.from_models(str(encoder), str(llm), torch.float32), []
    model.llm.register_forward_hook(lambda *_: calls.append(1))
    assert message == refusal(answer, model, ["How many?", "Why?"], languages="English", max_new_tokens=50)
    assert len(calls) == 1
    if side == "llm":
        assert message == refusal(evaluate, llm, "--llm_only")


def test_logits_of_minus_infinity_are_legal_unless_no_token_is_left(tiny_llm):
    model = MindMerger.from_models(None, tiny_llm)
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    inputs = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "max_new_tokens": 6}
    expected = model.generate(**inputs)
    never = sorted(set(range(259)) - set(expected.flatten().tolist()))

    def masked(tokens, value, row=slice(None)):
        def hook(*arguments):
            arguments[2][row, :, tokens] = value
            return arguments[2]

        return model.llm.get_output_embeddings().register_forward_hook(hook)

    handle = masked(never, -torch.inf)
    assert torch.equal(model.generate(**inputs), expected)
    handle.remove()
    for tokens, value in ((list(range(259)), -torch.inf), (never[:1], torch.inf), (never[:1], torch.nan)):
        handle = masked(tokens, value, row=1)
        assert "NaN or infinite" in refusal(model.generate, **inputs)
        handle.remove()


def test_merged_embeddings_for_another_engine_are_checked(evaluate, llm, encoder, mapping, datas):
    spoil(encoder, "encoder.final_layer_norm.weight", torch.inf)
    flags = ["--llm_path", str(llm), "--mt_path", str(encoder), "--init_checkpoint", mapping, "--data_root", datas]
    settings = evaluation_settings.settle(evaluation_flags.build_parser().parse_args([*flags, *FEW]), on_gpu=False)
    settings.engine = "vllm"
    model = loading.load_model(settings, torch.device("cpu"))
    assert "encoder.final_layer_norm.weight" in refusal(generation_answers.merge_batch, model, settings, [0, 1])


# -- damaged files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 134217728\n"
INDEX = json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}).encode()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGES = {
    "pointer": (lambda _: POINTER, "Git LFS"),
    "cut": (half, "cut short"),
    "empty": (lambda _: b"", ""),
    "null": (lambda _: b"null", "must hold a JSON object"),
    "half a value": (lambda _: b'{"eos_token_id": 2,', "not valid JSON"),
}
FILES = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_model_folder_is_named_with_its_cause_before_data_loads(
    evaluate, check_training, llm, name, damage, tmp_path
):
    change, cause = DAMAGES[damage]
    (llm / name).write_bytes(change((llm / name).read_bytes()))
    cause = "" if name == "model.safetensors" and damage in ("null", "half a value") else cause
    absent = ("--data_root", tmp_path / "absent") if not name.startswith("tokenizer") else ()
    for call in (lambda: evaluate(llm, *absent), lambda: check_training("--llm_path", llm, *absent)):
        message = refusal(call)
        assert str(llm / name) in message and cause in message
    if not name.startswith("tokenizer"):
        assert str(llm / name) in refusal(MindMerger.from_models, None, str(llm))


def test_a_tokenizer_or_mapping_config_of_the_wrong_form_is_named(evaluate, llm, mapping, tmp_path):
    edit_json(llm / "tokenizer.json", model=[1])
    assert f"{llm / 'tokenizer.json'} is not a tokenizer" in refusal(evaluate, llm)
    (llm / "tokenizer.json").unlink()
    assert f"tokenizer of {llm}: it holds none of tokenizer.json" in refusal(evaluate, llm)
    saved = Path(shutil.copytree(mapping, tmp_path / "saved"))
    for name, value in (("llm_path", [1]), ("format_version", "1"), ("augmentation", {})):
        edit_json(saved / "config.json", **{name: value})
        assert f"{saved / 'config.json'}: {name} cannot be" in refusal(evaluate, llm, checkpoint=saved)
        shutil.copy(Path(mapping) / "config.json", saved)
    (saved / "config.json").write_bytes(POINTER)
    assert "config.json is a Git LFS pointer" in refusal(evaluate, llm, checkpoint=saved)


def test_missing_shards_and_damaged_older_weights_are_named(evaluate, llm, encoder):
    for damage, part in (
        ({"model.safetensors.index.json": INDEX}, "lacks 1 of the 1 weight files"),
        ({"model.safetensors.index.json": b"null"}, "model.safetensors.index.json must hold a JSON object"),
        ({}, "holds no weights"),
    ):
        for folder in (llm, encoder):
            (folder / "model.safetensors").unlink(missing_ok=True)
            (folder / "model.safetensors.index.json").unlink(missing_ok=True)
            for name, content in damage.items():
                (folder / name).write_bytes(content)
        assert part in refusal(evaluate, llm)
        assert part in refusal(load_encoder, str(encoder))
    torch.save({"model.norm.weight": torch.zeros(9000)}, llm / "pytorch_model.bin")
    (llm / "pytorch_model.bin").write_bytes(half((llm / "pytorch_model.bin").read_bytes()))
    assert f"{llm / 'pytorch_model.bin'} is cut short" in refusal(evaluate, llm)


def test_pointers_that_nothing_reads_do_no_harm(evaluate, llm, tiny_llm):
    """As after `git lfs pull --include` of the safetensors alone."""
    for name in ("pytorch_model.bin", "tokenizer.model", "original.bin"):
        (llm / name).write_bytes(POINTER)
    assert evaluate(llm) == evaluate(tiny_llm)


def test_a_pointer_is_not_taken_for_a_vocabulary_of_three_words(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "bert/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (tmp_path / "bert/vocab.txt").write_bytes(b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n")
    assert load_tokenizers(str(tmp_path / "bert"), None).encoder.convert_tokens_to_ids("word") == 5
    (tmp_path / "bert/vocab.txt").write_bytes(POINTER)
    assert "vocab.txt is a Git LFS" in refusal(load_tokenizers, str(tmp_path / "bert"), None)


def test_a_pointer_as_mapping_or_expert_is_named(evaluate, llm, tmp_path):
    (tmp_path / "mapping.safetensors").write_bytes(POINTER)
    assert "mapping.safetensors is a Git LFS" in refusal(evaluate, llm, checkpoint=tmp_path / "mapping.safetensors")
    (llm / "model.safetensors").write_bytes(POINTER)
    assert f"{llm / 'model.safetensors'} is a Git LFS" in refusal(open_model, "math expert", str(llm))


@pytest.mark.parametrize("name", FILES[:4])
def test_a_file_that_may_not_be_read_is_named_as_that(llm, name):
    (llm / name).chmod(0)
    for folder in (llm, *llm.parents):  # as many as pytest makes; those above are open already
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody: root may read all
    try:
        call = load_tokenizers if name.startswith("tokenizer") else check_models
        message = refusal(call, None, str(llm), **({} if call is load_tokenizers else {"backward": False}))
    finally:
        os.seteuid(user)
    assert str(llm / name) in message and "Permission denied" in message


# -- code that a folder brings along


def add_own_code(folder, trace, kind):
    """Makes a folder whose own code writes a file called `trace` when it runs."""
    (folder / "own.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import PreTrainedConfig, PreTrainedTokenizerFast, PreTrainedModel\n"
        "class OwnConfig(PreTrainedConfig):\n    model_type = 'own'\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
        "class OwnModel(PreTrainedModel):\n    config_class = OwnConfig\n"
    )
    if kind == "model":
        auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnModel"}
        edit_json(folder / "config.json", model_type="own", auto_map=auto_map)
    else:
        (folder / "tokenizer.json").unlink()
        settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
        edit_json(folder / "tokenizer_config.json", **settings)
    return str(folder)


def test_code_of_a_model_folder_is_never_asked_about_and_never_run(
    run, tiny_llm, tiny_encoder, mapping, datas, tmp_path, flags
):
    """Real processes with `yes` on standard input, which transformers would take for the user's consent."""
    trace, own = tmp_path / "trace", {}
    for name, source, kind in (("llm", tiny_llm, "model"), ("mt", tiny_encoder, "model"), ("words", tiny_llm, "words")):
        own[name] = add_own_code(Path(shutil.copytree(source, tmp_path / name)), trace, kind)
    common = ["--init_checkpoint", mapping, "--data_root", datas, "--llm_path", tiny_llm, "--mt_path", tiny_encoder]
    experts = ["--output", "merged", "--math_expert", own["llm"], "--language_expert", tiny_llm]
    commands = [
        ("run_evaluation", [*common, "--llm_path", own["llm"]], "llm"),
        ("run_evaluation", [*common, "--mt_path", own["mt"]], "mt"),
        ("run_evaluation", [*common, "--llm_path", own["words"]], "words"),
        ("run_evaluation", [*common, "--llm_only", "--llm_path", own["words"]], "words"),
        ("mindmerger.analysis.embeddings", [*common, "--mt_path", own["mt"]], "mt"),
        ("mindmerger.baselines.layer_swap", experts, "llm"),
        ("run_training", [*flags, "--llm_path", own["llm"]], "llm"),
        ("run_training", [*flags, "--mt_path", own["mt"]], "mt"),
        ("run_training", [*flags, "--llm_path", own["words"]], "words"),
    ]
    code = f"""
import importlib, json, sys
sys.path.insert(0, {str(ROOT)!r})
from mindmerger.runtime.errors import UserError
for module, argv, name in json.loads({json.dumps(commands)!r}):
    try:
        importlib.import_module(module).main(argv)
    except UserError as error:
        print("refused:" + json.dumps([name, str(error)]))
"""
    done = run(sys.executable, "-c", code, input="yes\n" * 100)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.partition("refused:")[2] for line in done.stdout.splitlines()]
    refused = [json.loads(line) for line in lines if line]
    assert [name for name, _ in refused] == [name for _, _, name in commands]
    for name, message in refused:
        assert own[name] in message and "needs code of its own" in message and "\n" not in message
    assert not trace.exists() and "[y/N]" not in done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Hub names that cannot be fetched

ASKING = """
import sys
from mindmerger.hub.model_configs import load_config
from mindmerger.runtime.errors import UserError

for name in sys.argv[1:]:
    try:
        load_config(name)
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """Returns what is said of hub names that a server refuses in several ways, by name."""

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self):
            status, code = {"gated": (401, "GatedRepo"), "private": (401, "RepoNotFound")}.get(
                self.path.split("/")[1], (403, "")
            )
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = str(tmp_path_factory.mktemp("hub"))
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": home}
    names = ["gated/llm", "private/llm", "other/llm"]
    done = subprocess.run(
        [sys.executable, "-c", ASKING, *names],
        env={**os.environ, **place, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    server.shutdown()
    said = done.stdout.splitlines()
    assert len(said) == len(names), done
    return dict(zip(names, said, strict=True))


def test_a_gated_model_is_told_to_need_its_licence_accepted_and_a_log_in(refusals):
    assert refusals["gated/llm"] == (
        "cannot fetch gated/llm from the Hugging Face hub: it is gated: accept its licence at "
        "https://huggingface.co/gated/llm, then log in with 'hf auth login' or set HF_TOKEN"
    )


def test_a_model_that_the_hub_hides_or_refuses_is_told_to_need_a_log_in(refusals):
    assert "the hub shows no such model: check the name" in refusals["private/llm"]
    assert "refuses access (HTTP 403)" in refusals["other/llm"]
    assert all("'hf auth login' or set HF_TOKEN" in line for line in refusals.values())


def test_a_model_that_an_offline_cache_lacks_is_told_how_to_fetch_it():
    """The tests run with HF_HUB_OFFLINE=1."""
    for load in (load_config, load_tokenizer):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set and the cache .* lacks it: .*'hf download org/llm'"):
            load("org/llm")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_a_model_folder_is_refused_and_never_waited_for(llm, name):
    """The libraries open it, and wait for its writer forever."""

    def give_up(*_):
        raise TimeoutError

    (llm / name).unlink(missing_ok=True)
    os.mkfifo(llm / name)
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    try:
        assert refusal(load_config, str(llm)) == f"{llm / name} is a pipe: a file is expected there"
    finally:
        signal.alarm(0)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def with_m2m100(folder):
    """An NLLB-like model with three encoder and four decoder layers."""
    sizes = {f"{half}_{name}": 2 for half in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}
    config = transformers.M2M100Config(vocab_size=60, d_model=16, encoder_layers=3, decoder_layers=4, **sizes)
    transformers.M2M100ForConditionalGeneration(config).save_pretrained(folder)
    return folder


LAYERED = [
    (load_llm, lambda folder: make_tiny_llm(folder, layers=3), "num_hidden_layers", "model.layers"),
    (load_encoder, lambda folder: make_tiny_encoder(folder, layers=3), "num_layers", "encoder.block"),
    (load_encoder, with_m2m100, "encoder_layers", "layers"),
]


@pytest.mark.parametrize(("load", "make", "name", "where"), LAYERED)
def test_a_model_whose_config_has_fewer_layers_than_its_files_is_refused_by_name(tmp_path, load, make, name, where):
    """The other layers were left out without a word."""
    folder = tmp_path / "model"
    make(folder)
    load(str(folder))
    for layers in (2, 1):
        edit_json(folder / "config.json", **{name: layers})
        message = refusal(load, str(folder))
        assert message.startswith(f"{folder}: its weight files hold 3 layers in {where}, its config.json has {layers}:")


def test_weights_without_a_place_that_are_not_layers_of_the_config_change_nothing(tmp_path):
    """Buffers of earlier versions, a vision tower, and the layer behind the last one that predicts further tokens."""
    folder = Path(make_tiny_llm(tmp_path / "llm", layers=3))
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    state["vision_tower.layers.9.weight"] = torch.zeros(4)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert len(load_llm(str(folder)).model.layers) == 3
    edit_json(folder / "config.json", num_hidden_layers=2, num_nextn_predict_layers=1)
    assert len(load_llm(str(folder)).model.layers) == 2


@pytest.mark.parametrize("layers", [0, -1])
def test_a_model_without_layers_is_refused_before_it_loads(llm, encoder, layers):
    """Its first forward pass ended in a traceback."""
    edit_json(llm / "config.json", num_hidden_layers=layers)
    assert refusal(check_roles, str(llm), None) == (
        f"{llm}: its config.json asks for {layers} layers: correct the number there"
    )
    edit_json(llm / "config.json", num_hidden_layers=2)
    edit_json(encoder / "config.json", num_layers=layers)
    assert refusal(check_roles, str(llm), str(encoder)).startswith(f"{encoder}: its config.json asks for {layers} ")
