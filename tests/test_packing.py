"""--packing: rows end to end in one, apart from each other, with the losses and gradients of padded rows."""

import itertools
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, byte_tokenizer, clean_environment, make_tiny_llm, read_log, run_many, run_prepared
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dev_accuracy import COUNTED, LANGUAGES, lines_of, option_rows, stage_flags, write_rows
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import flash_attention_mask

from mindmerger.bridges import Mapping
from mindmerger.data.batches import collate, heaviest_batches, split_global_batch
from mindmerger.data.loader import BatchLoader, TrainingData
from mindmerger.model.adapters import adapter_values, add_adapter
from mindmerger.model.input_plan import plan_input
from mindmerger.model.mindmerger import MindMerger
from mindmerger.model.packing import take_rows
from mindmerger.model.towers import load_encoder
from mindmerger.runtime.errors import UserError
from mindmerger.training import speedups
from mindmerger.training.packing import ATTENTION, MODEL_TYPES, check_packing

# Rows of 14 to 26 positions, where they slide: so the window ends within a row.
WINDOW = 8
SMALL = {"vocab_size": 280, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
SMALL |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
SLIDES = {"layer_types": ["sliding_attention", "full_attention"]}
OTHERWISE = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, **SLIDES},
    "phi3": {"original_max_position_embeddings": 64},
    **dict.fromkeys(("gemma3_text", "cohere2", "olmo3", "exaone4", "ministral"), SLIDES),
    **dict.fromkeys(("mixtral", "granitemoe"), EXPERTS),
    "olmoe": EXPERTS | {"sliding_window": None},  # which it hands to flash attention and makes no mask of
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), EXPERTS | {"moe_intermediate_size": 16}),
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    "gpt_oss": EXPERTS,
    "qwen3_next": EXPERTS | {"moe_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]},
}
OTHERWISE["qwen2_moe"] = OTHERWISE["qwen2_moe"] | {"shared_expert_intermediate_size": 16}
OTHERWISE["qwen3_next"] |= {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
OTHERWISE["qwen3_next"] |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
# Each mixes rows: by a mask made without positions, by positions of its own, by what runs on from token to token.
MIXING = ("gpt_oss", "opt", "bloom", "lfm2", "falcon_h1")


def tiny_config(kind: str, **more):
    """Config of a small LLM of a type."""
    return AutoConfig.for_model(kind, **{**SMALL, **OTHERWISE.get(kind, {}), **more})


@pytest.fixture(scope="module")
def make(tiny_encoder, tiny_llm):
    """Builds a model around a random LLM of a type, the same each time."""

    def build(kind="llama", attention=None, **more) -> MindMerger:
        torch.manual_seed(0)
        config = tiny_config(kind, **more)
        llm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        for parameter in llm.parameters():
            if parameter.dim() > 1:  # large weights: what is wrong shows
                torch.nn.init.normal_(parameter, std=0.2)
        model = MindMerger.from_towers(load_encoder(tiny_encoder, torch.float32), llm, tiny_encoder, tiny_llm)
        torch.nn.init.normal_(model.mapping.end_boundary)
        return model

    return build


# Lengths of the source, the prompt and the target.
SIZES = ((5, 3, 4), (9, 7, 8), (2, 1, 11), (7, 6, 1), (4, 5, 6))


def batch_of(sizes=SIZES, seed=0, with_prompt=True) -> dict:
    """Arguments of `forward` for random rows of these lengths."""
    draw = torch.Generator().manual_seed(seed)
    columns = ("encoder_ids", "prompt_ids", "target_ids")
    drawn = [[torch.randint(3, 250, (n,), generator=draw).tolist() for n in one] for one in sizes]
    rows = [dict(zip(columns, one, strict=True)) for one in drawn]
    if not with_prompt:
        rows = [{**row, "prompt_ids": []} for row in rows]
    return collate(rows, 0, 0).tensors


def plan_of(model, batch: dict, packed=True):
    return model.plan_input(*(batch.get(f"{n}_mask") for n in ("encoder_attention", "prompt", "target")), packed=packed)


def losses_and_gradient(model, batch: dict, packed: bool) -> tuple[float, torch.Tensor]:
    """The summed loss, and the gradient of all that is trained as one vector."""
    model.zero_grad()
    output = model(**batch, plan=plan_of(model, batch, packed))
    output.loss_sum.backward()
    trained = model.trained_parameters().values()
    return output.loss_sum.item(), torch.cat([parameter.grad.flatten() for parameter in trained])


def assert_same(model, batch=None):
    """Loss and gradient of packed rows are those of padded ones, in fp32."""
    batch = batch or batch_of()
    (loss, gradient), (packed_loss, packed) = (losses_and_gradient(model, batch, one) for one in (False, True))
    assert packed_loss == pytest.approx(loss, rel=1e-5) and gradient.norm() > 0
    assert (packed - gradient).norm() <= 1e-5 * gradient.norm()


# -- what is computed


@pytest.mark.parametrize("kind", sorted(MODEL_TYPES))
def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(make, kind):
    """A row that sees the one before it, or positions that run on, train a mapping on other losses without a word."""
    model = make(kind)
    for with_prompt in (True, False):
        assert_same(model, batch_of(with_prompt=with_prompt))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_eager_attention_keeps_rows_apart_too(make, kind):
    assert_same(make(kind, "eager"))


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "phi3", "starcoder2"])
def test_rows_are_longer_than_the_window_that_slides_over_them(make, kind):
    """Else the equality above would say nothing of sliding windows."""
    wide = {"sliding_window": 60}
    narrow, wide = (losses_and_gradient(make(kind, **more), batch_of(), True)[1] for more in ({}, wide))
    assert (narrow - wide).norm() > 1e-3 * wide.norm()


