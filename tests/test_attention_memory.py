"""The memory that a bridge adds to the LLM's attention: formula, families of LLMs, cost, and what cannot have one."""

import json
import weakref

import pytest
import torch
from conftest import run_many
from safetensors.torch import load_file
from test_modeling_mindmerger import (
    ENCODERS,
    LLMS,
    SAVED_AS,
    batch,
    check_padding_and_batch_size_change_nothing,
    make_folder,
    rows,
)
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoConfig, GPT2Config, OPTConfig, Phi3Config
from transformers.models.gemma2 import modeling_gemma2

from mindmerger.bridges import Mapping
from mindmerger.evaluation import settings as evaluation_settings
from mindmerger.evaluation.flags import parse as parse_evaluation
from mindmerger.hub.model_files import ModelError
from mindmerger.model.attention_memory import (
    KEPT,
    MODEL_TYPES,
    SUFFIX,
    Kept,
    check_attention_function,
    check_attention_memory,
)
from mindmerger.model.decoding import ONE_QUERY
from mindmerger.model.loss import ChunkedCrossEntropy
from mindmerger.model.mapping_files import read_config
from mindmerger.model.mindmerger import MindMerger
from mindmerger.training import speedups
from mindmerger.training.settings import parse, settle

# OPT-350m's layers are wider than its embeddings, and a memory has the width of both.
OPT = ("OPT", {**LLMS["opt"][1], "word_embed_proj_dim": 32})
# More heads than the width holds: in_features // out_features would count the groups wrongly.
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    **{name: LLMS[name] for name in ("llama", "mistral", "qwen2", "gemma3")},
    "llama-wide-heads": ("Llama", {**LLMS["llama"][1], **WIDE}),
    "qwen3": ("Qwen3", {**LLMS["qwen3"][1], **WIDE}),
    "gemma2": ("Gemma2", {**LLMS["gemma2"][1], "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5}),
    "opt": OPT,
}


def remembering(tmp_path, llm):
    """A MindMerger whose bridge gives a memory to each layer of an LLM of the named family, its gates open."""
    encoder, _ = make_folder(tmp_path / "encoder", *ENCODERS["mt5"], SAVED_AS["MT5"])
    folder, _ = make_folder(tmp_path / "llm", *FAMILIES[llm], "ForCausalLM")
    torch.manual_seed(3)
    model = MindMerger.from_models(encoder, folder, torch.float32, bridge="layalign")
    torch.nn.init.normal_(model.mapping.end_boundary)
    for last in (model.mapping.mlp.linear2, model.mapping.aligner.fc2):
        torch.nn.init.normal_(last.weight, std=0.5)
    set_gates(model, 1.5, -0.8)
    return model


def set_gates(model, *values):
    for i, value in enumerate(values):
        getattr(model.mapping, f"gate_{i}").data.fill_(value)


def gradients(model, **inputs):
    """Gradient of each trained tensor, by name."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.trained_parameters().items()}


def hand_computed(query, key, value, mask, scaling, softcap):
    """The formula in einsum: a softmax over the memory alone, heads of queries in groups."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = torch.einsum("bhlw,bhsw->bhls", query, key) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(mask[:, None, None] == 0, float("-inf")).softmax(-1)
    return torch.einsum("bhls,bhsw->blhw", weights, value)


@pytest.mark.parametrize(("base", "new", "softcap"), [("sdpa", 4, None), ("sdpa", 1, None), (ONE_QUERY, 1, None)]
                         + [("eager", 4, None), ("eager", 1, 2.0)])  # fmt: skip
def test_the_memory_adds_an_attention_of_its_own_to_the_stock_one(base, new, softcap):
    torch.manual_seed(0)
    module = modeling_gemma2.Gemma2Attention.__new__(modeling_gemma2.Gemma2Attention)  # whose file has an eager form
    torch.nn.Module.__init__(module)
    module.num_key_value_groups = 3
    query, stock = torch.randn(2, 6, new, 8), AttentionInterface().get(base, modeling_gemma2.eager_attention_forward)
    key, value, remembered, valued = (torch.randn(2, 2, length, 8) for length in (new, new, 5, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    added = torch.zeros(2, 1, 1, 5).masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
    more = {"scaling": 0.3} | ({"softcap": softcap} if softcap else {})
    plain, _ = stock(module, query, key, value, None, **more)
    function = AttentionInterface()[base + SUFFIX]
    assert torch.equal(function(module, query, key, value, None, **more)[0], plain)  # nothing kept, nothing added
    vars(module)[KEPT] = Kept(remembered, valued, added)
    ours, _ = function(module, query, key, value, None, **more)
    expected = hand_computed(query, remembered, valued, mask, 0.3, softcap)
    assert torch.allclose(ours - plain, expected, atol=1e-6)


@pytest.mark.parametrize("llm", FAMILIES)
def test_rows_alone_and_cached_decoding_equal_a_batch_and_a_decoding_without_cache(tmp_path, llm):
    model = remembering(tmp_path, llm)
    check_padding_and_batch_size_change_nothing(model)
    model.llm.generation_config.eos_token_id = None
    inputs = batch(rows(), "left", with_target=False)
    ids = model.generate(**inputs, max_new_tokens=12)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, use_cache=False), ids)
    set_gates(model, 0.0, 0.0)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=12), ids)


