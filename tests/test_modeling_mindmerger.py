"""The model: parity with the published implementation, every family of encoder and LLM, files."""

import json
import pickle

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file

from mindmerger.bridges import BridgeOutput, Mapping
from mindmerger.hub.model_files import ModelError
from mindmerger.model.loss import ChunkedCrossEntropy, head_on_positions
from mindmerger.model.mapping_files import read_config, save_released
from mindmerger.model.mindmerger import MindMerger
from mindmerger.model.packing import plan_packing, take_rows
from mindmerger.model.towers import load_encoder, load_llm, max_positions

CASES = {"mt5-llama": "mt5-tiny", "m2m100-llama-gqa": "nllb-tiny"}


def parity_case(name):
    """Model with the published mapping, and the tensors of the golden file."""
    folder = DATA / "parity" / name
    model = MindMerger.from_models(str(folder / CASES[name]), str(folder / "llm-tiny"))
    model.load_mapping(str(folder / "pytorch_model.bin"))
    return model, load_file(folder / "golden.safetensors"), load_file(folder / "curve.safetensors")


def pick(golden, *names):
    """The named inputs of a golden file as keyword arguments."""
    return {name: golden[name] for name in names}


ENCODER = ("encoder_input_ids", "encoder_attention_mask")
TARGET = ("target_ids", "target_mask")
PROMPT = ("prompt_ids", "prompt_mask")
STAGES = {"mapping": (), "augmentation": PROMPT}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_greedy_ids_equal_the_published_implementation(case, stage):
    model, golden, _ = parity_case(case)
    out = model(**pick(golden, *ENCODER, *TARGET, *STAGES[stage]))
    out.loss.backward()
    assert abs(out.loss.item() - golden[f"{stage}.loss"].item()) <= 1e-5
    for name, parameter in model.mapping.named_parameters():
        expected = golden[f"{stage}.grad.{name}"]
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name
    ids = model.generate(**pick(golden, *ENCODER, *STAGES[stage]), max_new_tokens=12)
    assert torch.equal(ids, golden[f"{stage}.generated_ids"])
    assert torch.equal(out.loss, out.loss_sum / out.target_tokens)
    assert out.target_tokens.item() == golden["target_mask"].sum().item()


@pytest.mark.parametrize("case", CASES)
def test_twenty_adamw_steps_follow_the_published_curve(case):
    model, golden, curve = parity_case(case)
    optimizer = torch.optim.AdamW(model.mapping.parameters(), lr=1e-3, betas=(0.8, 0.999), eps=1e-8, weight_decay=3e-7)
    losses = []
    for step in range(20):
        out = model(**pick(golden, *ENCODER, *TARGET, *(PROMPT if step >= 10 else ())))
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.mapping.parameters(), 1.0)
        optimizer.step()
        losses.append(out.loss.detach())
    assert (torch.stack(losses) - curve["losses"]).abs().max() <= 1e-4
    for name, parameter in model.mapping.named_parameters():
        assert (parameter - curve[f"final.{name}"]).abs().max() <= 1e-4, name


# -- families: every model is made from its config with random weights and goes through a saved folder

