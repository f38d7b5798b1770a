"""The MAET-style merge and its controls against sums worked out on whole tensors in memory."""

import json
import math
import re
from fractions import Fraction

import pytest
import torch
from expert_folders import base_state, load_state, same_bits, save_expert, tiny_config, tuned

from mindmerger.baselines import maet as baselines_maet
from mindmerger.baselines import model_folder
from mindmerger.baselines.merge_flags import ratio
from mindmerger.baselines.model_folder import place_of
from mindmerger.runtime.errors import UserError

IDENTITY = ["--key_ratio", "1", "--tensor_ratio", "1", "--include_nonlayer"]


def make_folders(root, dtype, shards=1, form="safetensors"):
    config = tiny_config(layers=3)
    start = base_state(config)
    start["model.layers.0.self_attn.q_proj.weight"][0, :4] = torch.tensor([0.0, -0.0, 8.0, -8.0])
    states = {"base": start, "task": tuned(start, 1), "english": tuned(start, 2)}
    states |= {"l1": tuned(start, 3), "l2": tuned(start, 4)}
    # Scalars of very different size: base plus difference, in fp32, would not give the expert's bits back.
    states["task"]["model.layers.0.self_attn.q_proj.weight"][0, :4] = torch.tensor([1e-6, 3e-7, 1e-6, -2e-6])
    options = {"dtype": dtype, "shards": shards, "form": form}
    return {name: save_expert(root / name, config, state, **options) for name, state in states.items()}


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    """Folders of base, task, English and two language experts in bf16."""
    return make_folders(tmp_path_factory.mktemp("bf16"), torch.bfloat16)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    """The same in fp32, where hardly two differences are equal."""
    return make_folders(tmp_path_factory.mktemp("fp32"), torch.float32)


def merge(folders, output, *flags, languages=("l1",), base=True):
    """Runs the command; returns the merged tensors and merge.json's plan."""
    command = ["--task_expert", folders["task"], "--language_experts", *(folders[name] for name in languages)]
    command += ["--base", folders["base"]] if base else []
    assert baselines_maet.main([*command, "--output", str(output), *map(str, flags)]) == 0
    return load_state(output), json.loads((output / "merge.json").read_text())["plan"]


# -- identities, bit for bit


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_task_weights_alone_with_full_ratios_give_exactly_the_task_expert(kind, request, tmp_path):
    """base + (expert - base) in fp32 loses the expert's bits where the base is much larger."""
    folders = request.getfixturevalue(kind)
    merged, _ = merge(folders, tmp_path / "m", "--alpha", 1, "--mu", 0, "--gamma", 1, *IDENTITY)
    assert same_bits(merged, load_state(folders["task"]))


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_language_weights_alone_give_exactly_the_language_expert(kind, request, tmp_path):
    folders = request.getfixturevalue(kind)
    merged, _ = merge(folders, tmp_path / "m", "--gamma", 0, "--mu", 1, "--include_nonlayer")
    assert same_bits(merged, load_state(folders["l1"]))


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_all_scales_zero_give_the_base_bit_for_bit(kind, request, tmp_path):
    """0 * x added to a negative zero would make it a positive one."""
    folders = request.getfixturevalue(kind)
    merged, _ = merge(folders, tmp_path / "m", "--gamma", 0, "--eta", 0, "--include_nonlayer")
    assert same_bits(merged, load_state(folders["base"]))


def test_tensor_ratio_zero_leaves_no_task_term(bf16, tmp_path):
    none, plan = merge(bf16, tmp_path / "none", "--tensor_ratio", 0)
    without, _ = merge(bf16, tmp_path / "without", "--gamma", 0)
    assert plan["task_tensors"] == []
    assert same_bits(none, without)
    some, _ = merge(bf16, tmp_path / "some", "--tensor_ratio", "0.5")
    assert not same_bits(some, without)