@pytest.mark.parametrize("llm", FAMILIES)
def test_closed_gates_leave_the_logits_of_the_plain_bridge(tmp_path, llm):
    model = remembering(tmp_path, llm)
    inputs = batch(rows(), "right")
    open_loss = model(**inputs).loss
    set_gates(model, 0.0, 0.0)
    seen = []
    model.llm.get_output_embeddings().register_forward_hook(lambda module, given, logits: seen.append(logits))
    closed = model(**inputs).loss
    plain = with_mindmergers_bridge(model)
    assert torch.equal(closed, plain(**inputs).loss) and torch.equal(*seen)
    assert abs(open_loss - closed) > 1e-3


def with_mindmergers_bridge(model):
    """The same model with MindMerger's own bridge, of the same weights."""
    mapping = Mapping(32, 32)
    mapping.load_state_dict({name: model.mapping.state_dict()[name] for name in mapping.state_dict()})
    model.mapping = mapping
    return model


@pytest.mark.parametrize("llm", ["llama", "gemma2"])
def test_layers_that_are_recomputed_have_their_memory_again(tmp_path, monkeypatch, llm):
    # Our own loss can be gone back through once: its gradient takes the logits' place.
    monkeypatch.setattr(ChunkedCrossEntropy, "apply", lambda *both: cross_entropy(*both, reduction="sum"))
    model = remembering(tmp_path, llm)
    inputs = batch(rows(), "right")
    plain = gradients(model, **inputs)
    assert all(gradient.norm() > 0 for gradient in plain.values())
    model.gradient_checkpointing_enable()
    recomputed = gradients(model, **inputs)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    loss.backward()  # the contexts are entered a second time
    for name, parameter in model.trained_parameters().items():
        assert torch.allclose(parameter.grad, 2 * plain[name], rtol=1e-5, atol=1e-9), name
    assert not any(KEPT in vars(module) for module in model.llm.modules())
    assert not model.llm.config._attn_implementation.endswith(SUFFIX)