SMALL = {"vocab_size": 120, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.2,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4}
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLMS = {
    "llama": ("Llama", {**DECODER, "num_key_value_heads": 4}),
    "llama-gqa-tied": ("Llama", {**DECODER, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**DECODER, "sliding_window": 8}),
    "qwen2": ("Qwen2", DECODER),
    "qwen3": ("Qwen3", DECODER),
    "gemma2": ("Gemma2", {**DECODER, "sliding_window": 8, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3Text", {**DECODER, "sliding_window": 8}),
    "gpt2": ("GPT2", {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}),
    "opt": (
        "OPT",
        {
            **SMALL,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,  # as OPT-350m: embeddings narrower than the layers
            "init_std": 0.2,
        },
    ),
}
ENCODERS = {
    "mt5": ("MT5", {**SMALL, **T5}),
    "umt5": ("UMT5", {**SMALL, **T5}),
    "t5": ("T5", {**SMALL, **T5}),
    "m2m100": ("M2M100", {**SMALL, **BART, "decoder_start_token_id": 2}),
    "mbart": ("MBart", {**SMALL, **BART, "decoder_start_token_id": 2, "max_position_embeddings": 64}),
    "xlm-roberta": ("XLMRoberta", {**SMALL, **BERT}),
    "bert": ("Bert", {**SMALL, **BERT}),
    "xglm": (
        "XGLM",
        {**SMALL, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "init_std": 0.2},
    ),
    "mgpt": ("GPT2", {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}),
}
# The class a hub folder was saved from: not the one that loads it.
SAVED_AS = {"MT5": "ForConditionalGeneration", "UMT5": "ForConditionalGeneration", "T5": "ForConditionalGeneration"}
SAVED_AS |= {"M2M100": "ForConditionalGeneration", "MBart": "ForConditionalGeneration"}
SAVED_AS |= {"XLMRoberta": "ForMaskedLM", "Bert": "ForMaskedLM", "XGLM": "ForCausalLM", "GPT2": "LMHeadModel"}


def make_folder(folder, family, settings, suffix):
    """Saves a random model of a family and returns its folder."""
    import transformers

    torch.manual_seed(7)
    config_name = family + "Config"
    config = getattr(transformers, config_name)(**settings)
    model = getattr(transformers, family.replace("Gemma3Text", "Gemma3") + suffix)(config)
    model.save_pretrained(folder)
    return str(folder), model.eval()


def make_pair(tmp_path, encoder, llm):
    """A MindMerger of two named families, with a mapping that is not at its start."""
    name, settings = ENCODERS[encoder]
    encoder_folder, _ = make_folder(tmp_path / "encoder", name, settings, SAVED_AS[name])
    name, settings = LLMS[llm]
    llm_folder, _ = make_folder(tmp_path / "llm", name, settings, "LMHeadModel" if name == "GPT2" else "ForCausalLM")
    torch.manual_seed(3)
    model = MindMerger.from_models(encoder_folder, llm_folder, dtype=torch.float32)
    torch.nn.init.normal_(model.mapping.end_boundary)
    torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)
    return model


def rows(seed=0, sizes=((5, 3, 4), (9, 7, 2), (2, 1, 6), (7, 4, 1), (1, 6, 3), (4, 4, 4), (8, 2, 5), (3, 5, 2))):
    """Token ids of source, prompt and target for each row, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(3, 120, (n,), generator=generator).tolist() for n in row] for row in sizes]


def batch(examples, side, with_prompt=True, with_target=True):
    """Rows padded on one side, as keyword arguments of forward or generate."""
    tensors = {}
    for i, (ids, mask) in enumerate(
        zip((ENCODER[0], PROMPT[0], TARGET[0]), (ENCODER[1], PROMPT[1], TARGET[1]), strict=True)
    ):
        if (i == 1 and not with_prompt) or (i == 2 and not with_target):
            continue
        longest = max(len(row[i]) for row in examples) + 1  # one column of padding in every row
        pads = [longest - len(row[i]) for row in examples]
        place = {"right": lambda row, pad, fill: row + [fill] * pad, "left": lambda row, pad, fill: [fill] * pad + row}[
            side
        ]
        tensors[ids] = torch.tensor([place(row[i], pad, 0) for row, pad in zip(examples, pads, strict=True)])
        tensors[mask] = torch.tensor(
            [place([1] * len(row[i]), pad, 0) for row, pad in zip(examples, pads, strict=True)]
        )
    return tensors


def check_padding_and_batch_size_change_nothing(model):
    examples = rows()
    reference = model(**batch(examples, "right"))
    left = model(**batch(examples, "left"))
    alone = [model(**batch([example], "left")) for example in examples]
    assert torch.isfinite(reference.loss)
    assert abs(left.loss.item() - reference.loss.item()) <= 1e-5
    assert (
        abs(sum(out.loss_sum.item() for out in alone) / reference.target_tokens.item() - reference.loss.item()) <= 1e-5
    )
    for with_prompt in (True, False):
        options = {"with_prompt": with_prompt, "with_target": False}
        ids = model.generate(**batch(examples, "right", **options), max_new_tokens=6)
        assert torch.equal(model.generate(**batch(examples, "left", **options), max_new_tokens=6), ids)
        for i, example in enumerate(examples):
            one = model.generate(**batch([example], "left", **options), max_new_tokens=6)[0]
            assert torch.equal(one, ids[i, : len(one)]), f"row {i}"
            assert (ids[i, len(one) :] == model.pad_token_id).all()


@pytest.mark.parametrize("llm", LLMS)
def test_padding_side_and_batch_size_change_nothing_for_llm(tmp_path, llm):
    check_padding_and_batch_size_change_nothing(make_pair(tmp_path, "mt5", llm))


@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name != "mt5"])
def test_padding_side_and_batch_size_change_nothing_for_encoder(tmp_path, encoder):
    check_padding_and_batch_size_change_nothing(make_pair(tmp_path, encoder, "llama"))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoder_half_gives_the_states_of_the_whole_model(tmp_path, encoder):
    """Loading half a checkpoint may leave weights random without an error (M2M100 does, by its key names)."""
    name, settings = ENCODERS[encoder]
    folder, whole = make_folder(tmp_path / "encoder", name, settings, SAVED_AS[name])
    llm = make_folder(tmp_path / "llm", *LLMS["llama"], "ForCausalLM")[0]
    model = MindMerger.from_models(folder, llm, dtype=torch.float32)
    half = whole.get_encoder() if whole.config.is_encoder_decoder else whole.base_model
    ids, mask = torch.tensor([[5, 9, 40, 7, 2, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        expected = half(input_ids=ids[:, :5], attention_mask=mask[:, :5]).last_hidden_state
    (states,), packed_mask = model.encode(ids, mask)
    assert torch.allclose(states, expected, atol=1e-6)
    assert packed_mask.tolist() == [[1, 1, 1, 1, 1]]
    assert sum(p.numel() for p in model.encoder.parameters()) < sum(p.numel() for p in whole.parameters()) or name in (
        "XGLM",
        "GPT2",
    )


@pytest.mark.parametrize("llm", ["gemma2", "gemma3", "llama", "gpt2"])
def test_merged_embeddings_give_the_loss_of_plain_token_ids(tmp_path, llm):
    """Embedding scales (Gemma) are applied exactly once, and selecting positions before the head changes nothing."""
    model = make_pair(tmp_path, "mt5", llm)
    prompt, target = [5, 6, 7, 8], [9, 10, 11]
    # The mapping is bypassed: its output is what the LLM's own embedding gives for the prompt's tokens.
    own = model.llm.get_input_embeddings()(torch.tensor([prompt]))
    model.mapping.forward = lambda states, mask: BridgeOutput(own, torch.ones(1, 4, dtype=torch.long))
    out = model(
        encoder_input_ids=torch.tensor([[4, 5, 2]]),
        encoder_attention_mask=torch.ones(1, 3, dtype=torch.long),
        target_ids=torch.tensor([target]),
        target_mask=torch.ones(1, 3, dtype=torch.long),
    )
    ids = torch.tensor([[1, *prompt, *target]])
    logits = model.llm(input_ids=ids).logits[0, 4:7]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")
    assert torch.allclose(out.loss_sum, expected, atol=1e-5)


def test_towers_are_frozen_and_in_eval_mode_whatever_is_asked(tiny_encoder, tiny_llm):
    """The published code trains with the encoder's dropout on."""
    model = MindMerger.from_models(tiny_encoder, tiny_llm).train()
    assert model.mapping.training
    assert not any(module.training for tower in (model.encoder, model.llm) for module in tower.modules())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"mapping.{name}" for name, _ in Mapping(2, 2).named_parameters()}
    width, llm_width = model.config.encoder_width, model.config.llm_width
    expected = width * 2 * width + 2 * width + 2 * width * llm_width + llm_width + llm_width
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_published_size_of_the_trained_part():
    with torch.device("meta"):
        mapping = Mapping(2048, 4096)
    assert sum(p.numel() for p in mapping.parameters()) == 25_178_112


