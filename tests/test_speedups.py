"""--compile and --liger: what they leave as it is, and what they refuse. Compiling needs a compiler, Liger a GPU.

Liger's loss runs on a CPU too, in triton's interpreter; the other kernels do not:

    pip install liger-kernel triton && TRITON_INTERPRET=1 python -m pytest tests/test_speedups.py -k ligers_loss
"""

import inspect
import json
import os
import sys
from argparse import Namespace
from importlib import metadata
from importlib.util import find_spec
from shutil import which
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_tiny_llm, read_log, run_many
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GraniteConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from mindmerger.model.adapters import adapter_values, add_adapter
from mindmerger.model.loss import next_token_loss
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime import command
from mindmerger.runtime.errors import UserError
from mindmerger.training import speedups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIGER = pytest.mark.skipif(find_spec("liger_kernel") is None or DEVICE == "cpu", reason="needs Liger and a GPU")
LIGERS_LOSS = pytest.mark.skipif(
    find_spec("liger_kernel") is None or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs Liger, and a GPU or TRITON_INTERPRET=1",
)


def batch_of(ids, mask=None):
    """Rows whose source and target are the same ids."""
    mask = torch.ones_like(ids) if mask is None else mask
    return {"encoder_input_ids": ids, "encoder_attention_mask": mask, "target_ids": ids, "target_mask": mask}


class Looks(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers read off tensors, and tensors compared as a whole."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += operation.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal)
        return operation(*args, **(kwargs or {}))


def options(**given):
    return Namespace(**{"compile": False, "liger": False, "llm_path": None, **given})


# -- torch.compile


def test_compiled_layers_have_the_same_losses_and_gradients(tiny_llm, tiny_encoder, monkeypatch):
    """Many lengths, batches of one row, with and without gradient: all that the layers are traced for, without the
    minutes of a C++ compiler."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **way: compile_module(self, backend="aot_eager", **way)
    )
    outcomes = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
        if compiled:
            speedups.compile_layers(model)
        found = []
        for rows, length in ((3, 9), (1, 5), (2, 17), (1, 30)):
            batch = batch_of(torch.arange(rows * length).view(rows, length) % 200 + 5)
            with torch.no_grad():
                found.append(model(**batch).loss.item())
            model.zero_grad()
            model(**batch).loss.backward()
            found.append(model.mapping.mlp.linear1.weight.grad.norm().item())
        outcomes.append(found)
    traced = torch._dynamo.utils.counters["frames"]["ok"]
    torch._dynamo.reset()
    assert traced and outcomes[1] == pytest.approx(outcomes[0], rel=1e-5)


def with_adapter(encoder, llm, kind, targets) -> MindMerger:
    """A model whose adapter is the same each time."""
    torch.manual_seed(0)
    model = MindMerger.from_models(encoder, llm, torch.float32)
    add_adapter(model, adapter_values(kind, 4, 8.0, 0.0, targets, llm))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "checkpointing"), [("lora", False), ("dora", True)])
def test_an_adapter_in_compiled_layers_trains_with_the_same_losses(
    tiny_llm, tiny_encoder, monkeypatch, kind, checkpointing
):
    """As above; its weights change between the steps, which code that holds them as constants would not see."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **way: compile_module(self, backend="aot_eager", **way)
    )
    outcomes = []
    for compiled in (False, True):
        model = with_adapter(tiny_encoder, tiny_llm, kind, ["q_proj", "v_proj"])
        if checkpointing:
            model.gradient_checkpointing_enable()
        if compiled:
            speedups.compile_layers(model)
        model.train()
        optimizer, losses = torch.optim.AdamW(model.trained_parameters().values(), lr=1e-2), []
        for rows, length in ((3, 9), (2, 17), (3, 9)):
            ids = torch.arange(rows * length).view(rows, length) % 200 + 5
            mask = torch.ones(rows, length, dtype=torch.long)
            optimizer.zero_grad()
            loss = model(encoder_input_ids=ids, encoder_attention_mask=mask, target_ids=ids, target_mask=mask).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        outcomes.append(losses)
    traced = torch._dynamo.utils.counters["frames"]["ok"]
    torch._dynamo.reset()
    assert traced and outcomes[1] == pytest.approx(outcomes[0], rel=1e-4) and outcomes[0][-1] < outcomes[0][0]