@pytest.mark.slow
def test_compiled_layers_have_the_same_gradients(tmp_path, monkeypatch):
    """With recomputation too, where torch refuses contexts and the memory is an input of what it compiled."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **way: compile_module(self, backend="aot_eager", **way)
    )
    model = remembering(tmp_path, "llama")
    inputs = batch(rows(), "right")
    plain = gradients(model, **inputs)
    model.gradient_checkpointing_enable()
    speedups.compile_layers(model.llm)
    compiled = gradients(model, **inputs)
    traced = torch._dynamo.utils.counters["frames"]["ok"]
    torch._dynamo.reset()
    assert traced
    for name, expected in plain.items():
        assert torch.allclose(compiled[name], expected, rtol=1e-4, atol=1e-7), name


def test_keys_and_values_of_the_memory_are_computed_once_and_texts_are_encoded_once(tmp_path):
    model = remembering(tmp_path, "llama")
    calls = {"k_proj": 0, "v_proj": 0, "encoder": 0}
    for name in ("k_proj", "v_proj"):
        for layer in model.llm.model.layers:
            getattr(layer.self_attn, name).register_forward_pre_hook(
                lambda *_, name=name: calls.update({name: calls[name] + 1})
            )
    model.encoder.register_forward_pre_hook(lambda *_: calls.update(encoder=calls["encoder"] + 1))
    model.llm.generation_config.eos_token_id = None
    model.generate(**batch(rows(), "left", with_target=False), max_new_tokens=10)
    # In each of two layers once for the memory, once for all of the input, and once for each of nine tokens behind it.
    assert calls == {"k_proj": 2 * 11, "v_proj": 2 * 11, "encoder": 1}
    calls.update(k_proj=0, v_proj=0, encoder=0)
    model(**batch(rows(), "right"))
    assert calls == {"k_proj": 2 * 2, "v_proj": 2 * 2, "encoder": 1}


def test_sources_of_the_memory_are_not_held_while_the_llm_runs(tmp_path):
    """Of 32 layers and 4,096 channels they are half a megabyte for each encoder token in bf16."""
    model = remembering(tmp_path, "llama")
    alive, real = [], model.mapping.forward

    def forward(*inputs):
        output = real(*inputs)
        alive.append(weakref.ref(output.memory[0].key_BSD))
        return output

    model.mapping.forward = forward
    model.llm.model.norm.register_forward_pre_hook(lambda *_: alive.append(alive[-1]() is not None))
    model(**batch(rows(), "right")).loss.backward()
    model.generate(**batch(rows(), "left", with_target=False), max_new_tokens=1)
    assert alive[1::2] == [False, False]


@pytest.mark.parametrize("llm", FAMILIES)
def test_keys_of_the_memory_are_normalised_where_the_llms_are_and_that_is_recorded(tmp_path, llm):
    model = remembering(tmp_path, llm)
    normalised = llm in ("qwen3", "gemma3")
    model.save_pretrained(tmp_path / "saved")
    assert read_config(str(tmp_path / "saved")).memory_key_norm is normalised
    attention = model.llm.get_decoder().layers[1].self_attn
    if normalised:
        torch.nn.init.normal_(attention.k_norm.weight)
    inputs = batch(rows(), "right")
    states, mask = model.encode(inputs["encoder_input_ids"], inputs["encoder_attention_mask"])
    source = model.mapping(states, mask).memory[1]
    seen = []
    handle = model.llm.get_decoder().layers[1].register_forward_pre_hook(lambda *_: seen.append(vars(attention)[KEPT]))
    model(**inputs)
    handle.remove()
    keys = attention.k_proj(source.key_BSD).unflatten(-1, (-1, attention.head_dim))
    keys = attention.k_norm(keys) if normalised else keys
    values = -0.8 * attention.v_proj(source.value_BSD).unflatten(-1, (-1, attention.head_dim))
    assert torch.allclose(seen[0].key_BHSW, keys.transpose(1, 2), atol=1e-6)
    assert torch.allclose(seen[0].value_BHSW, values.transpose(1, 2), atol=1e-6)
    hidden = torch.finfo(torch.float32).min
    assert torch.equal(seen[0].mask_B11S[:, 0, 0] == hidden, mask == 0)


@pytest.mark.parametrize("fails", ["layers", "projection"])
def test_nothing_is_left_on_the_llm_after_an_error(tmp_path, fails):
    model = remembering(tmp_path, "llama")
    inputs = batch(rows(), "right")
    expected = model(**inputs).loss
    layer = model.llm.model.layers[1]

    def failing(*_):
        raise RuntimeError("as out of memory")

    handle = (layer.mlp if fails == "layers" else layer.self_attn.v_proj).register_forward_pre_hook(failing)
    for call in (model, model.generate):
        with pytest.raises(RuntimeError, match="as out of memory"):
            call(**(inputs if call is model else batch(rows(), "left", with_target=False)))
        assert not any(KEPT in vars(module) for module in model.llm.modules())
        assert model.llm.config._attn_implementation == "sdpa"
    handle.remove()
    assert torch.equal(model(**inputs).loss, expected)


@pytest.mark.parametrize("llm", ["llama", "qwen3", "gemma3", "opt"])
def test_bf16_on_a_cpu_decodes_with_batched_products_and_the_same_logits(tmp_path, llm):
    """The same tokens are fed to both; a random model's best two tokens may lie within bf16's rounding."""
    model = remembering(tmp_path, llm)
    model.llm.to(torch.bfloat16)
    inputs = batch(rows(), "left", with_target=False)

    def logits(implementation):
        model.llm.set_attn_implementation(implementation)
        embeds, grown, memory = model._merged(**inputs)
        new, cache, found = {"inputs_embeds": embeds}, None, []
        with memory:
            for step in range(4):
                out = model.llm(**new, attention_mask=grown, use_cache=True, past_key_values=cache)
                cache = out.past_key_values
                found.append(out.logits[:, -1].float())
                new = {"input_ids": torch.full((len(grown), 1), 5 + step)}
                grown = torch.cat([grown, torch.ones(len(grown), 1, dtype=grown.dtype)], dim=1)
        return torch.stack(found)

    with torch.no_grad():
        ours, theirs = logits(ONE_QUERY), logits("sdpa")
        set_gates(model, 0.0, 0.0)
        closed = logits("sdpa")
    assert (ours - theirs).abs().max() <= 0.05 * theirs.abs().max() < (closed - theirs).abs().max()


def test_generation_in_bf16_on_a_cpu_reads_the_memory_with_batched_products(tmp_path, monkeypatch):
    model = remembering(tmp_path, "llama")
    model.llm.to(torch.bfloat16)
    model.llm.generation_config.eos_token_id = None
    keys, real = [], AttentionInterface()[ONE_QUERY]

    def noting(module, query, key, *given, **more):
        keys.append((query.shape[2], key.shape[2]))
        return real(module, query, key, *given, **more)

    monkeypatch.setitem(AttentionInterface._global_mapping, ONE_QUERY, noting)
    model.generate(**batch(rows(), "left", with_target=False), max_new_tokens=6)
    # Nine tokens of the longest source, in each of two layers, for each of five tokens behind the input.
    assert keys.count((1, 9)) == 10
    assert model.llm.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_training_where_zero_3_shards_every_gate_equals_training_at_zero_0(flags, tmp_path):
    """DeepSpeed's own settings would leave the gates, one number each, whole on every rank."""
    sharded = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "sharded.json").write_text(json.dumps(sharded))
    common = [*flags, "--bridge", "layalign", "--stage_name", "task", "--init_checkpoint", "none", "--max_steps", "3"]
    ways = {"whole": [], "sharded": ["--deepspeed_config", str(tmp_path / "sharded.json"), "--gradient_checkpointing"]}
    runs = [[*common, "--dev_size", "0", "--save_name", name, *way] for name, way in ways.items()]
    outcomes = run_many(tmp_path, runs, ranks=2)
    assert [outcome["code"] for outcome in outcomes] == [0, 0], outcomes
    whole, found = (load_file(tmp_path / f"outputs/{name}/math/task/mapping.safetensors") for name in ways)
    assert all((found[name] - whole[name]).abs().max() <= 1e-4 for name in whole)
    assert whole["gate_0"].abs() > 1e-3 and whole["gate_1"].abs() > 1e-3


