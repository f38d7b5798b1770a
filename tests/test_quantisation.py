"""--quantization and quantised LLM folders, with bitsandbytes itself on its CPU back-end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_tiny_llm, read_log, run_many, run_prepared
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import run_evaluation
from mindmerger.evaluation import tables
from mindmerger.hub import quantisation
from mindmerger.hub.model_configs import llm_config
from mindmerger.hub.quantisation import saved_bytes
from mindmerger.model import towers
from mindmerger.model.adapters import adapter_values, add_adapter
from mindmerger.model.mapping_files import read_config
from mindmerger.model.mindmerger import MindMerger
from mindmerger.model.towers import load_llm
from mindmerger.runtime.errors import UserError
from mindmerger.training import settings as training_settings
from mindmerger.training import tuning_settings

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which requirements.txt has")
KINDS = ("nf4", "int8")
OWN = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    # As hub folders for adapters have it: scales quantised too, and codes stored as if they were bf16 numbers.
    "nested": {
        **{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def edit_json(file, **changes):
    """Changes entries of a JSON file."""
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | changes))


def batch(rows=3, length=12):
    """Inputs of `MindMerger.forward` with all of its segments."""
    ids = torch.randint(5, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    names = ("encoder_input_ids", "prompt_ids", "target_ids")
    masks = ("encoder_attention_mask", "prompt_mask", "target_mask")
    return dict.fromkeys(names, ids) | dict.fromkeys(masks, mask)


def loss_and_gradient(encoder, llm, kind, dtype=torch.float32, change=lambda model: None):
    """Loss, gradient of the same fresh mapping as one vector, and the model."""
    torch.manual_seed(0)
    model = MindMerger.from_models(encoder, llm, dtype, quantization=kind)
    change(model)
    loss = model(**batch()).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.mapping.parameters()]), model


@pytest.fixture(scope="module")
def tiny_llm(tmp_path_factory):
    """As wide as a block of NF4: narrower rows are misread on CPUs with AVX-512."""
    return make_tiny_llm(tmp_path_factory.mktemp("models") / "llm", width=64, initializer_range=0.1)


@pytest.fixture(scope="module")
def plain(tiny_encoder, tiny_llm):
    return loss_and_gradient(tiny_encoder, tiny_llm, "none")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_llm):
    """Folders of the tiny LLM as transformers saves them quantised."""
    made = {}
    for name, settings in OWN.items():
        made[name] = shutil.copytree(tiny_llm, tmp_path_factory.mktemp("quantised") / name)
        how = BitsAndBytesConfig(**settings)
        AutoModelForCausalLM.from_pretrained(tiny_llm, quantization_config=how).save_pretrained(made[name])
    return made


def refusal(call, *arguments):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def settle_training(flags, *more):
    """Everything that a training command settles before weights load."""
    return training_settings.settle(training_settings.parse([*map(str, flags), *map(str, more)]))


# -- the model


@pytest.mark.parametrize(
    ("kind", "dtype", "cosine"),
    [("int8", torch.float32, 0.998), ("int8", torch.bfloat16, 0.998), ("nf4", torch.float32, 0.86)]
    + [("nf4", torch.bfloat16, 0.86)],
)
def test_gradients_of_the_mapping_go_through_the_quantised_llm(plain, tiny_encoder, tiny_llm, kind, dtype, cosine):
    """Random weights of a tiny LLM; the bounds are what was measured on others, in `docs/training.md`."""
    loss, gradient, model = loss_and_gradient(tiny_encoder, tiny_llm, kind, dtype)
    assert loss == pytest.approx(plain[0], rel=0.05) and loss != plain[0]
    assert torch.cosine_similarity(gradient, plain[1], dim=0) > cosine
    packed = [one for one in model.llm.parameters() if quantisation.is_packed(one)]
    assert len(packed) == 14 and model.mapping.llm_dtype == dtype
    kinds = {"nf4": ("quant_type", "nf4"), "int8": ("has_fp16_weights", False)}[kind]
    assert {getattr(one, kinds[0]) for one in packed} == {kinds[1]}
    assert not any(one.requires_grad for one in model.llm.parameters())


def test_nf4_s_gradient_is_that_of_its_weights_as_numbers(tiny_encoder, tiny_llm):
    def dequantise(model):
        model.llm = model.llm.dequantize()

    found, expected = (
        loss_and_gradient(tiny_encoder, tiny_llm, "nf4", change=change) for change in (lambda model: None, dequantise)
    )
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("bridge", ["mindmerger", "layalign"])
def test_the_llm_s_dtype_is_that_of_its_input_embedding_whatever_parameter_comes_first(tiny_encoder, tiny_llm, bridge):
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, bridge=bridge, quantization="nf4")
    expected = model(**batch()).loss
    modules = model.llm.model._modules
    modules["embed_tokens"] = modules.pop("embed_tokens")  # now the last one
    assert next(model.llm.parameters()).dtype == torch.uint8
    assert torch.equal(model(**batch()).loss, expected)
    assert model.mapping.llm_dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_have_the_same_gradient(tiny_encoder, tiny_llm, kind):
    ways = (lambda model: None, MindMerger.gradient_checkpointing_enable)
    found = [loss_and_gradient(tiny_encoder, tiny_llm, kind, change=way)[1] for way in ways]
    torch.testing.assert_close(*found)


def test_a_pass_without_gradient_leaves_4_bit_layers_in_the_form_that_gradients_go_through(
    tiny_encoder, tiny_llm, monkeypatch
):
    """On a CPU with AVX512-BF16 bitsandbytes repacks them there for good; here it only believes to be on one."""
    from bitsandbytes.nn import modules

    def repack(*arguments):
        raise AssertionError("repacked")

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, quantization="nf4")
    with torch.no_grad():
        loss = model(**batch()).loss
    monkeypatch.setattr(towers, "forbid_repacking", lambda model: None)
    unguarded = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, quantization="nf4")
    with torch.no_grad(), pytest.raises(AssertionError, match="repacked"):
        unguarded(**batch())
    assert loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_weight_is_named_although_it_is_a_code_now(tiny_encoder, tiny_llm, tmp_path, kind):
    llm = shutil.copytree(tiny_llm, tmp_path / "llm")
    state = load_file(llm / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(state, llm / "model.safetensors", metadata={"format": "pt"})
    model = MindMerger.from_models(tiny_encoder, str(llm), torch.float32, quantization=kind)
    given = batch()
    names = ("encoder_input_ids", "encoder_attention_mask", "prompt_ids", "prompt_mask")
    message = refusal(lambda: model.generate(*(given[name] for name in names), max_new_tokens=1))
    assert "llm.model.layers.1.mlp.up_proj.weight" in message


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_on_an_nf4_llm_starts_as_nothing_and_learns(tiny_encoder, tiny_llm, kind):
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, quantization="nf4")
    with torch.no_grad():
        expected = model(**batch()).loss
    torch.manual_seed(0)
    add_adapter(model, adapter_values(kind, 4, 8.0, 0.0, ["q_proj", "v_proj"], tiny_llm))
    model.train()
    optimizer, losses = torch.optim.AdamW(model.trained_parameters().values(), lr=1e-2), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5) and losses[2] < losses[1] < losses[0]


def test_a_cpu_that_misreads_narrow_layers_says_so(tmp_path, monkeypatch):
    """Found on a CPU with AVX-512, whose answers were noise. The others read such layers right: there it is acted."""
    from bitsandbytes import functional

    narrow, read = make_tiny_llm(tmp_path / "llm", width=32), functional.dequantize_4bit
    monkeypatch.setattr(
        functional, "dequantize_4bit", lambda codes, state: read(codes, state) * (len(state.shape) if state else 1)
    )
    message = refusal(lambda: load_llm(narrow, torch.float32, quantization="nf4"))
    assert "misreads 4-bit layers on this CPU whose width is no multiple of 64, such as model.layers.0." in message
    assert "(32): use int8 or no quantisation here, or a GPU" in message
    load_llm(narrow, torch.float32, quantization="int8")


# -- folders that are quantised already


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN)
def test_a_quantised_folder_computes_in_the_asked_dtype_and_gradients_go_through_it(
    folders, plain, tiny_encoder, name, dtype
):
    loss, gradient, model = loss_and_gradient(tiny_encoder, str(folders[name]), "none", dtype)
    assert loss == pytest.approx(plain[0], rel=0.05)
    assert torch.cosine_similarity(gradient, plain[1], dim=0) > (0.998 if name == "int8" else 0.86)
    assert model.mapping.llm_dtype == model.llm.lm_head.weight.dtype == dtype
    computing = {one.compute_dtype for one in model.llm.modules() if type(one).__name__ == "Linear4bit"}
    assert computing == (set() if name == "int8" else {dtype})


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_folder_computes_what_the_flag_does(folders, tiny_llm, kind):
    ids = batch()["prompt_ids"]
    found = load_llm(str(folders[kind]), torch.float32)(ids).logits
    assert torch.equal(found, load_llm(tiny_llm, torch.float32, quantization=kind)(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_only_calls_its_weights_quantised_is_refused(tiny_llm, tmp_path, kind):
    llm = shutil.copytree(tiny_llm, tmp_path / "llm")
    edit_json(llm / "config.json", quantization_config={"quant_method": "bitsandbytes", **OWN[kind]})
    message = refusal(load_llm, str(llm), torch.float32)
    assert f"{llm}: its config.json calls the weights quantised" in message and "q_proj have no scales" in message


# -- what it does not go with


def test_what_quantised_weights_cannot_be_used_with_is_refused_by_name_before_weights_load(
    flags, folders, tmp_path, monkeypatch
):
    monkeypatch.setattr("mindmerger.training.speedups.check_speed_options", lambda args, stage: None)
    zero = tmp_path / "zero3.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    out, nf4 = ("--output_dir", tmp_path), ("--quantization", "nf4")
    own = ("--llm_path", folders["nf4"])
    encoder = shutil.copytree(flags[flags.index("--mt_path") + 1], tmp_path / "encoder")
    edit_json(encoder / "config.json", quantization_config={"quant_method": "bitsandbytes", **OWN["int8"]})
    named = f"{folders['nf4']} (bitsandbytes)"
    for more, words in (
        ((*nf4, "--deepspeed_config", zero), ("--quantization nf4: ZeRO 3 cannot share", "ZeRO 0 to 2")),
        ((*own, "--deepspeed_config", zero), (f"{named}: ZeRO 3 cannot",)),
        (("--mt_path", encoder, "--deepspeed_config", zero), (f"{encoder} (bitsandbytes): ZeRO 3",)),
        ((*nf4, "--compile"), ("--compile is not made for quantised layers, --quantization nf4",)),
        ((*own, "--compile"), (f"--compile is not made for quantised layers, {named}",)),
        ((*nf4, "--liger"), ("--liger is not made for quantised layers, --quantization nf4",)),
        ((*own, *nf4), (f"{folders['nf4']} is quantised already (bitsandbytes): leave --quantization nf4 out",)),
    ):
        message = refusal(settle_training, flags, *out, *more)
        assert all(word in message for word in words), message
    settle_training(flags, *out, *nf4)
    settle_training(flags, *out, *own)


def test_a_quantised_llm_is_neither_tuned_nor_merged(folders, tmp_path, datas):
    from mindmerger.baselines.model_folder import open_model

    given = ["--task", "math", "--llm_path", str(folders["nf4"]), "--data_root", datas]
    args = tuning_settings.build_parser().parse_args([*given, "--output_dir", str(tmp_path / "tuned")])
    assert "is quantised (bitsandbytes), and a tuning changes its weights" in refusal(tuning_settings.settle, args)
    assert "holds quantised weights" in refusal(open_model, "LLM", str(folders["nf4"]))


def test_without_bitsandbytes_one_line_says_what_to_install(flags, tiny_llm, tmp_path, monkeypatch):
    find = quantisation.importlib.util.find_spec
    monkeypatch.setattr(quantisation.importlib.util, "find_spec", lambda name: find(name) if name == "peft" else None)
    for call in (
        lambda: settle_training(flags, "--quantization", "nf4", "--output_dir", tmp_path),
        lambda: load_llm(tiny_llm, quantization="nf4"),
    ):
        assert 'needs the package bitsandbytes: pip install "bitsandbytes>=0.50' in refusal(call)
    assert "choose one of none, nf4, int8" in refusal(lambda: load_llm(tiny_llm, quantization="fp4"))


# -- training


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_run_resumes_to_the_same_losses_and_only_with_the_same_quantization(flags, tmp_path, kind):
    steps = [*flags, "--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--quantization", kind]
    short = ["--max_steps", "2", "--allow_changed", "max_steps"]
    whole, first, refused, resumed = run_many(
        tmp_path,
        [
            [*steps, "--save_name", "whole"],
            [*steps, *short, "--save_name", "parts"],
            [*steps, "--quantization", "none", "--save_name", "parts"],
            [*steps, "--allow_changed", "max_steps", "--save_name", "parts"],
        ],
    )
    assert [one["code"] for one in (whole, first, refused, resumed)] == [0, 0, 2, 0], (whole, first, refused, resumed)
    assert f"trained with another quantization ('{kind}', this run has 'none')" in refused["error"]
    assert "to float16" not in whole["printed"]  # which the library says at every product
    folders = [tmp_path / "outputs" / name / "math/mapping" for name in ("whole", "parts")]
    losses = [read_log(folder) for folder in folders]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert read_log(folders[0], "dev_loss")[-1] < read_log(folders[0], "dev_loss")[0]
    assert all(torch.equal(*(load_file(folder / "mapping.safetensors")[name] for folder in folders))
               for name in load_file(folders[0] / "mapping.safetensors"))  # fmt: skip
    assert read_config(str(folders[0])).quantization == kind


@pytest.mark.slow
def test_two_ranks_at_zero_2_have_the_losses_of_one_and_train_an_adapter_on_nf4(flags, tmp_path):
    zero = ["--deepspeed_config", f"{ROOT}/scripts/ds_zero2.json"]
    steps = [*flags, "--max_steps", "3", "--quantization", "nf4", *zero]
    adapter = ["--stage_name", "adapter", "--llm_only", "--adapter_dropout", "0"]
    losses = {}
    for ranks in (1, 2):
        names = [["--save_name", f"mapping{ranks}"], [*adapter, "--save_name", f"adapter{ranks}"]]
        outcomes = run_many(tmp_path, [steps + more for more in names], ranks=ranks)
        assert [one["code"] for one in outcomes] == [0, 0], outcomes
        losses[ranks] = [
            read_log(tmp_path / f"outputs/mapping{ranks}/math/mapping"),
            read_log(tmp_path / f"outputs/adapter{ranks}/math/llm_adapter"),
        ]
    for one, two in zip(losses[1], losses[2], strict=True):
        assert len(one) == 3 and one[2] < one[0] and two == pytest.approx(one, rel=1e-5)
    assert read_config(str(tmp_path / "outputs/adapter2/math/llm_adapter")).quantization == "nf4"


def test_a_checkpoint_without_the_entry_was_trained_without_quantization(flags, tmp_path):
    from mindmerger.training.outputs import MEANT_BY_ABSENCE, identity

    settings = settle_training(flags, "--output_dir", tmp_path)
    settings.args.dev_split = None
    found = identity(settings, type("Data", (), {"fingerprint": "data"}))
    assert found["quantization"] == MEANT_BY_ABSENCE["quantization"] == "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*KINDS, "own nf4", "own nested", "own int8"])
def test_the_dry_run_counts_the_bytes_that_quantised_weights_take(folders, tiny_llm, name, dtype):
    own = name.startswith("own")
    path = str(folders[name.split()[1]]) if own else tiny_llm
    kind = "none" if own else name
    llm, shapes = load_llm(path, dtype, quantization=kind), load_llm(tiny_llm, dtype).state_dict()
    taken = plain = 0
    for layer, module in llm.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.nn.Parameter) or not quantisation.is_packed(weight):
            continue
        plain += shapes[f"{layer}.weight"].numel() * dtype.itemsize
        taken += weight.data.nbytes
        if weight.data.dtype == torch.int8:
            taken += weight.SCB.nbytes
        else:
            state = weight.quant_state
            taken += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    assert saved_bytes(llm_config(path)[0], kind, dtype) == plain - taken > 0
    assert saved_bytes(llm_config(tiny_llm)[0], "none", dtype) == 0


def test_a_dry_run_prints_what_the_quantised_layers_save(flags, tmp_path, tiny_llm):
    command = [ROOT / "run_training.py", *flags, "--dry_run", "--quantization", "nf4"]
    codes, (printed,) = run_prepared(*command, cwd=tmp_path)
    assert codes == [0], printed
    saved = saved_bytes(llm_config(tiny_llm)[0], "nf4", torch.float32) / 1e9
    assert f"frozen in fp32 (the LLM's quantised layers take {saved:.3f} GB less)" in printed


# -- evaluation


@pytest.fixture
def evaluate(tmp_path, tiny_llm, tiny_encoder, datas, monkeypatch, capsys):
    """Runs an evaluation of a mapping that was trained before NF4; returns stderr."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)
    model.config.quantization = "nf4"
    model.save_pretrained("mapping")

    def call(*more):
        given = ["--init_checkpoint", "mapping", "--data_root", datas, "--precision", "fp32", "--languages", "en,sw"]
        assert run_evaluation.main([*given, "--limit", "2", "--max_new_tokens", "6", *map(str, more)]) == 0
        return capsys.readouterr().err

    return call


