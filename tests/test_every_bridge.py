"""Duties of every entry of `BRIDGES`, so that a new bridge is tested by its one line there."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from mindmerger.bridges import BRIDGES
from mindmerger.model.adapters import adapter_values, add_adapter
from mindmerger.model.mapping_files import empty_bridge
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from mindmerger.training.dry_run import bridge_flop, training_flop

# Each bridge with its defaults, and with the options that make it another one.
EVERY = [(name, {}) for name in BRIDGES]
EVERY += [("langbridge", {"mapper": "ffn"}), ("langbridge", {"mapper": "latent", "latents": "3"})]
EVERY += [("layalign", {"structure": "mlp"}), ("mindmerger", {"encoder_layer": "1"})]
EVERY += [("langbridge", {"train_lm_head": "true"}), ("layer_fusion", {"mix": "token", "feed_forward": "24"})]
E, D, DEPTH = 2048, 4096, 24  # mT5-xl and Llama-2-7B
COUNTS = [
    ("mindmerger", {}, 25_178_112),
    ("mindmerger", {"encoder_layer": "20"}, 25_178_112),
    ("langbridge", {}, 8_396_800),
    ("langbridge", {"mapper": "ffn"}, 2 * E * E + 2 * E + 2 * E * D + 2 * D),
    ("langbridge", {"train_lm_head": "true"}, 8_396_800 + 32_000 * D),
    ("layalign", {}, 33_572_448),
    ("layalign", {"structure": "mlp"}, 33_572_448 + (D + 1) * D),
    ("xbridge", {}, E * (5 + 4 * E + 4 * D) + 2 * D),
    ("layer_fusion", {}, DEPTH + 1 + E * D + 2 * D),
    ("layer_fusion", {"mix": "token"}, 4 * E * E + 4106 * E + 2048 + DEPTH * (2 * E + 1) + E * D + 2 * D),
]


def named(entry) -> str:
    """The name of a bridge and its options in a test's name."""
    return "-".join([entry[0], *entry[1].values()])


@pytest.fixture(params=EVERY, ids=named)
def model(request, tiny_encoder, tiny_llm):
    """The bridge between tiny models, no parameter at the start where markers and gates are zero."""
    bridge, options = request.param
    torch.manual_seed(0)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, bridge=bridge, bridge_options=options)
    with torch.no_grad():
        for parameter in model.mapping.parameters():
            parameter += 0.5 * (parameter.abs().mean() or 0.5) * torch.randn_like(parameter)
    return model


def test_the_bridges_that_are_tested_are_the_same_for_this_file_alone_and_among_all():
    """The tests' own bridge stood in the list only where another file had been collected before."""
    assert ("toy", {}) in EVERY


def rows(with_prompt: bool) -> list[dict]:
    """Ids of four rows of different lengths."""
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(3, 250, (length,), generator=generator).tolist()

    lengths = [(5, 4, 6), (2, 7, 3), (9, 1, 5), (3, 3, 1)]
    found = [{"encoder_input_ids": ids(s), "prompt_ids": ids(p), "target_ids": ids(t)} for s, p, t in lengths]
    return found if with_prompt else [{k: v for k, v in row.items() if k != "prompt_ids"} for row in found]


def batch(chosen: list[dict], side: str = "right") -> dict:
    """Rows as padded ids and masks."""
    masks = {"encoder_input_ids": "encoder_attention_mask", "prompt_ids": "prompt_mask", "target_ids": "target_mask"}
    tensors = {}
    for name in chosen[0]:
        longest = max(len(row[name]) for row in chosen)
        gaps = [longest - len(row[name]) for row in chosen]
        right = side == "right"
        both = [(row[name], [0] * gap) for row, gap in zip(chosen, gaps, strict=True)]
        tensors[name] = torch.tensor([ids + gap if right else gap + ids for ids, gap in both])
        real = [([1] * len(ids), gap) for ids, gap in both]
        tensors[masks[name]] = torch.tensor([ones + gap if right else gap + ones for ones, gap in real])
    return tensors


def rows_of(model) -> list[dict]:
    """Rows of the form that the bridge's last stage trains."""
    return rows(list(model.mapping.stages.values())[-1].with_prompt)


def question(tensors: dict) -> dict:
    """A batch without its targets."""
    return {name: value for name, value in tensors.items() if not name.startswith("target")}


