"""The adapter stage: LoRA and DoRA on the LLM over any frozen bridge, or over none."""

import gc
import json
import shutil

import pytest
import torch
from conftest import ROOT, make_tiny_llm, read_log, run_many, run_prepared
from safetensors.torch import load_file, save_file
from test_every_bridge import batch, rows

import run_evaluation
from mindmerger.baselines import merge_adapter
from mindmerger.bridges import BRIDGES
from mindmerger.evaluation.models import Models, check_adapter_fits
from mindmerger.generation.answers import answer
from mindmerger.model.adapters import adapter_shapes, adapter_values, add_adapter, check_adapter
from mindmerger.model.mapping_files import read_config
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime import command
from mindmerger.runtime.errors import UserError
from mindmerger.training.checkpoints import remove_leftovers
from mindmerger.training.outputs import clear_outputs
from mindmerger.training.settings import find_stage, parse, settle

ADAPTER = ["--stage_name", "adapter", "--adapter_rank", "4", "--max_gen_len", "300", "--max_steps", "4"]
ADAPTER += ["--eval_steps", "2"]
BRIDGE = ["--stage_name", "augmentation", "--init_checkpoint", "none", "--max_gen_len", "300", "--max_steps", "2"]
TRAINED = "outputs/MindMerger/math/augmentation"
FEW = ["--task", "math_mgsm", "--languages", "sw,de", "--limit", "3", "--score_gold", "--max_new_tokens", "4"]
FEW += ["--precision", "fp32"]


def stage_flags(llm, encoder, datas):
    """Flags of short runs in fp32."""
    return [
        *("--deepspeed", "--llm_path", llm, "--mt_path", encoder, "--data_root", datas, "--task", "math"),
        *("--precision", "fp32", "--dev_size", "5", "--train_batch_size", "8", "--train_micro_batch_size_per_gpu", "2"),
        *("--max_seq_len", "60", "--lr", "1e-2", "--num_workers", "1"),
    ]


@pytest.fixture(scope="module")
def runs(tiny_llm, tiny_encoder, datas, tmp_path_factory):
    """The folder in which several runs took place, and their outcomes by name."""
    folder = tmp_path_factory.mktemp("adapters")
    half = [*ADAPTER, "--save_name", "half", "--init_checkpoint", TRAINED]
    dora = ["--adapter", "dora", "--adapter_targets", "q_proj, down_proj", "--gradient_checkpointing"]
    ways = {
        "bridge": BRIDGE,
        "whole": ADAPTER,
        "half": [*half, "--max_steps", "2"],
        "resumed": [*half, "--allow_changed", "max_steps"],
        "other rank": [*half, "--adapter_rank", "8"],
        "other dropout": [*half, "--adapter_dropout", "0"],
        "other mapping": [*half, "--init_checkpoint", f"{TRAINED}/last/pytorch_model.bin"],
        "dora": [*ADAPTER, *dora, "--save_name", "dora", "--init_checkpoint", TRAINED],
        "alone": [*ADAPTER, "--llm_only"],
        "dry": [*ADAPTER, "--dry_run", "--save_name", "nothing"],
        "dry alone": [*ADAPTER, "--llm_only", "--dry_run"],
        "no bridge": [*ADAPTER, "--init_checkpoint", "none"],
        "no such layer": [*ADAPTER, "--adapter_targets", "q_proj,v_prj"],
        "another stage": [*BRIDGE, "--adapter_rank", "4", "--dry_run"],
        "alone without adapter": ["--llm_only"],
    }
    flags = stage_flags(tiny_llm, tiny_encoder, datas)
    outcomes = run_many(folder, [[*flags, *one] for one in ways.values()])
    return folder, dict(zip(ways, outcomes, strict=True))