def test_bf16_towers_leave_the_mapping_in_fp32(tiny_encoder, tiny_llm):
    model = MindMerger.from_models(tiny_encoder, tiny_llm, dtype=torch.bfloat16)
    out = model(**batch(rows(), "right"))
    out.loss.backward()
    assert {p.dtype for p in model.mapping.parameters()} == {torch.float32}
    assert {p.dtype for tower in (model.encoder, model.llm) for p in tower.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p.grad).all() for p in model.mapping.parameters())
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("llm", ["llama", "opt"])
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, llm):
    """transformers' switch does nothing in eval mode; OPT's layers would apply dropout in train mode."""
    model = make_pair(tmp_path, "mt5", llm)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**batch(rows(), "right")).loss.backward()
        gradients.append([p.grad.clone() for p in model.mapping.parameters()])
        saved = len(gradients)
        model.gradient_checkpointing_enable()
    assert saved == 2
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
    saved_tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved_tensors.append(t.numel()) or t, lambda t: t):
        model(**batch(rows(), "right"))
    recomputed = sum(saved_tensors)
    plain_model = make_pair(tmp_path, "mt5", llm)
    saved_tensors.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved_tensors.append(t.numel()) or t, lambda t: t):
        plain_model(**batch(rows(), "right"))
    assert recomputed < 0.5 * sum(saved_tensors)