def test_a_rows_loss_does_not_depend_on_its_neighbours(make):
    """To the bit where these are as long, by rounding alone where they are not."""
    model, found = make(), []
    for first, other_tokens in ((SIZES[0], 0), (SIZES[0], 1), ((8, 9, 10), 0)):
        batch, rest = batch_of([first, *SIZES[1:]]), batch_of(SIZES[1:], seed=1)
        for name, tensor in rest.items():  # the same rows behind each first one
            batch[name][1:] = torch.nn.functional.pad(tensor, (0, batch[name].shape[1] - tensor.shape[1]))
        for name in ("encoder_input_ids", "prompt_ids"):
            batch[name][0] += other_tokens
        batch["target_mask"][0] = 0
        found.append(losses_and_gradient(model, batch, True))
    (loss, gradient), (as_long, same), (longer, _) = found
    assert as_long == loss and torch.equal(same, gradient)
    assert longer == pytest.approx(loss, rel=1e-6)


def test_positions_restart_and_lengths_are_those_of_the_rows():
    """By hand: BOS, two source tokens and a boundary in both; prompts of 0 and 2 tokens; targets of 2 and 1."""
    masks = [[[1, 1, 0], [0, 1, 1]], [[0, 0], [1, 1]], [[1, 1], [0, 1]]]
    plan = plan_input(Mapping(2, 2), True, *(torch.tensor(mask) for mask in masks), packed=True)
    assert plan.pack.position_1L.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6]]
    assert plan.pack.sequence_1L.tolist() == [[0] * 6 + [1] * 7]
    assert plan.pack.start_B1.tolist() == [0, 6, 13] and plan.pack.start_B1.dtype == torch.int32
    assert plan.pack.longest == 7 and type(plan.pack.longest) is int
    # Columns of a row: BOS, two of the source, the boundary, two of the prompt, two of the target.
    real = [[0, 1, 2, 3, 6, 7], [8, 9, 10, 11, 12, 13, 15]]
    assert take_rows(torch.arange(16).view(2, 8, 1), plan.rows.source_BL).flatten().tolist() == sum(real, [])
    assert plan.rows.predictor_M.tolist() == [3, 4, 11] and plan.token_M.tolist() == [0, 1, 3]
    assert plan.rows.mask_BL.tolist() == [[1] * 13] and plan.encoder.source_BL.shape == (2, 2)


def test_one_row_alone_gets_no_mask_and_what_has_no_target_is_not_packed(make):
    """The kernels of plain causal attention take no mask; generation and scored labels lay out rows from the left."""
    model, batch = make(), batch_of(SIZES[:1])
    plan = plan_of(model, batch)
    assert plan.pack.sequence_1L is None and plan.pack.start_B1.tolist() == [0, 14]
    assert_same(model, batch)
    assert plan_input(model.mapping, True, batch["encoder_attention_mask"], packed=True).pack is None