@pytest.mark.soak  # a minute of g++ each
@pytest.mark.parametrize(
    "more", [[], ["--gradient_checkpointing"], ["--stage_name", "adapter", "--llm_only", "--adapter_dropout", "0"]]
)
@pytest.mark.skipif(which("g++") is None, reason="needs a C++ compiler")
def test_compiled_training_has_the_same_losses(run, flags, tmp_path, more):
    """Batches of one row, evaluation without gradient and many lengths must all stay compiled and right."""
    steps = ["--max_steps", "4", "--eval_steps", "2", "--micro_batch_tokens", "150"]
    # Recomputing changes no loss: the plain run needs none of it.
    own = [] if more == ["--gradient_checkpointing"] else more
    ways = {"plain": own, "compiled": ["--compile", *more]}
    # The clean environment of tests has no compiler on PATH, and ours must not be shadowed by its CC and CXX.
    env = {"PATH": os.environ["PATH"], "CXX": which("g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    losses = {}
    for name, option in ways.items():
        done = run(ROOT / "run_training.py", *flags, *steps, *option, "--save_name", name, env=env, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "recompile_limit" not in done.stderr
        folder = tmp_path / "outputs" / name / "math" / ("llm_adapter" if "--llm_only" in more else "mapping")
        losses[name] = read_log(folder) + read_log(folder, "dev_loss")
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-5)


def test_every_layer_of_both_towers_is_compiled(tiny_llm, tiny_encoder):
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    speedups.compile_layers(model)
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    assert compiled == [f"{tower}.{i}" for tower in ("encoder.encoder.block", "llm.model.layers") for i in (0, 1)]
    assert torch._dynamo.config.recompile_limit >= 64


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so(run, flags, tmp_path):
    done = run(ROOT / "run_training.py", *flags, "--compile", env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --compile needs a C++ compiler such as g++ here: install it, or leave --compile out")
    assert "InvalidCxxCompiler" in line and "Traceback" not in done.stderr


def test_compile_is_refused_at_zero_3_and_with_liger(monkeypatch):
    monkeypatch.setattr(speedups, "check_compiler", lambda: None)
    speedups.check_speed_options(options(compile=True), zero_stage=2)
    with pytest.raises(UserError, match="--compile gains nothing at ZeRO 3"):
        speedups.check_speed_options(options(compile=True), zero_stage=3)
    with pytest.raises(UserError, match="--compile and --liger .* use one of them"):
        speedups.check_speed_options(options(compile=True, liger=True), zero_stage=0)


# -- Liger


@pytest.fixture
def stand_in(monkeypatch):
    """A Liger with the real one's table and signatures for three model types, on a machine that seems to have a GPU."""
    pytest.importorskip("bitsandbytes")  # PEFT imports it, which must not happen while a GPU only seems to be there
    calls = []

    def llama(
        rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
    ): ...

    def gemma(
        rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, geglu=True, model=None
    ): ...

    def apply(model, **kwargs):
        table = sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN
        assert kwargs.keys() <= inspect.signature(table[model.config.model_type]).parameters.keys()
        calls.append(kwargs)

    def loss(hidden, weight, labels, bias, reduction):
        calls.append(hidden.shape)
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)

    names = ["liger_kernel", *(f"liger_kernel.transformers{part}" for part in ("", ".monkey_patch", ".functional"))]
    modules = {name: ModuleType(name) for name in names}
    modules[names[3]].liger_fused_linear_cross_entropy = loss
    modules[names[1]]._apply_liger_kernel_to_instance = apply
    modules[names[2]].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": llama, "gemma": gemma}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.8.5" if name == "liger-kernel" else real(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


def test_liger_puts_no_cross_entropy_into_the_llm_and_takes_the_loss_on_target_positions(
    stand_in, tiny_llm, tiny_encoder
):
    speedups.check_speed_options(options(liger=True, llm_path=tiny_llm), zero_stage=3)
    assert stand_in == []
    found = []
    for with_liger in (False, True):
        torch.manual_seed(0)
        model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
        if with_liger:
            speedups.apply_liger(model)
            off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
            assert stand_in == [{"rope": True, "rms_norm": True, "swiglu": True, **off}]
        ids = torch.arange(24).view(2, 12) + 5
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, 7:] = 0
        batch = batch_of(ids, mask)
        output = model(**batch)
        output.loss.backward()
        found.append((output.loss.item(), model.mapping.mlp.linear1.weight.grad.norm().item()))
        assert output.target_tokens.item() == 19
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert stand_in[1:] == [(19, model.llm.config.hidden_size)]
    # The head is as it was, and rows without a target have no loss rather than an error.
    assert model.llm(ids).logits.shape == (2, 12, model.llm.config.vocab_size)
    assert "forward" not in vars(model.llm.get_output_embeddings())
    assert model(**{**batch, "target_mask": torch.zeros_like(mask)}).loss_sum.item() == 0


def test_liger_takes_no_loss_of_logits_that_the_llm_changes_nor_through_a_head_that_is_adapted(stand_in, tmp_path):
    head, llama = torch.nn.Linear(4, 9), LlamaConfig(hidden_act="silu")
    adapted = torch.nn.Sequential(torch.nn.Linear(4, 9)).requires_grad_(False)
    cases = [
        (llama, head.requires_grad_(False), True),
        (LlamaConfig(final_logit_softcapping=30.0), head, False),
        (GraniteConfig(logits_scaling=8.0), head, False),
        (llama, adapted, False),
        (llama, torch.nn.Linear(4, 9), False),
    ]
    table = sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN
    table["granite"] = table["llama"]
    for config, output, expected in cases:
        llm = SimpleNamespace(config=config, get_output_embeddings=lambda output=output: output)
        model = SimpleNamespace(llm=llm, linear_loss=None)
        speedups.apply_liger(model)
        assert (model.linear_loss is speedups.liger_loss) == expected


@pytest.mark.parametrize("scale", [lambda logits: logits / 2, lambda logits: logits.div_(2)])
def test_a_loss_that_stands_for_logits_which_the_llm_then_changes_is_an_error(tiny_llm, scale):
    class Scaled(LlamaForCausalLM):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = scale(output.logits)
            return output

    llm = Scaled.from_pretrained(tiny_llm)
    places = torch.tensor([0, 2]), torch.tensor([5, 6])
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(RuntimeError, match="Scaled changes its logits"):
        next_token_loss(llm, *places, lambda hidden, weight, labels, bias: hidden.sum(), **inputs)
    logits = llm(**inputs).logits[0, [0, 2]]
    expected = torch.nn.functional.cross_entropy(logits, places[1], reduction="sum")
    assert next_token_loss(llm, *places, **inputs).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]])