def gradients(model, batches: list[dict]) -> tuple[float, dict]:
    """The summed loss of some micro-batches and its gradients."""
    model.zero_grad()
    loss = sum(model(**tensors).loss_sum for tensors in batches)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.trained_parameters().items()}


@pytest.mark.parametrize(("name", "options", "expected"), COUNTS, ids=lambda part: str(part))
def test_a_bridge_has_the_published_number_of_parameters(name, options, expected):
    with torch.device("meta"):
        bridge = BRIDGES[name](E, D, DEPTH, 32, 32_000, **options)
    assert sum(p.numel() for p in bridge.parameters()) == expected


def test_padding_side_company_and_split_into_micro_batches_change_nothing(model):
    every = rows_of(model)
    loss, expected = gradients(model, [batch(every)])
    for split in (
        [batch(every, "left")],
        [batch([row]) for row in every],
        [batch(every[:1]), batch(every[1:], "left")],
    ):
        other, found = gradients(model, split)
        assert abs(other - loss) <= 1e-5 * loss
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 2e-4 * gradient.norm() + 1e-6, name


def test_only_the_bridge_learns_and_both_towers_stay_as_they_are(model):
    for stage in model.mapping.stages_with(model.mapping.options).values():
        assert stage.trains == (("bridge", "lm_head") if hasattr(model.mapping, "lm_head") else ("bridge",))
    mine = {f"mapping.{name}" for name, _ in model.mapping.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == mine
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=1e-3)
    tensors, losses = batch(rows_of(model)), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**tensors).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    same = {name for name, p in model.named_parameters() if torch.equal(before[name], p)}
    assert same == before.keys() - mine


def test_towers_in_bf16_leave_the_bridge_in_fp32(model, tiny_encoder, tiny_llm):
    between = {"bridge": model.config.bridge, "bridge_options": model.config.bridge_options}
    rounded = MindMerger.from_models(tiny_encoder, tiny_llm, torch.bfloat16, **between)
    rounded.mapping.load_state_dict(model.mapping.state_dict())
    tensors = batch(rows_of(model))
    out = rounded(**tensors)
    out.loss.backward()
    assert abs(out.loss - model(**tensors).loss) <= 0.05 * out.loss and out.loss.dtype == torch.float32
    for name, parameter in rounded.trained_parameters().items():
        assert parameter.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    assert rounded.generate(**question(tensors), max_new_tokens=3).shape[0] == 4


def test_a_saved_bridge_is_itself_again(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again = MindMerger.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32)
    tensors = batch(rows_of(model))
    assert torch.equal(model(**tensors).loss_sum, again(**tensors).loss_sum)
    ids = [one.generate(**question(tensors), max_new_tokens=4) for one in (model, again)]
    assert torch.equal(*ids)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    recorded = (config["bridge"], config["bridge_options"], config["encoder_layers"])
    assert recorded == (model.config.bridge, model.mapping.options, list(model.mapping.encoder_layers))
    card = (tmp_path / "saved/README.md").read_text()
    assert all(text in card for text in (config["bridge"], *config["bridge_options"].values()))


def test_an_adapter_over_it_starts_as_nothing_learns_alone_and_is_itself_again(model, tmp_path):
    tensors, before = batch(rows_of(model)), {name: p.detach().clone() for name, p in model.named_parameters()}
    start = model(**tensors).loss_sum
    add_adapter(model, adapter_values("lora", 4, 8.0, 0.1, ["q_proj", "v_proj"], model.config.llm_path))
    assert torch.equal(model(**tensors).loss_sum, start)
    optimizer = torch.optim.AdamW(model.train().trained_parameters().values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**tensors).loss.backward()
        optimizer.step()
    model.eval()
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if ".lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(before[name], p) for name, p in after.items())
    assert model(**tensors).loss_sum < start
    model.save_pretrained(tmp_path / "saved")
    again = MindMerger.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32)
    ids = [one.generate(**question(tensors), max_new_tokens=4) for one in (model, again)]
    assert torch.equal(again(**tensors).loss_sum, model(**tensors).loss_sum) and torch.equal(*ids)


def test_generation_equals_a_loop_without_a_cache(model):
    every = rows_of(model)
    ids = model.generate(**question(batch(every)), max_new_tokens=6)
    for row, expected in zip(every, ids.tolist(), strict=True):
        found = []
        while len(found) < 6 and (not found or found[-1] not in model.eos_token_ids):
            # What was generated stands where the prompt does: right behind the prefix.
            prompt = row.get("prompt_ids", []) + found
            alone = {"encoder_input_ids": row["encoder_input_ids"]} | ({"prompt_ids": prompt} if prompt else {})
            found += model.generate(**batch([alone]), max_new_tokens=1, use_cache=False)[0].tolist()
        assert found == expected[: len(found)] and set(expected[len(found) :]) <= {model.pad_token_id}