def test_all_of_a_packed_plan_waits_in_pinned_memory_and_moves(make, monkeypatch):
    """A copy out of other memory waits for the GPU, in each of the thousands of micro-batches."""
    plan, pinned = plan_of(make(), batch_of()), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    names = ("position_1L", "sequence_1L", "start_B1")
    assert {id(getattr(plan.pin().pack, name)) for name in names} <= {id(tensor) for tensor in pinned}
    moved = plan.to("meta").pack
    assert {getattr(moved, name).device.type for name in names} == {"meta"} and moved.longest == plan.pack.longest


# -- attention by lengths


def attention_by_lengths(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention as flash's kernels for rows of various lengths compute it: of lengths and a window, without a mask."""
    assert attention_mask is None and kwargs["cu_seq_lens_q"] is kwargs["cu_seq_lens_k"]
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32
    assert type(kwargs["max_length_q"]) is type(kwargs["max_length_k"]) is int
    starts, window = kwargs["cu_seq_lens_q"].tolist(), kwargs.get("sliding_window") or query.shape[2]
    assert max(b - a for a, b in itertools.pairwise(starts)) == kwargs["max_length_q"]
    out = []
    for first, last in itertools.pairwise(starts):
        q, k, v = (states[:, :, first:last] for states in (query, key, value))
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
        back = torch.arange(last - first)[:, None] - torch.arange(last - first)
        scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if (cap := kwargs.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        out.append(scores.masked_fill((back < 0) | (back >= window), -torch.inf).softmax(-1) @ v)
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register("flash_by_lengths", attention_by_lengths)
AttentionMaskInterface.register("flash_by_lengths", flash_attention_mask)


@pytest.mark.parametrize("kind", sorted(MODEL_TYPES))
def test_flash_attention_is_handed_the_lengths_of_the_rows(make, kind):
    """Some models drop them on the way: flash would read them off the positions, with a wait in every layer, where it
    is handed these, and attend across rows where it is not."""
    model, batch = make(kind, "eager"), batch_of()  # of older versions, sdpa leaves out Gemma 2's soft cap
    loss, gradient = losses_and_gradient(model, batch, False)
    model.llm.config._attn_implementation = "flash_by_lengths"
    packed_loss, packed = losses_and_gradient(model, batch, True)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert (packed - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_keeps_rows_apart(make):
    """Uncompiled, which needs no compiler, and forward alone: torch has no backward of it on a CPU."""
    for kind in ("llama", "mistral"):
        model, batch = make(kind), batch_of()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            expected = model(**batch).loss.item()
            model.llm.set_attn_implementation("flex_attention")
            assert model(**batch, plan=plan_of(model, batch)).loss.item() == pytest.approx(expected, rel=1e-5)


# -- with other options


def test_recomputed_layers_and_adapters_have_the_same_gradient(make):
    for adapter, checkpointing in ((False, True), (True, False), (True, True)):
        model = make()
        if adapter:
            add_adapter(model, adapter_values("lora", 4, 8.0, 0.0, ["q_proj", "v_proj"], model.config.llm_path))
            model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert_same(model)


@pytest.mark.slow
def test_compiled_layers_have_the_same_loss_on_packs_of_all_lengths(make, monkeypatch):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **way: compiled(self, backend="aot_eager", **way))
    batches = [batch_of(SIZES[:n], seed=n) for n in (5, 2, 1, 4)]
    model = make()
    expected = [losses_and_gradient(model, batch, False) for batch in batches]
    speedups.compile_layers(model)
    found = [losses_and_gradient(model, batch, True) for batch in batches]
    traced = torch._dynamo.utils.counters["frames"]["ok"]
    torch._dynamo.reset()
    assert traced
    for (loss, gradient), (packed_loss, packed) in zip(expected, found, strict=True):
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        assert (packed - gradient).norm() <= 1e-5 * gradient.norm()


# -- micro-batches


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40),
    world_size=st.integers(1, 4),
    token_budget=st.integers(1, 200),
)
@settings(deadline=None)
def test_a_budget_is_filled_by_the_sum_of_the_lengths_in_as_few_passes_as_can_be(lengths, world_size, token_budget):
    lengths, rows = np.array(lengths), np.arange(len(lengths))
    ranks = split_global_batch(rows, lengths, world_size, 1, token_budget, packed=True)
    assert len({len(rank) for rank in ranks}) == 1
    real = [batch.indices for rank in ranks for batch in rank if batch.weight]
    assert sorted(np.concatenate(real)) == rows.tolist()
    assert all(len(batch) == 1 or lengths[batch].sum() <= token_budget for batch in real)
    # Filling each one up is the least number of parts, where the order stands.
    least, left = 0, 0
    for length in -np.sort(-lengths)[::world_size]:
        least, left = (least, left - length) if length <= left else (least + 1, token_budget - length)
    assert len(ranks[0]) == least