@pytest.mark.slow
def test_an_adapter_trains_and_its_resume_is_exact_in_spite_of_dropout(runs):
    folder, outcomes = runs
    for name in ("bridge", "whole", "half", "resumed", "dora"):
        assert outcomes[name]["code"] == 0, outcomes[name]
    assert "trainable parameters: 896 (adapter only)" in outcomes["whole"]["printed"]
    whole, half, dora = (folder / f"outputs/{name}/math/adapter" for name in ("MindMerger", "half", "dora"))
    losses = read_log(whole)
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert read_log(half) == losses and read_log(whole, "dev_loss") == read_log(half, "dev_loss")
    expected, found = (load_file(one / "last/adapter/adapter_model.safetensors") for one in (whole, half))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert read_log(dora)[-1] < read_log(dora)[0] and read_log(dora)[0] == losses[0]


@pytest.mark.slow
def test_an_adapter_folder_holds_the_frozen_bridge_and_what_the_run_is(runs):
    folder, _ = runs
    trained, out = folder / TRAINED, folder / "outputs/dora/math/adapter"
    assert (trained / "mapping.safetensors").read_bytes() == (out / "mapping.safetensors").read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if "checkpoint-" not in str(path)}
    best = {"mapping.safetensors", "config.json", "README.md"}
    best |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    others = {"args.json", "ds_config.json", "log.jsonl", "loss.png", "last", "adapter", "last/adapter"}
    assert files == best | {f"last/{name}" for name in best} | others
    expected = {"adapter": "dora", "adapter_rank": 4, "adapter_alpha": 32.0, "adapter_dropout": 0.05}
    assert read_config(str(out)).adapter == expected | {"adapter_targets": ["down_proj", "q_proj"]}
    assert (
        "| adapter | DoRA, rank 4, alpha 32.0, dropout 0.05, on down_proj, q_proj |" in (out / "README.md").read_text()
    )
    state = json.loads((out / "checkpoint-000004/state.json").read_text())["identity"]
    assert state.items() >= expected.items() and len(state["mapping under the adapter"]) == 16
    tensors = load_file(out / "checkpoint-000004/training.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {"adapter", "exp_avg", "exp_avg_sq"}


@pytest.mark.slow
def test_a_resume_with_another_adapter_or_another_mapping_under_it_is_refused_by_name(runs):
    _, outcomes = runs
    assert "was trained with another adapter_rank (4, this run has 8)" in outcomes["other rank"]["error"]
    assert "was trained with another adapter_dropout (0.05, this run has 0.0)" in outcomes["other dropout"]["error"]
    assert "was trained with another mapping under the adapter ('" in outcomes["other mapping"]["error"]


@pytest.mark.slow
def test_flags_of_an_adapter_that_do_not_fit_are_one_line(runs):
    _, outcomes = runs
    errors = {name: one["error"] for name, one in outcomes.items() if one["error"]}
    assert errors.pop("no bridge").startswith("--init_checkpoint none leaves the adapter a bridge that nobody trained")
    assert "has no linear layer of this name (did you mean v_proj?): it has down_proj, " in errors.pop("no such layer")
    assert (
        "warning: --adapter_rank is ignored: it counts in --stage_name adapter" in outcomes["another stage"]["printed"]
    )
    assert errors.pop("alone without adapter").endswith("pass --stage_name adapter too")
    assert all(name.startswith("other ") for name in errors)


@pytest.mark.slow
def test_the_llm_alone_trains_an_adapter_on_the_same_rows_without_an_encoder(runs):
    folder, outcomes = runs
    assert [outcomes[name]["code"] for name in ("alone", "dry", "dry alone")] == [0, 0, 0], outcomes["dry alone"]
    out = folder / "outputs/MindMerger/math/llm_adapter"
    assert len(read_log(out)) == 4 and read_log(out)[-1] < read_log(out)[0]
    assert not (out / "mapping.safetensors").exists()
    counts = [json.loads((one / "args.json").read_text())["data"]["counts"] for one in (out, out.parent / "adapter")]
    assert counts[0]["rows"] == counts[1]["rows"]
    assert read_log(out, "target_tokens") == read_log(out.parent / "adapter", "target_tokens")
    config = read_config(str(out))
    assert (config.mt_path, config.stage, config.augmentation) == (None, "adapter", True)
    model = MindMerger.from_pretrained(str(out), dtype=torch.float32)
    assert model.encoder is None and model.mapping is None and model.adapter["r"] == 4
    assert "| bridge | none |" in (out / "README.md").read_text()


def evaluate(results, datas, *flags):
    """Evaluates six questions and returns the results."""
    assert run_evaluation.main([*FEW, "--data_root", datas, "--results_dir", str(results), *flags]) == 0
    return {path.parent.name: json.loads(path.read_text()) for path in results.glob("MindMerger/*/results.json")}


@pytest.mark.slow
def test_an_evaluation_takes_the_adapter_beside_the_mapping_and_says_so(runs, datas, tmp_path, capsys):
    trained = str(runs[0] / "outputs/MindMerger/math/adapter")
    evaluate(tmp_path, datas, "--init_checkpoint", trained)
    assert "MindMerger-Soft (mapped source and prompt), LoRA adapter on the LLM" in capsys.readouterr().out
    results = evaluate(tmp_path, datas, "--init_checkpoint", trained, "--adapter_path", "none")
    assert results.keys() == {"math_mgsm-adapter", "math_mgsm"} and "adapter" not in results["math_mgsm"]
    with_it, without = results["math_mgsm-adapter"], results["math_mgsm"]
    assert with_it["adapter"]["path"] == f"{trained}/adapter" and with_it["adapter"]["adapter_rank"] == 4
    assert abs(with_it["gold"]["gold_loss"] - without["gold"]["gold_loss"]) > 0.01
    assert with_it["identity"]["--adapter_path (sha256)"] and without["identity"]["--adapter_path (sha256)"] is None
    line = (tmp_path / "MindMerger/math_mgsm-adapter/predictions/Swahili.jsonl").read_text().split("\n")[0]
    model = MindMerger.from_pretrained(trained, dtype=torch.float32)
    assert answer(model, [json.loads(line)["source"]], languages="sw", max_new_tokens=4) == [json.loads(line)["output"]]


@pytest.mark.slow
def test_two_ranks_evaluate_with_the_adapter_that_rank_0_has_read(runs, datas, tmp_path):
    trained = str(runs[0] / "outputs/MindMerger/math/adapter")
    results = evaluate(tmp_path / "one", datas, "--init_checkpoint", trained)["math_mgsm-adapter"]
    flags = ["--init_checkpoint", trained, "--results_dir", str(tmp_path / "two")]
    program = [ROOT / "run_evaluation.py", *FEW, "--data_root", datas, *flags]
    codes, printed = run_prepared(*program, cwd=tmp_path, ranks=2)
    assert codes == [0, 0], printed
    again = json.loads((tmp_path / "two/MindMerger/math_mgsm-adapter/results.json").read_text())
    assert again["gold"]["gold_loss"] == pytest.approx(results["gold"]["gold_loss"], abs=1e-5)
    assert again["identity"] == results["identity"]


@pytest.mark.slow
def test_an_adapter_of_the_llm_alone_evaluates_without_an_encoder(runs, datas, tiny_llm, tmp_path, capsys):
    trained = str(runs[0] / "outputs/MindMerger/math/llm_adapter")
    command.collect_rarely()  # as `run_main` does
    first = evaluate(tmp_path, datas, "--llm_only", "--init_checkpoint", trained)
    assert gc.get_threshold() == command.USUAL_THRESHOLDS
    said = capsys.readouterr()
    assert "LLM alone (prompt only), LoRA adapter on the LLM" in said.out and "no use of" not in said.err
    again = evaluate(tmp_path, datas, "--llm_only", "--llm_path", tiny_llm, "--adapter_path", f"{trained}/adapter")
    assert "holds this evaluation already" in capsys.readouterr().err and again == first
    plain = evaluate(tmp_path, datas, "--llm_only", "--llm_path", tiny_llm)
    losses = [plain[name]["gold"]["gold_loss"] for name in ("math_mgsm-llm_only-adapter", "math_mgsm-llm_only")]
    assert abs(losses[0] - losses[1]) > 0.01
    # The adapter over a mapping is not part of the LLM alone.
    over = str(runs[0] / "outputs/MindMerger/math/adapter")
    assert evaluate(tmp_path, datas, "--llm_only", "--init_checkpoint", over).keys() == plain.keys()
    with pytest.raises(
        UserError, match="adapter that was trained on the LLM alone, without a mapping: pass --llm_only"
    ):
        evaluate(tmp_path, datas, "--init_checkpoint", trained)


@pytest.mark.slow
def test_zero_0_to_3_train_the_same_adapter_on_two_ranks(tiny_llm, tiny_encoder, datas, tmp_path):
    """At ZeRO 3 without a threshold below which parameters stay whole: DoRA reads weights of other modules."""
    sharded = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "sharded.json").write_text(json.dumps(sharded))
    configs = {name: str(ROOT / f"scripts/ds_{name}.json") for name in ("zero0", "zero1", "zero2", "zero3_offload")}
    configs["zero3"] = str(tmp_path / "sharded.json")
    flags = stage_flags(tiny_llm, tiny_encoder, datas)
    dora = [*flags, *ADAPTER, "--adapter", "dora", "--init_checkpoint", TRAINED]
    ways = [[*flags, *BRIDGE]]
    ways += [[*dora, "--deepspeed_config", config, "--save_name", name] for name, config in configs.items()]
    half = [*dora, "--deepspeed_config", configs["zero3"], "--save_name", "half"]
    ways += [[*half, "--max_steps", "2"], [*half, "--allow_changed", "max_steps"]]
    outcomes = run_many(tmp_path, ways, ranks=2)
    assert [one["code"] for one in outcomes] == [0] * len(ways), [one["printed"][-800:] for one in outcomes]
    folders = {name: tmp_path / "outputs" / name / "math/adapter" for name in (*configs, "half")}
    expected = load_file(folders["zero0"] / "last/adapter/adapter_model.safetensors")
    mapping = (tmp_path / TRAINED / "mapping.safetensors").read_bytes()
    for name, folder in folders.items():
        assert (folder / "last/mapping.safetensors").read_bytes() == mapping, name
        found = load_file(folder / "last/adapter/adapter_model.safetensors")
        for key in expected:
            assert (found[key] - expected[key]).abs().max() <= 1e-5, (name, key)
        assert read_log(folder) == pytest.approx(read_log(folders["zero0"]), abs=1e-5), name
    assert read_log(folders["half"]) == read_log(folders["zero3"])