def test_packing_keeps_order_and_closes_every_gap():
    masks = [torch.tensor([[1], [1]]), torch.tensor([[0, 1, 1], [1, 0, 0]]), torch.tensor([[1, 0], [1, 1]])]
    values = torch.arange(12).view(2, 6, 1).float()
    for side, expected in (("right", [[0, 2, 3, 4], [6, 7, 10, 11]]), ("left", [[0, 2, 3, 4], [6, 7, 10, 11]])):
        plan = plan_packing(masks, side, target_segment=2)
        assert take_rows(values, plan.source_BL).squeeze(-1).tolist() == expected
        assert plan.predictor_M.tolist() == [2, 5, 6]
    masks[1] = torch.tensor([[0, 0, 1], [1, 0, 0]])
    assert plan_packing(masks, "left").mask_BL.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert plan_packing(masks, "right").mask_BL.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_head_that_is_never_called_is_an_error():
    with pytest.raises(RuntimeError, match="0 times"), head_on_positions(torch.nn.Linear(2, 2), torch.tensor([0])):
        pass


def test_generation_ignores_sampling_settings_of_the_llm_folder(tmp_path, tiny_encoder):
    folder, _ = make_folder(tmp_path / "llm", *LLMS["llama"], "ForCausalLM")
    settings = {
        "do_sample": True,
        "temperature": 5.0,
        "repetition_penalty": 9.0,
        "num_beams": 3,
        "eos_token_id": [2, 3],
    }
    plain = MindMerger.from_models(tiny_encoder, folder)
    state = plain.mapping.state_dict()
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps(settings))
    model = MindMerger.from_models(tiny_encoder, folder)
    model.mapping.load_state_dict(state)
    assert model.eos_token_ids == [2, 3]
    model.llm.generation_config.eos_token_id = [2]
    arguments = batch(rows(), "right", with_target=False)
    assert torch.equal(model.generate(**arguments, max_new_tokens=8), plain.generate(**arguments, max_new_tokens=8))
    with pytest.raises(ModelError, match="greedy"):
        model.generate(**arguments, do_sample=True)