# -- what cannot have a memory


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "to the attention of each LLM layer, but some/llm is a gpt2 model: take one of the types"),
        (Phi3Config(), "but some/llm is a phi3 model: take one of the types llama, mistral, qwen2, qwen3, gemma2"),
        (OPTConfig(hidden_size=32, word_embed_proj_dim=16), "some/llm has embeddings of width 16, layers of 32"),
    ],
)
def test_llms_that_cannot_have_a_memory_are_refused_by_name(config, message):
    with pytest.raises(ModelError, match=message):
        check_attention_memory("some/llm", config)


def test_what_cannot_attend_twice_is_refused_by_name(tiny_encoder, tiny_llm):
    with pytest.raises(ModelError, match="--attn_implementation flash_attention_2 does not allow: use sdpa or eager"):
        check_attention_function("flash_attention_2")
    with pytest.raises(ModelError, match="--engine vllm does not allow: leave it out"):
        check_attention_function(None, "vllm")
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, "flex_attention")
    with pytest.raises(ModelError, match="--attn_implementation flex_attention does not allow"):
        MindMerger.from_towers(model.encoder, model.llm, tiny_encoder, tiny_llm, "layalign")


def test_every_type_that_is_accepted_is_tested_here(tmp_path):
    tested = set()
    for i, (family, settings) in enumerate(FAMILIES.values()):
        folder, _ = make_folder(tmp_path / str(i), family, settings, "ForCausalLM")
        config = AutoConfig.from_pretrained(folder)
        check_attention_memory(folder, config)
        tested.add(config.get_text_config().model_type)
    assert tested == set(MODEL_TYPES)