@pytest.mark.parametrize("form", ["bin", "safetensors", "shards"])
def test_released_weights_load_and_the_towers_in_them_are_passed_over(model, form, tmp_path):
    expected = model.mapping.state_dict()
    state = {key: expected[name].clone() for key, name in model.released_names().items()}
    towers = {
        f"{start}weight": torch.zeros(3) for start in model.mapping.released_others if f"{start}weight" not in state
    }
    if form == "bin":
        torch.save(state | towers, tmp_path / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(state | towers, tmp_path / "model.safetensors")
    else:
        first, *others = state
        torch.save({first: state[first]} | towers, tmp_path / "pytorch_model-00001-of-00002.bin")
        torch.save({key: state[key] for key in others}, tmp_path / "pytorch_model-00002-of-00002.bin")
    with torch.no_grad():
        for parameter in model.mapping.parameters():
            parameter.zero_()
    model.load_mapping(str(tmp_path))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.mapping.state_dict().items())
    torch.save(state | {"stranger": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(UserError, match=r"missing nothing, unknown \['stranger'\]"):
        model.load_mapping(str(tmp_path / "other.bin"))


def products(counter) -> tuple[int, int]:
    """FLOP that torch counted in matrix products, and in attention's, which come in batches."""
    found = {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()}
    plain = sum(flop for op, flop in found.items() if "mm" in op and "bmm" not in op)
    return plain, sum(found.values()) - plain


def counted_and_estimated(model, adapter: int = 0) -> tuple[float, float]:
    """FLOP of a training step, as torch counts them without both models' attention, and as a dry run estimates them."""
    with_prompt = list(model.mapping.stages.values())[-1].with_prompt
    lengths = {"encoder_input_ids": 30, "prompt_ids": 20 if with_prompt else 0, "target_ids": 10}
    tensors = batch([{name: [7] * n for name, n in lengths.items() if n}] * 2)
    with FlopCounterMode(display=False) as counter:
        model(**tensors).loss.backward()
    states = model.encode(tensors["encoder_input_ids"], tensors["encoder_attention_mask"])
    with FlopCounterMode(display=False) as attending:  # a bridge that attends does so in here
        made = model.mapping(*states).prefix_BKD.sum()
        if made.requires_grad:  # not under an adapter
            made.backward()
    counted = products(counter)[0] + products(attending)[1]
    merged = 1 + model.mapping.prefix_length(30) + lengths["prompt_ids"] + 10
    columns = {"merged": merged, "encoder": 30, "target": 10}
    data = SimpleNamespace(**{f"{name}_lengths": np.array([n, n]) for name, n in columns.items()})
    with torch.device("meta"):  # an LLM as a dry run has it: without adapter, with a head of its own
        llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.config.llm_path))
    args = SimpleNamespace(gradient_checkpointing=False)
    parts = (llm, model.encoder, empty_bridge(model.config), adapter)
    return counted, training_flop(args, data, data.merged_lengths, np.arange(2), *parts)


def test_the_hours_of_a_dry_run_count_the_bridge_s_own_arithmetic(model):
    """They left it out: of LayAlign and of a trained output head it is more than a tenth of the whole."""
    counted, estimated = counted_and_estimated(model)
    # Of fused attention on a CPU torch counts nothing; latents attend, and on the meta device that is counted.
    assert estimated == pytest.approx(counted, rel=0.15 if model.mapping.options.get("mapper") == "latent" else 0.03)


def test_under_an_adapter_a_bridge_counts_as_its_forward_pass_alone(model):
    trained, bridge = counted_and_estimated(model)[1], empty_bridge(model.config)
    model.zero_grad()
    add_adapter(model, adapter_values("lora", 4, 8.0, 0.0, ["q_proj", "v_proj"], model.config.llm_path))
    number = sum(p.numel() for p in model.trained_parameters().values())
    counted, estimated = counted_and_estimated(model, number)
    # Of the first layer nothing goes back into the prefix, which the estimate counts; here the LLM has two.
    assert counted < estimated < 1.35 * counted
    assert bridge_flop(bridge, 30, trained=False) < bridge_flop(bridge, 30, trained=True) and estimated < 2 * trained