def test_key_ratio_zero_leaves_no_task_term(bf16, tmp_path):
    none, plan = merge(bf16, tmp_path / "none", "--key_ratio", 0)
    without, _ = merge(bf16, tmp_path / "without", "--gamma", 0)
    assert plan["key_scalars"] == 0 and plan["key_threshold"] is None
    assert same_bits(none, without)


def test_norms_and_embeddings_stay_the_bases_unless_asked(bf16, tmp_path):
    merged, plan = merge(bf16, tmp_path / "m")
    base = load_state(bf16["base"])
    for name, tensor in merged.items():
        projection = place_of(name).kind in model_folder.KINDS
        assert torch.equal(tensor, base[name]) != projection
    assert plan["scalars"] == sum(t.numel() for name, t in base.items() if place_of(name).kind in model_folder.KINDS)


# -- K


def differences(folders, names):
    base, task = load_state(folders["base"]), load_state(folders["task"])
    return torch.cat([(task[name].float() - base[name].float()).abs().flatten() for name in names])


@pytest.mark.parametrize("share", ["0.00001", "0.001", "0.05", "0.29", "0.5", "0.999", "1"])
def test_mask_size_is_the_floor_of_ratio_times_scalars(fp32, tmp_path, share):
    _, plan = merge(fp32, tmp_path / "m", "--key_ratio", share)
    wanted = math.floor(Fraction(share) * plan["scalars"])
    names = [name for name in load_state(fp32["base"]) if place_of(name).kind in model_folder.KINDS]
    values = differences(fp32, names)
    if wanted in (0, len(values)):
        assert plan["key_scalars"] == wanted
        return
    threshold = values.sort(descending=True).values[wanted - 1]
    assert plan["key_threshold"] == threshold.item()
    assert plan["key_scalars"] == int((values >= threshold).sum())
    # "Up to ties": without those at the threshold it would be too few.
    assert int((values > threshold).sum()) < wanted <= plan["key_scalars"]


def test_ties_at_the_threshold_are_all_in_the_mask(bf16, tmp_path):
    """Differences of bf16 weights take few values, so that the threshold is shared by many."""
    _, plan = merge(bf16, tmp_path / "m", "--key_ratio", "0.05")
    names = [name for name in load_state(bf16["base"]) if place_of(name).kind in model_folder.KINDS]
    values = differences(bf16, names)
    wanted = len(values) // 20
    threshold = values.sort(descending=True).values[wanted - 1]
    assert plan["key_threshold"] == threshold.item()
    assert plan["key_scalars"] == int((values >= threshold).sum()) > wanted
    assert int((values > threshold).sum()) < wanted


def test_mask_of_an_expert_that_moved_few_scalars_is_all_ties(tmp_path):
    """Most differences are exactly zero; the threshold is zero then, which must not be read as "everything asked"."""
    config = tiny_config(layers=1)
    start = base_state(config)
    task = {name: tensor.clone() for name, tensor in start.items()}
    task["model.layers.0.mlp.up_proj.weight"][0] += 1
    folders = {"base": start, "task": task, "l1": tuned(start, 3)}
    folders = {name: save_expert(tmp_path / name, config, state) for name, state in folders.items()}
    _, few = merge(folders, tmp_path / "few", "--key_ratio", "0.001")
    assert few["key_threshold"] > 0 and few["key_scalars"] <= 32
    _, many = merge(folders, tmp_path / "many", "--key_ratio", "0.5")
    assert many["key_threshold"] == 0 and many["key_scalars"] == many["scalars"]


def test_ratios_are_exact_fractions():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    assert math.floor(ratio("0.29") * 100) == 29
    assert math.floor(ratio("0.7") * 10) == 7


# -- streamed against in memory