def outputs_of(folder):
    """All answers of an evaluation."""
    return [json.loads(line)["output"] for file in sorted(Path(folder).glob("predictions/*.jsonl"))
            for line in file.read_text().splitlines()]  # fmt: skip


def test_an_evaluation_answers_by_the_quantised_llm_and_records_it(evaluate, folders):
    said = evaluate("--quantization", "nf4", "--save_name", "flag")
    assert "was trained with --quantization" not in said
    evaluate("--llm_path", folders["nf4"], "--save_name", "folder")
    said = evaluate("--save_name", "plain")
    assert "was trained with --quantization nf4, now evaluated with none: pass --quantization nf4" in said
    answers = {name: outputs_of(f"results/{name}/math_mgsm") for name in ("flag", "folder", "plain")}
    assert answers["flag"] == answers["folder"] != answers["plain"] and len(answers["flag"]) == 4
    results = {name: json.loads(Path(f"results/{name}/math_mgsm/results.json").read_text()) for name in answers}
    assert results["flag"]["identity"]["--quantization"] == "nf4" and results["flag"]["versions"]["bitsandbytes"]
    assert results["plain"]["identity"]["--quantization"] is None
    message = refusal(evaluate, "--save_name", "flag")
    assert "with another --quantization" in message
    assert tables.form_title(results["flag"]) == tables.form_title(results["plain"]) + ", LLM in nf4"