def test_the_memory_probe_fills_the_budget_behind_its_longest_rows():
    """The longest rows alone may leave half of a budget empty that training fills."""
    lengths, targets = np.array([60, 55, 30, 30, 9, 8, 7, 130]), np.array([1, 1, 20, 1, 9, 8, 7, 1])

    def heaviest(rows, others=(), most=9):
        return [found.tolist() for found in heaviest_batches(np.arange(rows), lengths, others, most, 100, packed=True)]

    assert heaviest(7) == [[0, 2, 4]]  # 60, not 55, then 30, and room for 9
    assert heaviest(7, [targets]) == [[0, 2, 4], [2, 4, 5, 6, 3]]  # the largest shares: the same rows
    assert heaviest(8) == [[7]]  # longer than the budget
    assert heaviest(7, most=2) == [[0, 2]] and heaviest(0, [targets]) == []


def test_the_dev_split_is_packed_by_the_sum_of_its_lengths_too():
    lengths = np.array([40, 30, 20, 10, 8, 5, 5, 2])
    args = SimpleNamespace(packing=True, micro_batch_tokens=60, eval_batch_size=1, num_workers=0)
    examples = SimpleNamespace(merged_lengths=lambda _: lengths, encoder_lengths=lengths, target_lengths=lengths)
    loader = BatchLoader(args, TrainingData(examples, None, np.arange(8), np.arange(8)), None, torch.device("cpu"))
    parts = [micro.rows for group in loader.dev_groups() for micro in group]
    assert len(parts) == 3 and all(loader.positions(rows) == lengths[rows].sum() <= 60 for rows in parts)
    args.packing = False
    assert loader.positions(np.array([0, 7])) == 80


# -- whole runs


@pytest.fixture
def narrow(flags, tmp_path):
    """Flags of a run whose LLM has the width that 4-bit layers need on a CPU."""
    return [*flags, "--llm_path", make_tiny_llm(tmp_path / "narrow", width=128)]


def folder_of(tmp_path, name, task="math", stage="mapping"):
    return tmp_path / "outputs" / name / task / stage


def test_whole_runs_have_the_same_losses_with_and_without_packing(flags, narrow, tmp_path):
    """By rows and by budget, with adapters, recomputed layers, 4-bit weights and bf16."""
    steps = ["--max_steps", "4", "--eval_steps", "2"]
    adapter = ["--stage_name", "adapter", "--llm_only", "--adapter_dropout", "0"]
    ways = {
        "plain": [*flags],
        "budget": [*flags, "--micro_batch_tokens", "300", "--gradient_checkpointing"],
        "adapter": [*flags, *adapter],
        "nf4": [*narrow, "--quantization", "nf4"],
        "bf16": [*flags, "--precision", "bf16"],
    }
    runs = [
        [*given, *steps, *on, "--save_name", name + "".join(on)]
        for name, given in ways.items()
        for on in ([], ["--packing"])
    ]
    outcomes = run_many(tmp_path, runs)
    assert [outcome["code"] for outcome in outcomes] == [0] * len(runs), outcomes
    for name in ways:
        stage = "llm_adapter" if name == "adapter" else "mapping"
        padded, packed = (folder_of(tmp_path, name + on, stage=stage) for on in ("", "--packing"))
        assert set(read_log(packed, "padding_share")) == {0.0} and max(read_log(padded, "padding_share")) > 0
        for key in ("loss", "dev_loss"):
            rounding = 5e-3 if name in ("bf16", "nf4") else 1e-5
            assert read_log(packed, key) == pytest.approx(read_log(padded, key), rel=rounding), (name, key)