def in_memory(folders, *, languages, mu, alpha=1.0, beta=0.0, gamma=1.0, eta=1.0, keys, tensors, order=1, probe="task"):
    """The help text's formula on whole models: (K, s_t, T, merged in fp64)."""
    models = {name: load_state(folder) for name, folder in folders.items()}
    base = models["base"]
    names = [name for name in base if place_of(name).kind in model_folder.KINDS]
    delta = {
        model: {name: state[name].double() - base[name].double() for name in names} for model, state in models.items()
    }
    moved = {name: delta[probe][name].float().abs() for name in names}
    values = torch.cat([moved[name].flatten() for name in names])
    threshold = values.sort(descending=True).values[math.floor(keys * len(values)) - 1]
    mask = {name: moved[name] >= threshold for name in names}
    task = {name: (alpha * delta["task"][name] - beta * delta["english"][name]) * mask[name] for name in names}
    language = {n: sum(m * delta[x][n] for m, x in zip(mu, languages, strict=True)) for n in names}
    cosines = {
        name: torch.cosine_similarity(task[name].flatten(), language[name].flatten(), dim=0).item() for name in names
    }
    chosen = sorted(names, key=lambda name: order * cosines[name])[: math.floor(tensors * len(names))]
    merged = {name: tensor.double() for name, tensor in base.items()}
    for name in names:
        merged[name] = merged[name] + eta * language[name] + gamma * task[name] * (name in chosen)
    return mask, cosines, set(chosen), merged


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("order", ["lowest", "highest"])
def test_streamed_equals_in_memory(kind, order, request, tmp_path, monkeypatch):
    """Blocks of a few rows must find the same K and T, and the same weights, as whole tensors do."""
    folders = request.getfixturevalue(kind)
    expected = in_memory(
        folders, languages=("l1", "l2"), mu=(0.7, 0.2), alpha=0.9, beta=0.4, gamma=0.8, eta=1.1, keys=Fraction("0.07"),
        tensors=Fraction("0.6"), order=1 if order == "lowest" else -1,
    )  # fmt: skip
    mask, cosines, chosen, reference = expected
    monkeypatch.setattr(model_folder, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(model_folder, "REOPEN_BYTES", 1000)
    flags = ["--mu", 0.7, 0.2, "--alpha", 0.9, "--beta", 0.4, "--gamma", 0.8, "--eta", 1.1, "--key_ratio", "0.07"]
    flags += ["--tensor_ratio", "0.6", "--tensor_order", order, "--english_expert", folders["english"]]
    merged, plan = merge(folders, tmp_path / "m", *flags, "--dtype", "float32", languages=("l1", "l2"))
    assert plan["key_scalars"] == sum(int(one.sum()) for one in mask.values())
    assert set(plan["task_tensors"]) == chosen
    for name, cosine in plan["cosines"].items():
        assert cosine == pytest.approx(cosines[name], abs=1e-6)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), reference[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_block_size_changes_no_bit(kind, request, tmp_path, monkeypatch):
    folders = request.getfixturevalue(kind)
    whole, first = merge(folders, tmp_path / "whole", languages=("l1", "l2"))
    monkeypatch.setattr(model_folder, "BLOCK_ELEMENTS", 64)
    blocks, second = merge(folders, tmp_path / "blocks", languages=("l1", "l2"))
    assert same_bits(whole, blocks)
    assert first["task_tensors"] == second["task_tensors"] and first["key_scalars"] == second["key_scalars"]


def test_shard_layout_changes_nothing(bf16, tmp_path):
    single, _ = merge(bf16, tmp_path / "single", "--english_expert", bf16["english"])
    for shards, form in ((3, "safetensors"), (2, "bin")):
        folders = make_folders(tmp_path / f"{shards}", torch.bfloat16, shards, form)
        sharded, _ = merge(folders, tmp_path / f"m{shards}", "--english_expert", folders["english"])
        assert same_bits(single, sharded)


def test_probe_chooses_the_key_scalars(bf16, tmp_path):
    _, plan = merge(bf16, tmp_path / "m", "--probe", bf16["english"])
    names = [name for name in load_state(bf16["base"]) if place_of(name).kind in model_folder.KINDS]
    values = differences({"base": bf16["base"], "task": bf16["english"]}, names)
    assert plan["key_threshold"] == values.sort(descending=True).values[math.floor(0.05 * len(values)) - 1].item()


# -- controls


def test_task_arithmetic_is_the_merge_with_full_ratios(fp32, tmp_path):
    control, plan = merge(fp32, tmp_path / "a", "--task_arithmetic", "--gamma", "0.6", languages=("l1", "l2"))
    flags = ["--key_ratio", 1, "--tensor_ratio", 1, "--gamma", "0.6"]
    assert same_bits(control, merge(fp32, tmp_path / "b", *flags, languages=("l1", "l2"))[0])
    assert plan["key_scalars"] == plan["scalars"]
    base, task, one, two = (load_state(fp32[name]) for name in ("base", "task", "l1", "l2"))
    name = "model.layers.1.mlp.down_proj.weight"
    start = base[name].double()
    expected = start + 0.6 * (task[name] - start) + 0.5 * (one[name] - start) + 0.5 * (two[name] - start)
    torch.testing.assert_close(control[name].double(), expected, rtol=0, atol=1e-6)


def test_soup_is_the_mean_of_the_experts_over_all_tensors(fp32, tmp_path):
    soup, plan = merge(fp32, tmp_path / "soup", "--soup", languages=("l1", "l2"), base=False)
    states = [load_state(fp32[name]) for name in ("task", "l1", "l2")]
    assert soup.keys() == states[0].keys()
    for name, tensor in soup.items():
        expected = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    assert plan["weights"] == {"task expert": 1 / 3, "language expert 1": 1 / 3, "language expert 2": 1 / 3}


def test_a_soup_of_three_is_their_exact_sum_divided_by_three_and_rounded_once(bf16, tmp_path):
    """A third of each, added up, is off by one unit of bf16 in one scalar of some hundred."""
    soup, _ = merge(bf16, tmp_path / "soup", "--soup", languages=("l1", "l2"), base=False)
    states = [load_state(bf16[name]) for name in ("task", "l1", "l2")]
    # Three numbers of 8 bits: fp64 holds their sum exactly, and 53 bits of a third tell which neighbour is nearer.
    expected = {name: (sum(state[name].double() for state in states) / 3).bfloat16() for name in soup}
    assert sum(int((soup[name] != expected[name]).sum()) for name in soup) == 0


def test_soup_of_equal_experts_is_the_expert(bf16, tmp_path):
    twins = bf16 | {"l1": bf16["task"], "l2": bf16["task"]}
    assert same_bits(
        merge(twins, tmp_path / "soup", "--soup", languages=("l1", "l2"), base=False)[0], load_state(bf16["task"])
    )


# -- wrong input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mu", "1", "2"], "--mu has 2 values for 1 --language_experts"),
        (["--beta", "0.5"], "--beta weighs the English expert"),
        (["--soup", "--gamma", "1"], "--soup makes no use of --gamma"),
        (["--task_arithmetic", "--key_ratio", "0.1"], "--task_arithmetic makes no use of --key_ratio"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(bf16, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        merge(bf16, tmp_path / "m", *flags)
    assert not list(tmp_path.iterdir())


def test_missing_base_is_refused(bf16, tmp_path):
    with pytest.raises(UserError, match="--base is needed"):
        merge(bf16, tmp_path / "m", base=False)


@pytest.mark.parametrize("flag", ["--key_ratio", "--tensor_ratio"])
@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "x", "1/0"])
def test_share_outside_zero_to_one_is_refused(flag, value):
    with pytest.raises(UserError, match=re.escape(f"expected a share from 0 to 1, got '{value}'")):
        baselines_maet.main(["--task_expert", "a", "--language_experts", "b", "--output", "c", f"{flag}={value}"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bf16, tmp_path, value):
    """A NaN sorts above every number and would take the whole of K."""
    config = tiny_config(layers=3)
    state = {name: tensor.float() for name, tensor in load_state(bf16["task"]).items()}
    state["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    broken = bf16 | {"task": save_expert(tmp_path / "broken", config, state)}
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight is not finite in .*broken"):
        merge(broken, tmp_path / "m")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["broken"]