def test_starting_over_removes_the_adapter_folder_and_a_kill_leaves_no_half_file_in_it(tmp_path):
    for folder in (tmp_path / "adapter", tmp_path / "last/adapter"):
        folder.mkdir(parents=True)
        (folder / ".adapter_model.safetensors.7.tmp").touch()
        (folder / "adapter_config.json").touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"adapter", "last", "adapter_config.json"}
    clear_outputs(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=["lora", "dora"])
def kind(request):
    """Both kinds of adapter."""
    return request.param


def with_adapter(encoder, llm, kind, dtype=torch.float32, **more):
    """A model with a new adapter."""
    torch.manual_seed(0)
    model = MindMerger.from_models(encoder, llm, dtype, **more)
    add_adapter(model, adapter_values(kind, 4, 8.0, 0.1, ["q_proj", "v_proj"], llm))
    return model


def train(model, steps=5):
    """Some steps, with dropout."""
    tensors = batch(rows(True))
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**tensors).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("bridge", ["mindmerger", "layalign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_new_adapter_leaves_the_loss_equal_to_the_bit_and_learns_alone(tiny_encoder, tiny_llm, kind, dtype, bridge):
    tensors = batch(rows(True))
    torch.manual_seed(0)
    plain = MindMerger.from_models(tiny_encoder, tiny_llm, dtype, bridge=bridge)
    model = with_adapter(tiny_encoder, tiny_llm, kind, dtype, bridge=bridge)
    assert torch.equal(model(**tensors).loss_sum, plain(**tensors).loss_sum)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == {name for name in before if ".lora_" in name}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {parameter.dtype for parameter in model.trained_parameters().values()} == {torch.float32}
    assert not torch.equal(model(**tensors).loss_sum, plain(**tensors).loss_sum)


def test_dropout_of_an_adapter_is_active_in_training_alone(tiny_encoder, tiny_llm, kind):
    model, tensors = train(with_adapter(tiny_encoder, tiny_llm, kind)), batch(rows(True))
    assert torch.equal(model(**tensors).loss_sum, model(**tensors).loss_sum)
    model.train()
    assert not torch.equal(model(**tensors).loss_sum, model(**tensors).loss_sum)
    inner = [module for module in model.modules() if module.training and not any(module.children())]
    linear = {id(layer.base_layer) for layer in model.modules() if hasattr(layer, "base_layer")}
    assert inner and not linear & set(map(id, inner)) and not model.mapping.training


def test_plain_peft_loads_a_saved_adapter_and_so_do_we(tiny_encoder, tiny_llm, kind, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, tensors = train(with_adapter(tiny_encoder, tiny_llm, kind)), batch(rows(True))
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32)
    ids = tensors["prompt_ids"]
    plain = base(ids).logits
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(ids).logits
    assert torch.equal(loaded, model.llm(ids).logits) and not torch.equal(loaded, plain)
    again = MindMerger.from_pretrained(str(tmp_path), dtype=torch.float32)
    assert torch.equal(again(**tensors).loss_sum, model(**tensors).loss_sum)
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_names_and_shapes_are_known_from_the_config_alone(tiny_encoder, tiny_llm, kind):
    model = with_adapter(tiny_encoder, tiny_llm, kind)
    found = {name: tuple(parameter.shape) for name, parameter in model.trained_parameters().items()}
    assert found == adapter_shapes(tiny_llm, model.adapter)
    number = 2 * 4 * (32 + 32 + 32 + 16)  # q and v of two layers; two of four heads are of keys and values
    assert sum(p.numel() for p in model.trained_parameters().values()) == number + (kind == "dora") * 2 * (32 + 16)


@pytest.mark.parametrize("bridge", sorted(BRIDGES))
def test_every_bridge_has_an_adapter_stage_on_what_its_last_stage_trains_on(bridge):
    own = BRIDGES[bridge].stages
    last, stage = list(own)[-1], find_stage(bridge, "adapter")
    assert stage == own[last]._replace(trains=("adapter",), starts_from=last)


def test_a_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch, flags):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else found(name, *more))
    with pytest.raises(UserError, match=r"adapters need the package peft: pip install peft"):
        settle(parse([*flags, "--stage_name", "adapter"]))


