"""Layer swapping: the plan, the merged tensors, the merged model's behaviour, and the analysis."""

import csv
import json
import os
import shlex
import shutil
import subprocess

import pytest
import torch
from expert_folders import base_state, load_state, same_bits, save_expert, tiny_config, tuned

from mindmerger.baselines import layer_swap as baselines_layer_swap
from mindmerger.baselines.layer_swap import suggest_ends, swap_ends, swap_middle
from mindmerger.runtime.errors import UserError

LAYERS = 6


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Folders of a base, a math and a language expert, bf16 Llamas."""
    root = tmp_path_factory.mktemp("experts")
    config = tiny_config(layers=LAYERS)
    start = base_state(config)
    states = {"base": start, "math": tuned(start, 1), "language": tuned(start, 2)}
    return {name: save_expert(root / name, config, state) for name, state in states.items()}


def swap(experts, output, *flags):
    """Runs the command and returns the merged tensors."""
    arguments = ["--math_expert", experts["math"], "--language_expert", experts["language"], "--output", str(output)]
    assert baselines_layer_swap.main([*arguments, *map(str, flags)]) == 0
    return load_state(output)


def mean(first, second):
    return {name: (0.5 * first[name].float() + 0.5 * second[name].float()).to(first[name].dtype) for name in first}


# -- the plan


def test_defaults_for_32_layers_are_the_papers():
    expected = ["language"] * 5 + ["mix"] + ["math"] * 23 + ["mix"] + ["language"] * 2
    assert list(swap_ends(32, None, None, None, None)) == expected


def test_defaults_scale_with_depth_and_give_way_to_given_values():
    assert swap_ends(3, 1, 1, None, None) == ("language", "mix", "language")
    assert swap_ends(8, None, None, None, None) == ("language", "mix", *["math"] * 4, "mix", "language")
    assert swap_ends(4, 4, None, None, None) == ("language",) * 4
    assert swap_ends(1, None, None, None, None) == ("mix",)


def test_sizes_beyond_the_number_of_layers_are_refused_with_both_numbers():
    with pytest.raises(UserError, match="--bottom 5 --top 2 need 7 layers, the experts have 6"):
        swap_ends(6, 5, 2, None, None)


@pytest.mark.parametrize("span", ["2:7", "3:3", "4:2", "-1:3", "2", "a:b", ":", "1:2:3", "٢:٣"])
def test_unknown_layer_range_is_refused(span):
    with pytest.raises(UserError, match="not a range of layers: expected A:B with 0 <= A < B <= 6"):
        swap_middle(6, span, "language")


# -- the merged tensors


def test_every_tensor_equals_its_planned_source_bit_for_bit(experts, tmp_path):
    merged = swap(experts, tmp_path / "merged", "--bottom", 2, "--top", 1, "--head", "average", "--embeddings", "math")
    sources = {"math": load_state(experts["math"]), "language": load_state(experts["language"])}
    sources["mix"] = mean(sources["language"], sources["math"])
    layers = ["language", "language", "mix", "math", "mix", "language"]
    expected = {}
    for name in sources["math"]:
        parts = name.split(".")
        outside = "math" if "embed" in name else "mix"
        source = layers[int(parts[2])] if parts[1] == "layers" else outside
        expected[name] = sources[source][name]
    assert same_bits(merged, expected)
    plan = json.loads((tmp_path / "merged" / "merge.json").read_text())["plan"]
    assert plan["layers"] == layers
    assert plan["tensors"]["model.layers.2.mlp.up_proj.weight"] == plan["tensors"]["model.norm.weight"] == "mix"


def test_each_merge_is_to_be_evaluated_into_results_of_its_own(experts, tmp_path, capsys):
    """Results of two merges under one name are refused, so a hint without a name would fail at the second."""
    from mindmerger.evaluation.flags import build_parser

    places = set()
    for name in ("first", "second one"):
        swap(experts, tmp_path / name)
        hint = capsys.readouterr().err.split("python run_evaluation.py ")[1]
        args = build_parser().parse_args(shlex.split(hint))
        assert args.llm_only and args.llm_path == str(tmp_path / name)
        places.add(args.save_name)
    assert len(places) == 2


def test_mixed_tensors_are_the_weighted_fp32_mean_cast_once(experts, tmp_path):
    """Summing in bf16 rounds twice: some scalars then differ by one unit in the last place."""
    sizes = ["--bottom", 0, "--top", 0, "--transition_bottom", LAYERS, "--transition_top", 0]
    merged = swap(experts, tmp_path / "merged", *sizes, "--weight", "0.3")
    math_state, language_state = load_state(experts["math"]), load_state(experts["language"])
    name = "model.layers.3.self_attn.q_proj.weight"
    expected = (0.3 * language_state[name].float() + (1 - 0.3) * math_state[name].float()).bfloat16()
    assert torch.equal(merged[name], expected)
    assert not torch.equal(merged[name], 0.3 * language_state[name] + 0.7 * math_state[name])


def test_bottom_of_all_layers_gives_the_language_expert(experts, tmp_path):
    assert same_bits(swap(experts, tmp_path / "merged", "--bottom", LAYERS), load_state(experts["language"]))


def test_no_ends_and_math_outside_give_the_math_expert(experts, tmp_path):
    sizes = ["--bottom", 0, "--top", 0, "--transition_bottom", 0, "--transition_top", 0]
    merged = swap(experts, tmp_path / "merged", *sizes, "--embeddings", "math", "--head", "math")
    assert same_bits(merged, load_state(experts["math"]))


@pytest.mark.parametrize("weight", ["0.5", "0.3"])
def test_equal_experts_give_themselves(experts, tmp_path, weight):
    twins = {"math": experts["math"], "language": experts["math"]}
    flags = ["--bottom", 1, "--top", 1, "--transition_bottom", 2, "--embeddings", "average", "--weight", weight]
    assert same_bits(swap(twins, tmp_path / "merged", *flags), load_state(experts["math"]))


def test_middle_is_the_mirror_of_the_ends(experts, tmp_path):
    merged = swap(experts, tmp_path / "merged", "--middle", "2:4")
    expected = load_state(experts["math"])
    language = load_state(experts["language"])
    expected |= {name: language[name] for name in expected if name.startswith(("model.layers.2.", "model.layers.3."))}
    assert same_bits(merged, expected)
    other = swap(experts, tmp_path / "other", "--middle", "2:4", "--middle_from", "math")
    sizes = ["--bottom", 2, "--top", 2, "--transition_bottom", 0, "--transition_top", 0]
    assert same_bits(other, swap(experts, tmp_path / "ends", *sizes))


def test_middle_with_ends_is_refused(experts, tmp_path):
    with pytest.raises(UserError, match="--middle replaces --bottom"):
        swap(experts, tmp_path / "merged", "--middle", "2:4", "--bottom", "1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("middle", ["2:9", "x"])
def test_unknown_layer_range_leaves_nothing(experts, tmp_path, middle):
    with pytest.raises(UserError, match="--middle .* is not a range of layers"):
        swap(experts, tmp_path / "merged", "--middle", middle)
    assert not list(tmp_path.iterdir())


def test_hidden_state_after_the_bottom_equals_the_language_experts(experts, tmp_path):
    from transformers import AutoModelForCausalLM

    swap(experts, tmp_path / "merged", "--bottom", 3, "--top", 1)
    ids = torch.arange(3, 40).unsqueeze(0)
    hidden = {}
    for name, folder in (("merged", tmp_path / "merged"), ("language", experts["language"])):
        with torch.no_grad():
            hidden[name] = AutoModelForCausalLM.from_pretrained(folder)(ids, output_hidden_states=True).hidden_states
    # hidden_states[i] is the input of layer i: the first b layers and their output agree, then the ways part.
    for i in range(4):
        assert torch.equal(hidden["merged"][i], hidden["language"][i])
    assert not torch.equal(hidden["merged"][4], hidden["language"][4])


def test_head_of_tied_models_follows_the_embeddings(tmp_path, capsys):
    config = tiny_config(layers=2, tie_word_embeddings=True)
    start = base_state(config)
    pair = {n: save_expert(tmp_path / n, config, tuned(start, s)) for n, s in (("math", 1), ("language", 2))}
    merged = swap(pair, tmp_path / "merged", "--embeddings", "language", "--head", "math")
    math_state, language_state = load_state(pair["math"]), load_state(pair["language"])
    assert "lm_head.weight" not in merged
    assert torch.equal(merged["model.embed_tokens.weight"], language_state["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], math_state["model.norm.weight"])
    assert "tie the output head to the embeddings" in capsys.readouterr().err


def test_result_equals_mergekits(experts, tmp_path):
    """Five linear slices in mergekit are the same method; run it from its own environment with MERGEKIT_YAML."""
    program = os.environ.get("MERGEKIT_YAML") or shutil.which("mergekit-yaml")
    if program is None:
        pytest.skip("mergekit is not installed (LGPL, no dependency): set MERGEKIT_YAML to its mergekit-yaml program")
    merged = swap(experts, tmp_path / "ours", "--bottom", 2, "--top", 1)
    weights = [(0, 2, 0, 1), (2, 3, 0.5, 0.5), (3, 4, 1, 0), (4, 5, 0.5, 0.5), (5, 6, 0, 1)]
    slices = [
        {
            "sources": [
                {"model": experts[name], "layer_range": [start, stop], "parameters": {"weight": weight}}
                for name, weight in (("math", of_math), ("language", of_language))
            ]
        }
        for start, stop, of_math, of_language in weights
    ]
    recipe = {"merge_method": "linear", "slices": slices, "dtype": "float32", "out_dtype": "bfloat16"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [program, str(tmp_path / "recipe.yaml"), str(tmp_path / "theirs"), "--copy-tokenizer"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert same_bits(merged, load_state(tmp_path / "theirs"))


# -- the analysis


def test_analysis_equals_norms_worked_out_on_whole_matrices(experts, tmp_path):
    command = ["analyse", "--base", experts["base"], "--math_expert", experts["math"]]
    baselines_layer_swap.main(
        [*command, "--language_expert", experts["language"], "--output", str(tmp_path / "analysis")]
    )
    assert sorted(file.name for file in (tmp_path / "analysis").iterdir()) == [
        "changes.csv",
        "changes.png",
        "suggestion.json",
    ]
    states = {name: load_state(folder) for name, folder in experts.items()}
    rows = list(csv.DictReader((tmp_path / "analysis" / "changes.csv").open()))
    assert [(int(row["layer"]), row["kind"]) for row in rows] == [
        (layer, kind) for layer in range(LAYERS) for kind in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    for row in rows:
        part = "self_attn" if row["kind"] in "qkvo" else "mlp"
        name = f"model.layers.{row['layer']}.{part}.{row['kind']}_proj.weight"
        start = states["base"][name].double()
        for expert in ("math", "language"):
            expected = torch.linalg.norm(states[expert][name].double() - start) / torch.linalg.norm(start)
            assert float(row[expert]) == pytest.approx(expected.item(), rel=1e-12)


def test_analysis_suggests_the_ends_that_the_language_expert_moved_more(tmp_path):
    config = tiny_config(layers=6)
    start = base_state(config)
    language_moved = {0: 0.05, 1: 0.05, 5: 0.05}

    def moved(scale_of, seed):
        return {
            name: tuned({name: tensor}, seed, scale_of(int(name.split(".")[2])) if ".layers." in name else 0.01)[name]
            for name, tensor in start.items()
        }

    folders = {
        "base": save_expert(tmp_path / "base", config, start),
        "math": save_expert(tmp_path / "math", config, moved(lambda layer: 0.02, 1)),
        "language": save_expert(tmp_path / "language", config, moved(lambda layer: language_moved.get(layer, 0.01), 2)),
    }
    command = ["analyse", "--base", folders["base"], "--math_expert", folders["math"]]
    baselines_layer_swap.main(
        [*command, "--language_expert", folders["language"], "--output", str(tmp_path / "analysis")]
    )
    suggestion = json.loads((tmp_path / "analysis" / "suggestion.json").read_text())
    assert (suggestion["bottom"], suggestion["top"]) == (2, 1)
    assert sum(suggestion["share_of_change"]["language"]) == pytest.approx(1)


def test_suggested_ends_stop_at_the_first_layer_that_fails():
    assert suggest_ends([0.4, 0.1, 0.3, 0.2], [0.1, 0.4, 0.2, 0.3]) == (1, 0)
    assert suggest_ends([0.25] * 4, [0.25] * 4) == (0, 0)


def test_analysis_of_an_expert_that_equals_its_base_is_refused(experts, tmp_path):
    command = ["analyse", "--base", experts["base"], "--math_expert", experts["base"]]
    with pytest.raises(UserError, match="math expert .* does not differ from the base"):
        baselines_layer_swap.main(
            [*command, "--language_expert", experts["language"], "--output", str(tmp_path / "analysis")]
        )
    assert not list(tmp_path.iterdir())