@pytest.mark.slow
def test_every_zero_stage_packs_on_two_ranks_and_resumes_to_the_bit(flags, tmp_path):
    common = [*flags, "--packing", "--micro_batch_tokens", "200", "--max_steps", "5", "--eval_steps", "2"]
    runs, expected = [], [[*flags, "--max_steps", "5", "--eval_steps", "2", "--save_name", "padded"]]
    for stage in (0, 1, 2, 3):
        more = ["--deepspeed_config", f"{ROOT}/scripts/ds_zero{stage}.json"]
        whole, cut = ([*common, *more, "--save_name", f"{name}{stage}"] for name in ("whole", "cut"))
        runs += [whole, {"argv": cut, "fault": {"step": 3, "signal": "SIGTERM", "rank": 1}}, cut]
    outcomes = run_many(tmp_path, [*expected, *runs], ranks=2)
    assert [outcome["code"] for outcome in outcomes] == [0] + [0, 143, 0] * 4, outcomes
    for stage in (0, 1, 2, 3):
        whole, cut = (folder_of(tmp_path, f"{name}{stage}") for name in ("whole", "cut"))
        for key in ("loss", "dev_loss", "grad_norm"):
            assert read_log(whole, key) == read_log(cut, key)
            assert read_log(whole, key) == pytest.approx(read_log(folder_of(tmp_path, "padded"), key), rel=1e-5)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(flags, tmp_path):
    common = [*flags, "--packing", "--micro_batch_tokens", "300", "--max_steps", "6", "--save_steps", "2"]
    whole, cut = ([*common, "--save_name", name] for name in ("whole", "cut"))
    assert run_prepared(ROOT / "tests/drivers/killed.py", "train_step:5", *cut, cwd=tmp_path)[0] == [-signal.SIGKILL]
    assert [outcome["code"] for outcome in run_many(tmp_path, [whole, cut])] == [0, 0]
    for key in ("step", "loss", "dev_loss", "grad_norm"):
        assert read_log(folder_of(tmp_path, "whole"), key) == read_log(folder_of(tmp_path, "cut"), key)


@pytest.mark.slow
def test_a_run_resumes_without_packing_too(flags, tmp_path):
    """As with compiled layers, nothing but rounding depends on it."""
    common = [*flags, "--max_steps", "6", "--save_steps", "2"]
    first = {"argv": [*common, "--packing", "--save_name", "cut"], "fault": {"step": 3, "signal": "SIGTERM"}}
    outcomes = run_many(tmp_path, [[*common, "--save_name", "whole"], first, [*common, "--save_name", "cut"]])
    assert [outcome["code"] for outcome in outcomes] == [0, 143, 0]
    expected, found = (read_log(folder_of(tmp_path, name)) for name in ("whole", "cut"))
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 6


def test_labels_are_scored_as_without_packing(flags, tmp_path):
    """Beside the packed dev loss, the labels of a task are passed row by row behind their inputs."""
    for code in LANGUAGES:
        write_rows(tmp_path / f"data/query_translation/x-csqa/train_{code}.jsonl", option_rows(code))
    given = stage_flags(flags, tmp_path / "data")
    ways = {"padded": [], "packed": ["--packing", "--micro_batch_tokens", "500"]}
    outcomes = run_many(tmp_path, [[*given, *more, "--save_name", name] for name, more in ways.items()])
    assert [outcome["code"] for outcome in outcomes] == [0, 0], outcomes
    one, two = (lines_of(folder_of(tmp_path, name, "x-csqa", "augmentation")) for name in ways)
    accuracies = [[line["dev_accuracy"] for line in lines if "dev_accuracy" in line] for lines in (one, two)]
    assert accuracies[0] == accuracies[1] and len(accuracies[0]) == 3 and COUNTED
    losses = [[line["dev_loss"] for line in lines if "dev_loss" in line] for lines in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# -- what is refused


def save_llm(folder, kind: str) -> str:
    """A whole folder of a random LLM of a type, with a tokenizer."""
    size = byte_tokenizer(folder, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, "<s> $A")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(kind, vocab_size=size, max_position_embeddings=512)).save_pretrained(
        folder
    )
    return str(folder)


def options(**given):
    return SimpleNamespace(
        **{"packing": True, "llm_only": False, "bridge": "mindmerger", "attn_implementation": None, **given}
    )


