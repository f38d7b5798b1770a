"""Neuron statistics: counts against hand computation, step-by-step decoding, padding, families, files and plots."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_llm
from safetensors.numpy import load_file

from mindmerger.analysis import neurons as analysis_neurons
from mindmerger.analysis.activations import (
    find_activations,
    generated_mask,
    observe,
    observe_answers,
    observe_encoder,
    predicting_positions,
)
from mindmerger.analysis.neurons import peak_neurons
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError

WIDTH = 12


def tiny(family, **changes):
    """A random two-layer model of a family, without files."""
    import transformers as t

    torch.manual_seed(3)
    common = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    gated = common | {"intermediate_size": WIDTH, "num_key_value_heads": 2, "initializer_range": 0.3}
    gated |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | changes
    if family == "bloom":
        return t.BloomForCausalLM(
            t.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=4, initializer_range=0.3)
        ).eval()
    if family == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(**gated, num_local_experts=2)).eval()
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[family]
    return getattr(t, name + "ForCausalLM")(getattr(t, name + "Config")(**gated)).eval()


@pytest.fixture(scope="module")
def merged(tmp_path_factory, tiny_llm, tiny_encoder):
    """A MindMerger between the tiny models, with a mapping that matters, and its saved folder."""
    torch.manual_seed(5)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)
    folder = tmp_path_factory.mktemp("neurons") / "mapping"
    model.save_pretrained(folder)
    model.folder = str(folder)
    return model


def padded(rows, side, pad=0):
    """Ids (B, n) and mask (B, n) of lists of ids, padded on one side."""
    width = max(map(len, rows))
    fill = [[pad] * (width - len(row)) for row in rows]
    ids = [f + row if side == "left" else row + f for row, f in zip(rows, fill, strict=True)]
    mask = [[0] * len(f) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(f)
            for row, f in zip(rows, fill, strict=True)]  # fmt: skip
    return torch.tensor(ids), torch.tensor(mask)


ROWS = [[5, 9, 14, 7, 30], [21, 4], [8, 8, 33, 12]]


# -- the hook


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "bloom"])
def test_logits_with_and_without_hooks_are_equal(family):
    """A hook that returns what it computes replaces the activation, and every later layer is wrong."""
    model = tiny(family)
    ids = torch.tensor([ROWS[0]])
    plain = model(ids).logits
    with observe(model, torch.arange(5), torch.zeros(5, dtype=torch.long), 1) as seen:
        hooked = model(ids).logits
    assert torch.equal(plain, hooked)
    assert 0 < int(seen.counts.sum()) < seen.counts.numel() * 5
    assert seen.counts.dtype == torch.int64
    assert torch.equal(model(ids).logits, plain) and not any(m._forward_hooks for m in model.modules())


def test_counts_equal_a_hand_computation_from_the_weights():
    """Attention is switched off, so that a few lines of numpy are the whole model."""
    model = tiny("llama")
    layers = model.model.layers
    for layer in layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.post_attention_layernorm.weight.data.uniform_(0.5, 2)
    x = model.get_input_embeddings().weight.detach().double().numpy()[ROWS[0]]
    expected = []
    for layer in layers:
        w = {k: v.detach().double().numpy() for k, v in layer.mlp.named_parameters()}
        scale = layer.post_attention_layernorm.weight.detach().double().numpy()
        h = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.rms_norm_eps) * scale
        gate = h @ w["gate_proj.weight"].T
        expected.append((gate[1:4] > 0).sum(0))
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up_proj.weight"].T)) @ w["down_proj.weight"].T
    with observe(model, torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.long), 1) as seen:
        model(torch.tensor([ROWS[0]]))
    assert np.array_equal(seen.counts.numpy(), np.array(expected))
    assert seen.tokens.tolist() == [3]


@pytest.mark.parametrize(
    ("family", "name"), [("bloom", "dense_h_to_4h"), ("qwen2", "gate_proj"), ("mistral", "gate_proj")]
)
def test_a_neuron_is_active_where_its_branch_before_the_product_is_positive(family, name):
    model = tiny(family)
    before = []
    for key, module in model.named_modules():
        if key.endswith(name):
            module.register_forward_hook(lambda m, i, output: before.append((output > 0).flatten(0, 1).sum(0)))
    with observe(model, torch.arange(5), torch.zeros(5, dtype=torch.long), 1) as seen:
        model(torch.tensor([ROWS[0]]))
    assert torch.equal(seen.counts, torch.stack(before))


def test_a_fused_mlp_that_never_calls_its_activation_is_an_error():
    """Silently, its neurons would count as never active."""
    model = tiny("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    with (
        pytest.raises(UserError, match=r"layer 1 was never called \(1 of 2 layers\).*fused"),
        observe(model, torch.arange(5), torch.zeros(5, dtype=torch.long), 1),
    ):
        model(torch.tensor([ROWS[0]]))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_mixture_of_experts_is_refused_by_name():
    with pytest.raises(UserError, match="mixtral model: 0 MLPs of a known form in 2 layers; known are Llama"):
        find_activations(tiny("mixtral"))


def test_layers_that_share_an_activation_module_are_refused():
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = model.model.layers[0].mlp.act_fn
    with pytest.raises(UserError, match="share one activation module"):
        find_activations(model)


# -- which positions


def test_positions_are_those_that_predict_a_token():
    positions, rows = predicting_positions(torch.tensor([3, 1]), torch.tensor([2, 4]))
    # Rows of length 5: row 0 predicts at 2 and 3; row 1 at 0 to 3.
    assert positions.tolist() == [2, 3, 5, 6, 7, 8]
    assert rows.tolist() == [0, 0, 1, 1, 1, 1]


def test_what_follows_the_end_token_is_not_counted():
    """A pad id that is an ordinary token, or EOS again, must not be counted as generated."""
    ids = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 2], [5, 6, 7, 8], [7, 5, 5, 5]])
    assert generated_mask(ids, [2]).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert generated_mask(ids, [2, 7]).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]]


def step_by_step(model, inputs, steps):
    """Counts of one row decoded with a cache, one token at a time, as `generate` does."""
    plan = model.plan_input(inputs.get("encoder_attention_mask"), inputs.get("prompt_mask"))
    embeds, _ = model._segments(plan, inputs.get("encoder_input_ids"), inputs.get("prompt_ids"))
    fed, cache, total, made = torch.cat(embeds, 1), None, 0, 0
    with torch.no_grad():
        for _ in range(steps):
            last = torch.tensor([fed.shape[1] - 1])
            with observe(model.llm, last, torch.zeros(1, dtype=torch.long), 1) as seen:
                out = model.llm(inputs_embeds=fed, past_key_values=cache, use_cache=True)
            total, made, cache = total + seen.counts, made + 1, out.past_key_values
            token = int(out.logits[0, -1].argmax())
            if token in model.eos_token_ids:
                break
            fed = model.llm.get_input_embeddings()(torch.tensor([[token]]))
    return total, made


@pytest.mark.parametrize("form", ["llm_only", "hard", "soft"])
def test_one_full_pass_counts_what_step_by_step_decoding_counts(merged, form):
    inputs = {}
    if form != "llm_only":
        ids = torch.tensor([ROWS[2]])
        inputs |= {"encoder_input_ids": ids, "encoder_attention_mask": torch.ones_like(ids)}
    if form != "hard":
        ids = torch.tensor([ROWS[0]])
        inputs |= {"prompt_ids": ids, "prompt_mask": torch.ones_like(ids)}
    expected, made = step_by_step(merged, inputs, 6)
    seen = observe_answers(merged, inputs, 6)
    assert torch.equal(seen.counts, expected)
    assert seen.tokens.tolist() == [made]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_and_padded_counts_equal_one_by_one(merged, side):
    prompts, prompt_mask = padded(ROWS, side)
    sources, source_mask = padded(ROWS[::-1], side)
    names = ("encoder_input_ids", "encoder_attention_mask", "prompt_ids", "prompt_mask")
    whole = dict(zip(names, (sources, source_mask, prompts, prompt_mask), strict=True))
    batched = observe_answers(merged, whole, 5)
    counts = 0
    for i in range(3):
        pieces = [torch.tensor([ROWS[2 - i]]), torch.tensor([ROWS[i]])]
        one = {"encoder_input_ids": pieces[0], "prompt_ids": pieces[1]}
        one |= {"encoder_attention_mask": torch.ones_like(pieces[0]), "prompt_mask": torch.ones_like(pieces[1])}
        single = observe_answers(merged, one, 5)
        assert torch.equal(single.row_counts[0], batched.row_counts[i])
        counts = counts + single.counts
    assert torch.equal(batched.counts, counts)
    encoder = observe_encoder(merged, whole)
    singles = [
        observe_encoder(
            merged,
            {"encoder_input_ids": torch.tensor([row]), "encoder_attention_mask": torch.ones(1, len(row)).long()},
        )
        for row in ROWS[::-1]
    ]
    assert torch.equal(encoder.counts, sum(one.counts for one in singles))
    assert encoder.tokens.tolist() == [4, 2, 5]


def test_a_left_padded_llm_counts_no_padding():
    """The hook itself knows no mask: positions must be those of real tokens wherever padding stands."""
    model = tiny("llama")
    ids, mask = padded(ROWS, "left")
    rows, columns = torch.nonzero(mask, as_tuple=True)
    with torch.no_grad(), observe(model, rows * ids.shape[1] + columns, rows, 3) as seen:
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    total = 0
    for row in ROWS:
        with torch.no_grad(), observe(model, torch.arange(len(row)), torch.zeros(len(row)).long(), 1) as one:
            model(torch.tensor([row]))
        total = total + one.counts
    assert torch.equal(seen.counts, total)


# -- the commands


@pytest.fixture(scope="module")
def counted(merged, datas, tmp_path_factory):
    """Folders that the count command left for the LLM alone, Hard, Soft and PMI-1 on the same items."""
    root = tmp_path_factory.mktemp("counted")
    common = ["count", "--task", "math", "--data_root", datas, "--languages", "sw,th", "--limit", "2"]
    common += ["--max_new_tokens", "3", "--llm_path", merged.config.llm_path, "--results_dir", str(root)]
    common += ["--precision", "fp32"]
    mapping = ["--mt_path", merged.config.mt_path, "--init_checkpoint", merged.folder]
    for flags in (
        ["--llm_only"],
        [*mapping, "--augmentation", "False"],
        [*mapping, "--augmentation", "True"],
        ["--llm_only", "--parallel_input", "1", "--translations", "aligned"],
        [*mapping, "--tower", "encoder"],
    ):
        assert analysis_neurons.main(common + flags) == 0
    return root / "MindMerger"


FORMS = ("math_mgsm-llm_only", "math_mgsm-hard", "math_mgsm", "math_mgsm-pmi1-oracle")


def test_sum_of_counts_is_active_share_times_width_times_tokens(counted):
    for name in FORMS:
        folder = counted / name / "neurons"
        assert {path.name for path in folder.iterdir()} == {"neurons.safetensors", "proportion.jsonl", "run.json"}
        tensors = load_file(folder / "neurons.safetensors")
        layers, width = tensors["counts"].shape
        assert (layers, width) == (2, 64) and tensors["counts"].dtype == np.int64
        items = [json.loads(line) for line in (folder / "proportion.jsonl").read_text().splitlines()]
        assert [item["id"] for item in items] == ["sw-1", "sw-2", "th-1", "th-2"]
        assert int(tensors["tokens"][0]) == sum(item["tokens"] for item in items) <= 4 * 3
        for layer in range(layers):
            active = sum(round(item["active_share_per_layer"][layer] * width * item["tokens"]) for item in items)
            assert tensors["counts"][layer].sum() == active
        run = analysis_neurons.read_counts(folder)
        assert np.array_equal(run.shares() * width * run.tokens["all"], tensors["counts"].sum(1))
        assert np.array_equal(tensors["counts"], tensors["counts.sw"] + tensors["counts.th"])
        assert tensors["counts"].max() <= tensors["tokens"][0]


def test_the_encoder_is_counted_on_every_token_of_the_questions(counted, datas):
    run = analysis_neurons.read_counts(counted / "math_mgsm/neurons-encoder")
    assert run.tower == "encoder" and run.counts["all"].shape == (2, 32)
    questions = [
        line.split("\t")[0]
        for code in ("sw", "th")
        for line in Path(datas, f"evaluation/mgsm/mgsm_{code}.tsv").read_text(encoding="utf-8").split("\n")[:2]
    ]
    assert run.tokens["all"] == sum(min(len(question.encode()) + 1, 512) for question in questions)


def test_several_runs_come_into_one_plot_and_one_table(counted, tmp_path, capsys):
    folders = [str(counted / name / "neurons") for name in FORMS]
    assert analysis_neurons.main(["analyse", *folders, "--peak", "0.1", "--output_dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "active_share.csv",
        "active_share.png",
        "peak.csv",
        "rank_count.png",
        "peak_per_layer.png",
        *(f"heatmap-{i}.png" for i in range(1, 5)),
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    out = capsys.readouterr().out
    for name in ("LLM alone:", "MindMerger-Hard:", "MindMerger-Soft:", "LLM alone, PMI-1 (oracle):"):
        assert name in out
    rows = (tmp_path / "active_share.csv").read_text().splitlines()
    # Four runs, three languages (all, sw, th), two layers and their mean.
    assert len(rows) == 1 + 4 * 3 * 3
    peaks = (tmp_path / "peak.csv").read_text().splitlines()
    assert len(peaks) == 1 + 4 * int(128 * 0.1)


def test_peak_orders_by_count_then_layer_then_neuron():
    counts = np.array([[1, 5, 5], [9, 5, 0]])
    assert peak_neurons(counts, 1.0) == [(1, 0, 9), (0, 1, 5), (0, 2, 5), (1, 1, 5), (0, 0, 1), (1, 2, 0)]
    assert peak_neurons(counts, 0.5) == [(1, 0, 9), (0, 1, 5), (0, 2, 5)]
    assert peak_neurons(counts, 0.49) == [(1, 0, 9), (0, 1, 5)]


def test_a_border_among_equal_counts_is_announced(counted, tmp_path, capsys):
    """Ties go to the lower layers: a plot of kept neurons per layer would then show the rule and not the model."""
    alone = str(counted / FORMS[0])
    assert analysis_neurons.main(["analyse", alone, "--peak", "0.02", "--output_dir", str(tmp_path)]) == 0
    run = analysis_neurons.read_counts(alone)
    flat = np.sort(run.counts["all"].reshape(-1))[::-1]
    assert flat[1] == flat[2], "the two kept neurons are not tied with a third one here"
    assert f"have the count {flat[1]} at which --peak 0.02 ends" in capsys.readouterr().err
    assert analysis_neurons.main(["analyse", alone, "--peak", "1e-9", "--output_dir", str(tmp_path)]) == 0
    assert f"--peak 1e-09 of {flat.size} neurons keeps none" in capsys.readouterr().err


def test_a_heatmap_of_more_neurons_than_columns_shows_means(tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 10, size=(3, 2 * analysis_neurons._HEATMAP_COLUMNS + 7))
    run = analysis_neurons.Counts("wide", "llm", {"all": counts}, {"all": 10}, [])
    analysis_neurons.draw_heatmap(run, tmp_path / "wide.png")
    assert (tmp_path / "wide.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_input_of_the_commands_is_one_line(counted, merged, datas, tmp_path):
    alone, hard = (str(counted / name / "neurons") for name in FORMS[:2])
    few = ["count", "--llm_only", "--llm_path", merged.config.llm_path, "--data_root", datas, "--languages", "sw"]
    few += ["--limit", "1", "--max_new_tokens", "2", "--output_dir", str(tmp_path / "few")]
    assert analysis_neurons.main(few) == 0
    for arguments, message in (
        ([], "say what to do"),
        (few, "few holds counts already: pass --overwrite"),
        ([*few, "--tower", "encoder"], "needs an encoder"),
        ([*few, "--score_gold"], "greedy answers alone: leave --score_gold out"),
        (["analyse", str(tmp_path)], "holds no counts: neurons.safetensors is missing"),
        (["analyse", "/nonexistent"], "^/nonexistent holds no counts: neurons.safetensors is missing"),
        (["analyse", alone, str(tmp_path / "few"), "--names", "a", "b"], r"few \(1 items\).*different items"),
        (["analyse", alone, str(counted / "math_mgsm/neurons-encoder")], "counts the encoder"),
        (["analyse", alone, alone], "one name"),
        (["analyse", alone, hard, "--names", "x"], "1 names for 2 folders"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            analysis_neurons.main(arguments)
        assert "\n" not in str(caught.value)


def test_half_precision_models_are_counted_too(tmp_path, datas):
    llm = make_tiny_llm(tmp_path / "llm")
    flags = ["--llm_path", llm, "--data_root", datas, "--languages", "sw", "--limit", "1", "--max_new_tokens", "2"]
    assert (
        analysis_neurons.main(
            ["count", "--llm_only", "--precision", "bf16", "--output_dir", str(tmp_path / "n"), *flags]
        )
        == 0
    )
    assert analysis_neurons.read_counts(tmp_path / "n").tokens["all"] in (1, 2)