def test_llm_alone_reads_bos_and_prompt(tiny_llm):
    model = MindMerger.from_models(None, tiny_llm)
    prompt = torch.tensor([[5, 6, 7]])
    ids = model.generate(prompt_ids=prompt, prompt_mask=torch.ones_like(prompt), max_new_tokens=5)
    expected = model.llm.generate(input_ids=torch.tensor([[1, 5, 6, 7]]), max_new_tokens=5, do_sample=False)[:, 4:]
    assert torch.equal(ids, expected)
    with pytest.raises(ModelError, match="needs"):
        model.generate()
    with pytest.raises(ModelError, match="greedy: do_sample=True is not available"):
        model.generate(prompt_ids=prompt, prompt_mask=torch.ones_like(prompt), do_sample=True)


def test_a_t5_in_fp16_is_refused_before_its_weights_load(tiny_encoder, monkeypatch):
    """Its activations overflow there: every answer would be of NaN."""
    monkeypatch.setattr("mindmerger.model.towers._from_pretrained", None)
    with pytest.raises(ModelError, match="overflows in fp16, use bf16 or fp32"):
        load_encoder(tiny_encoder, torch.float16)


def test_a_mapping_without_a_config_names_the_way_to_load_it(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json: use from_models and load_mapping"):
        MindMerger.from_pretrained(str(tmp_path))


def test_bos_is_the_tokenizers_where_the_folder_has_one(tmp_path):
    """Qwen2's config names a BOS that its tokenizer does not have."""
    from conftest import byte_tokenizer

    folder, _ = make_folder(tmp_path / "llm", *LLMS["qwen2"], "ForCausalLM")
    assert MindMerger.from_models(None, folder).bos_token_id == 1
    byte_tokenizer(folder, {"eos_token": "</s>"})
    model = MindMerger.from_models(None, folder)
    assert model.bos_token_id is None
    prompt = torch.tensor([[5, 6, 7]])
    expected = model.llm.generate(input_ids=prompt, max_new_tokens=5, do_sample=False)[:, 3:]
    assert torch.equal(
        model.generate(prompt_ids=prompt, prompt_mask=torch.ones_like(prompt), max_new_tokens=5), expected
    )


# -- files


def test_saved_folder_rebuilds_the_same_model(tmp_path, tiny_encoder, tiny_llm):
    torch.manual_seed(5)
    model = MindMerger.from_models(tiny_encoder, tiny_llm + "/")
    model.config.stage, model.config.task, model.config.augmentation = "augmentation", "math", True
    model.save_pretrained(str(tmp_path / "saved"))
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["README.md", "config.json", "mapping.safetensors"]
    again = MindMerger.from_pretrained(str(tmp_path / "saved"))
    assert again.config == model.config
    assert again.config.llm_path == tiny_llm
    for (name, a), (_, b) in zip(model.mapping.named_parameters(), again.mapping.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    arguments = batch(rows(), "right")
    assert model(**arguments).loss == again(**arguments).loss


def test_released_format_goes_both_ways(tmp_path, tiny_encoder, tiny_llm):
    model = MindMerger.from_models(tiny_encoder, tiny_llm)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.mapping.state_dict().items()}
    save_released(tmp_path / "pytorch_model.bin", state)
    assert (tmp_path / "pytorch_model.bin").read_bytes()[:2] != b"PK", "the released files are in the legacy format"
    content = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert set(content) == {"model_state_dict"}
    assert sorted(content["model_state_dict"]) == sorted(state)
    model.load_mapping(str(tmp_path / "pytorch_model.bin"))
    assert {p.dtype for p in model.mapping.parameters()} == {torch.float32}
    for name, parameter in model.mapping.named_parameters():
        assert torch.equal(parameter, state[name].float())


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def wrong_width(state):
    state["mlp.linear2.bias"] = torch.zeros(7)


def missing_key(state):
    del state["end_boundary"]


def extra_key(state):
    state["mlp.linear3.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(wrong_width, r"\(7,\).*\(32,\)"), (missing_key, "end_boundary"), (extra_key, "linear3")],
)
def test_a_mapping_that_does_not_fit_is_refused_by_name(tmp_path, tiny_encoder, tiny_llm, damage, message):
    model = MindMerger.from_models(tiny_encoder, tiny_llm)
    state = dict(model.mapping.state_dict())
    damage(state)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        model.load_mapping(str(tmp_path / "m.safetensors"))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, tiny_encoder, tiny_llm):
    model = MindMerger.from_models(tiny_encoder, tiny_llm)
    witness = tmp_path / "executed"
    torch.save({"model_state_dict": Payload(witness)}, tmp_path / "new.bin")
    torch.save({"model_state_dict": Payload(witness)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Payload(witness)))
    for name in ("new", "old", "plain"):
        with pytest.raises(ModelError, match="could run code") as caught:
            model.load_mapping(str(tmp_path / f"{name}.bin"))
        assert "\n" not in str(caught.value)
    assert not witness.exists()