def test_several_beams_and_embeddings_without_the_memory_are_refused(tmp_path):
    model = remembering(tmp_path, "llama")
    inputs = batch(rows(), "left", with_target=False)
    with pytest.raises(ModelError, match="keeps one memory for each row: num_beams must be 1"):
        model.generate(**inputs, num_beams=2)
    with pytest.raises(ModelError, match="its embeddings alone are not what the LLM reads"):
        model.merged_embeddings(**inputs)
    assert model.generate(**inputs, num_beams=1, max_new_tokens=2).shape == (8, 2)


def test_a_memory_of_another_number_of_layers_is_an_error(tmp_path):
    model = remembering(tmp_path, "llama")
    model.mapping.towers = model.mapping.towers._replace(llm_depth=1)
    with pytest.raises(ValueError, match="zip"):
        model(**batch(rows(), "right"))


def test_training_refuses_what_cannot_have_a_memory_before_it_reads_data(tmp_path, tiny_encoder, tiny_llm):
    gpt2, _ = make_folder(tmp_path / "gpt2", *LLMS["gpt2"], "LMHeadModel")
    for flags, message in (
        (["--llm_path", gpt2], f"{gpt2} is a gpt2 model"),
        (["--llm_path", tiny_llm, "--attn_implementation", "flash_attention_2"], "flash_attention_2 does not allow"),
    ):
        flags += ["--mt_path", tiny_encoder, "--bridge", "layalign", "--data_root", "nowhere", "--task", "math"]
        with pytest.raises(ModelError, match=message):
            settle(parse([*flags, "--output_dir", str(tmp_path)]))


def test_evaluation_refuses_an_engine_without_memory_before_it_reads_data(tmp_path, tiny_encoder, tiny_llm):
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, bridge="layalign")
    model.save_pretrained(tmp_path / "saved")
    flags = ["--task", "math", "--data_root", "nowhere", "--init_checkpoint", str(tmp_path / "saved")]
    for more, message in (
        (["--engine", "vllm"], "--engine vllm does not allow: leave it out"),
        (["--attn_implementation", "flash_attention_2"], "flash_attention_2 does not allow"),
    ):
        with pytest.raises(ModelError, match=message):
            evaluation_settings.settle(parse_evaluation([*flags, *more]), False)