@pytest.mark.parametrize("kind", MIXING)
def test_an_llm_that_is_refused_would_mix_rows(make, kind):
    """The refusal is for something: packed rows give a mapping another gradient."""
    assert kind not in MODEL_TYPES
    padded, packed = (losses_and_gradient(make(kind), batch_of(), one)[1] for one in (False, True))
    assert (packed - padded).norm() > 1e-3 * padded.norm()


@pytest.mark.parametrize("kind", [*MIXING, "qwen3_next", "nemotron", "stablelm", "mamba", "gemma3n_text"])
def test_who_is_not_known_to_keep_rows_apart_is_refused_by_name(tmp_path, kind):
    """Nemotron and StableLM do with a mask, and hand flash attention no lengths."""
    config = tiny_config(kind) if kind in OTHERWISE else AutoConfig.for_model(kind)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{kind} model.*: (leave --packing out|pass another --llm_path)"):
        check_packing(options(llm_path=str(tmp_path)))
    check_packing(options(llm_path=str(tmp_path), packing=False))


def test_layers_that_run_on_are_named(tmp_path):
    for kind, layers in (("qwen3_next", "linear_attention"), ("lfm2", "conv")):
        tiny_config(kind).save_pretrained(tmp_path / kind)
        with pytest.raises(UserError, match=f"is a {kind} model with {layers} layers, not known to keep packed rows"):
            check_packing(options(llm_path=str(tmp_path / kind)))


def test_a_memory_and_unknown_attention_are_refused_by_name(tiny_llm):
    with pytest.raises(UserError, match="bridge layalign gives the LLM's attention a memory for each row"):
        check_packing(options(llm_path=tiny_llm, bridge="layalign"))
    check_packing(options(llm_path=tiny_llm, bridge="layalign", llm_only=True))
    with pytest.raises(UserError, match=r"--attn_implementation kernels-community/flash-attn2: use sdpa, eager, .* or"):
        check_packing(options(llm_path=tiny_llm, attn_implementation="kernels-community/flash-attn2"))
    for name in (None, *ATTENTION):
        check_packing(options(llm_path=tiny_llm, attn_implementation=name))


def test_a_refusal_is_one_line_and_exit_code_2_before_a_weight_loads(flags, tmp_path):
    llm = save_llm(tmp_path / "opt", "opt")
    runs = [[*flags, "--packing", "--llm_path", llm, *more] for more in ([], ["--dry_run"])]
    for outcome in run_many(tmp_path, runs):
        assert outcome["code"] == 2 and "not known to keep packed rows apart" in outcome["error"], outcome
        assert "\n" not in outcome["error"].strip() and "trainable parameters" not in outcome["printed"]


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))])
def test_an_llm_that_mixes_rows_all_the_same_ends_the_run_before_its_first_step(flags, tmp_path, stage):
    """As a kernel would that is handed no lengths: an LLM that the list takes for one that keeps them apart."""
    llm = save_llm(tmp_path / "opt", "opt")
    code = (
        "import run_training\nfrom mindmerger.training import packing\n"
        "from mindmerger.runtime.command import run_main\n"
        "packing.MODEL_TYPES.add('opt')\nrun_main(run_training.main)\n"
    )
    given = [*flags, "--packing", "--llm_path", llm, "--deepspeed_config", f"{ROOT}/scripts/ds_zero{stage}.json"]
    environment = clean_environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line == (
        f"error: --packing: {llm} attends across packed rows with its attention sdpa: leave --packing out, or choose "
        "another --attn_implementation"
    )
    assert read_log(folder_of(tmp_path, "MindMerger")) == []


def test_the_plan_of_a_run_is_packed_where_the_flag_says_so(make):
    """The loader's threads make it, so that nothing is left to the thread that trains."""
    model = make()
    plan = partial(model.plan_input, packed=True)
    batch = batch_of()
    made = plan(batch["encoder_attention_mask"], batch["prompt_mask"], batch["target_mask"])
    assert made.llm_arguments.keys() == {
        "position_ids",
        *(f"{n}_{s}" for n in ("cu_seq_lens", "max_length") for s in "qk"),
    }
    assert plan_of(model, batch, packed=False).llm_arguments == {}