def test_an_encoder_without_flash_attention_leaves_it_to_the_llm(tiny_encoder, tmp_path, monkeypatch, capsys):
    """mT5's classes refuse flash attention, which would otherwise shut the LLM out of it too."""
    encoder = load_encoder(tiny_encoder, attn_implementation="flash_attention_2")
    assert encoder.config._attn_implementation == "sdpa"
    assert "cannot use flash_attention_2" in capsys.readouterr().err
    name, settings = ENCODERS["m2m100"]
    folder, _ = make_folder(tmp_path / "encoder", name, settings, SAVED_AS[name])
    asked = []
    monkeypatch.setattr("mindmerger.model.towers._from_pretrained", lambda *given, **more: asked.append(given[4]))
    load_encoder(folder, attn_implementation="flash_attention_2")
    assert asked == ["flash_attention_2"]


def test_positions_behind_robertas_padding_are_not_usable():
    from transformers import BertConfig, GPT2Config, MT5Config, XLMRobertaConfig

    sizes = {"max_position_embeddings": 514, "pad_token_id": 1}
    assert max_positions(XLMRobertaConfig(**sizes)) == 512
    assert max_positions(BertConfig(**sizes)) == 514
    assert max_positions(GPT2Config(n_positions=64)) == 64
    assert max_positions(MT5Config()) is None


def test_unreadable_mapping_files_are_named(tmp_path, tiny_encoder, tiny_llm):
    model = MindMerger.from_models(tiny_encoder, tiny_llm)
    save_released(tmp_path / "whole.bin", model.mapping.state_dict())
    model.save_pretrained(str(tmp_path / "saved"))
    for name, data in (
        ("cut.bin", (tmp_path / "whole.bin").read_bytes()[:1000]),
        ("cut.safetensors", (tmp_path / "saved" / "mapping.safetensors").read_bytes()[:500]),
        ("empty.bin", b""),
        ("text.safetensors", b"hello"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelError, match=name):
            model.load_mapping(str(tmp_path / name))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "something.txt").write_text("x")
    with pytest.raises(ModelError, match="something.txt"):
        model.load_mapping(str(tmp_path / "folder"))
    with pytest.raises(ModelError, match="no mapping at"):
        model.load_mapping(str(tmp_path / "absent"))