def test_liger_finds_the_layers_that_it_replaces_under_an_adapter_and_calls_what_lies_on_them(
    stand_in, tiny_llm, tiny_encoder, monkeypatch, targets
):
    """Training puts the adapter on first. Liger binds its own SwiGLU to each MLP, which calls its linear layers."""

    def swiglu(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def bind(model, **kernels):
        for layer in getattr(model, model.base_model_prefix).layers:
            assert type(layer.mlp) is modeling_llama.LlamaMLP
            assert type(layer.input_layernorm) is modeling_llama.LlamaRMSNorm
            layer.mlp.__dict__["forward"] = swiglu.__get__(layer.mlp)

    batch = batch_of(torch.arange(24).view(2, 12) + 5)
    found = []
    for with_liger in (False, True):
        model = with_adapter(tiny_encoder, tiny_llm, "lora", targets)
        if with_liger:
            monkeypatch.setattr(sys.modules["liger_kernel.transformers"], "_apply_liger_kernel_to_instance", bind)
            speedups.apply_liger(model)
        model(**batch).loss.backward()
        found.append({name: p.grad.norm().item() for name, p in model.trained_parameters().items()})
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert all(norm > 0 for name, norm in found[1].items() if "lora_B" in name)


def test_liger_refuses_models_it_does_not_know(stand_in, tmp_path):
    from transformers import GemmaConfig, GPT2Config

    for kind, config in (("gpt2", GPT2Config()), ("gemma", GemmaConfig())):
        config.save_pretrained(tmp_path / kind)
        with pytest.raises(UserError, match=f"--liger has no kernels for .*, a {kind} model"):
            speedups.check_liger(str(tmp_path / kind))
    odd = make_tiny_llm(tmp_path / "odd", hidden_act="gelu")
    with pytest.raises(UserError, match="--liger computes SwiGLU, but .*odd has the activation gelu"):
        speedups.check_liger(odd)


def test_liger_needs_a_gpu_and_its_package(monkeypatch, tiny_llm):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--liger needs an NVIDIA GPU"):
        speedups.check_liger(tiny_llm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(UserError, match=r'pip install "liger-kernel>=0\.8\.5"'):
        speedups.check_liger(tiny_llm)


def test_a_loss_in_the_heads_place_trains_alike_at_zero_3(tmp_path, flags):
    """Without a threshold below which parameters stay whole: the head's weight is there within its own call alone."""
    sharded = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "sharded.json").write_text(json.dumps(sharded))
    short = [*flags, "--stage_name", "mapping", "--max_steps", "3"]
    ways = {"logits": [], "liger": ["--liger"], "zero3": ["--liger", "--deepspeed_config", "sharded.json"]}
    runs = [[*short, *more, "--save_name", name] for name, more in ways.items()]
    outcomes = run_many(tmp_path, runs, ranks=2, driver="liger_runs.py")
    assert [one["code"] for one in outcomes] == [0] * 3, [one["printed"][-800:] for one in outcomes]
    vocabulary = LlamaConfig.from_pretrained(flags[2]).vocab_size
    # Python's garbage collector, which hardly looks at anything while libraries load.
    assert all(one["thresholds"] == [*command.USUAL_THRESHOLDS] for one in outcomes)
    whole = f"linear loss of ({vocabulary}, 32)"
    assert [whole in one["printed"] for one in outcomes] == [False, True, True]
    losses = [read_log(tmp_path / "outputs" / name / "math/mapping") for name in ways]
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-5)] * 2