@pytest.fixture(scope="module")
def saved(tiny_encoder, tiny_llm, tmp_path_factory):
    """An adapter folder."""
    folder = tmp_path_factory.mktemp("saved")
    with_adapter(tiny_encoder, tiny_llm, "dora").save_pretrained(folder)
    return folder / "adapter"


def change_config(folder, **changes):
    """Changes entries of an adapter's config."""
    values = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(values))


def change_tensors(folder, change):
    """Changes an adapter's tensors in place."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGES = {
    "no adapter folder": lambda folder: shutil.rmtree(folder),
    "holds no adapter_config.json": lambda folder: (folder / "adapter_config.json").unlink(),
    "lacks adapter_model.safetensors": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "cannot be read, it may be cut short": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"cut"),
    "adapter_config.json": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "peft_type is 'IA3', only LORA": lambda folder: change_config(folder, peft_type="IA3"),
    "PEFT refuses this adapter": lambda folder: change_config(folder, r=-1),
    "was trained on the LLM /elsewhere/other, not": lambda folder: change_config(
        folder, base_model_name_or_path="/elsewhere/other"
    ),
    "has no linear layer of this name": lambda folder: change_config(folder, target_modules=["c_attn"]),
    "has shape (4, 32), the LLM": lambda folder: change_config(folder, r=8),
    "does not fit the LLM": lambda folder: change_tensors(folder, lambda tensors: tensors.pop(FIRST)),
    "values that are not finite numbers": lambda folder: change_tensors(
        folder, lambda tensors: tensors[FIRST].fill_(float("nan"))
    ),
}


@pytest.mark.parametrize("message", DAMAGES, ids=lambda message: message.replace(" ", "_"))
def test_an_adapter_that_cannot_be_used_is_one_line_before_any_weight_loads(message, saved, tiny_llm, tmp_path, datas):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    DAMAGES[message](folder)
    with pytest.raises(UserError) as error:
        evaluate(tmp_path, datas, "--llm_only", "--llm_path", tiny_llm, "--adapter_path", str(folder))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_is_told_from_one_of_another_llm_by_its_content_where_both_are_there(saved, tiny_llm, tmp_path):
    other = make_tiny_llm(tmp_path / "other", seed=5)  # of the same shapes
    with pytest.raises(UserError, match="was trained on the LLM .*, not .*other: pass that one"):
        check_adapter(str(saved), other)
    shutil.copytree(tiny_llm, tmp_path / "copy")
    assert check_adapter(str(saved), str(tmp_path / "copy")).values["use_dora"] is True


def test_vllm_takes_no_adapter(saved, tiny_llm):
    with pytest.raises(UserError, match="--engine vllm takes no adapter: merge it first"):
        check_adapter_fits(Models(None, None, tiny_llm, None, str(saved)), "vllm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_merged_llm_is_an_ordinary_folder_that_answers_as_with_the_adapter(
    tiny_encoder, tiny_llm, kind, dtype, tmp_path
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stored = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=dtype)
    shutil.copytree(tiny_llm, tmp_path / "llm")
    stored.save_pretrained(tmp_path / "llm")
    llm, out = str(tmp_path / "llm"), str(tmp_path / "merged")
    model = train(with_adapter(tiny_encoder, llm, kind, dtype), steps=20)
    model.save_pretrained(tmp_path / "trained")
    adapter = str(tmp_path / "trained/adapter")
    assert merge_adapter.main(["--llm_path", llm, "--adapter_path", adapter, "--output", out]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out)
    by_peft = PeftModel.from_pretrained(stored, adapter).merge_and_unload().state_dict()
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # one step of bf16 at weights of this size
    for name, tensor in merged.state_dict().items():
        assert tensor.dtype == dtype and (tensor - by_peft[name]).abs().max() <= tolerance, name
    assert AutoTokenizer.from_pretrained(out)("a").input_ids == AutoTokenizer.from_pretrained(llm)("a").input_ids
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert record["plan"]["adapter"] == kind and len(record["plan"]["tensors"]) == 4
    if dtype == torch.float32:
        tensors = {name: one for name, one in batch(rows(True)).items() if not name.startswith("target")}
        alone = MindMerger.from_models(tiny_encoder, out, dtype)
        alone.mapping.load_state_dict(model.mapping.state_dict())
        ids = [one.generate(**tensors, max_new_tokens=8) for one in (model, alone)]
        plain = MindMerger.from_models(tiny_encoder, llm, dtype)
        plain.mapping.load_state_dict(model.mapping.state_dict())
        assert torch.equal(*ids) and not torch.equal(ids[0], plain.generate(**tensors, max_new_tokens=8))


@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_an_adapter_that_cannot_be_merged_leaves_nothing_behind(saved, tiny_llm, tmp_path):
    flags = ["--adapter_path", str(saved), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="was trained on the LLM"):
        merge_adapter.main(["--llm_path", make_tiny_llm(tmp_path / "other", seed=5), *flags])
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    change_config(folder, lora_bias=True)
    biases = {f"{FIRST.replace('q_proj', one).replace('layers.0', layer).replace('lora_A.weight', 'lora_B.bias')}": size
              for layer in ("layers.0", "layers.1") for one, size in (("q_proj", 32), ("v_proj", 16))}  # fmt: skip
    change_config(folder, use_dora=False)
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "magnitude" in name])
    change_tensors(folder, lambda tensors: tensors.update({n: torch.ones(size) for n, size in biases.items()}))
    with pytest.raises(UserError, match=r"lora_B.bias, which is not part of LoRA's or DoRA's formula"):
        merge_adapter.main(["--llm_path", tiny_llm, "--adapter_path", str(folder), *flags[2:]])
    assert not (tmp_path / "out").exists()