def test_unusable_model_folders_are_named(tmp_path, tiny_encoder, tiny_llm):
    with pytest.raises(ModelError, match="no model folder /nowhere/llm"):
        MindMerger.from_models(tiny_encoder, "/nowhere/llm")
    with pytest.raises(ModelError, match="not a causal language model"):
        MindMerger.from_models(tiny_encoder, tiny_encoder)
    broken = tmp_path / "broken"
    make_folder(broken, *ENCODERS["m2m100"], "ForConditionalGeneration")
    weights = load_file(broken / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "encoder.layers.1.fc1" not in k}, broken / "model.safetensors")
    with pytest.raises(ModelError, match="unset.*fc1"):
        MindMerger.from_models(str(broken), tiny_llm)
    with pytest.raises(ModelError, match="fp16"):
        MindMerger.from_models(tiny_encoder, tiny_llm, dtype=torch.float16)


def test_config_of_a_newer_format_or_another_program_is_not_misread(tmp_path, tiny_encoder, tiny_llm):
    MindMerger.from_models(tiny_encoder, tiny_llm).save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert read_config(str(tmp_path / "mapping.safetensors")).mt_path == tiny_encoder
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(ModelError, match="99"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert read_config(str(tmp_path)) is None


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 6, 7, 20])
def test_cross_entropy_in_chunks_is_the_cross_entropy(monkeypatch, dtype, rows):
    """Loss and gradient, for whole and broken chunks of seven rows and for none at all."""
    monkeypatch.setattr(ChunkedCrossEntropy, "CHUNK", 7 * 50)
    torch.manual_seed(0)
    ours = (4 * torch.randn(rows, 50)).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    labels = torch.randint(0, 50, (rows,))
    loss = ChunkedCrossEntropy.apply(ours, labels)
    expected = torch.nn.functional.cross_entropy(theirs.float(), labels, reduction="sum")
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    assert loss.dtype == torch.float32 and ours.grad.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-8)


def test_the_gradient_of_the_logits_takes_their_place():
    """Beside them it was the largest tensor of a pass a second time."""
    logits = torch.randn(5, 11)
    leaf = logits.clone().requires_grad_()
    own = leaf * 1.0
    loss = ChunkedCrossEntropy.apply(own, torch.tensor([1, 0, 10, 4, 4]))
    (grad,) = torch.autograd.grad(loss, own, retain_graph=True)
    assert grad.data_ptr() == own.data_ptr()
    expected = torch.softmax(logits, 1)
    expected[torch.arange(5), torch.tensor([1, 0, 10, 4, 4])] -= 1
    assert torch.allclose(grad, expected, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # a second way back would start there
        torch.autograd.grad(loss, own)


# ---------------------------------------------------------------------------------------------------------------------
# Layout and place


def test_a_bridge_whose_mask_is_not_as_long_as_its_prefix_is_named(tiny_encoder, tiny_llm):
    """Rows would be laid out wrongly without a word."""
    model = MindMerger.from_models(tiny_encoder, tiny_llm)
    model.mapping.prefix_mask = lambda mask: torch.cat([mask, mask], dim=1)
    forward = model.mapping.forward
    model.mapping.forward = lambda states, mask: forward(states, mask)._replace(prefix_mask_BK=None)
    ones = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"bridge mindmerger: prefix_mask\(\) and forward\(\) differ"):
        model(encoder_input_ids=3 * ones, encoder_attention_mask=ones, target_ids=3 * ones, target_mask=ones)


def test_towers_can_be_read_straight_onto_their_device(monkeypatch, tiny_encoder, tiny_llm):
    """On a GPU the host would hold a copy of both models for each rank."""
    import transformers

    asked, real = [], transformers.PreTrainedModel.from_pretrained.__func__

    def note(cls, *args, **kwargs):
        asked.append(kwargs.get("device_map"))
        return real(cls, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(note))
    cpu = torch.device("cpu")
    for load, path in ((load_llm, tiny_llm), (load_encoder, tiny_encoder)):
        placed, plain = load(path, torch.float32, device=cpu).state_dict(), load(path, torch.float32).state_dict()
        assert placed.keys() == plain.keys() and all(torch.equal(placed[name], plain[name]) for name in plain)
    assert asked == [{"": cpu}, None, {"": cpu}, None]