@LIGER
def test_liger_changes_losses_and_gradients_by_rounding_only(tiny_encoder, tmp_path, monkeypatch):
    """The real kernels on a tiny model; the rotary embedding of transformers is put back afterwards."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    for name in ("LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    llm = make_tiny_llm(tmp_path / "llm", width=256)
    generator = torch.Generator().manual_seed(0)
    ids = {
        f"{name}_ids": torch.randint(3, 250, (3, n), generator=generator) for name, n in (("prompt", 7), ("target", 9))
    }
    ids["encoder_input_ids"] = torch.randint(3, 250, (3, 11), generator=generator)
    batch = {name: tensor.cuda() for name, tensor in ids.items()}
    batch |= {"encoder_attention_mask": torch.ones(3, 11, dtype=torch.long)}
    batch |= {f"{name}_mask": torch.ones(3, n, dtype=torch.long) for name, n in (("prompt", 7), ("target", 9))}
    found = []
    for with_liger in (False, True):
        torch.manual_seed(0)
        model = MindMerger.from_models(tiny_encoder, llm, torch.float32)
        if with_liger:
            speedups.check_liger(llm)
            speedups.apply_liger(model)
            assert model.linear_loss is speedups.liger_loss
        model.cuda()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.item(), model.mapping.mlp.linear1.weight.grad.norm().item()))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@LIGERS_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_loss_and_its_gradient_are_those_of_the_logits(tiny_llm, dtype):
    """Over several of Liger's chunks of rows, and scaled by a factor, as a micro-batch's share of a batch is."""
    llm = LlamaForCausalLM.from_pretrained(tiny_llm, dtype=dtype).to(DEVICE).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (4, 30), generator=generator).to(DEVICE)
    embeds = torch.randn(4, 30, llm.config.hidden_size, generator=generator).to(DEVICE, dtype)
    predictor = torch.randperm(120, generator=generator)[:101].to(DEVICE)
    labels = ids.flatten()[predictor]
    found, numbers = [], []
    for linear_loss in (None, speedups.liger_loss):
        inputs = embeds.clone().requires_grad_()
        with Looks() as looks:
            loss = next_token_loss(llm, predictor, labels, linear_loss, inputs_embeds=inputs)
            (loss / 7).backward()
        numbers.append(looks.number)
        with torch.no_grad():
            alone = next_token_loss(llm, predictor, labels, linear_loss, inputs_embeds=inputs)
        assert alone.item() == pytest.approx(loss.item(), rel=1e-6) and loss.dtype == torch.float32
        found.append((loss.item(), inputs.grad.float()))
    assert numbers[1] == numbers[0] + 2  # transformers looks at a mask that it has to make itself
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5 if dtype == torch.float32 else 1e-2)
    close = 1e-5 if dtype == torch.float32 else 3e-2
    assert (found[1][1] - found[0][1]).norm() < close * found[0][1].norm()