def test_published_numbers_do_not_stand_beside_a_quantised_llm(evaluate, monkeypatch):
    row = {"label": "MindMerger", "note": "", "mean": 57.6, "scores": {}}
    monkeypatch.setattr(tables, "published_scores", lambda *_: row)
    for kind, published in (("none", row), ("nf4", None)):
        evaluate("--quantization", kind, "--languages", "en", "--limit", "1", "--save_name", kind)
        results = json.loads(Path(f"results/{kind}/math_mgsm/results.json").read_text())
        assert results["published"] == published


def test_answers_of_another_bitsandbytes_are_not_mixed_with_these(evaluate):
    evaluate("--quantization", "nf4", "--languages", "en", "--limit", "1", "--save_name", "growing")
    file = Path("results/growing/math_mgsm/results.json")
    versions = json.loads(file.read_text())["versions"]
    edit_json(file, versions=versions | {"bitsandbytes": "0.1"})
    more = ("--quantization", "nf4", "--languages", "en", "--limit", "2", "--save_name", "growing")
    assert "was generated with bitsandbytes 0.1, now installed: bitsandbytes" in refusal(evaluate, *more)
    edit_json(file, versions=versions)
    evaluate(*more)
    assert len(outputs_of(file.parent)) == 2


def test_a_saved_mapping_is_loaded_before_a_quantised_llm_as_its_card_says(evaluate):
    assert 'MindMerger.from_pretrained("this/folder", quantization="nf4")' in Path("mapping/README.md").read_text()
    model = MindMerger.from_pretrained("mapping", quantization="int8")
    assert sum(map(quantisation.is_packed, model.llm.parameters())) == 14


def test_labels_and_gold_answers_are_scored_by_the_quantised_llm(evaluate):
    losses = []
    for kind in ("none", "int8"):
        evaluate(
            "--quantization", kind, "--save_name", kind, "--task", "xnli", "--scoring", "likelihood", "--score_gold"
        )
        rows = Path(f"results/{kind}/xnli-likelihood/predictions/English.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["gold_loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_vllm_takes_no_quantization(evaluate, monkeypatch):
    monkeypatch.setattr(run_evaluation, "check_engine", lambda engine, device: None)
    message = refusal(evaluate, "--quantization", "nf4", "--engine", "vllm")
    assert "--engine vllm loads the LLM from its folder" in message
